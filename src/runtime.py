"""The machine a run is on: device, threads, and randomness that is addressed, not consumed."""

import contextlib
import gc
import os
import platform
import random
import re
import signal
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from errors import UserError, one_line

# First part of an address: what the randomness is for. Data order is addressed by (seed, epoch) as LeRobot does.
INIT, STEP, EVAL, VALIDATE = 1, 2, 3, 4


def pick_device(name: str) -> torch.device:
    """The device of a `--device` flag; `auto` takes CUDA, else MPS, else XPU, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "auto":
        for kind, there in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("xpu", torch.xpu)):
            if there.is_available():
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} cannot be used here ({one_line(error)[:120]}): pass --device cpu or auto"
        ) from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of a `--precision` flag; `auto` takes bf16 on GPUs that compute in it, else fp32.

    Raises:
        UserError: the device cannot compute in it.
    """
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    if name == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has none: pass fp16 or fp32")
    return name


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`, without waiting for the copy but on MPS, which would read the memory later than it may be used again."""
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")


def autocast(precision: str, device: torch.device):
    """A context in which matrix products and convolutions are computed in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss so that small gradients survive fp16; does nothing at all in other precisions."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def set_numerics(deterministic: bool) -> None:
    """GPU kernels: the fastest that are found, TF32 among them, or those that give the same bits every time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)  # whose backward is exact without warn_only alone
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for


def threads(asked: int | None) -> int:
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


@contextlib.contextmanager
def without_collector():
    """Without garbage collection, which takes a second of what LeRobot's imports take; what an earlier run left goes first."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def enough_memory(batch_size: int):
    """Within this, memory that runs out is a line, and so is what torch.compile left half-written when it was killed.

    Raises:
        UserError: one of the two.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if damaged := re.search(r"(\S+): file too short", str(error)):
            message = f"a process that was killed while it compiled left {damaged[1]} half-written"
            raise UserError(f"{message}: delete that file, and start again") from error
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"out of memory with --batch_size {batch_size}: pass a smaller one, or a smaller --image_size, or cut it in parts with "
            "--grad_accumulation_steps"
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    told = re.search("can't allocate memory|ALLOC_FAILED|out of memory", str(error))
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and told is not None)


class StopSignals:
    """Within this, SIGINT, SIGTERM and SIGUSR1 are kept in `asked` for the loop to see; a second SIGINT interrupts at once.

    SLURM sends SIGUSR1 ahead of a job's end if asked to (`--signal=USR1@120`), SIGTERM at its end.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")

    def __init__(self):
        self.asked: signal.Signals | None = None

    def _ask(self, number, frame):
        if self.asked == signal.SIGINT == number:
            raise KeyboardInterrupt
        first, self.asked = self.asked is None, self.asked or signal.Signals(number)
        if first and number == signal.SIGINT:
            with contextlib.suppress(OSError):  # whoever read it may be gone by the same Ctrl-C
                os.write(
                    2, b"\nfinishing this step and saving; Ctrl-C again leaves at once\n"
                )  # print may be under way

    def __enter__(self):
        mine = threading.current_thread() is threading.main_thread()  # Python gives signals to that thread alone
        there = [getattr(signal, name) for name in self.NAMES if mine and hasattr(signal, name)]
        self.before = {number: signal.signal(number, self._ask) for number in there}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def seed_all(*address: int) -> None:
    """Set every generator that a policy may draw from to a function of `address`, such as (seed, STEP, step, rank)."""
    word = int(np.random.SeedSequence(address).generate_state(1, dtype=np.uint64)[0])
    torch.manual_seed(word)  # the CPU's and every accelerator's
    np.random.seed(word % 2**32)
    random.seed(word)


class NoHostSync(TorchFunctionMode):
    """Within this, `tensor.item()` gives the tensor: LeRobot's policies report sub-losses by a wait for the device each."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def in_notebook() -> bool:
    """Whether a notebook's kernel runs this, and no script that has merely imported one."""
    return {"ipykernel", "IPython"} <= set(sys.modules) and sys.modules["IPython"].get_ipython() is not None


def describe_machine(device: torch.device) -> dict:
    """Names and versions that a run's figures depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    packages = ("lerobot", "torch", "torchvision", "numpy", "safetensors")
    return {
        "device": str(device),
        "device_name": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }


def user_cache_dir() -> Path:
    """Armature's folder in the user's cache: decoded frames, and checkpoints that were converted on the way in."""
    base = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return Path(base or Path.home() / ".cache") / "armature"
