"""Write checkpoints: complete or absent, in the background, by one run in a folder at a time.

A checkpoint is written into a hidden folder beside its place. Every file is flushed to disk and listed with its sha256 in
manifest.json, then the folder is renamed: a folder called checkpoint-<step> is complete or does not exist.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import torch
from accelerate.utils import recursively_apply
from safetensors import SafetensorError
from safetensors.torch import save_model
from torch import Tensor

from checkpoints.folder import (
    ADAPTER,
    ALIASES,
    OPTIMIZER,
    RESUME_ONLY,
    TRAINED_WEIGHTS,
    WEIGHTS,
    TrainState,
    best_checkpoint,
    find_checkpoints,
    prune,
    recover,
    write_manifest,
)
from config import TrainConfig
from errors import UserError, one_line
from hub import Uploader
from runtime import in_notebook

LOCK = ".lock"
OWNER = ".lock.json"  # who holds the lock, for people
UPLOAD_SECONDS = 60  # how long the end of a run waits for uploads


@dataclass
class Snapshot:
    """A run at one step.

    Attributes:
        step: optimizer steps done.
        weights: the policy's state dict.
        trained_weights: with --ema_decay the weights being trained, whose average is `weights`; else empty.
        optimizer: the optimizer's state dict.
        policy_config, preprocessor, postprocessor: LeRobot objects, which training does not change.
        state: what else a resume needs.
        adapters: PEFT's config, if `weights` are adapters.
        ready: CUDA event after which the copies on the host are complete; None if they already are.
    """

    step: int
    weights: dict[str, Tensor]
    trained_weights: dict[str, Tensor]
    optimizer: dict
    policy_config: object
    preprocessor: object
    postprocessor: object
    state: TrainState
    adapters: object = None
    ready: object = None

    def map(self, function) -> "Snapshot":
        """This snapshot with `function` applied to each of its tensors."""
        trees = (self.weights, self.trained_weights, self.optimizer)
        weights, trained_weights, optimizer = recursively_apply(function, trees)
        return replace(self, weights=weights, trained_weights=trained_weights, optimizer=optimizer)


class StagingBuffers:
    """Host memory that each snapshot is copied into. It is reused: allocating it takes longer than the copy."""

    def __init__(self):
        self.buffers: list[Tensor] = []  # in the order of the tensors of the last snapshot

    def copy(self, snapshot: Snapshot) -> Snapshot:
        """The snapshot with each tensor copied; tensors that are one (tied weights) stay one."""
        spare = iter(self.buffers)
        self.buffers = []
        copies = {}  # by the memory that they are copies of

        def copy(tensor: Tensor) -> Tensor:
            tensor = tensor.detach()
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if memory in copies and tensor.numel() > 0:
                return copies[memory]
            buffer = next(spare, None)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                # page-locked memory, which a GPU copies to without being waited for
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self.buffers.append(buffer)
            copies[memory] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
            return buffer

        device = next(iter(snapshot.weights.values())).device
        snapshot = snapshot.map(copy)
        if device.type == "cuda":
            # The next step's kernels follow the copies in the stream, so training need not wait for them: the writer does.
            snapshot.ready = torch.cuda.current_stream(device).record_event()
        return snapshot


class Writer:
    """Writes the checkpoints of a run, one at a time, and deletes old ones.

    A save that fails is reported and repeated at the next one, or at the end. Two failures in a row stop the run.

    Args:
        output_dir: where the checkpoint-<step> folders go.
        config: save_async (write in a thread, from copies in host memory), keep_last and keep_every (see `prune`).
        warn: called with a line for people.
        saved: the newest checkpoint there is; None before the first.
    """

    def __init__(self, output_dir: Path, config: TrainConfig, warn, saved: Path | None):
        self.output_dir = output_dir
        self.config = config
        self.warn = warn
        self.saved = saved
        self.background = config.save_async == "on"
        self.staging = StagingBuffers()
        self.thread: threading.Thread | None = None
        self.snapshot: Snapshot | None = None  # being written, or to be written again
        self.protected: list[Path] = []
        self.failures: list[BaseException] = []  # of the last saves in a row
        self.uploader = Uploader(config.push_to_hub, warn) if config.push_checkpoints else None

    def save(self, snapshot: Snapshot, protected=()) -> None:
        """Write a checkpoint, in the background from a copy. `protected` checkpoints are not deleted to make room.

        Raises:
            UserError: saving failed twice in a row.
        """
        self.wait()
        self.protected = list(protected)
        if not self.background:
            self.snapshot = snapshot.map(lambda tensor: tensor.detach().cpu())
            self._write()
            self.check()
            return
        self.snapshot = self.staging.copy(snapshot)
        self.thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        """Write the snapshot. Errors are kept for the training loop, which meets them at its next save, log line or end."""
        try:
            if self.snapshot.ready is not None:
                self.snapshot.ready.synchronize()
            self.saved = write_checkpoint(self.output_dir, self.snapshot)
            self._clean_up()
            self.failures = []
            self.snapshot = None
        except UserError as error:
            self.failures.append(error)
            if len(self.failures) == 1:
                self.warn(f"{error}. Training continues, and the next save tries again")
        except BaseException as error:
            self.failures.append(error)

    def _clean_up(self) -> None:
        """Name the best checkpoint, upload the new one and delete old ones.

        Raises:
            UserError: the disk failed; the new checkpoint is complete.
        """
        try:
            protected = [*self.protected, *mark_best(self.output_dir)]
            if self.uploader is not None:
                self.uploader.put(self.saved)
                protected += self.uploader.in_use
            prune(self.output_dir, self.snapshot.step, self.config.keep_last, self.config.keep_every, protected)
        except OSError as error:
            raise UserError(f"{self.output_dir} could not be written: {one_line(error)}") from error

    def check(self) -> None:
        """Raise what stopped the writer: a second failure in a row, or a bug."""
        for error in self.failures:
            if not isinstance(error, UserError):
                raise error
        if len(self.failures) > 1:
            raise UserError(f"{self.failures[-1]}. This was the second time in a row: free some space and resume")

    def wait(self) -> None:
        """Return when nothing is being written.

        Raises:
            UserError: as `save`.
        """
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    def finish(self) -> None:
        """Wait, and write what could not be written before.

        Raises:
            UserError: it cannot be written now either.
        """
        self.wait()
        if self.failures:
            self._write()
            self.check()

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if self.uploader is not None:
            self.uploader.close(UPLOAD_SECONDS if kind is None else 0)
        if kind is None:
            self.finish()
        elif self.thread is not None and (in_notebook() or not issubclass(kind, KeyboardInterrupt)):
            # Ctrl-C leaves the thread behind, except in a notebook, where it would meet the next run's
            self.thread.join()


def write_checkpoint(output_dir: Path, snapshot: Snapshot) -> Path:
    """Write checkpoint-<step> into `output_dir` and return it.

    Raises:
        UserError: the disk is full or cannot be written. Nothing is left behind, and earlier checkpoints are untouched.
    """
    checkpoint = output_dir / f"checkpoint-{snapshot.step}"
    backup = output_dir / f".{checkpoint.name}.old"
    # a name that no other thread uses: that of an interrupted run may still be writing this step
    folder = output_dir / f".{checkpoint.name}.{uuid4().hex[:8]}.tmp"
    try:
        folder.mkdir()
        with disk_errors(folder, snapshot):
            write_files(folder, snapshot)
        write_manifest(folder)
        for path in [*sorted(folder.iterdir()), folder, output_dir / "metrics.jsonl"]:
            flush(path)
        if checkpoint.exists():  # an earlier branch of this run wrote this step
            shutil.rmtree(backup, ignore_errors=True)
            os.rename(checkpoint, backup)
        os.rename(folder, checkpoint)
        flush(output_dir)
        shutil.rmtree(backup, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if backup.exists() and not checkpoint.exists():
            os.rename(backup, checkpoint)
        if isinstance(error, OSError):
            raise UserError(f"{checkpoint.name} could not be written to {output_dir}: {one_line(error)}") from error
        raise
    return checkpoint


def write_files(folder: Path, snapshot: Snapshot) -> None:
    """Every file of a checkpoint but its manifest."""
    save_weights(snapshot.weights, folder / WEIGHTS)
    snapshot.policy_config.save_pretrained(folder)
    snapshot.preprocessor.save_pretrained(folder, config_filename="preprocessor_config.json")
    snapshot.postprocessor.save_pretrained(folder, config_filename="postprocessor_config.json")
    if snapshot.trained_weights:
        save_weights(snapshot.trained_weights, folder / TRAINED_WEIGHTS)
    torch.save(snapshot.optimizer, folder / OPTIMIZER)
    for name in ("trainer_state", "train_config", "training_info"):
        (folder / f"{name}.json").write_text(json.dumps(getattr(snapshot.state, name), indent=2) + "\n")
    if snapshot.adapters is not None:
        snapshot.adapters.save_pretrained(folder)
    for alias, source in ALIASES.items():
        is_adapter = snapshot.adapters is not None and source == WEIGHTS
        link(folder / source, folder / (ADAPTER if is_adapter else alias))


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a state dict, in which a tensor of two names (tied weights) is stored under one."""
    save_model(SimpleNamespace(state_dict=lambda: dict(tensors)), str(path))  # takes a module


