"""One run a folder: the lock on a run's folder, and whether the folder is still the one that was locked."""

import contextlib
import errno
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from checkpoints.folder import find_checkpoints, recover
from errors import UserError, read_json, reason_of_disk

LOCK = ".lock"
OWNER = ".lock.json"  # which run holds the lock
NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)  # what a disk without locks answers


class LostFolderError(UserError):
    """A run's folder was moved, deleted or replaced: what is there now is not this run's to touch."""


@dataclass
class RunFolder:
    """A run's folder while this run holds its lock.

    Attributes:
        path: the folder.
        lock_file: descriptor of the lock file. While it is open, no other file gets its inode number, even if it is deleted.
        owner: what this run wrote into OWNER.
        warnings: what this disk cannot do, and what could not be cleaned up, a line each.
        released: whether the run has ended.
        guard: held while the descriptor is used or closed.
    """

    path: Path
    lock_file: int
    owner: dict
    warnings: list[str] = field(default_factory=list)
    released: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Call right before every change in the folder: raise unless it is still the folder that this run locked.

        Raises:
            LostFolderError: it was moved, deleted or replaced, or another run has begun in it.
            OSError: the disk does not answer.
        """
        lock = self.path / LOCK
        remedy = "Nothing more is written there. Resume from its last checkpoint, where that is now, or start again"
        try:
            with self.guard:
                if self.released:  # a writer that Ctrl-C left behind
                    raise LostFolderError(f"--output_dir {self.path} is not written any more: the run was interrupted")
                is_ours = os.path.samestat(os.stat(lock), os.fstat(self.lock_file))
        except (FileNotFoundError, NotADirectoryError):
            missing = lock if self.path.is_dir() else "it"
            raise LostFolderError(
                f"--output_dir {self.path} was moved or deleted during this run: {missing} is gone. {remedy}"
            ) from None
        if not is_ours:
            raise LostFolderError(
                f"--output_dir {self.path} was replaced during this run: expected the {LOCK} that this run holds, "
                f"got another. {remedy}"
            )
        # On a disk whose locks do nothing, or only on each machine by itself, the run that began last has the folder.
        owner = read_owner(self.path)
        if owner is not None and owner != self.owner:
            raise LostFolderError(f"--output_dir {self.path} was taken over by {name_of(owner)}. {remedy}")

    def release(self) -> None:
        """Close the lock file, and delete this run's name from the folder if the folder is still this run's."""
        with contextlib.suppress(LostFolderError, OSError):
            self.check()
            (self.path / OWNER).unlink(missing_ok=True)
        with self.guard:
            self.released = True
            os.close(self.lock_file)


@contextlib.contextmanager
def sole_writer(output_dir: Path) -> Iterator[RunFolder]:
    """Within this context, no other run writes into `output_dir`, and nothing half-written is in it.

    The lock is the system's (flock): it ends with the process that holds it, even if that is killed.

    Raises:
        UserError: another run holds it (the message names its pid and host), it is not a run's folder, or cannot be written.
    """
    from filelock import FileLock, Timeout

    is_new = not output_dir.exists()
    lock = FileLock(output_dir / LOCK, timeout=0)
    with contextlib.ExitStack() as cleanup:
        try:
            refuse_other_folder(output_dir)
            output_dir.mkdir(parents=True, exist_ok=True)
            cleanup.callback(lock.release)
            warnings = acquire(lock, output_dir)
            folder = take(output_dir)
            cleanup.callback(remove_if_unused, folder, is_new)
            folder.warnings = warnings + recover(output_dir)
        except Timeout:
            raise refusal(output_dir) from None
        except OSError as error:
            raise UserError(f"--output_dir {output_dir} cannot be written: {reason_of_disk(error)}") from error
        yield folder


def acquire(lock, output_dir: Path) -> list[str]:
    """Take the lock; on a disk without locks, go by the run that OWNER names. Returns a warning there.

    Raises:
        UserError: the run that OWNER names is running on this machine.
        Timeout: another run holds the lock.
        OSError: the disk failed.
    """
    try:
        lock.acquire()
        return []
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        reason = reason_of_disk(error)
    owner = read_owner(output_dir)
    if owner is not None and is_running(owner):
        raise refusal(output_dir)
    other = f" {name_of(owner)}, which began here before, stops at its next save if it still runs." if owner else ""
    return [
        f"the disk of {output_dir} has no locks ({reason}), so a run on another machine would not be refused: "
        f"the one that begins last has the folder.{other}"
    ]


def take(output_dir: Path) -> RunFolder:
    """Write this run's name into a folder whose lock it holds."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "run": uuid4().hex}
    lock_file = os.open(output_dir / LOCK, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        (output_dir / OWNER).write_text(json.dumps(owner) + "\n")
    except OSError:
        os.close(lock_file)
        raise
    return RunFolder(output_dir, lock_file, owner)


def remove_if_unused(folder: RunFolder, is_new: bool) -> None:
    """Release a folder, and delete it if the run that made it never began."""
    is_ours = False
    with contextlib.suppress(LostFolderError, OSError):
        folder.check()
        is_ours = True
    folder.release()
    with contextlib.suppress(OSError):
        if is_new and is_ours and [path.name for path in folder.path.iterdir()] == [LOCK]:
            shutil.rmtree(folder.path)


def refuse_other_folder(output_dir: Path) -> None:
    """Raise a UserError if the folder holds a dataset, a project or a policy, and no run."""
    if (output_dir / LOCK).exists() or find_checkpoints(output_dir):
        return
    for name in ("meta", "README.md", "config.json"):
        if (output_dir / name).exists():
            raise UserError(f"--output_dir {output_dir} is not a run's folder: it holds {name}. Pass another folder")


def refusal(output_dir: Path) -> UserError:
    owner = read_owner(output_dir)
    # Without a name: it has the lock, but has not written its name yet.
    other = name_of(owner) if owner else "another process"
    return UserError(
        f"--output_dir {output_dir} is being written by {other}. Stop that run first, or pass another --output_dir"
    )


def read_owner(output_dir: Path) -> dict | None:
    """What the run that holds a folder wrote of itself; None if it is not there or cannot be read."""
    try:
        owner = read_json(output_dir / OWNER)
    except UserError:
        return None
    return owner if {"pid", "host"} <= owner.keys() else None


def name_of(owner: dict) -> str:
    return f"process {owner['pid']} on {owner['host']}"


def is_running(owner: dict) -> bool:
    """Whether the process that `owner` names is running on this machine, and is not this one."""
    pid = owner["pid"]
    if owner["host"] != socket.gethostname() or not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True
