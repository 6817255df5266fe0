"""Writing checkpoints: whole or not at all, in the background, by one run in a folder at a time.

A checkpoint is written into a hidden folder beside its place, every file is flushed to disk and listed with its sha256 in
manifest.json, and then the folder is renamed: one called checkpoint-<step> is complete or does not exist.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import torch
from safetensors.torch import save_model
from torch import Tensor

from checkpoints.folder import (
    ALIASES,
    NOT_FINAL,
    OPTIMIZER,
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
from policy.adapters import ADAPTER
from runtime import in_notebook

LOCK, OWNER = ".lock", ".lock.json"


@dataclass
class Snapshot:
    """One snapshot of a run, safe from the steps that follow.

    Attributes:
        step: optimizer steps done.
        weights: the policy's state dict, on the host.
        trained_weights: those being trained, where `weights` are their average; else empty.
        optimizer: the optimizer's state dict, on the host.
        policy_config, preprocessor, postprocessor: LeRobot objects, which training does not change.
        state: what else a resume needs.
        adapters: PEFT's config, where `weights` are adapters.
        ready: event after which the copies are complete; None where they are already.
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


class StagingBuffers:
    """Copies of a state dict's tensors in host memory that is used again: fresh memory costs more than the copy into it."""

    def __init__(self):
        self.buffers: dict[tuple, Tensor] = {}

    def of(self, tree, path: tuple = ()):
        """`tree` with each tensor copied; tensors that are one (tied weights) stay one."""
        self.seen = {} if path == () else self.seen
        if isinstance(tree, dict):
            return {key: self.of(item, (*path, key)) for key, item in tree.items()}
        if isinstance(tree, (list, tuple)):
            return type(tree)(self.of(item, (*path, i)) for i, item in enumerate(tree))
        return self._copy(tree.detach(), path) if isinstance(tree, Tensor) else tree

    def _copy(self, tensor: Tensor, path: tuple) -> Tensor:
        view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if view in self.seen and tensor.numel():
            return self.seen[view]
        buffer = self.buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        self.buffers[path] = self.seen[view] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        return buffer