@contextlib.contextmanager
def disk_errors(folder: Path, snapshot: Snapshot):
    """Let a disk that fails within this context be an OSError.

    safetensors writes in Rust and torch.save in C++. Both raise errors of their own without an errno, so the disk is asked
    again from Python: as many bytes as the snapshot has must fit beside what is there.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        cause = error
        while cause is not None:  # closes torch's file, whose room would stay taken after it is deleted
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__context__
        sizes = []
        snapshot.map(lambda tensor: sizes.append(tensor.nbytes))
        block = os.urandom(2**20)  # which a file system cannot compress
        with open(folder / "probe", "wb") as probe:
            for _ in range(sum(sizes) // len(block) + 1):
                probe.write(block)
            probe.flush()
            os.fsync(probe.fileno())
        raise


def link(source: Path, alias: Path) -> None:
    """`alias` as a hard link to `source`, or as a copy if the file system has no links."""
    try:
        os.link(source, alias)
    except OSError:
        shutil.copyfile(source, alias)


def flush(path: Path) -> None:
    """Move a file or folder from the system's cache to the disk itself; nothing if it does not exist."""
    if not path.exists() or (path.is_dir() and os.name == "nt"):  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mark_best(output_dir: Path) -> list[Path]:
    """Name the checkpoint with the lowest validation loss in best.json. Returns it, or nothing if none was validated."""
    best, loss = best_checkpoint(output_dir)
    if best is None:
        return []
    fresh = output_dir / ".best.json.tmp"
    fresh.write_text(json.dumps({"checkpoint": best.name, "val_loss": loss}) + "\n")
    os.replace(fresh, output_dir / "best.json")
    return [best]


