"""Delta windows: which rows of the table each sample of a batch reads, and in which order. Pure functions of integers.

B samples, T deltas, E episodes, M rows that a sample may start at.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # episodes that --shuffle blocks reads at a time


def window_rows(rows: Tensor, deltas: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that `rows + deltas` reach, clamped to each sample's episode, and which of them were clamped.

    Args:
        rows: (B,) int64 rows of the samples.
        deltas: (T,) int64 offsets in frames, negative for the past.
        starts: (B,) int64 first row of each sample's episode.
        ends: (B,) int64 row after its last.

    Returns:
        (B, T) int64 rows, and (B, T) bool, true where the window leaves the episode (LeRobot's `<key>_is_pad`).

    Source: LeRobot 0.6.1 `DatasetReader._get_query_indices`, one sample at a time there.
    """
    wanted = rows[:, None] + deltas[None, :]  # (B, T)
    first = starts[:, None]  # (B, 1)
    last = ends[:, None] - 1
    return wanted.clamp(first, last), (wanted < first) | (wanted > last)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """(count,) int64 permutation, a function of (seed, epoch).

    Source: LeRobot 0.6.1 `EpisodeAwareSampler`, so that both read a dataset in the same order.
    """
    entropy = np.random.SeedSequence([seed, epoch]).generate_state(1, dtype=np.uint64)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(entropy)))


def weighted_order(counts: Sequence[int], weights: Sequence[float], seed: int, epoch: int) -> Tensor:
    """(M,) int64 positions of one epoch over several datasets, one after the other in the rows, sampled by weight.

    An epoch has as many samples as there are rows, M = sum(counts), divided by weight. Each dataset is read in shuffles of
    its own, one after the other and across epochs, so that its rows are read equally often.

    Args:
        counts: trainable rows of each dataset, above 0.
        weights: relative share of each dataset in the samples, above 0.
        seed, epoch: the order is a function of these.
    """
    total = sum(counts)
    bounds = [round(total * share) for share in np.cumsum(weights) / sum(weights)]
    quotas = np.diff([0, *bounds]).tolist()  # each dataset's number of samples in an epoch
    slots = epoch_order(total, seed, epoch).split(quotas)  # and which of the epoch's samples they are
    order = torch.empty(total, dtype=torch.int64)
    offset = 0
    for dataset, (count, quota) in enumerate(zip(counts, quotas, strict=True)):
        dataset_seed = int(np.random.SeedSequence([seed, dataset, 0xDA7A]).generate_state(1)[0])
        dataset_slots = slots[dataset].sort().values  # (quota,)
        # Sample n of a dataset, counted over all epochs, is row n % count of its shuffle n // count.
        samples = torch.arange(epoch * quota, (epoch + 1) * quota)  # (quota,)
        shuffles = samples // count
        for shuffle in torch.unique(shuffles).tolist():
            chosen = shuffles == shuffle
            rows = epoch_order(count, dataset_seed, shuffle)[samples[chosen] % count]
            order[dataset_slots[chosen]] = offset + rows
        offset += count
    return order
