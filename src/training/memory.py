"""How much memory and disk a run takes, estimated before it starts.

Activations are not counted: they depend on the batch, and on what the policy keeps for its backward pass.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from lerobot.policies import PreTrainedPolicy, get_policy_class

from config import TrainConfig
from errors import UserError
from policy.adapters import has_adapters
from policy.presets import optimizer_preset
from policy.quantize import is_packed
from policy.weights_dtype import own_setting
from processors.bases import resizes_pictures
from runtime import available_memory, less_memory, total_memory

GB = 1e9
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
ADAMS = ("adam", "adamw", "xvla-adamw", "multi_adam")
BLOCK = 256  # weights that share a scale in torchao's 8-bit moments, which smaller tensors do not have
SMALLEST = 4096
OF_ACTIVATIONS = ("--grad", "a smaller")  # remedies that make only the activations fewer


@dataclass(frozen=True)
class Memory:
    """Bytes that one process of a run takes.

    Attributes:
        weights: {dtype: bytes} of the policy's parameters and buffers.
        gradients, optimizer, ema: of the trained parameters.
        checkpoint: of one checkpoint on the disk, which is also what its copy in the host's memory takes.
    """

    weights: dict[str, int]
    gradients: int
    optimizer: int
    ema: int
    checkpoint: int

    @property
    def on_device(self) -> int:
        return sum(self.weights.values()) + self.gradients + self.optimizer + self.ema


def estimate_memory(policy, config: TrainConfig, kind: str = "one", processes: int = 1) -> Memory:
    """What training a policy takes in each process.

    Args:
        policy: with its adapters, frozen weights and dtypes; its tensors may be without values.
        kind, processes: as in Distributed; FSDP and DeepSpeed divide all of it among the processes.
    """
    tensors = [*policy.parameters(), *policy.buffers()]
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    shares = processes if kind in ("FSDP", "DeepSpeed") else 1
    weights = {}
    for tensor in tensors:
        name = dtype_name(tensor)
        weights[name] = weights.get(name, 0) + tensor.nbytes
        if is_packed(tensor):
            weights[name] += tensor.quant_state.absmax.nbytes  # the scales of its blocks
    gradients = sum(gradient_bytes(parameter, config, kind) for parameter in trained)
    preset = optimizer_preset(policy.config, config)
    optimizer = sum(moment_bytes(parameter, preset, config.optimizer) for parameter in trained)
    ema = sum(max(4 * parameter.numel(), parameter.nbytes) for parameter in trained) if config.ema_decay else 0
    return Memory(
        weights={name: size // shares for name, size in weights.items()},
        gradients=gradients // shares,
        optimizer=optimizer // shares,
        ema=ema // shares,
        checkpoint=checkpoint_bytes(policy, trained, optimizer, config),
    )


def dtype_name(tensor) -> str:
    """What a weight is stored in."""
    if is_packed(tensor):
        return "4-bit"
    return NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))


def gradient_bytes(parameter, config: TrainConfig, kind: str) -> int:
    """Bytes of a parameter's gradient; those of micro-batches are summed up in float32, and DDP keeps a second copy."""
    if config.grad_accumulation_steps > 1 and kind == "one":
        return max(4 * parameter.numel(), parameter.nbytes)
    return 2 * parameter.nbytes if kind == "DDP" else parameter.nbytes


