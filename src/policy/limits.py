"""Refuse a policy that is too large to build before it takes memory: a mistyped size, or a hostile file."""

import os
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from errors import UserError
from trust import OTHER_COPY

MOST_TENSORS = 50_000  # the largest policies of LeRobot make a few thousand while they are built
# Bytes that a policy may make per byte of its weights' file: 4-bit weights as float32, and what it uses only once.
SLACK = 16
SMALL = 2**30  # bytes that any policy may make on top
# Bytes that no policy of a single machine has: the limit on the device "meta", where tensors take no memory.
LARGE = 2**40
MAKERS = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.linspace, torch.logspace,
    torch.eye,
}  # fmt: skip


class SizeLimit(TorchFunctionMode):
    """Within this context, refuse to make a tensor if it would take all tensors together above a limit.

    Args:
        what: what is built, to begin the message.
        weights: file that it is built for. Without one, as for new weights and for shards, a policy may take twice the
            machine's memory: some are built with parts that are replaced at once.

    Raises:
        UserError: the limit is passed.
    """

    def __init__(self, what: str, weights: Path | None):
        super().__init__()
        self.what = what
        self.weights = None
        self.limit = LARGE if torch.get_default_device().type == "meta" else 2 * physical_memory()
        if weights is not None and os.path.isfile(weights):
            self.weights = weights
            self.limit = SLACK * weights.stat().st_size + SMALL
        self.count = 0
        self.bytes = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in MAKERS:
            self.count += 1
            self.bytes += self.bytes_of(func, args, kwargs)
            if self.bytes > self.limit or self.count > MOST_TENSORS:
                self.refuse()
        return func(*args, **kwargs)

    def bytes_of(self, func, args, kwargs) -> int:
        """Bytes of the tensor that a call would make, measured on the device "meta", where tensors take no memory."""
        try:
            tensor = func(*args, **{**kwargs, "device": "meta", "pin_memory": False})
        except (RuntimeError, OverflowError, TypeError) as error:
            if "verflow" in str(error):  # the size is no 64-bit integer
                self.refuse()
            raise
        return tensor.nbytes

    def refuse(self):
        if self.weights is None:
            raise UserError(
                f"{self.what} does not fit in the {physical_memory() / 2**30:.3g} GB of memory of this machine. "
                "Pass smaller sizes with --policy_args"
            )
        raise UserError(
            f"{self.what} is refused: expected a policy of the size of {self.weights}, got sizes in config.json that make "
            f"a far larger one. {OTHER_COPY}"
        )


def physical_memory() -> int:
    """Bytes of the machine's memory; a very large number where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return 2**63
