"""--minutes: how many steps fit in the time, measured before the run begins and fixed then, schedule included."""

import copy
import statistics
import time
from dataclasses import replace

import torch

from config import TrainConfig
from world import World


def fix_steps(run) -> TrainConfig:
    """The run's settings with --steps such that they take --minutes; the run itself stands where it stood.

    Trains on its first batch for 3 % of the minutes, 20 seconds at most, and takes all of that back.
    """
    batch, config, policy = run.loader.batch_at(run.samples_seen), run.config, run.policy
    weights = copy.deepcopy(policy.state_dict())
    policy.train()
    seconds = seconds_of(lambda: run.learner.step(batch, 0), run.world, at_most=min(20.0, 1.8 * config.minutes))
    policy.load_state_dict(weights)
    config = replace(config, steps=max(1, round(60 * config.minutes / seconds)))
    run.learner.start_over(config)
    run.report.set_steps(config.steps)
    run.report.say(f"{config.minutes:g} minutes are {config.steps:,} steps of {seconds:.3f} s")
    return config


def seconds_of(call, world: World, at_most: float) -> float:
    """How long a call takes: the median of those within `at_most` seconds, the first two left out; of the slowest process."""
    times, end, enough = [], time.perf_counter() + at_most, 0
    while not enough:
        begun = time.perf_counter()
        call()
        if world.device.type == "cuda":
            torch.cuda.synchronize(world.device)  # waits for the device
        times.append(time.perf_counter() - begun)
        (enough,) = world.agree(len(times) >= 3 and time.perf_counter() > end)
    return world.agree(round(1e9 * statistics.median(times[2:])))[0] / 1e9
