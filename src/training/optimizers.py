"""The optimizer of a run: the policy's own preset, AdamW with 8-bit moments, and exact updates of bf16 weights.

A bf16 weight has 8 bits of precision: an update of less than 1/512 of it rounds to none, and a learning rate of 1e-5 moves
nothing. So every bf16 weight is updated in float32 and rounded up or down at random, with the chances that make the mean
exact (stochastic rounding). Its moments are float32, or 8 bits each with `--optimizer adamw8bit`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from checkpoints.folder import OPTIMIZER_ENTRIES
from errors import UserError

INSTALL_TORCHAO = "needs the package torchao. Install it with: uv pip install torchao==0.18.0"
# What torch's optimizers keep of each parameter, in its shape.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum", "acc_delta")
SHARED_SETTINGS = ("lr", "betas", "eps", "weight_decay")  # of torch's AdamW and torchao's
BUCKET = 2**23  # weights that are updated in float32 at a time, which takes 8 bytes each


def build_optimizer(policy, preset, kind: str = "auto", sharded: bool = False) -> torch.optim.Optimizer:
    """The optimizer of LeRobot's `preset`, with fused kernels where PyTorch has them.

    Args:
        kind: auto, or adamw8bit for AdamW with 8-bit moments and the preset's settings.
        sharded: whether FSDP or DeepSpeed will shard it; these update the weights as they are.

    Raises:
        UserError: torchao is not installed, or the preset is not Adam.
    """
    parameters = policy.get_optim_params()
    fused = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if preset.type in fused:
        settings = asdict(preset)
        del settings["grad_clip_norm"]
        optimizer = fused[preset.type](parameters, **settings, fused=True)
    else:
        optimizer = preset.build(parameters)
    if kind == "adamw8bit":
        return eight_bit(optimizer)
    if rounds(optimizer) and not sharded:
        optimizer.step = partial(step_in_float32, optimizer, optimizer.step)
    return optimizer


def rounds(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's updates draw random numbers, to round bf16 weights."""
    return any(parameter.dtype is torch.bfloat16 for parameter in parameters_of(optimizer))


def rounding_warning(optimizer: torch.optim.Optimizer, trainer_state: dict, sharded: bool) -> list[str]:
    """A line where a resumed run is another one because its checkpoint is of a version that updated bf16 weights in bf16."""
    if OPTIMIZER_ENTRIES in trainer_state or sharded or not rounds(optimizer):
        return []
    return [
        "the checkpoint is of a version that updated bf16 weights in bf16, where small steps round to none: from here on they "
        "are updated in fp32, and the run ends with other weights"
    ]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """In the order in which its state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def sum_gradients_in_float32(optimizer: torch.optim.Optimizer) -> None:
    """Let the gradients of bf16 weights be float32, in which those of many micro-batches add up."""
    for parameter in parameters_of(optimizer):
        if parameter.dtype is torch.bfloat16:
            parameter.grad_dtype = torch.float32


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load an optimizer's state dict, with numbered parameters and the moments of bf16 weights in float32."""
    optimizer.load_state_dict(state)
    for number, parameter in enumerate(parameters_of(optimizer)):
        entry = state["state"].get(number, {})
        for key in MOMENTS:
            is_rounded = key in entry and entry[key].is_floating_point() and parameter.dtype is torch.bfloat16
            if is_rounded:  # by PyTorch, to the weight's dtype
                optimizer.state[parameter][key] = entry[key].to(parameter.device, torch.float32)


