"""The means that a log line holds: of the loss and of the policy's sub-losses, over micro-batches, steps and processes."""

import torch
from torch import Tensor

from training.distributed import Distributed


class LossMeans:
    """The loss and the sub-losses since the last log line. Sums are this process's; means are over all processes.

    Args:
        distributed: the processes of the run.
        saved: what `state` returned, possibly among other entries.
    """

    def __init__(self, distributed: Distributed, saved: dict):
        self.distributed = distributed
        loss_sum = distributed.local_value(saved["loss_sums"])
        self.loss_sum = torch.tensor(loss_sum, device=distributed.device)  # stays on the device until it is read
        self.loss_count = saved["loss_count"]
        self.sub_losses = SubLossMeans(totals_of_rank(saved.get("sub_loss_sums", []), distributed))

    def add(self, loss: Tensor, sub_losses: list[dict]) -> None:
        """Take in a step: its loss, and the sub-losses of each micro-batch."""
        self.loss_sum = self.loss_sum + loss
        self.loss_count += 1
        for numbers in sub_losses:
            self.sub_losses.add(numbers)

    def loss(self) -> float:
        return self.distributed.mean(self.loss_sum) / self.loss_count

    def mean_sub_losses(self) -> dict[str, float]:
        return mean_of(self.distributed.all_gather_object(self.sub_losses.totals()))

    def state(self) -> dict:
        """What a checkpoint records, of all processes by rank."""
        return {
            "loss_sums": self.distributed.all_gather(self.loss_sum),
            "loss_count": self.loss_count,
            "sub_loss_sums": self.distributed.all_gather_object(self.sub_losses.totals()),
        }

    def clear(self) -> None:
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.loss_count = 0
        self.sub_losses.clear()


class SubLossMeans:
    """Running sums of named numbers of one process. Tensors stay on the device until they are read.

    The mean of a name is over the micro-batches that report it.

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
    """The totals of all processes, added up."""
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
