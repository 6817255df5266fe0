"""A bounded cache on disk of pieces of remote files, in pages of 32 KiB.

Pages are appended to segments, files of one size; when the bound is reached, the oldest segment is deleted. A segment is

    segment-<number>.data   pages, one after the other
    segment-<number>.index  a record for each page: which file, which page, length and CRC-32

A page whose CRC does not fit is read again from the server, so that a process that was killed leaves nothing to mend.
"""

import contextlib
import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np

PAGE = 32 * 2**10  # bytes: a frame of 480x640 takes 5 to 60 KB
SEGMENTS = 16  # at least, so that deleting one frees a small part
LARGEST_SEGMENT = 64 * 2**20  # bytes
RECORD = struct.Struct("<16sIII")  # hash of the file, page, length, CRC-32


class Segment:
    """One open segment. The file is closed when nobody reads it any more, also after it was deleted.

    Args:
        folder: of the cache.
        number: of the segment, higher for newer ones.
    """

    def __init__(self, folder: Path, number: int):
        self.number = number
        self.data_path = folder / f"segment-{number:06d}.data"
        self.index_path = self.data_path.with_suffix(".index")
        self.data = os.open(self.data_path, os.O_RDWR | os.O_CREAT)
        self.index = os.open(self.index_path, os.O_RDWR | os.O_CREAT)
        self.records: list[tuple[bytes, int, int, int]] = []

    def load(self) -> None:
        """Read the records of an earlier process, those of pages that were written."""
        pages = os.fstat(self.data).st_size // PAGE
        content = os.pread(self.index, pages * RECORD.size, 0)
        whole = len(content) // RECORD.size
        self.records = list(RECORD.iter_unpack(content[: whole * RECORD.size]))
        os.ftruncate(self.index, whole * RECORD.size)
        os.ftruncate(self.data, whole * PAGE)

    def append(self, file: bytes, page: int, content: bytes) -> int:
        """Write a page; returns its place in the segment."""
        record = (file, page, len(content), zlib.crc32(content))
        position = len(self.records)
        write_at(self.data, content.ljust(PAGE, b"\0"), position * PAGE)
        write_at(self.index, RECORD.pack(*record), position * RECORD.size)
        self.records.append(record)
        return position

    def read(self, position: int, file: bytes, page: int) -> bytes | None:
        """A page; None if its bytes are not those that were written."""
        owner, number, length, crc = self.records[position]
        content = os.pread(self.data, length, position * PAGE)
        is_right = (owner, number) == (file, page) and zlib.crc32(content) == crc
        return content if is_right else None

    def delete(self) -> None:
        for path in (self.data_path, self.index_path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def __del__(self):
        os.close(self.data)
        os.close(self.index)


def write_at(file: int, content: bytes | memoryview, position: int) -> None:
    """Write all bytes at a position of a file, given its descriptor."""
    while content:
        written = os.pwrite(file, content, position)
        content = content[written:]
        position += written


class PageCache:
    """Pages of remote files, at most `max_bytes` of them on disk. Any thread may read and write.

    Args:
        folder: of its own, used by one process at a time.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        segment_bytes = min(LARGEST_SEGMENT, max(PAGE, max_bytes // SEGMENTS))
        self.pages_per_segment = segment_bytes // PAGE
        self.max_segments = max(1, max_bytes // (self.pages_per_segment * PAGE))
        self.lock = threading.Lock()
        self.segments: dict[int, Segment] = {}  # by number, oldest first
        self.places: dict[bytes, np.ndarray] = {}  # of each file, the place of each page in all segments; -1 for none

    def open(self) -> "PageCache":
        """Find the pages that an earlier process left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("segment-*.data"))
        for number in numbers:
            segment = Segment(self.folder, number)
            segment.load()
            if len(segment.records) > self.pages_per_segment:  # of a larger cache
                segment.delete()
                continue
            self.segments[number] = segment
            for position, (file, page, _, _) in enumerate(segment.records):
                self._set_place(file, page, number * self.pages_per_segment + position)
        while len(self.segments) > self.max_segments:
            self._delete_oldest()
        return self

    def get(self, file: bytes, page: int) -> bytes | None:
        """A page of a file, by the file's hash (16 bytes); None if it is not there."""
        with self.lock:
            places = self.places.get(file)
            place = -1 if places is None or page >= len(places) else int(places[page])
            segment = self.segments.get(place // self.pages_per_segment) if place >= 0 else None
        if segment is None:
            return None
        return segment.read(place % self.pages_per_segment, file, page)

    def has(self, file: bytes, page: int) -> bool:
        with self.lock:
            places = self.places.get(file)
            return places is not None and page < len(places) and places[page] >= 0

    def put(self, file: bytes, page: int, content: bytes) -> None:
        """Keep a page.

        Raises:
            OSError: the disk refuses.
        """
        with self.lock:
            newest = max(self.segments, default=0)
            segment = self.segments.get(newest)
            if segment is None or len(segment.records) >= self.pages_per_segment:
                if len(self.segments) >= self.max_segments:
                    self._delete_oldest()
                segment = self.segments[newest + 1] = Segment(self.folder, newest + 1)
            position = segment.append(file, page, content)
            self._set_place(file, page, segment.number * self.pages_per_segment + position)

    def _set_place(self, file: bytes, page: int, place: int) -> None:
        places = self.places.get(file, np.empty(0, np.int64))
        if page >= len(places):
            longer = np.full(max(page + 1, 2 * len(places)), -1, np.int64)
            longer[: len(places)] = places
            places = self.places[file] = longer
        places[page] = place

    def _delete_oldest(self) -> None:
        number = min(self.segments)
        self.segments.pop(number).delete()
        first = number * self.pages_per_segment
        for places in self.places.values():
            places[(places >= first) & (places < first + self.pages_per_segment)] = -1