@torch.no_grad()
def step_in_float32(optimizer: torch.optim.Optimizer, step: Callable) -> None:
    """Update the weights by `step`, which sees bf16 weights and their gradients as float32; then round them at random.

    Works for any optimizer that treats each weight by itself. Its moments become float32, which it makes like the weights.
    """
    members = [group["params"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    try:
        for group, parameters in zip(optimizer.param_groups, members, strict=True):
            for bucket in buckets(parameters):
                group["params"] = [in_float32(parameter) for parameter in bucket]
                move_state(optimizer, bucket, group["params"])
                step()
                move_state(optimizer, group["params"], bucket)
                for parameter, updated in zip(bucket, group["params"], strict=True):
                    if updated is not parameter:
                        parameter.copy_(round_at_random(updated))
            group["params"] = []
    finally:
        for group, parameters in zip(optimizer.param_groups, members, strict=True):
            group["params"] = parameters


def buckets(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cut a list of parameters into lists of about BUCKET weights, those without a gradient left out."""
    bucket = []
    for parameter in parameters:
        if parameter.grad is not None:
            bucket.append(parameter)
        if sum(member.numel() for member in bucket) >= BUCKET:
            yield bucket
            bucket = []
    if bucket:
        yield bucket


def in_float32(parameter: Tensor) -> Tensor:
    """A float32 copy of a bf16 parameter and its gradient; any other parameter itself."""
    if parameter.dtype is not torch.bfloat16:
        return parameter
    copy = parameter.detach().float()
    copy.grad = parameter.grad.float()
    return copy


def move_state(optimizer: torch.optim.Optimizer, old: list[Tensor], new: list[Tensor]) -> None:
    """Hand the optimizer's state of each tensor on to another."""
    for before, after in zip(old, new, strict=True):
        if before in optimizer.state:
            optimizer.state[after] = optimizer.state.pop(before)


def round_at_random(tensor: Tensor) -> Tensor:
    """A float32 tensor in bf16: each number rounded up or down, such that the mean over many times is the number."""
    noise = torch.randint(2**16, tensor.shape, dtype=torch.int32, device=tensor.device)
    bits = tensor.contiguous().view(torch.int32) + noise
    return (bits & -(2**16)).view(torch.float32).to(torch.bfloat16)  # bf16 is the upper half of a float32


# AdamW with 8-bit moments.


def eight_bit(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """torchao's AdamW with the parameter groups of an Adam or AdamW.

    Raises:
        UserError: torchao is not installed, or it is another optimizer.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise UserError(
            f"--optimizer adamw8bit: this policy is trained with {type(optimizer).__name__}. Leave the flag out"
        )
    groups = [{name: group[name] for name in ("params", *SHARED_SETTINGS)} for group in optimizer.param_groups]
    return adamw8bit_class()(groups, bf16_stochastic_round=True)


def check_optimizer(kind: str) -> None:
    """Raise a UserError if --optimizer needs a package that is not installed."""
    if kind == "adamw8bit":
        adamw8bit_class()


def adamw8bit_class() -> type:
    """torchao's AdamW8bit, with a state dict of plain tensors, and with float32 moments where it has no 8-bit ones.

    Raises:
        UserError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise UserError(f"--optimizer adamw8bit {INSTALL_TORCHAO}") from error

    class PlainAdamW8bit(AdamW8bit):
        def _new_buffer(self, p, signed):
            # torchao keeps those of small tensors, and of sizes that its blocks do not divide, in the weights' dtype
            return super()._new_buffer(p.detach().float() if p.dtype is torch.bfloat16 else p, signed)

        def step(self, closure=None):
            rates = [group["lr"] for group in self.param_groups]
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)  # compiled code reads it as a tensor
            # torchao compiles its step, which on a CPU takes minutes and a C++ compiler, for the same numbers.
            on_cpu = all(parameter.device.type == "cpu" for parameter in parameters_of(self))
            try:
                with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                    return super().step(closure)
            finally:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate

        def add_param_group(self, param_group):
            rate = param_group["lr"]
            super().add_param_group(param_group)
            self.param_groups[-1]["lr"] = rate  # which torchao has made a tensor

        def state_dict(self):
            state = super().state_dict()
            return {**state, "state": {number: as_plain(entry) for number, entry in state["state"].items()}}

        def load_state_dict(self, state_dict):
            parameters = parameters_of(self)
            entries = state_dict["state"]
            super().load_state_dict({**state_dict, "state": {}})
            for number, entry in entries.items():
                self.state[parameters[number]] = self.from_plain(entry, parameters[number])

        def from_plain(self, entry: dict, parameter: Tensor) -> dict:
            """The state of a parameter, as the optimizer has it."""
            loaded = {"step": entry["step"].clone()}
            for key in ("exp_avg", "exp_avg_sq"):
                loaded[key] = self._new_buffer(parameter, signed=key == "exp_avg")
                if isinstance(loaded[key], OptimState8bit):
                    loaded[key].codes.copy_(entry[key])
                    loaded[key].scale.copy_(entry[f"{key}.scale"].view_as(loaded[key].scale))
                else:
                    loaded[key].copy_(entry[key])
            return loaded

    def as_plain(entry: dict) -> dict:
        plain = {}
        for key, value in entry.items():
            if isinstance(value, OptimState8bit):
                plain[key] = value.codes  # uint8, in the parameter's shape
                plain[f"{key}.scale"] = value.scale
            else:
                plain[key] = value
        return plain

    return PlainAdamW8bit