def on_host(tree):
    """`tree` with its tensors on the host: themselves where they are there already."""
    if isinstance(tree, dict):
        return {key: on_host(item) for key, item in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(on_host(item) for item in tree)
    return tree.detach().cpu() if isinstance(tree, Tensor) else tree


class Writer:
    """Writes the checkpoints of a run, one at a time, and deletes those that are not to be kept.

    A save that fails is told and tried again at the next one, or on leaving; two in a row stop the run.

    Args:
        output_dir: where the checkpoint-<step> folders go.
        config: save_async (write in a thread, from copies in host memory), keep_last and keep_every (see `prune`).
        warn: called with a line for people.
        saved: the newest checkpoint there is, None before the first.
    """

    def __init__(self, output_dir: Path, config: TrainConfig, warn, saved: Path | None):
        self.output_dir, self.config, self.warn, self.saved = output_dir, config, warn, saved
        self.background = config.save_async == "on"
        self.copies, self.thread, self.snapshot = StagingBuffers(), None, None
        self.failures: list[BaseException] = []  # of saves in a row
        self.uploader = Uploader(config.push_to_hub, warn) if config.push_checkpoints else None

    def save(self, snapshot: Snapshot, protected=()) -> None:
        """Save this snapshot, which is copied first; `never` are checkpoints that are not to be deleted for it.

        Raises:
            UserError: saving failed twice in a row.
        """
        self.wait()
        self.protected = protected
        device = next(iter(snapshot.weights.values())).device
        trees = snapshot.weights, snapshot.trained_weights, snapshot.optimizer
        weights, trained_weights, optimizer = (self.copies.of if self.background else on_host)(trees)
        ready = None
        if self.background and device.type == "cuda":  # queued before the next step's kernels: no need to wait here
            ready = torch.cuda.current_stream(device).record_event()
        snapshot = replace(snapshot, weights=weights, trained_weights=trained_weights, optimizer=optimizer, ready=ready)
        self.snapshot = snapshot
        if self.background:
            self.thread = threading.Thread(target=self._write, name="checkpoint writer", daemon=True)
            self.thread.start()
        else:
            self._write()
            self.check()

    def _write(self) -> None:
        try:
            if self.snapshot.ready is not None:
                self.snapshot.ready.synchronize()
            self.saved = write_checkpoint(self.output_dir, self.snapshot)
            protected = [*self.protected, *mark_best(self.output_dir)]
            if self.uploader is not None:
                self.uploader.put(self.saved)
                protected += self.uploader.in_use
            prune(self.output_dir, self.snapshot.step, self.config.keep_last, self.config.keep_every, protected)
            self.failures, self.snapshot = [], None
        except BaseException as error:  # reaches the loop at its next save, log line or end
            if isinstance(error, OSError):  # the checkpoint is whole: naming the best or deleting old ones failed
                error = UserError(f"{self.output_dir} could not be written: {one_line(error)}")
            self.failures.append(error)
            if isinstance(error, UserError) and len(self.failures) == 1:
                self.warn(f"{error}; training goes on, and the next save tries again")

    def check(self) -> None:
        """Raise what stopped the writer for good: a second failure in a row, or a mistake of ours."""
        for error in self.failures:
            if not isinstance(error, UserError):
                raise error
        if len(self.failures) > 1:
            raise UserError(f"{self.failures[-1]}; that was the second time in a row: free some space and resume")

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
        """Wait, and try once more what could not be written.

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
            self.uploader.close(60 if kind is None else 0)
        if kind is None:
            self.finish()
        elif self.thread is not None and (in_notebook() or not issubclass(kind, KeyboardInterrupt)):
            self.thread.join()  # in a notebook too, where the thread would meet the next run's


def write_checkpoint(output_dir: Path, snapshot: Snapshot) -> Path:
    """Write checkpoint-<step> into `output_dir` and return it.

    Raises:
        UserError: the disk is full or cannot be written; nothing is left behind and earlier checkpoints are untouched.
    """
    name = f"checkpoint-{snapshot.step}"
    place, backup = output_dir / name, output_dir / f".{name}.old"
    folder = output_dir / f".{name}.{uuid4().hex[:8]}.tmp"  # its own even if an interrupted run's thread writes on
    try:
        folder.mkdir()
        save_model(SimpleNamespace(state_dict=lambda: snapshot.weights), str(folder / WEIGHTS))
        snapshot.policy_config.save_pretrained(folder)
        snapshot.preprocessor.save_pretrained(folder, config_filename="preprocessor_config.json")
        snapshot.postprocessor.save_pretrained(folder, config_filename="postprocessor_config.json")
        if snapshot.trained_weights:
            save_model(SimpleNamespace(state_dict=lambda: snapshot.trained_weights), str(folder / TRAINED_WEIGHTS))
        torch.save(snapshot.optimizer, folder / OPTIMIZER)
        for part in ("trainer_state", "train_config", "training_info"):
            (folder / f"{part}.json").write_text(json.dumps(getattr(snapshot.state, part), indent=2) + "\n")
        if snapshot.adapters is not None:
            snapshot.adapters.save_pretrained(folder)
        for alias, source in ALIASES.items():
            adapters = snapshot.adapters is not None and source == WEIGHTS
            link(folder / source, folder / (ADAPTER if adapters else alias))
        write_manifest(folder)
        for path in [*sorted(folder.iterdir()), folder, output_dir / "metrics.jsonl"]:
            flush(path)
        if place.exists():  # an earlier course of this run wrote that step
            shutil.rmtree(backup, ignore_errors=True)
            os.rename(place, backup)
        os.rename(folder, place)
        flush(output_dir)
        shutil.rmtree(backup, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if backup.exists() and not place.exists():
            os.rename(backup, place)
        # torch and safetensors tell a full disk as errors of their own
        if isinstance(error, OSError) or any(word in str(error).lower() for word in ("write", "os error")):
            raise UserError(f"{name} could not be written to {output_dir}: {one_line(error)[:200]}") from error
        raise
    return place


def link(source: Path, alias: Path) -> None:
    """`alias` as a hard link to `source`, or as a copy where the file system has none."""
    try:
        os.link(source, alias)
    except OSError:
        shutil.copyfile(source, alias)


def flush(path: Path) -> None:
    """Have a file or folder on the disk itself, not only in the system's cache; nothing if it is not there."""
    if not path.exists() or (path.is_dir() and os.name == "nt"):  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def mark_best(output_dir: Path) -> list[Path]:
    """Name the checkpoint with the lowest validation loss in best.json; returns it, or nothing if none was validated."""
    best, loss = best_checkpoint(output_dir)
    if best is None:
        return []
    fresh = output_dir / ".best.json.tmp"
    fresh.write_text(json.dumps({"checkpoint": best.name, "val_loss": loss}) + "\n")
    os.replace(fresh, output_dir / "best.json")
    return [best]


@contextlib.contextmanager
def finishing(checkpoint: Path, output_dir: Path):
    """Within this, a disk that fails is a line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{checkpoint} is whole, but the finished policy cannot be written to {output_dir} ({one_line(error)}): "
            f"make room and go on from it with --resume_from_checkpoint {checkpoint}"
        ) from error


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Put the files that run the policy into `output_dir` itself, one atomic replacement each."""
    for source in sorted(checkpoint.iterdir()):
        if source.name not in NOT_FINAL:
            fresh = output_dir / f".{source.name}.tmp"
            # weights are linked, for their size; what a person might edit is copied, or the checkpoint would change with it
            (link if source.suffix == ".safetensors" else shutil.copyfile)(source, fresh)
            os.replace(fresh, output_dir / source.name)


@contextlib.contextmanager
def sole_writer(output_dir: Path):
    """Within this, no other run writes into `output_dir`, and nothing half-written lies in it.

    The lock is the system's (flock), which goes with the process that holds it, however that ends.

    Raises:
        UserError: another run holds it (its pid and host are named), it is no run's folder, or cannot be written.
    """
    from filelock import FileLock, Timeout

    fresh, lock = not output_dir.exists(), FileLock(output_dir / LOCK, timeout=0)
    try:
        others = [name for name in ("meta", "README.md", "config.json") if (output_dir / name).exists()]
        if others and not (output_dir / LOCK).exists() and not find_checkpoints(output_dir):
            message = f"--output_dir {output_dir} is no run's folder, it holds {others[0]}"
            raise UserError(f"{message}: pass another, which may be new")
        output_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        owner = {"pid": os.getpid(), "host": socket.gethostname()}
        (output_dir / OWNER).write_text(json.dumps(owner) + "\n")
        recover(output_dir)
    except Timeout:
        raise UserError(f"--output_dir {output_dir} is being written by {owner_of(output_dir)}") from None
    except OSError as error:
        lock.release()
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        (output_dir / OWNER).unlink(missing_ok=True)
        lock.release()
        if fresh and [path.name for path in output_dir.iterdir()] == [LOCK]:  # a run that never began
            shutil.rmtree(output_dir)


def owner_of(output_dir: Path) -> str:
    try:
        owner = json.loads((output_dir / OWNER).read_text())
        return f"process {owner['pid']} on {owner['host']}: stop that run first, or pass another --output_dir"
    except (OSError, ValueError, KeyError):  # between its lock and its name
        return "another process: stop that run first, or pass another --output_dir"
