"""--minutes: how many steps fit in the time, measured before the run begins and fixed then, schedule included."""

import copy
import statistics
import time
from dataclasses import replace

import torch

from config import TrainConfig
from optim import Average, make_optimizer, make_schedule


def fix_steps(run) -> TrainConfig:
    """The run's settings with --steps such that they take --minutes; the run itself stands where it stood.

    Trains on its first batch for 3 % of the minutes, 20 seconds at most, and takes all of that back.
    """
    batch, config, policy = run.loader.batch_of(run.loader.rows_at(run.samples_seen)), run.config, run.policy
    batch["sample"] = torch.arange(config.batch_size)
    weights = copy.deepcopy(policy.state_dict())
    before = run.loss_sum, run.loss_count, run.bad_step, run.step, run.samples_seen
    policy.train()
    seconds = seconds_of(lambda: run.train_step(batch), run.device, at_most=min(20.0, 1.8 * config.minutes))
    policy.load_state_dict(weights)
    run.loss_sum, run.loss_count, run.bad_step, run.step, run.samples_seen = before
    config = replace(config, steps=max(1, round(60 * config.minutes / seconds)))
    run.average = Average(policy, config.ema_decay)
    run.optimizer, run.clip_norm = make_optimizer(policy, config)
    run.set_lr = make_schedule(policy, run.optimizer, config)
    run.report.steps = config.steps
    run.report.say(f"{config.minutes:g} minutes are {config.steps:,} steps of {seconds:.3f} s")
    return config


def seconds_of(call, device: torch.device, at_most: float) -> float:
    """How long a call takes: the median of those within `at_most` seconds, the first two left out."""
    times, end = [], time.perf_counter() + at_most
    while len(times) < 3 or time.perf_counter() < end:
        begun = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # waits for the device
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])
