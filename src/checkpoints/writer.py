"""Write checkpoints: complete or absent, in the background, by one run in a folder at a time.

A checkpoint is written into a hidden folder beside its place. Every file is flushed to disk and listed with its sha256 in
manifest.json, then the folder is renamed: a folder called checkpoint-<step> is complete or does not exist.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import traceback
from collections.abc import Callable
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
    OPTIMIZER_ENTRIES,
    POLICY_MANIFEST,
    RESUME_ONLY,
    TRAINED_WEIGHTS,
    WEIGHTS,
    TrainState,
    best_checkpoint,
    discard,
    folder_id,
    listed_files,
    manifest_text,
    nothing,
    prune,
    remove,
    write_manifest,
)
from checkpoints.lock import LostFolderError
from config import TrainConfig
from errors import FULL_DISK, UserError, one_line, reason_of_disk
from hub import Uploader
from runtime import available_memory

UPLOAD_SECONDS = 60  # how long the end of a run waits for uploads
NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # what a disk answers that cannot flush


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

    def missing(self, snapshot: Snapshot) -> int:
        """Bytes that a copy of the snapshot takes beyond the existing buffers."""
        sizes = {}  # {(address, shape): bytes}: tied weights are copied once
        snapshot.map(lambda tensor: sizes.update({(tensor.data_ptr(), tensor.shape): tensor.nbytes}))
        return max(0, sum(sizes.values()) - sum(buffer.nbytes for buffer in self.buffers))

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

    A save that fails is reported and repeated at the next one, or at the end. Two failures in a row stop the run, and so does
    a folder that was moved or replaced. Deleting old checkpoints and naming the best one may fail: that is a warning.

    Args:
        output_dir: where the checkpoint-<step> folders go.
        config: save_async (write in a thread, from copies in host memory), keep_last and keep_every (see `prune`).
        warn: called with a line for people.
        saved: the newest checkpoint there is; None before the first.
        check: called before every change in `output_dir`; raises LostFolderError if that is not this run's any more.
    """

    def __init__(
        self, output_dir: Path, config: TrainConfig, warn, saved: Path | None, check: Callable[[], None] = nothing
    ):
        self.output_dir = output_dir
        self.config = config
        self.warn = warn
        self.check_folder = check
        self.warned: set[str] = set()
        self.saved = saved
        self.background = config.save_async == "on"
        self.staging = StagingBuffers()
        self.thread: threading.Thread | None = None
        self.is_idle = threading.Event()
        self.is_idle.set()
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
        in_background = self.background
        if in_background:
            missing = self.staging.missing(snapshot)
            in_background = missing <= available_memory()
            if not in_background:
                self.warn_once(
                    f"no room for a copy of the checkpoint: {missing / 1e9:.1f} GB are not free in the host's memory. "
                    "Training waits while it is written, as with --save_async off"
                )
        if not in_background:
            self.snapshot = snapshot.map(lambda tensor: tensor.detach())
            self._write()
            self.check()
            return
        self.snapshot = self.staging.copy(snapshot)
        self.is_idle.clear()
        self.thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
        self.thread.start()

    def _write(self) -> None:
        """Write the snapshot. Errors are kept for the training loop, which meets them at its next save, log line or end."""
        try:
            if self.snapshot.ready is not None:
                self.snapshot.ready.synchronize()
            self.saved = write_checkpoint(self.output_dir, self.snapshot, self.check_folder, self.warn_once)
            self._clean_up()
            self.failures = []
            self.snapshot = None
        except LostFolderError as error:  # no other try can mend that
            self.failures.append(error)
        except UserError as error:
            self.failures.append(error)
            if len(self.failures) == 1:
                self.warn(f"{error}. Training continues, and the next save tries again")
        except BaseException as error:
            self.failures.append(error)
        finally:
            self.is_idle.set()

    def warn_once(self, text: str) -> None:
        """Warn, but only once of each problem, not at every save."""
        if text not in self.warned:
            self.warned.add(text)
            self.warn(text)

    def _clean_up(self) -> None:
        """Name the best checkpoint, upload the new one and delete old ones. Failures are warnings: the new one is complete.

        Raises:
            LostFolderError: the folder is not this run's any more.
        """
        best, loss = best_checkpoint(self.output_dir)
        try:
            mark_best(self.output_dir, best, loss, self.check_folder)
        except OSError as error:
            self.warn_once(
                f"best.json could not be written to {self.output_dir} ({reason_of_disk(error)}). Training continues"
            )
        protected = list(self.protected)
        if best is not None:
            protected.append(best)
        if self.uploader is not None:
            self.uploader.put(self.saved)
            protected += self.uploader.in_use
        keep_last = self.config.keep_last
        keep_every = self.config.keep_every
        step = self.snapshot.step
        for text in prune(self.output_dir, step, keep_last, keep_every, protected, self.check_folder):
            self.warn_once(f"{text}. Training continues")

    def check(self) -> None:
        """Raise what stopped the writer: a lost folder, a second failure in a row, or a bug."""
        for error in self.failures:
            if isinstance(error, LostFolderError) or not isinstance(error, UserError):
                raise error
        if len(self.failures) > 1:
            cause = self.failures[-1].__cause__
            remedy = "make it writable again and resume"
            if isinstance(cause, OSError) and cause.errno in FULL_DISK:
                remedy = "free some space and resume"
            if isinstance(cause, OSError) and cause.errno == errno.EFBIG:
                remedy = "allow larger files (ulimit -f unlimited) and resume, or pass an --output_dir on another disk as well"
            raise UserError(f"{self.failures[-1]}. This was the second time in a row: {remedy}")

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
        elif self.thread is not None:
            # However often Ctrl-C is pressed: the next run in this process must not meet the thread.
            # Not `is_alive`: after an interrupted `join`, Python 3.12 reports that the thread has ended.
            while not self.is_idle.is_set():
                with contextlib.suppress(KeyboardInterrupt):
                    self.is_idle.wait()


