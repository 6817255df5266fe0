"""Which kind of processes this run was launched as: one, DDP, FSDP2 or DeepSpeed."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from errors import UserError
from runtime import pick_device
from training.deepspeed_zero import DeepSpeedDistributed
from training.distributed import Distributed

GLOO_TIMEOUT = timedelta(days=1)  # one process may decode, save or validate for hours while the others wait


def make_distributed(device: str) -> Distributed:
    """The processes that this one was launched into.

    Args:
        device: where several processes compute: cpu, cuda, or auto, which gives each its own GPU where there are some.

    Raises:
        UserError: as `make_accelerator`.
    """
    kind = launched_kind()
    if kind == "one":
        return Distributed()
    accelerator = make_accelerator(device, kind)
    gloo_group = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT)  # between hosts: no GPU has to wait for it
    if kind == "DeepSpeed":
        return DeepSpeedDistributed(kind, accelerator, gloo_group)
    return Distributed(kind, accelerator, gloo_group)


def launched_kind() -> str:
    """ "one", "DDP", "FSDP" or "DeepSpeed", from what `accelerate launch` or torchrun put into the environment."""
    if launched_as("DEEPSPEED"):
        return "DeepSpeed"
    if launched_as("FSDP"):
        return "FSDP"
    return "one" if os.environ.get("WORLD_SIZE", "1") == "1" else "DDP"


def launched_as(name: str) -> bool:
    """Whether `accelerate launch` was told to use FSDP or DEEPSPEED."""
    return os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true"


def make_accelerator(device: str, kind: str):
    """Accelerate's hold on the processes of this run.

    Raises:
        UserError: the device is one process' own, or there are fewer GPUs than processes.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import (
        DeepSpeedPlugin,
        DistributedDataParallelKwargs,
        DistributedType,
        FullyShardedDataParallelPlugin,
    )

    if ":" in device:
        raise UserError(
            f"--device {device} is one device, and several processes each take their own: pass cuda or auto"
        )
    if device != "cpu" and torch.cuda.is_available():
        here, count = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > count:
            raise UserError(
                f"{here} processes on a machine of {count} GPUs: launch one for each (accelerate launch --num_processes {count})"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # what is tried below is this process' own
    cpu = pick_device(device).type == "cpu"
    # as lerobot-train: some policies have parameters that a batch does not use
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[unused])
    if kind == "DeepSpeed" and cpu:  # as below
        accelerator.state.deepspeed_plugins = DeepSpeedPlugin()
        AcceleratorState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
    if kind == "FSDP" and cpu:  # accelerate holds weights in parts on GPUs alone, torch on CPUs as well
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    return accelerator
