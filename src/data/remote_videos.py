"""Videos of a streamed dataset: files that libraries read from, whose pieces are fetched when they are needed or ahead of that."""

import contextlib
import hashlib
import io
import queue
import threading
from concurrent.futures import Future, InvalidStateError
from functools import cached_property
from pathlib import Path

import numpy as np

from data.frame_times import FrameTimes
from data.page_cache import PAGE, PageCache
from data.placeholders import AS_LISTED, kept_spans
from data.remote import CONNECTIONS, RemoteFolder
from errors import UserError, reason_of_disk

AFTER = 3  # packets behind a frame's own that a decoder may want before it gives the frame


class Pages:
    """Pieces of remote videos: from the cache, or fetched. Any thread may ask.

    Args:
        cache: where pages are kept.
        remote: where they come from.
    """

    def __init__(self, cache: PageCache, remote: RemoteFolder):
        self.cache = cache
        self.remote = remote
        self.jobs: queue.SimpleQueue = queue.SimpleQueue()
        self.lock = threading.Lock()  # held while `arriving` changes
        self.arriving: dict[tuple[bytes, int], Future] = {}  # pages that are asked for
        # Daemons, unlike the threads of an executor: one that waits for a server must not keep the process alive.
        for _ in range(CONNECTIONS):
            threading.Thread(target=self._work, name="fetch", daemon=True).start()

    def _work(self) -> None:
        while self._do(self.jobs.get()):
            pass

    def _do(self, job: tuple | None) -> bool:
        """Fetch a run of pages; False to end the thread."""
        if job is None:
            return False
        video, run, arriving = job
        try:
            found = self._fetch_run(video, run)
        except BaseException as error:
            settle(arriving, error)
        else:
            settle(arriving, found)
        finally:
            with self.lock:
                for page in run:
                    self.arriving.pop((video.hash, page), None)
        return True

    def stop(self) -> None:
        """End the threads, and whatever waits for a page."""
        self.remote.stopped.set()
        for _ in range(CONNECTIONS):
            self.jobs.put(None)
        with self.lock:
            waited_for = set(self.arriving.values())
        for arriving in waited_for:
            settle(arriving, UserError(f"{self.remote.url} was closed"))

    @property
    def capacity(self) -> int:
        """Pages that the cache holds."""
        return self.cache.max_segments * self.cache.pages_per_segment

    def request(self, video: "RemoteVideo", pages: list[int]) -> dict[int, Future]:
        """Ask for those of some pages that are not in the cache; returns what arrives for them, {page: bytes} each."""
        if self.remote.stopped.is_set():
            raise UserError(f"{self.remote.url} was closed")
        requested = {}
        with self.lock:
            runs: list[list[int]] = []
            for page in pages:
                arriving = self.arriving.get((video.hash, page))
                if arriving is not None:
                    requested[page] = arriving
                elif not self.cache.has(video.hash, page):
                    if runs and page == runs[-1][-1] + 1:
                        runs[-1].append(page)
                    else:
                        runs.append([page])
            for run in runs:
                arriving = Future()
                self.jobs.put((video, run, arriving))
                for page in run:
                    self.arriving[video.hash, page] = requested[page] = arriving
        return requested

    def _fetch_run(self, video: "RemoteVideo", run: list[int]) -> dict[int, bytes]:
        start = run[0] * PAGE
        content = self.remote.read_range(video.name, start, min(video.size, (run[-1] + 1) * PAGE), video.version)
        found = {}
        for page in run:
            found[page] = content[page * PAGE - start : (page + 1) * PAGE - start]
            self._keep(video, page, found[page])
        return found

    def _keep(self, video: "RemoteVideo", page: int, content: bytes) -> None:
        try:
            self.cache.put(video.hash, page, content)
        except OSError as error:
            raise UserError(
                f"{self.cache.folder} cannot be written: {reason_of_disk(error)}. Free some space, or pass a smaller --cache_gb"
            ) from error

    def read(self, video: "RemoteVideo", page: int) -> bytes:
        """A page of a video."""
        content = self.cache.get(video.hash, page)
        while content is None:
            requested = self.request(video, [page])
            if requested:
                return requested[page].result()[page]
            content = self.cache.get(video.hash, page)  # it has just arrived
        return content