def write_checkpoint(
    output_dir: Path,
    snapshot: Snapshot,
    check: Callable[[], None] = nothing,
    warn: Callable[[str], None] = nothing,
) -> Path:
    """Write checkpoint-<step> into `output_dir` and return it.

    Args:
        check: called before each change of what others may see; raises LostFolderError.
        warn: called with a line if the disk cannot flush.

    Raises:
        UserError: the disk is full or cannot be written. Nothing is left behind, and earlier checkpoints are untouched.
    """
    checkpoint = output_dir / f"checkpoint-{snapshot.step}"
    backup = output_dir / f".{checkpoint.name}.old"
    # a name that no other thread uses: that of an interrupted run may still be writing this step
    folder = output_dir / f".{checkpoint.name}.{uuid4().hex[:8]}.tmp"
    try:
        check()
        folder.mkdir()
        with disk_errors(folder, snapshot):
            write_files(folder, snapshot)
        write_manifest(folder)
        unflushed = None
        for path in [*sorted(folder.iterdir()), folder, output_dir / "metrics.jsonl"]:
            unflushed = flush(path) or unflushed
        check()
        if os.path.lexists(checkpoint):  # an earlier branch of this run wrote this step
            with contextlib.suppress(OSError):  # most often there is none, and only its name must be free
                discard(backup)
            os.rename(checkpoint, backup)
        os.rename(folder, checkpoint)
        unflushed = flush(output_dir) or unflushed
    except LostFolderError:  # what is there is not ours to clean up
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # a disk that does not answer lets nothing be changed either
            check()
        with contextlib.suppress(OSError):
            shutil.rmtree(folder, ignore_errors=True)
            if os.path.lexists(backup) and not os.path.lexists(checkpoint):
                os.rename(backup, checkpoint)
        if isinstance(error, OSError):
            raise UserError(f"{checkpoint.name} could not be written to {output_dir}: {one_line(error)}") from error
        raise
    if unflushed:
        warn(
            f"the disk of {output_dir} cannot flush every file and folder ({unflushed}): programs see only complete "
            "checkpoints, but one may be lost if the machine loses power"
        )
    try:
        check()
        if os.path.lexists(backup):
            discard(backup)
    except OSError as error:
        warn(f"{backup}, which {checkpoint.name} replaced, could not be deleted ({reason_of_disk(error)})")
    return checkpoint


