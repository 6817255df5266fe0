"""A bounded cache on disk of pieces of remote files, in pages of 32 KiB.

Pages are appended to segments, files of one size; when the bound is reached, the oldest segment is deleted. A segment is

    segment-<number>.data   pages, one after the other
    segment-<number>.index  a RECORD for each page: which file, which page, length and CRC-32

A page whose CRC does not fit is read again from the server, so that a process that was killed leaves nothing to mend.
"""

import contextlib
import threading
import zlib
from pathlib import Path

import numpy as np

PAGE = 32 * 2**10  # bytes: a frame of 480x640 takes 5 to 60 KB
SEGMENTS = 16  # at least, so that deleting one frees a small part
LARGEST_SEGMENT = 64 * 2**20  # bytes
MOST_PAGES = 2**23  # of a file: 256 GB. A record with a larger number is damaged
RECORD = np.dtype([("file", "V16"), ("page", "<u4"), ("length", "<u4"), ("crc", "<u4")])


class Segment:
    """The pages of one segment. Files are open only while they are read or written: there may be thousands.

    Args:
        folder: of the cache.
        number: of the segment, higher for newer ones.
        size: pages that it can hold.
    """

    def __init__(self, folder: Path, number: int, size: int):
        self.number = number
        self.data_path = folder / f"segment-{number:06d}.data"
        self.index_path = self.data_path.with_suffix(".index")
        self.records = np.zeros(size, RECORD)
        self.count = 0

    def load(self) -> None:
        """Read the records of an earlier process, those of pages that were written.

        Raises:
            ValueError: it has more pages than this cache's segments.
        """
        written = self.data_path.stat().st_size // PAGE
        found = np.fromfile(self.index_path, RECORD)[:written] if self.index_path.exists() else self.records[:0]
        if len(found) > len(self.records):
            raise ValueError(f"{self.data_path} is of a larger cache")
        self.count = len(found)
        self.records[: self.count] = found

    def append(self, file: bytes, page: int, content: bytes) -> int:
        """Write a page; returns its place in the segment.

        Raises:
            OSError: the disk refuses.
        """
        position = self.count
        self.records[position] = (file, page, len(content), zlib.crc32(content))
        write_into(self.data_path, content.ljust(PAGE, b"\0"), position * PAGE)
        write_into(self.index_path, self.records[position].tobytes(), position * RECORD.itemsize)
        self.count += 1
        return position

    def read(self, position: int, file: bytes, page: int) -> bytes | None:
        """A page; None if its bytes are not those that were written."""
        record = self.records[position]
        try:
            with open(self.data_path, "rb") as data:
                data.seek(position * PAGE)
                content = data.read(int(record["length"]))
        except FileNotFoundError:  # it was the oldest, and has just been deleted
            return None
        is_right = record["file"].tobytes() == file and record["page"] == page
        return content if is_right and zlib.crc32(content) == record["crc"] else None

    def delete(self) -> None:
        for path in (self.data_path, self.index_path):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def write_into(path: Path, content: bytes, position: int) -> None:
    """Write bytes at a position of a file, which is made if it is missing."""
    path.touch()
    with open(path, "r+b") as file:
        file.seek(position)
        file.write(content)


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
        """Find the pages that an earlier process left.

        Raises:
            OSError: the disk refuses.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = sorted(int(path.stem.partition("-")[2]) for path in self.folder.glob("segment-*.data"))
        for number in numbers:
            segment = Segment(self.folder, number, self.pages_per_segment)
            try:
                segment.load()
            except ValueError:
                segment.delete()
                continue
            self.segments[number] = segment
            for position, record in enumerate(segment.records[: segment.count]):
                self._set_place(record["file"].tobytes(), int(record["page"]), self._place(number, position))
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
        content = segment.read(place % self.pages_per_segment, file, page)
        if content is None:
            with self.lock:
                if places[page] == place:
                    places[page] = -1
        return content

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
            if segment is None or segment.count >= self.pages_per_segment:
                if len(self.segments) >= self.max_segments:
                    self._delete_oldest()
                segment = self.segments[newest + 1] = Segment(self.folder, newest + 1, self.pages_per_segment)
            position = segment.append(file, page, content)
            self._set_place(file, page, self._place(segment.number, position))

    def _place(self, number: int, position: int) -> int:
        return number * self.pages_per_segment + position

    def _set_place(self, file: bytes, page: int, place: int) -> None:
        if page >= MOST_PAGES:
            return
        places = self.places.get(file, np.empty(0, np.int64))
        if page >= len(places):
            longer = np.full(max(page + 1, 2 * len(places)), -1, np.int64)
            longer[: len(places)] = places
            places = self.places[file] = longer
        places[page] = place

    def _delete_oldest(self) -> None:
        number = min(self.segments)
        self.segments.pop(number).delete()
        first = self._place(number, 0)
        for places in self.places.values():
            places[(places >= first) & (places < first + self.pages_per_segment)] = -1
