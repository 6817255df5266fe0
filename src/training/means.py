"""Means of the numbers that a policy reports beside its loss, over micro-batches, steps and processes, as the loss is one."""

from torch import Tensor

from training.distributed import Distributed


class SubLossMeans:
    """Running sums of named numbers of one process. Tensors stay on the device until they are read.

    A name that only some micro-batches report counts in those alone.

    Args:
        totals: {name: [sum, count]} so far, as `totals` returns it.
    """

    def __init__(self, totals: dict[str, list[float]]):
        self.sums: dict[str, float | Tensor] = {name: total for name, (total, _) in totals.items()}
        self.counts: dict[str, float] = {name: count for name, (_, count) in totals.items()}

    def add(self, numbers: dict[str, float | Tensor]) -> None:
        """Take in the numbers of one micro-batch."""
        for name, number in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + number
            self.counts[name] = self.counts.get(name, 0) + 1

    def totals(self) -> dict[str, list[float]]:
        """{name: [sum, count]}. Waits for the device."""
        return {name: [float(total), self.counts[name]] for name, total in self.sums.items()}

    def clear(self) -> None:
        self.sums = {}
        self.counts = {}


def mean_of(totals_by_rank: list[dict[str, list[float]]]) -> dict[str, float]:
    """The mean of each name over all processes that report it."""
    return {name: total / count for name, (total, count) in merged(totals_by_rank).items()}


def totals_of_rank(totals_by_rank: list[dict[str, list[float]]], distributed: Distributed) -> dict[str, list[float]]:
    """This process's totals among those of a checkpoint; an equal share if that was of another number of processes."""
    if len(totals_by_rank) == distributed.size:
        return totals_by_rank[distributed.rank]
    size = distributed.size
    return {name: [total / size, count / size] for name, (total, count) in merged(totals_by_rank).items()}


def merged(totals_by_rank: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    together = {}
    for totals in totals_by_rank:
        for name, (total, count) in totals.items():
            total_before, count_before = together.get(name, (0.0, 0))
            together[name] = [total_before + total, count_before + count]
    return together


def scalars(sub_losses: dict | None, weight: float | Tensor = 1.0) -> dict[str, float | Tensor]:
    """The numbers among a policy's sub-losses, times `weight`: Python's, and tensors without dimensions, as float32."""
    numbers = {}
    for name, value in (sub_losses or {}).items():
        if isinstance(value, (int, float)):
            numbers[name] = value * weight
        elif isinstance(value, Tensor) and value.ndim == 0:
            numbers[name] = value.detach().float() * weight
    return numbers
