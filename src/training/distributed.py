"""The processes of a run: one, or those that `accelerate launch` (or torchrun) started, which share every batch.

All that a run does together goes through here: agreeing, waiting for each other, wrapping the policy for DDP, FSDP2 or DeepSpeed,
and putting weights and optimizer state that are spread over the processes together again.
"""

import contextlib
import copy
import re
import statistics
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from errors import UserError
from policy.adapters import adapters_of, is_adapted, put_adapters
from policy.factory import load_weights
from runtime import StopSignals, autocast, pick_device

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Distributed:
    """This process and its peers.

    Args:
        kind: how the weights are held: by "one" process, whole by each ("DDP"), or sharded ("FSDP", "DeepSpeed").
        accelerator: accelerate's Accelerator; None for one process.
        gloo_group: process group over the hosts; None for one process.

    Attributes:
        rank, size: which process this is, of how many.
        device: where it computes, once `use` was called.
    """

    def __init__(self, kind: str = "one", accelerator=None, gloo_group=None):
        self.kind = kind
        self.accelerator = accelerator
        self.gloo_group = gloo_group
        self.rank = 0 if accelerator is None else accelerator.process_index
        self.size = 1 if accelerator is None else accelerator.num_processes

    def use(self, device: str) -> torch.device:
        """The device of a `--device` flag, or of several processes the one that is this one's."""
        # accelerate has made this process' GPU the current one: "cuda" is that
        self.device = pick_device(device if self.accelerator is None else self.accelerator.device.type)
        return self.device

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.accelerator is not None and kind is None:
            with StopSignals():  # which come again when a job is cancelled
                self.barrier()  # for what the main process writes: of one that leaves with a signal's status a launcher kills the others
            self.accelerator.end_training()

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        return self.kind in ("FSDP", "DeepSpeed")

    def barrier(self) -> None:
        """Return when every process has come here."""
        if self.gloo_group is not None:
            dist.barrier(self.gloo_group)

    @contextlib.contextmanager
    def main_first(self):
        """Within this, the main process goes before the others: what it makes, they find."""
        if not self.is_main:
            self.barrier()
        yield
        if self.is_main:
            self.barrier()

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest of each number over the processes, which is the same in all of them."""
        if self.gloo_group is None:
            return list(numbers)
        largest = torch.tensor(numbers)
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.gloo_group)
        return largest.tolist()

    def mean(self, value: torch.Tensor) -> float:
        """The mean of a number over the processes."""
        return statistics.fmean(self.all_gather(value))

    def all_gather(self, value: torch.Tensor) -> list[float]:
        """A number as each process has it, by rank."""
        if self.gloo_group is None:
            return [value.item()]
        numbers = list(torch.zeros(self.size, dtype=torch.float64).unbind())
        dist.all_gather(numbers, value.detach().double().cpu(), group=self.gloo_group)
        return [number.item() for number in numbers]

    def local_value(self, numbers: list[float]) -> float:
        """This process' of what `every` gave; their mean where that was in another number of processes."""
        return numbers[self.rank] if len(numbers) == self.size else statistics.fmean(numbers)

    def check(self, config) -> None:
        """Raise what these processes cannot do."""

    def autocast(self, precision: str):
        """A context for calls of the model, in which it computes in `precision`."""
        return autocast(precision, self.device)

    def wrap(self, policy, optimizer, clip_norm: float | None, share: int, precision: str):
        """(model, optimizer) to train with: `model(batch)` is `policy.forward(batch)`, with gradients of the whole batch.

        Args:
            clip_norm: what gradients are clipped to.
            share: samples in one call of the model.
            precision: what it computes in.
        """
        if self.kind == "DDP":
            return self.accelerator.prepare_model(policy), optimizer
        if self.kind == "FSDP":
            try:
                model, optimizer = self.accelerator.prepare(policy, optimizer)
            except ValueError as error:
                raise UserError(
                    f"FSDP: {error}: have fsdp_transformer_layer_cls_to_wrap name layers of policy {policy.name}, or set "
                    "fsdp_auto_wrap_policy to NO_WRAP"
                ) from error
            return model, optimizer.optimizer
        return policy, optimizer

    def sync_gradients(self, model, last: bool):
        """A context for forward and backward of one part of a step's batch: gradients go between processes in the last."""
        return contextlib.nullcontext() if last or self.accelerator is None else self.accelerator.no_sync(model)

    def backward(self, model, loss) -> None:
        loss.backward()

    def optimizer_step(self, policy, optimizer, scaler, clip_norm: float | None) -> torch.Tensor:
        """Move the weights by their gradients, which are zero afterwards; the gradients' norm, before it was clipped."""
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), clip_norm or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def local_batch_size(self, batch_size: int, accumulation: int) -> int:
        """Samples of a step's batch that this process takes.

        Raises:
            UserError: the batch cannot be shared evenly.
        """
        parts = self.size * accumulation
        if batch_size % parts:
            raise UserError(
                f"--batch_size {batch_size} is the whole batch of a step, and {self.size} processes with "
                f"--grad_accumulation_steps {accumulation} share it evenly: pass a multiple of {parts}"
            )
        return batch_size // self.size

    def unsharded_copy(self, policy):
        """The policy as one process runs it: itself, or for one held in parts a copy in the main process (None in others)."""
        if not self.is_sharded:
            return policy
        if is_adapted(policy):
            raise UserError(f"adapters (--peft) do not go with {self.kind}: they are small, use DDP")
        return copy.deepcopy(policy) if self.is_main else None

    def weights(self, policy) -> dict:
        """The policy's state dict, or its adapters', whole; of one that is held in parts empty but in the main process."""
        weights = get_model_state_dict(policy, options=WHOLE) if self.is_sharded else policy.state_dict()
        return adapters_of(policy, weights) if is_adapted(policy) else weights

    def load_weights(self, policy, path: Path) -> None:
        """Load a file such as `weights` gives into the policy."""
        if is_adapted(policy):
            put_adapters(policy, load_file(path))
        elif self.is_sharded:
            set_model_state_dict(policy, load_file(path), options=WHOLE)
        else:
            load_weights(policy, path)

    def optimizer_state(self, policy, optimizer) -> dict:
        """The optimizer's state dict as of one process, parameters numbered; empty as `weights` is."""
        if not self.is_sharded:
            return optimizer.state_dict()
        named = get_optimizer_state_dict(policy, optimizer, options=WHOLE)
        if not self.is_main:
            return {}
        names = {name: i for i, name in enumerate(names_of(policy, optimizer))}
        groups = [{**group, "params": [names[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {names[name]: entry for name, entry in named["state"].items()}, "param_groups": groups}

    def load_optimizer_state(self, policy, optimizer, state: dict) -> None:
        """Load a state dict such as `optimizer_state` gives.

        Raises:
            ValueError, KeyError: it is another optimizer's.
        """
        if not self.is_sharded:
            optimizer.load_state_dict(state)
            return
        names = names_of(policy, optimizer)
        groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
        named = {"state": {names[i]: entry for i, entry in state["state"].items()}, "param_groups": groups}
        set_optimizer_state_dict(policy, optimizer, named, options=WHOLE)


def names_of(policy, optimizer) -> list[str]:
    """Names of an optimizer's parameters, in the order in which its state dict numbers them."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an error says that another process has gone."""
    if not dist.is_initialized() or re.search("invalid ?usage|out of memory", str(error), re.I):
        return False
    return isinstance(error, dist.DistError) or re.search("gloo|nccl|peer|Broken pipe", str(error), re.I) is not None
