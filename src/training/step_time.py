"""How many steps take --minutes, by the time that a step takes here."""

import contextlib
import copy
import gc
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

import runtime
from config import TrainConfig
from data.source import Source
from training.distributed import Distributed
from training.feature_store import can_store_features, encode
from training.learner import build_learner
from training.memory import memory_remedies
from training.parts import build_processors, build_training_policy, open_loader
from training.policy_plan import PolicyPlan


def fix_steps(config: TrainConfig, distributed: Distributed, source: Source, episodes: Tensor, policy: PolicyPlan):
    """The settings with --steps such that they take --minutes, and a line that says so."""
    remedies = memory_remedies(config, policy.config, resumed=False, kind=distributed.kind, processes=distributed.size)
    with runtime.enough_memory(config.batch_size, remedies):
        seconds = seconds_of_step(config, distributed, source, episodes, policy)
    gc.collect()
    distributed.free_memory()
    steps = max(1, round(60 * config.minutes / seconds))
    return replace(config, steps=steps), f"{config.minutes:g} minutes are {steps:,} steps of {seconds:.3f} s"


def seconds_of_step(
    config: TrainConfig, distributed: Distributed, source: Source, episodes: Tensor, policy: PolicyPlan
) -> float:
    """How long an optimizer step of this run takes, measured on its first batch for 3 % of --minutes, 20 seconds at most.

    The policy that is trained here is thrown away: the run builds its own from the same seed.
    """
    runtime.seed_all(config.seed, runtime.INIT)
    policy = copy.deepcopy(policy)
    model = build_training_policy(policy, source.meta).train()
    preprocess, _ = build_processors(policy, source.meta)
    learner = build_learner(config, distributed, model, preprocess, source.meta)
    one_batch = replace(config, frame_cache="off", quiet=True)  # no frame store for a single batch
    loader = open_loader(one_batch, source, episodes, model, preprocess, 0, distributed, say=lambda line: None)
    with contextlib.closing(loader):
        batch = loader.batch_at(0)
    if can_store_features(model, config, source, distributed):
        features = encode(model, preprocess, batch, source.meta, distributed.device)
        if features:  # the run reads them from its store
            batch = {key: value for key, value in batch.items() if key not in source.meta.camera_keys} | features
    limit = min(20.0, 1.8 * config.minutes)
    return seconds_of(lambda: learner.step(batch, 0), distributed, at_most=limit)


def seconds_of(call, distributed: Distributed, at_most: float) -> float:
    """How long a call takes: the median of those within `at_most` seconds without the first two, of the slowest process."""
    times = []
    end = time.perf_counter() + at_most
    enough = 0
    while not enough:
        begun = time.perf_counter()
        call()
        if distributed.device.type == "cuda":
            torch.cuda.synchronize(distributed.device)  # waits for the device
        times.append(time.perf_counter() - begun)
        (enough,) = distributed.all_reduce_max(len(times) >= 3 and time.perf_counter() > end)
    (nanoseconds,) = distributed.all_reduce_max(round(1e9 * statistics.median(times[2:])))
    return nanoseconds / 1e9
