"""A raw frame store that fills while a run reads it, so that training starts at once and each frame is decoded once.

Until it is complete it is in its build folder:

    frames.u8    (N, C, h, w) uint8, zeros where nothing was written
    rows.u64     (N,) uint64: 2**32 + a checksum of each row's bytes, written after them; 0 for a row that is not there

What an earlier process wrote is compared with its checksum when it is first read. Several processes may fill a store at once: they
write the same bytes to the same places.

N rows, n frames, C channels, h and w pixels at training size.
"""

import mmap
import os
import queue
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.decode import CHUNK
from data.frame_store import FrameStore
from data.frame_times import FrameTimes
from data.pixels import contiguous_pictures
from data.read_ahead import read_ahead
from errors import printable, reason_of_disk

CAN_GROW = hasattr(os, "pwrite")  # which Windows has not
BLOCK = 4096  # bytes: direct writes begin and end at multiples
WRITTEN = 1 << 32  # in rows.u64
LEAST_DIRECT = 2**20  # bytes of a write: smaller ones reach the page cache sooner than the disk
WRITERS = 2
CHECK_EVERY = 64  # writes between two looks at whether all rows are there


@dataclass(eq=False)
class Job:
    """Rows that are decoded together.

    Attributes:
        rows: (n,) ascending rows of one file.
        callbacks: called with each row's number and its (C, h, w) pixels.
        pixels: (n, C, h, w) uint8, from when they are decoded to when they are written.
        future: when all `callbacks` were called.
    """

    rows: Tensor
    callbacks: list[Callable[[int, Tensor], None]]
    pixels: Tensor | None = None
    future: Future | None = None