@contextlib.contextmanager
def finishing(checkpoint: Path, output_dir: Path):
    """Turn a disk error into a UserError while the files of the finished policy are written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{checkpoint} is complete, but the finished policy cannot be written to {output_dir} ({one_line(error)}). "
            f"Free some space and resume with --resume_from_checkpoint {checkpoint}"
        ) from error


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Put the files that run the policy into `output_dir` itself, one atomic replacement each."""
    for source in sorted(checkpoint.iterdir()):
        if source.name in RESUME_ONLY:
            continue
        fresh = output_dir / f".{source.name}.tmp"
        if source.suffix == ".safetensors":
            link(source, fresh)
        else:  # people edit these: as a link, an edit would damage the checkpoint
            shutil.copyfile(source, fresh)
        os.replace(fresh, output_dir / source.name)


@contextlib.contextmanager
def sole_writer(output_dir: Path):
    """Within this context, no other run writes into `output_dir`, and nothing half-written is in it.

    The lock is the system's (flock): it ends with the process that holds it, even if that is killed.

    Raises:
        UserError: another run holds it (the message names its pid and host), it is not a run's folder, or cannot be written.
    """
    from filelock import FileLock, Timeout

    is_new = not output_dir.exists()
    lock = FileLock(output_dir / LOCK, timeout=0)
    try:
        refuse_other_folder(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        (output_dir / OWNER).write_text(json.dumps(owner) + "\n")
        recover(output_dir)
    except Timeout:
        raise UserError(
            f"--output_dir {output_dir} is being written by {owner_of(output_dir)}. "
            "Stop that run first, or pass another --output_dir"
        ) from None
    except OSError as error:
        lock.release()
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        (output_dir / OWNER).unlink(missing_ok=True)
        lock.release()
        if is_new and [path.name for path in output_dir.iterdir()] == [LOCK]:  # the run never began
            shutil.rmtree(output_dir)


def refuse_other_folder(output_dir: Path) -> None:
    """Raise a UserError if the folder holds a dataset, a project or a policy, and no run."""
    if (output_dir / LOCK).exists() or find_checkpoints(output_dir):
        return
    for name in ("meta", "README.md", "config.json"):
        if (output_dir / name).exists():
            raise UserError(f"--output_dir {output_dir} is not a run's folder: it holds {name}. Pass another folder")


def owner_of(output_dir: Path) -> str:
    try:
        owner = json.loads((output_dir / OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']}"
    except (OSError, ValueError, KeyError):  # it has the lock, but has not written its name yet
        return "another process"