def settle(future: Future, result) -> None:
    """Give a future its result or exception, if it has none yet."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)


class RemoteVideo:
    """A video of a streamed dataset.

    Args:
        stream: the Stream of the dataset.
        path: its placeholder.
        times: of its frames.
    """

    def __init__(self, stream, path: Path, times: FrameTimes):
        self.stream = stream
        self.path = path
        self.times = times
        self.name = path.relative_to(stream.folder).as_posix()
        self.size = path.stat().st_size
        self.version = stream.checked[self.name].version
        self.hash = hashlib.sha256(f"{self.name} {self.size} {self.version}".encode()).digest()[:16]
        self.kept = kept_spans(path)
        self._lock = threading.Lock()  # held while `_packets` is made

    def open(self) -> "VideoReader":
        """A file to read from, for one thread."""
        return VideoReader(self, self.stream.pages)

    def read(self, start: int, end: int, pages: Pages) -> bytes:
        """The bytes from `start` on, at most up to `end`: as many as are in one piece."""
        for first, last in self.kept:
            if first <= start < last:
                with open(self.path, "rb") as file:
                    file.seek(start)
                    return file.read(min(end, last) - start)
        page = start // PAGE
        return pages.read(self, page)[start - page * PAGE : end - page * PAGE]

    def request(self, numbers: np.ndarray) -> tuple[list[Future], float]:
        """Ask for what decoding these frames needs; returns what to wait for, and its share of the cache."""
        needed = set()
        for number in np.unique(numbers).tolist():
            start, end = self.span_of(number)
            needed.update(range(start // PAGE, -(-end // PAGE)))
        pages = self.stream.pages
        return list(pages.request(self, sorted(needed)).values()), len(needed) / pages.capacity

    def span_of(self, number: int) -> tuple[int, int]:
        """[start, end) of the bytes of the video from a frame's key frame to the frame."""
        with self._lock:
            pts, positions, ends = self._packets
        key = np.searchsorted(self.times.key_pts, self.times.pts[number], side="right") - 1
        first = int(np.searchsorted(pts, self.times.key_pts[max(key, 0)])) if len(self.times.key_pts) else 0
        own = int(np.searchsorted(pts, self.times.pts[number]))
        some = slice(min(first, own), own + 1 + AFTER)
        return int(positions[some].min()), int(ends[some].max())

    @cached_property
    def _packets(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each packet, ascending by presentation time: that time, and where its bytes begin and end."""
        import av

        with av.open(str(self.path), options=AS_LISTED) as container:
            stream = container.streams.best("video")
            packets = [(p.pts, p.pos, p.pos + p.size) for p in container.demux(stream) if p.size and p.pts is not None]
        pts, positions, ends = np.array(sorted(packets), np.int64).reshape(-1, 3).T
        return pts, positions, ends


class VideoReader(io.RawIOBase):
    """A remote video as a file that libraries read from."""

    def __init__(self, video: RemoteVideo, pages: Pages):
        self.video = video
        self.pages = pages
        self.position = 0
        self.error: UserError | None = None  # why a read failed, which a library may hide in an error of its own

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.video.size}[whence]
        self.position = max(0, start + offset)
        return self.position

    def read(self, size: int = -1) -> bytes:
        end = self.video.size if size is None or size < 0 else min(self.video.size, self.position + size)
        if end <= self.position:
            return b""
        try:
            content = self.video.read(self.position, end, self.pages)
        except UserError as error:
            self.error = error
            raise
        self.position += len(content)
        return content

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
