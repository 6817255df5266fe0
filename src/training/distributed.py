"""The processes of a run: one, or those that `accelerate launch` (or torchrun) started, which share every batch.

All that the processes do together goes through here: reductions, barriers, wrapping the policy for DDP or FSDP2 (DeepSpeed is
in deepspeed_zero.py), gathering weights and optimizer state that are sharded, and noticing that a process is gone.
"""

import contextlib
import copy
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from errors import UserError
from policy.adapters import adapter_state_dict, has_adapters, load_adapter_state_dict, with_full_names
from policy.weights import load_tensors
from runtime import StopSignals, autocast, pick_device
from training.optimizers import MOMENTS, load_state

UNSHARDED = StateDictOptions(full_state_dict=True, cpu_offload=True)
UNSHARDED_SOME = StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)

LARGEST_STEP = 2**53  # beyond it, floats do not count

PROBE_TAG = 0x10057  # of messages that nobody sends
PROBE_SECONDS = 2  # for the system to report a connection as closed


class LostPeerError(RuntimeError):
    """Another process of this run has ended, or its connection is closed."""


class Distributed:
    """This process and its peers.

    Args:
        kind: how the weights are held: by "one" process, all of them by each process ("DDP"), or sharded ("FSDP", "DeepSpeed").
        accelerator: accelerate's Accelerator; None for one process.
        gloo_group: process group of the hosts' CPUs; None for one process.

    Attributes:
        rank, size: which process this is, of how many.
        device: where this process computes, once `use` was called.
    """

    def __init__(self, kind: str = "one", accelerator=None, gloo_group=None):
        self.kind = kind
        self.accelerator = accelerator
        self.gloo_group = gloo_group
        self.rank = 0
        self.size = 1
        if accelerator is not None:
            self.rank = accelerator.process_index
            self.size = accelerator.num_processes

    def use(self, device: str) -> torch.device:
        """Pick the device to compute on: that of the `--device` flag, or this process's own where there are several."""
        if self.accelerator is not None:
            device = self.accelerator.device.type  # accelerate has made this process's GPU the current one
        self.device = pick_device(device)
        return self.device

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.accelerator is None or kind is not None:
            return
        # A launcher kills the other processes once one has left with a signal's status. So nobody leaves before the main
        # process has written, whatever signals arrive again while a job is cancelled.
        with StopSignals():
            self.barrier()
        self.accelerator.end_training()

    @property
    def is_main(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the weights or of the optimizer's state."""
        return self.kind in ("FSDP", "DeepSpeed")

    def check(self, config) -> None:
        """Raise a UserError for settings that this kind of processes does not support."""
        if not self.is_sharded:
            return
        if config.weights_dtype == "bf16":
            raise UserError(f"{self.kind} does not support --weights_dtype bf16. Leave it out, or launch with DDP")
        if config.optimizer != "auto":
            raise UserError(
                f"{self.kind} does not support --optimizer {config.optimizer}: it shards the optimizer's state instead. "
                "Leave the flag out, or launch with DDP"
            )

    # Communication between the hosts. It goes through gloo, so that no GPU has to wait for it.

    def barrier(self) -> None:
        """Return once every process has arrived here."""
        if self.gloo_group is not None:
            with self.detect_lost_peer():
                dist.barrier(self.gloo_group)

    @contextlib.contextmanager
    def main_first(self):
        """Within this, the main process runs before the others: they find what it downloads or writes.

        Raises:
            UserError: in every process, the main one's.
        """
        if not self.is_main:
            self._raise_error_of_main(None)
        try:
            yield
        except UserError as error:
            if self.is_main:
                self._raise_error_of_main(error)
            raise
        if self.is_main:
            self._raise_error_of_main(None)

    def on_main(self, call, for_others=lambda result: None):
        """Call `call` in the main process only: it gets the result, the others get `for_others(result)`, pickled.

        Raises:
            UserError: in every process, that of the call.
        """
        result = None
        error = None
        if self.is_main:
            try:
                result = call()
            except UserError as raised:
                error = raised
        self._raise_error_of_main(error)
        if self.gloo_group is None:
            return result
        if self.is_main:
            self.broadcast(for_others(result))
            return result
        return self.broadcast(None)

    def _raise_error_of_main(self, error: UserError | None) -> None:
        """Raise the UserError that the main process has met, if any, in every process."""
        text = self.broadcast(None if error is None else str(error))
        if error is not None:
            raise error
        if text is not None:
            raise UserError(*text.split("\n"))

    def broadcast(self, value):
        """What the main process passes, in every process."""
        if self.gloo_group is None:
            return value
        values = [value]
        with self.detect_lost_peer():
            dist.broadcast_object_list(values, src=0, group=self.gloo_group)
        return values[0]

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The maximum of each number over the processes."""
        if self.gloo_group is None:
            return list(numbers)
        largest = torch.tensor(numbers)
        with self.detect_lost_peer():
            dist.all_reduce(largest, dist.ReduceOp.MAX, self.gloo_group)
        return largest.tolist()

    def all_gather(self, value: torch.Tensor) -> list[float]:
        """The number that each process has, by rank."""
        if self.gloo_group is None:
            return [value.item()]
        numbers = list(torch.zeros(self.size, dtype=torch.float64).unbind())
        with self.detect_lost_peer():
            dist.all_gather(numbers, value.detach().double().cpu(), group=self.gloo_group)
        return [number.item() for number in numbers]

    def all_gather_object(self, value) -> list:
        """What each process passes, by rank."""
        if self.gloo_group is None:
            return [value]
        values = [None] * self.size
        with self.detect_lost_peer():
            dist.all_gather_object(values, value, group=self.gloo_group)
        return values

    def mean(self, value: torch.Tensor) -> float:
        """The mean of a number over the processes."""
        return statistics.fmean(self.all_gather(value))

    def local_value(self, numbers: list[float]) -> float:
        """This process's entry of what `all_gather` returned; the mean if that was in another number of processes."""
        if len(numbers) != self.size:
            return statistics.fmean(numbers)
        return numbers[self.rank]

    @contextlib.contextmanager
    def detect_lost_peer(self):
        """Within this, an error is a LostPeerError if another process is gone; every other error stays what it is.

        Raises:
            LostPeerError: with the whole message of the error.
        """
        try:
            yield
        except RuntimeError as error:
            # gloo raises a bare RuntimeError and NCCL a DistError. So do our own bugs and a wrong setup: only the connections
            # show whether a process is gone.
            may_be_lost = type(error) is RuntimeError or isinstance(error, dist.DistError)
            lost = self.lost_peers() if may_be_lost else []
            if not lost:
                raise
            names = ", ".join(str(rank) for rank in lost)
            raise LostPeerError(f"process {self.rank} of this run has lost process {names}: {error}") from error

    def lost_peers(self) -> list[int]:
        """Ranks of the processes whose connection to this one is closed.

        When a process ends, the system closes all its connections. gloo refuses to receive over a closed one; over an open
        one the receive stays pending and disturbs no other message.
        """
        lost = []
        peers = [rank for rank in range(self.size) if rank != self.rank]
        deadline = time.monotonic() + PROBE_SECONDS
        while peers and not lost and time.monotonic() < deadline:
            time.sleep(0.05)
            for rank in peers:
                try:
                    dist.irecv(torch.zeros(1), rank, group=self.gloo_group, tag=PROBE_TAG)
                except RuntimeError:
                    lost.append(rank)
        return lost

    # One training step.

    def local_batch_size(self, batch_size: int, accumulation: int) -> int:
        """Samples of a step's batch that this process takes.

        Raises:
            UserError: the batch cannot be split evenly.
        """
        micro_batches = self.size * accumulation
        if batch_size % micro_batches:
            raise UserError(
                f"--batch_size is the whole batch of a step, split evenly by --grad_accumulation_steps ({accumulation}) and "
                f"processes ({self.size}): expected a multiple of {micro_batches}, got {batch_size}. "
                f"Pass --batch_size {max(1, round(batch_size / micro_batches)) * micro_batches}"
            )
        return batch_size // self.size

    def autocast(self, precision: str):
        """A context for calls of the model, in which it computes in `precision`."""
        return autocast(precision, self.device)

    def wrap(self, policy, optimizer, clip_norm: float | None, micro_batch_size: int, precision: str):
        """(model, optimizer) to train with: `model(batch)` is `policy.forward(batch)`, with gradients of the whole batch.

        Args:
            clip_norm: gradients are clipped to this norm.
            micro_batch_size: samples in one call of the model.
            precision: what the model computes in.

        Raises:
            UserError: FSDP's settings do not fit the policy.
        """
        if self.kind == "DDP":
            return self.accelerator.prepare_model(policy), optimizer
        if self.kind == "FSDP":
            try:
                model, optimizer = self.accelerator.prepare(policy, optimizer)
            except ValueError as error:
                raise UserError(
                    f"FSDP: {error}. Set fsdp_transformer_layer_cls_to_wrap to layer classes of policy {policy.name}, or "
                    "fsdp_auto_wrap_policy to NO_WRAP, in the file that you pass to accelerate launch --config_file"
                ) from error
            return model, optimizer.optimizer
        return policy, optimizer

    def sync_gradients(self, model, last: bool):
        """A context for forward and backward of one micro-batch: gradients are synchronized in the last one of a step."""
        if last or self.accelerator is None:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def backward(self, model, loss) -> None:
        loss.backward()

    def optimizer_step(self, policy, optimizer, scaler, clip_norm: float | None) -> torch.Tensor:
        """Update the weights and zero their gradients; returns the gradients' norm before clipping."""
        scaler.unscale_(optimizer)
        norm = clip_gradients(policy, clip_norm or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if isinstance(norm, DTensor):
            return norm.full_tensor()
        return norm

    def free_memory(self) -> None:
        """Let go of models that were wrapped before, which accelerate keeps."""
        if self.accelerator is not None:
            self.accelerator.free_memory()

    # State as one process has it, for checkpoints. When sharded, all processes gather it and only the main one keeps it.

    def unsharded_copy(self, policy):
        """The policy as one process runs it: itself, or if sharded a copy in the main process and None in the others.

        Raises:
            UserError: the policy has adapters, which DeepSpeed does not train here.
        """
        if not self.is_sharded:
            return policy
        if has_adapters(policy) and self.kind == "DeepSpeed":
            raise UserError("DeepSpeed does not train adapters. They are small: launch with DDP or FSDP")
        if not self.is_main:
            return None
        return copy.deepcopy(policy)

    def weights(self, policy) -> dict:
        """The unsharded state dict of the policy, or only of its adapters."""
        state = get_model_state_dict(policy, options=UNSHARDED) if self.is_sharded else policy.state_dict()
        if has_adapters(policy) and state:  # empty in the other processes of FSDP
            return adapter_state_dict(policy, state)
        return state

    def unsharded_tensors(self, tensors: dict) -> dict:
        """{name: tensor} such as the averages of weights, unsharded."""
        return {name: unsharded(tensor) for name, tensor in tensors.items()}

    def load_weights(self, policy, path: Path, tensors: dict, optional: set[str]) -> None:
        """Load what `weights` returned into the policy.

        Args:
            path: file that the tensors are from, for messages.
            tensors: {name: tensor}; all of the policy's, but those of `optional` names may be missing.

        Raises:
            UserError: the tensors are not those of the policy.
        """
        if self.is_sharded:
            if has_adapters(policy):
                tensors = with_full_names(policy, tensors)
            set_model_state_dict(policy, tensors, options=UNSHARDED_SOME)
        elif has_adapters(policy):
            load_adapter_state_dict(policy, tensors)
        else:
            load_tensors(policy, path, tensors, optional)

    def optimizer_state(self, policy, optimizer) -> dict:
        """The optimizer's unsharded state dict, with numbered parameters as PyTorch has it."""
        if not self.is_sharded:
            return optimizer.state_dict()
        named = get_optimizer_state_dict(policy, optimizer, options=UNSHARDED)
        if not self.is_main:
            return {}
        numbers = {name: number for number, name in enumerate(parameter_names(policy, optimizer))}
        return rename_parameters(named, numbers)

    def load_optimizer_state(self, policy, optimizer, state: dict) -> None:
        """Load the moments and step counts of what `optimizer_state` returned.

        Settings such as learning rate, decay and kernels stay as this run has them.

        Raises:
            ValueError, KeyError: it is the state of another optimizer.
        """
        if len(state["param_groups"]) != len(optimizer.param_groups):
            raise ValueError(
                f"expected {len(optimizer.param_groups)} parameter groups, got {len(state['param_groups'])}"
            )
        parameters = dict(policy.named_parameters())
        names = parameter_names(policy, optimizer)
        check_moments(parameters, names, state["state"])
        align_moments(parameters, names, state["state"])
        settings = []
        groups = []
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
            settings.append({name: value for name, value in group.items() if name != "params"})
            groups.append({**saved, **settings[-1]})  # torch picks the device of a step count by "fused"
        state = {"state": state["state"], "param_groups": groups}
        if not self.is_sharded:
            load_state(optimizer, state)
            return
        named = rename_parameters(state, dict(enumerate(names)))
        set_optimizer_state_dict(policy, optimizer, named, options=UNSHARDED)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)  # FSDP has changed them


def clip_gradients(policy, max_norm: float) -> torch.Tensor:
    """Scale the gradients down to a norm of at most `max_norm`; returns their norm before that."""
    gradients = [parameter.grad for parameter in policy.parameters() if parameter.grad is not None]
    is_bf16 = any(gradient.dtype is torch.bfloat16 for gradient in gradients)
    if not is_bf16 or isinstance(gradients[0], DTensor):
        return torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    # PyTorch would round the norm of a bf16 gradient to bf16.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(policy.parameters(), max_norm, norm)
    return norm


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as one process has it. Every process calls this."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def copy_unsharded(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Copy a tensor, as one process has it, into one that may be sharded."""
    if isinstance(target, DTensor):
        tensor = distribute_tensor(tensor.to(target.device), target.device_mesh, target.placements)
    target.copy_(tensor)


def parameter_names(policy, optimizer) -> list[str]:
    """Names of an optimizer's parameters, in the order in which its state dict numbers them."""
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def check_moments(parameters: dict, names: list[str], entries: dict) -> None:
    """Raise a ValueError for a moment whose shape is not its parameter's, or for a step that is none: PyTorch loads any.

    Args:
        parameters: {name: parameter} of the policy.
        names: of the parameters, in the order in which the optimizer numbers them.
        entries: {number of a parameter: its state}.
    """
    for number, entry in entries.items():
        if not isinstance(number, int) or not 0 <= number < len(names):
            raise ValueError(f"expected the state of {len(names)} parameters, got parameter {number!r}")
        parameter = parameters[names[number]]
        expected = tuple(getattr(parameter, "ds_shape", parameter.shape))  # DeepSpeed's stage 3 keeps a shard
        for key in MOMENTS:
            moment = entry.get(key)
            if moment is not None and tuple(getattr(moment, "shape", ())) != expected:
                got = getattr(moment, "shape", type(moment).__name__)
                raise ValueError(f"{key} of {names[number]}: expected shape {expected}, got {got}")
        step = entry.get("step", 0)
        is_number = isinstance(step, (int, float)) or (isinstance(step, torch.Tensor) and step.numel() == 1)
        if not is_number or not 0 <= step <= LARGEST_STEP:
            raise ValueError(f"step of {names[number]}: expected a number from 0 to {LARGEST_STEP}")


def align_moments(parameters: dict, names: list[str], entries: dict) -> None:
    """Give each moment its parameter's strides: fused kernels read both in the order of memory. Args as `check_moments`."""
    for number, entry in entries.items():
        parameter = parameters[names[number]]
        for key in MOMENTS:
            moment = entry.get(key)
            if moment is not None and moment.stride() != parameter.stride():
                entry[key] = torch.empty_strided(parameter.shape, parameter.stride(), dtype=moment.dtype).copy_(moment)


def rename_parameters(state: dict, new: dict) -> dict:
    """An optimizer's state dict whose parameters are called by the values of `new` instead of by its keys."""
    entries = {new[parameter]: entry for parameter, entry in state["state"].items()}
    groups = [{**group, "params": [new[parameter] for parameter in group["params"]]} for group in state["param_groups"]]
    return {"state": entries, "param_groups": groups}