class GrowingStore:
    """A store that is read and filled by row. Any thread may do both.

    Args:
        store: the raw store that it becomes.
    """

    def __init__(self, store: FrameStore):
        self.store = store
        self.shape = store.shape
        self.frame_bytes = int(np.prod(self.shape[1:]))
        self.source = store.decoder.source
        self.is_full = False  # the disk has no more room
        self.lock = threading.Lock()  # held while the store is finished
        self.pending: dict[int, Job] = {}  # of each row that is not written yet
        self.pending_lock = threading.Lock()  # held while `pending`, or a job that is in it, changes
        self.writer = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")  # starts its threads at its first job
        self.buffers: queue.SimpleQueue = queue.SimpleQueue()  # for direct writes, at addresses that these take
        self.writes = 0

    def start(self) -> "GrowingStore":
        """Make the files, or open those of an earlier run.

        Raises:
            OSError: the disk refuses.
        """
        from filelock import FileLock

        folder = self.store.build_folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{folder.name}.lock"):  # another process may be making them
            self._make_files(folder)
        self.stored = torch.from_numpy(np.memmap(folder / self.store.data_file, np.uint8, "r+", shape=self.shape))
        self.rows = np.memmap(folder / "rows.u64", np.uint64, "r+", shape=self.shape[:1])
        self.is_checked = np.zeros(self.shape[0], bool)  # rows that this process wrote, or compared with their CRC
        self.direct = None
        if self.frame_bytes % BLOCK == 0:
            self.direct = open_direct(folder / self.store.data_file)
        for _ in range(2 * WRITERS if self.direct is not None else 0):
            self.buffers.put(mmap.mmap(-1, CHUNK * self.frame_bytes))
        return self

    def _make_files(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.store.write_about()
        (folder / "journal.txt").unlink(missing_ok=True)  # of a build that was stopped
        self.data = open_sized(folder / self.store.data_file, self.store.num_bytes)
        rows = open_sized(folder / "rows.u64", 8 * self.shape[0])
        try:
            # All on the disk from the start: a disk that is full when mapped memory is written to would end the process.
            write_at(rows, os.pread(rows, 8 * self.shape[0], 0), 0)
        finally:
            os.close(rows)

    def holds(self, rows: Tensor) -> Tensor:
        """(n,) bool whether the frames at (n,) rows are there."""
        numbers = rows.numpy()
        entries = self.rows[numbers]
        found = entries != 0
        unchecked = np.flatnonzero(found & ~self.is_checked[numbers])
        read_ahead(self.stored, rows[unchecked])
        for i in unchecked:
            row = int(numbers[i])
            if self.is_checked[row]:
                continue
            if int(entries[i]) == WRITTEN + checksum(self.stored[row].numpy()):
                self.is_checked[row] = True
            else:  # lost in a power cut
                self.rows[row] = 0
                found[i] = False
        return torch.from_numpy(found)

    def request(
        self, rows: Tensor, on_decoded: Callable[[int, Tensor], None], pool: ThreadPoolExecutor
    ) -> list[Future]:
        """Start to decode the frames at (n,) ascending rows that are not stored yet, and those around them in their video.

        Args:
            on_decoded: called with each row's number and its (C, h, w) pixels, and for other rows as well.
            pool: whose threads decode.

        Returns:
            Futures to wait for. Frames that another batch has requested already are not decoded again.
        """
        futures = []
        missing = []
        with self.pending_lock:
            for row in rows.tolist():
                job = self.pending.get(row)
                if job is None:
                    missing.append(row)
                elif job.pixels is None:
                    if on_decoded not in job.callbacks:
                        job.callbacks.append(on_decoded)
                        futures.append(job.future)
                else:
                    on_decoded(row, job.pixels[int(torch.searchsorted(job.rows, row))])
            for some in self.jobs(torch.tensor(missing, dtype=torch.int64)):
                job = Job(some, [on_decoded])
                job.future = pool.submit(self.decode, job)
                self.pending.update(dict.fromkeys(some.tolist(), job))
                futures.append(job.future)
        return futures

    def jobs(self, rows: Tensor) -> list[Tensor]:
        """The rows to decode for (n,) ascending rows that are not there, with those around them in their video: at most CHUNK
        ascending rows of one file each."""
        key = self.store.key
        if key not in self.source.videos:
            return list(rows.split(1))
        videos = self.source.videos[key]
        files, numbers = self.source.locate(key, rows)
        episodes = self.source.episode_of(rows)
        # Pieces of CHUNK frames: decoding these together is faster than one by one.
        pieces = torch.stack([files, episodes, numbers // CHUNK], dim=1).unique(dim=0)
        spans = {}
        for file, episode, piece in pieces.tolist():
            first, end = whole_groups(videos.times[file], piece * CHUNK, (piece + 1) * CHUNK)
            # Their rows, without those of other episodes.
            first_row = int(self.source.starts[episode])
            offset = first_row - int(videos.first_frame[episode])
            spans[max(first + offset, first_row), min(end + offset, int(self.source.ends[episode]))] = file
        by_file: dict[int, list[Tensor]] = {}
        for (first_row, end_row), file in spans.items():
            group = torch.arange(first_row, end_row)
            # Those that were asked for in any case: another thread may have written one by now.
            is_known = self.holds(group) | torch.tensor([row in self.pending for row in group.tolist()])
            by_file.setdefault(file, []).append(group[~is_known | torch.isin(group, rows)])
        jobs = []
        for groups in by_file.values():
            jobs += torch.cat(groups).sort().values.split(CHUNK)
        return jobs

    def decode(self, job: Job) -> None:
        """Decode a job, hand its pixels over and keep them."""
        buffer = None
        try:
            frames = self.store.decoder.read(self.store.key, job.rows)  # (n, C, h, w), not contiguous
            memory = None
            if self.direct is not None and frames.nbytes >= LEAST_DIRECT:
                buffer = self.buffers.get()
                memory = torch.frombuffer(buffer, dtype=torch.uint8, count=frames.numel())
            pixels = contiguous_pictures(frames, memory)
            with self.pending_lock:
                job.pixels = pixels
            for on_decoded in job.callbacks:  # no other is added now
                for row, of_row in zip(job.rows.tolist(), pixels, strict=True):
                    on_decoded(row, of_row)
            # A direct write waits for the disk: in another thread, so that this one decodes meanwhile.
            if buffer is not None:
                self.writer.submit(self._write_job, job, pixels, buffer)
                return
        except BaseException:
            self._forget(job, buffer)
            raise
        self._write_job(job, pixels, None)

    def _write_job(self, job: Job, pixels: Tensor, buffer: mmap.mmap | None) -> None:
        try:
            self._write_runs(self.data if buffer is None else self.direct, job.rows, pixels)
        finally:
            self._forget(job, buffer)

    def _forget(self, job: Job, buffer: mmap.mmap | None) -> None:
        """Take a job out of `pending`: from now on its buffer may be filled again."""
        with self.pending_lock:
            job.pixels = None
            for row in job.rows.tolist():
                if self.pending.get(row) is job:
                    del self.pending[row]
        if buffer is not None:
            self.buffers.put(buffer)

    def _write_runs(self, file: int, rows: Tensor, pixels: Tensor) -> None:
        """Keep the pixels of ascending rows, each run of consecutive ones in one piece."""
        gaps = (torch.diff(rows) > 1).nonzero().flatten() + 1
        for run, of_run in zip(rows.tensor_split(gaps), pixels.tensor_split(gaps), strict=True):
            if not self.is_full:
                self._write(file, int(run[0]), of_run.numpy())

    def _write(self, file: int, first_row: int, pixels: np.ndarray) -> None:
        try:
            write_at(file, memoryview(pixels).cast("B"), first_row * self.frame_bytes)
        except OSError as error:
            if not self.is_full:
                self.is_full = True
                line = (
                    f"the frames of {self.store.key} cannot be kept in {self.store.folder.parent}: {reason_of_disk(error)}. "
                    "Frames are decoded as they are needed"
                )
                print(printable(line), file=sys.stderr, flush=True)
            return
        for row, of_row in enumerate(pixels, first_row):
            self.rows[row] = WRITTEN + checksum(of_row)
            self.is_checked[row] = True
        self.writes += 1
        if self.writes % CHECK_EVERY == 0:
            self.finish()

    def finish(self) -> None:
        """Make it a finished store if all rows are there."""
        with self.lock:
            if self.store.is_finished or np.count_nonzero(self.rows) < self.shape[0]:
                return
            if not self.holds(torch.arange(self.shape[0])).all():
                return
            os.fsync(self.data)
            (self.store.build_folder / "rows.u64").unlink(missing_ok=True)
            try:
                os.rename(self.store.build_folder, self.store.folder)
            except OSError:
                return  # another process was faster

    def close(self) -> None:
        self.writer.shutdown(wait=True)
        if not self.is_full:
            self.finish()
        if self.store.is_finished:  # by another process, before this one made the files again
            shutil.rmtree(self.store.build_folder, ignore_errors=True)
        for file in (self.data, self.direct):
            if file is not None:
                os.close(file)


def checksum(pixels: np.ndarray) -> int:
    """A sum of a frame's bytes, in 32 bits. Blocks that a power cut loses are zeros, which change it; a CRC takes far longer."""
    content = pixels.reshape(-1)
    words = content[: len(content) // 8 * 8].view(np.uint64)
    total = int(words.sum(dtype=np.uint64)) + int(content[8 * len(words) :].sum(dtype=np.uint64))
    return (total ^ (total >> 32)) & 0xFFFFFFFF


def whole_groups(times: FrameTimes, first: int, end: int) -> tuple[int, int]:
    """The frames [first, end) of a video, or the whole group between two key frames if that is longer: then no frame is decoded
    again on the way to another."""
    keys = np.searchsorted(times.pts, times.key_pts)  # numbers of the key frames
    before = keys[keys <= first]
    after = keys[keys >= end]
    start = int(before[-1]) if len(before) else 0
    stop = int(after[0]) if len(after) else len(times.pts)
    has_key = ((keys > first) & (keys < end)).any()
    return (first, end) if has_key or stop - start <= end - first else (start, stop)


def open_sized(path: Path, size: int) -> int:
    """A descriptor of a file of this size, whose new bytes are zeros."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if os.fstat(file).st_size != size:
        os.ftruncate(file, 0)
        os.ftruncate(file, size)
    return file


def write_at(file: int, content: bytes | memoryview, position: int) -> None:
    """Write all bytes at a position of a file, given its descriptor."""
    while content:
        written = os.pwrite(file, content, position)
        content = content[written:]
        position += written


def open_direct(path: Path) -> int | None:
    """A descriptor for writes that go past the system's page cache: filling fresh pages of it takes longer than decoding does.
    None where the system or the file system has no such writes."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None
