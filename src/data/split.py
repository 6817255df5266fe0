"""Which episodes a run trains on and which it holds out.

E selected episodes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from data.episodes import parse_episodes
from data.source import Source
from errors import UserError
from runtime import VALIDATE


@dataclass
class Split:
    """Ascending positions in `Source.episodes`, int64: (E_train,) to train on and (E - E_train,) held out."""

    train: Tensor
    held_out: Tensor


def split_episodes(source: Source, config: TrainConfig, state=None) -> Split:
    """Hold out what --val_episodes or --val_fraction ask for. A function of the settings and of `state`.

    Args:
        state: the state of the checkpoint that the run resumes from. The episodes that it holds out stay held out
            while --val_fraction is the same.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = len(source.episodes)
    flag = ""
    held_out: set[int] = set()
    if config.val_episodes:
        flag = f"--val_episodes {config.val_episodes}"
        wanted = set(parse_episodes(config.val_episodes, source.episodes, "--val_episodes"))
        held_out = {i for i, episode in enumerate(source.episodes) if episode in wanted}
    elif config.val_fraction:
        flag = f"--val_fraction {config.val_fraction}"
        held_out = held_out_before(source, config, state) or drawn(source, config)
        if not held_out:
            raise UserError(f"{flag}: each dataset has one episode, so that none can be held out. Leave the flag out")
    if held_out and len(held_out) == count:
        raise UserError(f"{flag} holds out all {count} episodes: leave some to train on")
    train = sorted(set(range(count)) - held_out)
    return Split(torch.tensor(train, dtype=torch.int64), torch.tensor(sorted(held_out), dtype=torch.int64))


def drawn(source: Source, config: TrainConfig) -> set[int]:
    """Positions of the episodes that --val_fraction holds out: at least one of a dataset, unless that is all of several."""
    counts = source.episodes_per_dataset or [len(source.episodes)]
    held_out = set()
    first = 0
    for dataset, count in enumerate(counts):
        address = [config.seed, VALIDATE, dataset] if len(counts) > 1 else [config.seed, VALIDATE]
        order = first + np.random.default_rng(address).permutation(count)
        wanted = max(1, round(config.val_fraction * count))
        if len(counts) > 1:
            wanted = min(wanted, count - 1)  # each has something to train on
        held_out.update(order[:wanted].tolist())
        first += count
    return held_out


def held_out_before(source: Source, config: TrainConfig, state) -> set[int]:
    """Positions of the episodes that --val_fraction held out before the run was resumed.

    A new draw from a dataset that has grown since would hold out episodes that the policy was trained on.
    """
    data = state.trainer_state.get("data") if state else None
    if not data or config.val_fraction != state.train_config["val_fraction"]:
        return set()
    return {i for i, episode in enumerate(source.episode_ids) if episode in data["held_out"]}
