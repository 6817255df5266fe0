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
import psutil
import torch
from torch.overrides import TorchFunctionMode

from errors import UserError, one_line

# What randomness is for, the number after the seed in its address. (The order of the data has the address (seed, epoch).)
INIT = 1
STEP = 2
EVAL = 3
VALIDATE = 4
ROUND = 5

MASK = "_padding_mask"  # after a camera's name in a batch: whether a sample has its picture. LeRobot's smolvla reads it


def pick_device(name: str) -> torch.device:
    """The device of a `--device` flag; `auto` is CUDA, else MPS, else XPU, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    if name == "auto":
        for kind, backend in (("cuda", torch.cuda), ("mps", torch.backends.mps), ("xpu", torch.xpu)):
            if backend.is_available():
                return torch.device(kind)
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"--device {name} cannot be used on this machine ({one_line(error)[:120]}). Pass --device auto"
        ) from None
    return device


def pick_precision(name: str, device: torch.device, weights_dtype: str = "auto") -> str:
    """The precision of a `--precision` flag; `auto` is bf16 for bf16 weights and on GPUs that compute in it, else fp32.

    Args:
        weights_dtype: of `--weights_dtype`.

    Raises:
        UserError: the GPU does not compute in bf16, or bf16 weights are to be computed in something else.
    """
    if weights_dtype == "bf16":
        if name not in ("auto", "bf16"):
            raise UserError(f"--weights_dtype bf16 needs --precision bf16, got {name}. Leave --precision out")
        name = "bf16"
    if device.type != "cuda":
        return "fp32" if name == "auto" else name
    with torch.cuda.device(device):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return "bf16" if has_bf16 else "fp32"
    if name == "bf16" and not has_bf16:
        raise UserError(
            f"--precision bf16: {torch.cuda.get_device_name(device)} does not compute in bf16. Pass fp16 or fp32"
        )
    return name


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`. Waits for the copy only on MPS, which reads the host's memory late, when it may be overwritten."""
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")


def autocast(precision: str, device: torch.device):
    """A context in which matrix products and convolutions are computed in `precision`."""
    if precision == "fp32":
        return contextlib.nullcontext()
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[precision])


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """A scaler of the loss, so that small gradients survive fp16; in other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def set_numerics(deterministic: bool) -> None:
    """Use the fastest GPU kernels, TF32 among them, or those that give the same bits every time."""
    torch.backends.cuda.matmul.allow_tf32 = not deterministic
    torch.backends.cudnn.allow_tf32 = not deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    # With warn_only these two still choose kernels whose backward pass gives other bits each time.
    torch.backends.cuda.enable_mem_efficient_sdp(not deterministic)
    torch.backends.cuda.enable_cudnn_sdp(not deterministic)
    if deterministic:
        # cuBLAS is deterministic only with a fixed workspace
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def thread_count(num_threads: int | None) -> int:
    """Threads of the data loader: `--num_threads`, else one for each core that this process may use, 8 at most."""
    if num_threads is not None:
        return num_threads
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), 8)
    return min(os.cpu_count() or 1, 8)


@contextlib.contextmanager
def without_collector():
    """Within this, no garbage collection, which would take a second while LeRobot is imported."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def less_memory(remedies: list[str]) -> str:
    """What to do about too little memory, to end a message.

    Args:
        remedies: flags that would let the run take less.
    """
    if not remedies:
        return "Use a device with more memory"
    return f"These take less: {', '.join(remedies)}"


@contextlib.contextmanager
def enough_memory(batch_size: int, remedies: list[str]):
    """Within this, running out of memory is a UserError, and so is a half-written file of torch.compile.

    Args:
        batch_size: of the run.
        remedies: as of `less_memory`.

    Raises:
        UserError: one of the two.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        half_written = re.search(r"(\S+): file too short", str(error))
        if half_written:  # torch takes the file for a finished one, each time
            raise UserError(
                f"{half_written[1]} is incomplete: a process was killed while it compiled. Delete that file, and start again"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory with --batch_size {batch_size}. {less_memory(remedies)}") from error


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's limit."""
    return min([psutil.virtual_memory().total, *(limit for limit, _ in cgroup_memory())])


