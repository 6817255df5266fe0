"""Gradient checkpointing that leaves batch norms as they would be without it."""

import contextlib

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, *inputs: Tensor) -> Tensor:
    """module(*inputs), whose activations are computed a second time in the backward pass instead of being kept.

    The second time, batch norms do not update their running statistics. Under torch.compile they do: it supports no
    context in torch's `checkpoint`.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    if not norms or is_compiling():
        return checkpoint(module, *inputs, use_reentrant=False)
    return checkpoint(
        module,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), frozen_statistics(norms)),
    )


@contextlib.contextmanager
def frozen_statistics(norms: list[_BatchNorm]):
    """Within this context, the batch norms keep their running statistics and their counts of batches."""
    momenta = [norm.momentum for norm in norms]
    counts = [norm.num_batches_tracked.clone() for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:  # torch leaves the recomputation by an exception once it has all that it needs
        for norm, momentum, count in zip(norms, momenta, counts, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)
