"""A raw frame store that fills while a run reads it, so that training starts at once and each frame is decoded once.

Until it is complete it is in its build folder:

    frames.u8    (N, C, h, w) uint8, zeros where nothing was written
    rows.u64     (N,) uint64: 2**32 + CRC-32 of each row's bytes, written after them; 0 for a row that is not there

What an earlier process wrote is compared with its CRC when it is first read. Several processes may fill a store at once: they
write the same bytes to the same places.

N rows, n frames, C channels, h and w pixels at training size.
"""

import json
import mmap
import os
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.decode import CHUNK
from data.frame_store import FrameStore
from data.page_cache import write_at
from errors import printable, reason_of_disk

BLOCK = 4096  # bytes: direct writes begin and end at multiples
WRITTEN = 1 << 32  # in rows.u64
CHECK_EVERY = 64  # writes between two looks at whether all rows are there


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
        self.of_thread = threading.local()  # a buffer for direct writes
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
        return self

    def _make_files(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        about = {
            "dataset": self.source.name,
            "camera": self.store.key,
            "frames": self.shape[0],
            "shape": self.shape[1:],
        }
        (folder / "about.json").write_text(json.dumps(about))
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
        for i in np.flatnonzero(found & ~self.is_checked[numbers]):
            row = int(numbers[i])
            if self.is_checked[row]:
                continue
            if int(entries[i]) == WRITTEN + zlib.crc32(self.stored[row].numpy()):
                self.is_checked[row] = True
            else:  # lost in a power cut
                self.rows[row] = 0
                found[i] = False
        return torch.from_numpy(found)

    def runs(self, rows: Tensor) -> list[Tensor]:
        """The rows to decode for (n,) ascending rows that are not there: for a video, whole groups of frames from a key frame on,
        in runs of consecutive rows."""
        key = self.store.key
        if key not in self.source.videos:
            return list(rows.split(1))
        videos = self.source.videos[key]
        files, numbers = self.source.locate(key, rows)
        episodes = self.source.episode_of(rows)
        spans = {}
        for file, number, episode in zip(files.tolist(), numbers.tolist(), episodes.tolist(), strict=True):
            times = videos.times[file]
            group = int(np.searchsorted(times.key_pts, times.pts[number], side="right"))
            edges = times.key_pts[max(group - 1, 0) : group + 1]
            first, *after = np.searchsorted(times.pts, edges).tolist() or [0]
            end = after[0] if after else len(times.pts)
            # The frames of the group that belong to this episode, as rows.
            first_row = int(self.source.starts[episode])
            offset = first_row - int(videos.first_frame[episode])
            spans[max(first + offset, first_row), min(end + offset, int(self.source.ends[episode]))] = None
        found = []
        for first_row, end_row in spans:
            group = torch.arange(first_row, end_row)
            # Those that were asked for in any case: another thread may have written one by now.
            missing = group[~self.holds(group) | torch.isin(group, rows)]
            gaps = (torch.diff(missing) > 1).nonzero().flatten() + 1
            found += [run for run in missing.tensor_split(gaps) if len(run)]
        return found

    def decode(self, run: Tensor, use) -> None:
        """Decode consecutive rows and keep them.

        Args:
            use: called with each row's number and its (C, h, w) pixels.
        """
        for rows in run.split(CHUNK):
            pixels = self.store.decoder.read(self.store.key, rows).contiguous()  # (n, C, h, w)
            for row, of_row in zip(rows.tolist(), pixels, strict=True):
                use(row, of_row)
            if not self.is_full:
                self._put(int(rows[0]), pixels)

    def _put(self, first_row: int, pixels: Tensor) -> None:
        try:
            position = first_row * self.frame_bytes
            if self.direct is not None:
                write_at(self.direct, self._aligned(pixels), position)
            else:
                write_at(self.data, memoryview(pixels.numpy()).cast("B"), position)
        except OSError as error:
            self.is_full = True
            line = (
                f"the frames of {self.store.key} cannot be kept in {self.store.folder.parent}: {reason_of_disk(error)}. "
                "Frames are decoded as they are needed"
            )
            print(printable(line), file=sys.stderr, flush=True)
            return
        for row, of_row in enumerate(pixels, start=first_row):
            self.rows[row] = WRITTEN + zlib.crc32(of_row.numpy())
            self.is_checked[row] = True
        self.writes += 1
        if self.writes % CHECK_EVERY == 0 or first_row + len(pixels) == self.shape[0]:
            self.finish()

    def _aligned(self, pixels: Tensor) -> memoryview:
        """The bytes of pixels at an address that direct writes take, in a buffer of this thread."""
        if not hasattr(self.of_thread, "buffer"):
            self.of_thread.buffer = mmap.mmap(-1, CHUNK * self.frame_bytes)
        buffer = self.of_thread.buffer
        count = pixels.numel()
        torch.frombuffer(buffer, dtype=torch.uint8, count=count).copy_(pixels.flatten())
        return memoryview(buffer)[:count]

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
        if not self.is_full:
            self.finish()
        for file in (self.data, self.direct):
            if file is not None:
                os.close(file)


def open_sized(path: Path, size: int) -> int:
    """A descriptor of a file of this size, whose new bytes are zeros."""
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    if os.fstat(file).st_size != size:
        os.ftruncate(file, 0)
        os.ftruncate(file, size)
    return file


def open_direct(path: Path) -> int | None:
    """A descriptor for writes that go past the system's page cache: filling fresh pages of it takes longer than decoding does.
    None where the system or the file system has no such writes."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_DIRECT)
    except OSError:
        return None
