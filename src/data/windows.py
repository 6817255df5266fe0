"""Delta windows: which rows of the table each sample of a batch looks at. Pure functions of integers.

B samples, T deltas, E episodes, N rows.
"""

import numpy as np
import torch
from torch import Tensor


def window_rows(rows: Tensor, deltas: Tensor, starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Rows that `rows + deltas` reach, clamped to each sample's episode, and where the clamp took hold.

    Args:
        rows: (B,) int64 rows of the samples.
        deltas: (T,) int64 offsets in frames, negative for the past.
        starts, ends: (B,) int64 first row of each sample's episode, and the row after its last.

    Returns:
        (B, T) int64 rows, and (B, T) bool, true where the window leaves the episode (LeRobot's `<key>_is_pad`).

    Source: LeRobot 0.6.1 `DatasetReader._get_query_indices`, one sample at a time there.
    """
    wanted = rows[:, None] + deltas[None, :]  # (B, T)
    first, last = starts[:, None], ends[:, None] - 1  # (B, 1)
    return wanted.clamp(first, last), (wanted < first) | (wanted > last)


def trainable_rows(starts: Tensor, ends: Tensor, drop_n_last_frames: int = 0) -> Tensor:
    """(M,) int64 rows that a sample may start at: all but the last `drop_n_last_frames` of each episode."""
    spans = [
        torch.arange(start, end - drop_n_last_frames)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if end - drop_n_last_frames > start
    ]
    return torch.cat(spans) if spans else torch.empty(0, dtype=torch.int64)


def epoch_order(count: int, seed: int, epoch: int) -> Tensor:
    """(count,) int64 permutation that is a function of (seed, epoch) alone.

    Source: LeRobot 0.6.1 `EpisodeAwareSampler`, so that both walk a dataset in the same order.
    """
    entropy = np.random.SeedSequence([seed, epoch]).generate_state(1, dtype=np.uint64)[0]
    return torch.randperm(count, generator=torch.Generator().manual_seed(int(entropy)))


def weighted_order(counts: list[int], weights: list[float], seed: int, epoch: int) -> Tensor:
    """(M,) int64 positions of one epoch over several datasets that lie one after the other, sampled by weight.

    An epoch has as many samples as there are rows, M = sum(counts), shared out by weight. Each dataset walks through
    shuffles of its own, one after the other and on through the epochs, so that its rows come up equally often.

    Args:
        counts: trainable rows of each dataset.
        weights: relative share of each dataset, above 0.
        seed, epoch: the order is a function of these.
    """
    total = sum(counts)
    ends = [round(total * share) for share in np.cumsum(weights) / sum(weights)]
    quotas = np.diff([0, *ends]).tolist()
    order, offset = torch.empty(total, dtype=torch.int64), 0
    slots = epoch_order(total, seed, epoch).split(quotas)  # which of the epoch's samples are whose
    for part, (count, quota) in enumerate(zip(counts, quotas, strict=True)):
        drawn = torch.arange(epoch * quota, (epoch + 1) * quota)  # of all that this dataset ever gives
        own_seed = int(np.random.SeedSequence([seed, part, 0xDA7A]).generate_state(1)[0])
        for lap in torch.unique(drawn // max(count, 1)).tolist():
            mine = drawn // count == lap
            order[slots[part].sort().values[mine]] = offset + epoch_order(count, own_seed, lap)[drawn[mine] % count]
        offset += count
    return order