def moment_bytes(parameter, preset, optimizer: str) -> int:
    """Bytes that the optimizer keeps of a parameter."""
    count = parameter.numel()
    if optimizer == "adamw8bit" and count >= SMALLEST and count % BLOCK == 0:
        return 2 * (count + 4 * count // BLOCK)
    moments = 2 if preset.type in ADAMS else int(getattr(preset, "momentum", 0) > 0)
    return moments * max(4 * count, parameter.nbytes)


def checkpoint_bytes(policy, trained: list, optimizer: int, config: TrainConfig) -> int:
    """Bytes of a checkpoint: the weights to act with, what differs while they are trained, and the optimizer's state."""
    buffers = sum(buffer.nbytes for buffer in policy.buffers())
    trained_bytes = sum(parameter.nbytes for parameter in trained)
    size = optimizer + trained_bytes + buffers
    if not has_adapters(policy):
        size += sum(parameter.nbytes for parameter in policy.parameters() if not parameter.requires_grad)
    if config.ema_decay:
        rounded = [parameter for parameter in trained if parameter.element_size() < 4]
        size += trained_bytes + buffers + sum(4 * parameter.numel() for parameter in rounded)
    return size


def memory_lines(memory: Memory, config: TrainConfig, kept: int) -> list[str]:
    """What the run's header says of its memory.

    Args:
        kept: checkpoints that the run keeps at a time.
    """
    total = sum(memory.weights.values())
    weights = [f"{size_text(size)} {dtype}" for dtype, size in memory.weights.items() if size >= 0.01 * total]
    optimizer = "8-bit AdamW" if config.optimizer == "adamw8bit" else "optimizer"
    parts = [
        f"weights {' + '.join(weights)}",
        f"gradients {size_text(memory.gradients)}",
        f"{optimizer} {size_text(memory.optimizer)}",
    ]
    if memory.ema:
        parts.append(f"average {size_text(memory.ema)}")
    host = ""
    if config.save_async == "on":
        host = f"on the host {size_text(memory.checkpoint)} to copy a checkpoint; "
    checkpoints = f"{kept} checkpoints, {size_text(kept * memory.checkpoint)}" if kept > 1 else "this run saves one"
    return [
        f"{', '.join(parts)}: {size_text(memory.on_device)}, plus activations",
        f"{host}a checkpoint {size_text(memory.checkpoint)} on the disk, {checkpoints}",
    ]


def size_text(size: int) -> str:
    if size < 0.1 * GB:
        return f"{size / 1e6:.1f} MB"
    if size < 10 * GB:
        return f"{size / GB:.2f} GB"
    return f"{size / GB:.0f} GB"


def check_memory(memory: Memory, device: torch.device, remedies: list[str]) -> list[str]:
    """Compare what a run takes with what the device has.

    Args:
        remedies: of `memory_remedies`.

    Returns:
        A warning if it has that much, but not free.

    Raises:
        UserError: it does not have that much.
    """
    total, free = device_memory(device)
    needed = memory.on_device
    if total is None or needed <= free:
        return []
    what = f"training takes {size_text(needed)} before activations, and {device} has {size_text(total)}"
    remedies = [remedy for remedy in remedies if not remedy.startswith(OF_ACTIVATIONS)]
    if needed > total:
        raise UserError(f"{what}. {less_memory(remedies)}")
    return [f"{what}, {size_text(free)} of it free. {less_memory(remedies)}"]


def device_memory(device: torch.device) -> tuple[int | None, int]:
    """(total, free) bytes of a device's memory; (None, 0) if that is not known."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    if device.type == "cpu":
        return total_memory(), available_memory()
    return None, 0


def memory_remedies(
    config: TrainConfig, policy_config, *, resumed: bool, kind: str = "one", processes: int = 1
) -> list[str]:
    """Flags that would let this run take less memory, and that are not on already, those that change least first.

    Args:
        policy_config: LeRobot's config of the policy.
        resumed: whether it resumes a checkpoint, and so keeps its policy and its optimizer.
        kind, processes: as in Distributed.
    """
    flags = []
    more = more_micro_batches(config, processes)
    if more is not None:
        flags.append(f"--grad_accumulation_steps {more}")
    if getattr(policy_config, "gradient_checkpointing", None) is False:
        flags.append("--gradient_checkpointing")
    if config.ema_decay:
        flags.append("--ema_decay 0")
    if not resumed:
        flags += policy_remedies(config, policy_config, sharded=kind in ("FSDP", "DeepSpeed"))
    if config.batch_size and config.batch_size > processes * config.grad_accumulation_steps:
        flags.append("a smaller --batch_size")
    if getattr(policy_config, "image_features", None) and not resumed and not resizes_pictures(policy_config):
        flags.append("a smaller --image_size")
    return flags


def more_micro_batches(config: TrainConfig, processes: int) -> int | None:
    """The next larger --grad_accumulation_steps that splits the batch evenly; None if there is none."""
    if not config.batch_size:
        return None
    largest = config.batch_size // processes
    for count in range(config.grad_accumulation_steps + 1, largest + 1):
        if config.batch_size % (processes * count) == 0:
            return count
    return None


def policy_remedies(config: TrainConfig, policy_config, sharded: bool) -> Iterable[str]:
    """Those flags that only a new run can take."""
    field = own_setting(policy_config)
    is_bf16 = config.weights_dtype == "bf16" or (field is not None and getattr(policy_config, field) == "bfloat16")
    has_peft = bool(config.peft) or policy_config.use_peft
    is_adam = policy_config.get_optimizer_preset().type in ("adam", "adamw", "xvla-adamw")
    if is_adam and config.optimizer == "auto" and not sharded and not has_peft:
        yield "--optimizer adamw8bit"
    if not sharded and not is_bf16 and config.precision != "fp16":
        yield "--weights_dtype bf16"
    if getattr(policy_config, "train_expert_only", None) is False and not has_peft:
        yield "--policy_args train_expert_only=true"
    if config.policy_path and not has_peft:
        policy_class = get_policy_class(policy_config.type)
        has_targets = policy_class._get_default_peft_targets is not PreTrainedPolicy._get_default_peft_targets
        yield "--peft lora" if has_targets else "--peft lora --peft_args target_modules=all-linear"