def write_files(folder: Path, snapshot: Snapshot) -> None:
    """Every file of a checkpoint but its manifest."""
    save_weights(snapshot.weights, folder / WEIGHTS)
    snapshot.policy_config.save_pretrained(folder)
    snapshot.preprocessor.save_pretrained(folder, config_filename="preprocessor_config.json")
    snapshot.postprocessor.save_pretrained(folder, config_filename="postprocessor_config.json")
    if snapshot.trained_weights:
        save_weights(snapshot.trained_weights, folder / TRAINED_WEIGHTS)
    # from the host's memory, where a copy may not be yet: a file is read on any device
    torch.save(recursively_apply(Tensor.cpu, snapshot.optimizer), folder / OPTIMIZER)
    trainer_state = {
        **snapshot.state.trainer_state,
        OPTIMIZER_ENTRIES: len(snapshot.optimizer["state"]),
        "folder": folder_id(folder.parent),
    }
    write_json(folder / "trainer_state.json", trainer_state)
    write_json(folder / "train_config.json", snapshot.state.train_config)
    write_json(folder / "training_info.json", snapshot.state.training_info)
    if snapshot.adapters is not None:
        snapshot.adapters.save_pretrained(folder)
    for alias, source in ALIASES.items():
        is_adapter = snapshot.adapters is not None and source == WEIGHTS
        link(folder / source, folder / (ADAPTER if is_adapter else alias))
    share_weights(folder, as_file=folder / "trainer_state.json")


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def share_weights(folder: Path, as_file: Path) -> None:
    """Give the weights in a folder the permissions of another file: safetensors makes them readable only by their owner."""
    mode = as_file.stat().st_mode
    for path in folder.rglob("*.safetensors"):
        with contextlib.suppress(PermissionError):  # on a disk without permissions
            path.chmod(mode)


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a state dict. A tensor with two names (tied weights) is stored under one of them."""
    save_model(SimpleNamespace(state_dict=lambda: dict(tensors)), str(path))  # takes a module


@contextlib.contextmanager
def disk_errors(folder: Path, snapshot: Snapshot):
    """Within this context, a disk that fails raises an OSError.

    safetensors writes in Rust and torch.save in C++. Both raise errors of their own without an errno, so after
    one, Python writes as many bytes as the snapshot has, beside what is there, which fails with the disk's own error.
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
        block = os.urandom(2**20)  # no file system can compress it
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


def flush(path: Path) -> str | None:
    """Move a file or folder from the system's cache to the disk itself; nothing if it does not exist.

    Returns:
        Why this disk cannot do that; None if it could.

    Raises:
        OSError: the disk failed.
    """
    if not path.exists() or (path.is_dir() and os.name == "nt"):  # Windows cannot open a folder
        return None
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FLUSH:
            raise
        return reason_of_disk(error)
    finally:
        os.close(handle)
    return None


def mark_best(output_dir: Path, best: Path | None, loss: float | None, check: Callable[[], None]) -> None:
    """Name the checkpoint with the lowest validation loss in best.json; without one there is no such file.

    Raises:
        OSError: the file cannot be written.
    """
    check()
    if best is None:
        (output_dir / "best.json").unlink(missing_ok=True)
        return
    fresh = output_dir / ".best.json.tmp"
    fresh.write_text(json.dumps({"checkpoint": best.name, "val_loss": loss}) + "\n")
    os.replace(fresh, output_dir / "best.json")


@contextlib.contextmanager
def finishing(checkpoint: Path, output_dir: Path):
    """Turn a disk error into a UserError while the files of the finished policy are written."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{checkpoint} is complete, but the finished policy cannot be written to {output_dir} ({one_line(error)}). "
            f"Free some space or make it writable, and resume with --resume_from_checkpoint {checkpoint}"
        ) from error


def publish(checkpoint: Path, output_dir: Path, check: Callable[[], None] = nothing) -> None:
    """Put the files that run the policy into `output_dir` itself, one atomic replacement each, and a manifest of them.

    Args:
        check: called before each replacement; raises LostFolderError.

    Raises:
        OSError: a file cannot be written.
        UserError: the checkpoint's manifest is damaged.
    """
    files = {name: entry for name, entry in listed_files(checkpoint).items() if name not in RESUME_ONLY}
    outdated = set()
    if (output_dir / POLICY_MANIFEST).is_file():
        with contextlib.suppress(UserError):  # damaged: the new one takes its place
            outdated = listed_files(output_dir, POLICY_MANIFEST).keys() - files.keys()
    for name in sorted(files):
        source = checkpoint / name
        fresh = output_dir / f".{name}.tmp"
        check()
        remove(fresh)  # a link that was left over would be written through, into the checkpoint that it links to
        if source.suffix == ".safetensors":
            link(source, fresh)
        else:  # people edit these: as a link, an edit would damage the checkpoint
            shutil.copyfile(source, fresh)
        os.replace(fresh, output_dir / name)
        remove(fresh)  # `replace` leaves it if both are links to one file
    for name in outdated:
        check()
        remove(output_dir / name)
    fresh = output_dir / f".{POLICY_MANIFEST}.tmp"
    check()
    fresh.write_text(manifest_text(files))
    os.replace(fresh, output_dir / POLICY_MANIFEST)
