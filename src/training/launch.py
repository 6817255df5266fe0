"""Which kind of processes this run was launched as: one, DDP, FSDP2 or DeepSpeed."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from errors import UserError, one_line
from runtime import pick_device
from training.deepspeed_zero import DeepSpeedDistributed
from training.distributed import Distributed

GLOO_TIMEOUT = timedelta(days=1)  # one process may decode, save or validate for hours while the others wait


def make_distributed(device: str) -> Distributed:
    """Join the processes that this one was launched with.

    Args:
        device: where several processes compute: cpu, cuda, or auto, which gives each its own GPU where there are some.

    Raises:
        UserError: the device is a single one, there are fewer GPUs than processes, or the processes cannot connect.
    """
    kind = launched_kind()
    if kind == "one":
        return Distributed()
    check_device(device)
    accelerator = make_accelerator(device, kind)
    gloo_group = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT)
    if kind == "DeepSpeed":
        return DeepSpeedDistributed(kind, accelerator, gloo_group)
    return Distributed(kind, accelerator, gloo_group)


def launched_kind() -> str:
    """ "one", "DDP", "FSDP" or "DeepSpeed", by the environment that `accelerate launch` or torchrun set."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "DeepSpeed"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "FSDP"
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return "one"
    return "DDP"


def check_device(device: str) -> None:
    """Refuse a device that the processes of this machine cannot share.

    Raises:
        UserError: the device is a single one, or there are fewer GPUs than processes.
    """
    if ":" in device:
        raise UserError(
            f"--device {device} names one device, and each of several processes takes its own: expected cpu, cuda or auto. "
            "Pass --device auto"
        )
    if device == "cpu" or not torch.cuda.is_available():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count()
    if processes > gpus:
        raise UserError(
            f"each process needs a GPU of its own: expected at most {gpus} processes on this machine, got {processes}. "
            f"Launch with accelerate launch --num_processes {gpus}, or pass --device cpu"
        )


def make_accelerator(device: str, kind: str):
    """Connect the processes through accelerate, and give each its device.

    Raises:
        UserError: the processes cannot connect.
    """
    # A second that a run of one process does not need.
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))  # before `pick_device` tries it
    on_cpu = pick_device(device).type == "cpu"
    # As lerobot-train does: some policies have parameters that a batch does not use.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    try:
        accelerator = Accelerator(cpu=on_cpu, mixed_precision="no", kwargs_handlers=[unused])
        accelerator.wait_for_everyone()  # GPUs connect at their first communication: find out before anything is loaded
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the processes of this run cannot connect at {address} ({one_line(error)}). Check the address and port that "
            "you launch with (--main_process_ip and --main_process_port of accelerate launch), and that every machine's "
            "processes were started"
        ) from error
    except dist.DistBackendError as error:
        raise UserError(
            f"the GPUs of this run cannot connect ({one_line(error)}). Check that each process has a GPU of its own, and "
            "launch with NCCL_DEBUG=INFO to see the reason"
        ) from error
    if on_cpu:
        shard_on_cpu(accelerator, kind)
    return accelerator


def shard_on_cpu(accelerator, kind: str) -> None:
    """Turn on FSDP or DeepSpeed, which accelerate does only on GPUs although both run on CPUs as well."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin

    if kind == "FSDP":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        AcceleratorState._shared_state["distributed_type"] = DistributedType.FSDP
    if kind == "DeepSpeed":
        accelerator.state.deepspeed_plugins = DeepSpeedPlugin()
        AcceleratorState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
