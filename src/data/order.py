"""Which row of the table each sample of a run starts at: a function of (seed, sample), computed only for the samples asked for.

Sample p of a run is position p mod M of the order of epoch p // M. Up to LARGEST_LIST rows, an epoch's order is LeRobot's, as a list
that is kept in memory. The order of a larger dataset is a permutation by formula, so that memory does not grow with it.

M trainable rows, E episodes, n positions.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # episodes that --shuffle blocks reads at a time
LARGEST_LIST = 2**25  # rows: a list of 0.3 GB, made in a second
ROUNDS = 6  # of the formula


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


list_of_epoch = lru_cache(maxsize=3)(epoch_order)
list_of_weighted_epoch = lru_cache(maxsize=2)(weighted_order)


class TrainableRows:
    """The rows that a sample may start at, one episode after the other: all but the last ones of each episode.

    Args:
        starts, ends: (E,) int64 first row of each episode, and the row after its last.
        drop_n_last_frames: how many rows at the end of each are left out.
    """

    def __init__(self, starts: Tensor, ends: Tensor, drop_n_last_frames: int = 0):
        self.starts = starts
        self.counts = (ends - starts - drop_n_last_frames).clamp_min(0)  # (E,)
        self.bounds = self.counts.cumsum(0)  # (E,) position after the last of each episode

    def __len__(self) -> int:
        return int(self.bounds[-1]) if len(self.bounds) else 0

    def at(self, positions: Tensor) -> Tensor:
        """(n,) rows at (n,) positions in [0, M)."""
        episode = torch.searchsorted(self.bounds, positions, right=True)
        return self.starts[episode] + positions - (self.bounds - self.counts)[episode]


class Order:
    """The samples of a run.

    Args:
        rows: that they start at.
        seed: the order is a function of it.
        shuffle: full, or blocks (BLOCK episodes at a time).
        weights: relative share of each of several datasets in the samples; None for each row once an epoch.
        rows_per_dataset: trainable rows of each, above 0.
    """

    def __init__(
        self,
        rows: TrainableRows,
        seed: int,
        shuffle: str = "full",
        weights: list[float] | None = None,
        rows_per_dataset: list[int] | None = None,
    ):
        self.rows = rows
        self.seed = seed
        self.shuffle = shuffle
        self.weights = weights
        self.rows_per_dataset = rows_per_dataset
        self._blocks: tuple[int, Tensor, Tensor] | None = None  # of the epoch that was asked for last

    def rows_of(self, samples: Tensor) -> Tensor:
        """(n,) rows of (n,) int64 samples, counted from the run's beginning."""
        count = len(self.rows)
        epochs = samples // count
        positions = torch.empty_like(samples)
        for epoch in torch.unique(epochs).tolist():
            in_epoch = epochs == epoch
            positions[in_epoch] = self._positions(epoch, samples[in_epoch] % count)
        return self.rows.at(positions)

    def _positions(self, epoch: int, places: Tensor) -> Tensor:
        """(n,) positions in `rows` at (n,) places in an epoch."""
        if self.weights is not None:
            return self._weighted_positions(epoch, places)
        if self.shuffle == "blocks":
            return self._positions_by_blocks(epoch, places)
        return permuted(places, len(self.rows), self.seed, epoch)

    def _positions_by_blocks(self, epoch: int, places: Tensor) -> Tensor:
        """As of an order that reads BLOCK episodes at a time: random episodes, and random rows of these.

        A batch then holds samples of at most 2 * BLOCK episodes, and a streamed dataset is read nearly in one piece.
        """
        counts = self.rows.counts
        blocks_of_epoch = self._blocks
        if blocks_of_epoch is None or blocks_of_epoch[0] != epoch:
            episodes = list_of_epoch(len(counts), self.seed, epoch)
            blocks_of_epoch = self._blocks = (epoch, episodes, counts[episodes].cumsum(0))
        _, episodes, ends = blocks_of_epoch  # (E,) episodes in this order, and the place after the last row of each
        block_ends = torch.cat([ends[BLOCK - 1 :: BLOCK], ends[-1:]]).unique()
        block_starts = torch.cat([ends.new_zeros(1), block_ends])[:-1]
        blocks = torch.searchsorted(block_ends, places, right=True)
        positions = torch.empty_like(places)
        for block in torch.unique(blocks).tolist():
            chosen = blocks == block
            size = int(block_ends[block] - block_starts[block])
            block_seed = int(np.random.SeedSequence([self.seed, epoch, block, 0xB10C]).generate_state(1)[0])
            within = block_starts[block] + permuted(places[chosen] - block_starts[block], size, block_seed, epoch)
            place = torch.searchsorted(ends, within, right=True)  # (n,) of the episode in this order
            episode = episodes[place]
            offset = within - (ends[place] - counts[episode])
            positions[chosen] = self.rows.bounds[episode] - counts[episode] + offset
        return positions

    def _weighted_positions(self, epoch: int, places: Tensor) -> Tensor:
        total = len(self.rows)
        if total <= LARGEST_LIST:
            return list_of_weighted_epoch(tuple(self.rows_per_dataset), tuple(self.weights), self.seed, epoch)[places]
        # As weighted_order, but which of a dataset's samples comes where is drawn, not ascending.
        bounds = torch.tensor([round(total * share) for share in np.cumsum(self.weights) / sum(self.weights)])
        quotas = torch.diff(bounds, prepend=bounds.new_zeros(1))
        slots = permuted(places, total, self.seed, epoch)
        datasets = torch.searchsorted(bounds, slots, right=True)
        first_rows = torch.tensor([0, *self.rows_per_dataset]).cumsum(0)
        positions = torch.empty_like(places)
        for dataset in torch.unique(datasets).tolist():
            chosen = datasets == dataset
            count = self.rows_per_dataset[dataset]
            dataset_seed = int(np.random.SeedSequence([self.seed, dataset, 0xDA7A]).generate_state(1)[0])
            samples = epoch * quotas[dataset] + slots[chosen] - (bounds[dataset] - quotas[dataset])
            rows = torch.empty_like(samples)
            for shuffle in torch.unique(samples // count).tolist():
                of_shuffle = samples // count == shuffle
                rows[of_shuffle] = permuted(samples[of_shuffle] % count, count, dataset_seed, shuffle)
            positions[chosen] = first_rows[dataset] + rows
        return positions


def permuted(places: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """(n,) int64 where a permutation of [0, count) puts (n,) places; a function of (seed, epoch)."""
    if count <= LARGEST_LIST:
        return list_of_epoch(count, seed, epoch)[places]
    return permuted_by_formula(places, count, seed, epoch)


def permuted_by_formula(places: Tensor, count: int, seed: int, epoch: int) -> Tensor:
    """As `permuted`, without a list: a Feistel network over the numbers of an even number of bits, applied again to what falls
    outside of [0, count), which happens to at most three quarters of them at a time.

    Source: Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (2002).
    """
    half = np.uint64(max(1, (count - 1).bit_length() + 1) // 2)  # bits
    mask = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([seed, epoch, 0xFE15]).generate_state(ROUNDS, dtype=np.uint64)
    found = places.numpy().astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():
        value = found[outside]
        left = value >> half
        right = value & mask
        for key in keys:
            left, right = right, left ^ (mixed(right ^ key) & mask)
        found[outside] = (left << half) | right
        outside = found >= count
    return torch.from_numpy(found.astype(np.int64))


def mixed(value: np.ndarray) -> np.ndarray:
    """uint64 numbers with their bits mixed. Source: the finalizer of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
