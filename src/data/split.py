"""Which episodes a run trains on and which it holds out."""

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from data.source import parse_episodes
from errors import UserError
from runtime import VALIDATE


def split(source, config: TrainConfig, state=None) -> tuple[Tensor, Tensor]:
    """Positions in `source.episodes` to train on and to hold out, ascending; a function of the settings and of `state`.

    Args:
        state: of the checkpoint that a run goes on from, whose choice is kept where its settings are.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = len(source.episodes)
    chosen: set[int] = set()
    if config.val_episodes:
        wanted = set(parse_episodes(config.val_episodes, source.meta.total_episodes, "--val_episodes"))
        chosen = {i for i, episode in enumerate(source.episodes) if episode in wanted}
    elif config.val_fraction:
        order = np.random.default_rng([config.seed, VALIDATE]).permutation(count)
        drawn = set(order[: max(1, round(config.val_fraction * count))].tolist())
        chosen = held_out_before(source, config, state) or drawn
    if chosen and len(chosen) == count:
        asked = (
            f"--val_episodes {config.val_episodes}" if config.val_episodes else f"--val_fraction {config.val_fraction}"
        )
        raise UserError(f"{asked} holds out all {count} episodes: leave some to train on")
    kept = [i for i in range(count) if i not in chosen]
    return torch.tensor(kept, dtype=torch.int64), torch.tensor(sorted(chosen), dtype=torch.int64)


def held_out_before(source, config: TrainConfig, state) -> set[int]:
    """Positions of what the resumed run's --val_fraction held out: another draw, from a dataset that grew, would call
    unseen what was trained on."""
    was = state and state.trainer_state.get("data")
    if not was or config.val_fraction != state.train_config["val_fraction"]:
        return set()
    return {i for i, place in enumerate(source.places) if place in was["held_out"]}