def available_memory() -> int:
    """Bytes of the host's memory that are free, or can be freed from the disk cache."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in cgroup_memory())])


def cgroup_memory(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[int, int]]:
    """(limit, used) bytes of each of Linux's control groups that limits this process, as containers and SLURM do it.

    Memory of the disk cache that nobody uses is not counted as used.
    """
    found = []
    with contextlib.suppress(OSError):  # not Linux
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                top = root
                names = ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):  # version 1
                top = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            folder = top / path.strip("/")
            for level in [folder, *folder.parents]:
                if level == top.parent:
                    break
                found += limit_of(level, *names)
    return found


def limit_of(folder: Path, limit: str, usage: str, cache: str) -> list[tuple[int, int]]:
    """(limit, used) bytes of one control group, by the names of its files; empty if it has no limit."""
    try:
        most = (folder / limit).read_text().strip()
        used = int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root has no limit, and a container does not see what is above it
        return []
    if most == "max":
        return []
    return [(int(most), max(0, used - int(statistics.get(cache, 0))))]


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of PyTorch's or Python's says that the memory of the host or of the device is full."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # PyTorch's CPU allocator and cuBLAS raise a bare RuntimeError.
    full = re.search("can't allocate memory|ALLOC_FAILED|out of memory", str(error))
    return isinstance(error, RuntimeError) and full is not None


class StopSignals:
    """Within this, the first signal of NAMES is kept in `asked` for the loop to see; a SIGINT after it interrupts.

    SLURM sends SIGTERM at the end of a job, and SIGUSR1 ahead of it if asked to (`--signal=USR1@120`). A terminal that is
    closed sends SIGHUP; where nohup has it ignored, it stays ignored.

    Attributes:
        interrupt: called for a SIGINT after the first signal: raises KeyboardInterrupt, or ends the process in a command.
    """

    NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    interrupt = staticmethod(signal.default_int_handler)

    def __init__(self):
        self.asked: signal.Signals | None = None
        self.handlers_before = {}

    def keep(self, number: int, frame) -> None:
        """The handler: keep the first signal, and say what another Ctrl-C does."""
        if self.asked is not None:
            if number == signal.SIGINT:
                self.interrupt(number, frame)
            return
        self.asked = signal.Signals(number)
        if number == signal.SIGINT and sys.__stderr__ is not None:  # else descriptor 2 may be a file
            message = b"\nfinishing this step and saving; Ctrl-C again quits at once\n"
            with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader
                os.write(2, message)  # the signal may have come in the middle of a print

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # the only one that may handle signals
            for name in self.NAMES:
                number = getattr(signal, name, None)  # Windows has no SIGUSR1 and no SIGHUP
                if number is None or (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
                    continue
                self.handlers_before[number] = signal.signal(number, self.keep)
        return self

    def __exit__(self, *error):
        for number, handler in self.handlers_before.items():
            signal.signal(number, handler)


def seed_all(*address: int) -> None:
    """Seed every generator that a policy may draw from with a function of `address`, such as (seed, STEP, step, rank)."""
    seed = int(np.random.SeedSequence(address).generate_state(1, dtype=np.uint64)[0])
    torch.manual_seed(seed)  # of the CPU and of every accelerator
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def one_thread():
    """Within this, torch computes with one thread on a CPU: with another number, the last bits of a result may differ."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class NoHostSync(TorchFunctionMode):
    """Within this, `tensor.item()` returns the tensor: LeRobot's policies call it for each sub-loss, and each call waits."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.item:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def in_notebook() -> bool:
    """Whether this runs in a notebook's kernel; a script that has only imported IPython does not."""
    return {"ipykernel", "IPython"} <= set(sys.modules) and sys.modules["IPython"].get_ipython() is not None


def progress_interval() -> float:
    """Seconds between updates of a progress bar: a log file keeps each of them."""
    return 1 if sys.stderr.isatty() or in_notebook() else 30


def describe_machine(device: torch.device) -> dict:
    """Names and versions that the speed and the bits of a run depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
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
    """Armature's folder in the user's cache, for decoded frames and converted checkpoints."""
    variable = "LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME"
    return Path(os.environ.get(variable) or Path.home() / ".cache") / "armature"


def frame_cache_dir(cache_dir: str | Path | None) -> Path:
    """The folder of the frame cache: `cache_dir`, or the one in the user's cache."""
    return Path(os.path.expanduser(cache_dir)) if cache_dir else user_cache_dir() / "frames"
