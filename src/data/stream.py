"""Train on a dataset that is not downloaded: metadata and tables first, videos by the pages that are needed.

A streamed dataset has a folder in the cache, which looks like the dataset itself:

    meta, data        the files, whole
    videos            placeholders: files of the right size that hold what lists the frames (an MP4's moov box), the first frames and
                      a piece in the middle; the rest are holes
    pages-<n>         pieces of the videos, bounded by --cache_gb (page_cache.py); one for each process
    files.json        {name: [size, version]} of what was fetched, to notice what has changed

Opening, checking and indexing read it as any other folder. Only the decoder reads videos through `RemoteVideo.open`, which fetches
what is missing. As the order of a run is known in advance, the loader asks for pages ahead of it.
"""

import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from data.frame_times import FrameTimes
from data.page_cache import PAGE, PageCache
from data.placeholders import AS_LISTED, KEPT_SUFFIX, first_packets, is_kept, kept_spans, listing_spans
from data.remote import CONNECTIONS, RemoteFile, RemoteFolder, in_parallel
from errors import UserError, read_json, reason_of_disk
from runtime import frame_cache_dir, progress_interval

EPISODES_FILE = "meta/episodes/chunk-{chunk:03d}/file-{file:03d}.parquet"  # of LeRobot v3.0
TABLES = "data/chunk-{chunk:03d}/file-{file:03d}.parquet"
V3_FILES = ("meta/tasks.parquet", "meta/stats.json")
V2_FILES = ("meta/tasks.jsonl", "meta/episodes.jsonl", "meta/episodes_stats.jsonl", "meta/stats.json")
AFTER = 3  # packets behind a frame's own that a decoder may want before it gives the frame


class Stream:
    """A dataset behind a URL, and its folder in the cache.

    Args:
        url: of the dataset's folder.
        cache_dir: the frame cache; None for the user's.
        cache_gb: bound of the pieces of videos, in 1e9 bytes; None for a quarter of the free disk.
        quiet: no progress bar.
    """

    def __init__(self, url: str, cache_dir: str | Path | None, cache_gb: float | None, quiet: bool):
        self.remote = RemoteFolder(url)
        digest = hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        name = self.remote.url.rpartition("/")[2][:50]
        self.folder = frame_cache_dir(cache_dir) / f"{name}-stream-{digest}"
        self.cache_gb = cache_gb
        self.quiet = quiet
        self.checked: dict[str, RemoteFile | None] = {}  # what this process has asked the server about
        self._lock = None  # of this process' pages, held while it lives

    def open(self) -> Path:
        """Fetch the metadata; returns the folder.

        Raises:
            UserError: the server has no such dataset, or does not answer; or the cache cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{self.folder} cannot be written: {reason_of_disk(error)}. Pass another --cache_dir"
            ) from error
        if not self.fetch(["meta/info.json"]):
            raise UserError(f"no dataset at {self.remote.url}: it has no meta/info.json. Check the URL")
        info = read_json(self.folder / "meta" / "info.json")
        about = {"dataset": self.remote.url, "camera": "pieces of its videos", "frames": info.get("total_frames") or 0}
        (self.folder / "about.json").write_text(json.dumps({**about, "shape": ["streamed"]}))
        if not str(info.get("codebase_version")).startswith("v3"):
            self.fetch(list(V2_FILES))
            return self.folder
        self.fetch(list(V3_FILES))
        self._fetch_numbered(EPISODES_FILE, int(info.get("total_episodes") or 0))
        return self.folder

    def _fetch_numbered(self, template: str, total_rows: int) -> None:
        """Fetch the files of a template, counting up, until they have all rows or there is no other."""
        import pyarrow.parquet

        rows = 0
        chunk = 0
        file = 0
        while rows < total_rows or chunk == file == 0:
            name = template.format(chunk=chunk, file=file)
            if self.fetch([name]):
                rows += pyarrow.parquet.read_metadata(self.folder / name).num_rows
                file += 1
            elif file > 0:
                chunk += 1
                file = 0
            else:
                return

    def fetch(self, names: list[str]) -> list[str]:
        """Bring whole files up to date; returns those that the server has."""
        found = self._look_up(names)
        recorded = self._recorded()
        missing = []
        for name in names:
            if found[name] is None:
                (self.folder / name).unlink(missing_ok=True)
            elif recorded.get(name) != entry_of(found[name]) or not (self.folder / name).is_file():
                missing.append(name)
        total = sum(found[name].size for name in missing)
        with self._bar("downloading tables", total, "B") as bar:
            for name in missing:
                self._write(name, lambda file, name=name: self._download(file, name, found[name].size, bar))
        self._record({name: entry_of(found[name]) for name in missing})
        return [name for name in names if found[name] is not None]

    def _download(self, file, name: str, size: int, bar) -> None:
        for start in range(0, size, 16 * 2**20):
            content = self.remote.read_range(name, start, min(size, start + 16 * 2**20))
            file.write(content)
            bar.update(len(content))

    def fetch_videos(self, names: list[str]) -> None:
        """Make the placeholders of videos that have none yet, or an older one. What the server lacks is left out."""
        found = self._look_up(names)
        recorded = self._recorded()
        missing = []
        for name in names:
            if found[name] is not None and not (
                recorded.get(name) == entry_of(found[name]) and (self.folder / name).is_file()
            ):
                missing.append(name)

        def make(name: str) -> None:
            size = found[name].size
            spans = listing_spans(lambda start, end: self.remote.read_range(name, start, end), size)
            if spans is None:
                self.complete(self.folder / name, size)
                return

            def write(file) -> None:
                file.truncate(size)
                for start, content in spans.items():
                    file.seek(start)
                    file.write(content)

            self._write(name, write)
            path = self.folder / name
            kept = [[start, start + len(content)] for start, content in spans.items()]
            with open(path, "r+b") as file:
                for start, end in first_packets(path):
                    if not is_kept(kept, start, end):
                        file.seek(start)
                        file.write(self.remote.read_range(name, start, end))
                        kept.append([start, end])
            path.with_suffix(KEPT_SUFFIX).write_text(json.dumps(kept))

        with self._bar("reading the lists of videos", len(missing), "file") as bar:
            in_parallel(make, missing, bar)
        self._record({name: entry_of(found[name]) for name in missing})

    def fetch_tables(self, meta, names: list[str] | None) -> None:
        """Fetch the tables of a dataset; `names` is None where its metadata do not name them."""
        if names is None:
            self._fetch_numbered(TABLES, meta.info.total_frames)
        else:
            self.fetch(names)

    def complete(self, path: Path, size: int) -> None:
        """Download a video whole, since its frames cannot be listed without that."""
        name = path.relative_to(self.folder).as_posix()
        with self._bar(f"downloading {path.name}", size, "B") as bar:
            self._write(name, lambda file: self._download(file, name, size, bar))
        path.with_suffix(KEPT_SUFFIX).unlink(missing_ok=True)

    def video(self, path: Path, times: FrameTimes) -> "RemoteVideo | None":
        """What the decoder reads in place of a placeholder; None for a file that is whole."""
        if kept_spans(path) is None:
            return None
        return RemoteVideo(self, path, times)

    @cached_property
    def pages(self) -> "Pages":
        """The pieces of videos of this process."""
        from filelock import FileLock, Timeout

        for number in range(1000):
            folder = self.folder / f"pages-{number}"
            lock = FileLock(self.folder / f".pages-{number}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:  # another process'
                continue
            self._lock = lock
            break
        max_bytes = int(1e9 * self.cache_gb) if self.cache_gb else shutil.disk_usage(self.folder).free // 4
        return Pages(PageCache(folder, max_bytes).open(), self.remote)

    def _look_up(self, names: list[str]) -> dict[str, RemoteFile | None]:
        new = [name for name in dict.fromkeys(names) if name not in self.checked]
        with self._bar("asking for files", len(new), "file") as bar:
            self.checked |= dict(zip(new, in_parallel(self.remote.look_up, new, bar), strict=True))
        return {name: self.checked[name] for name in names}

    def _recorded(self) -> dict[str, list]:
        path = self.folder / "files.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):  # none yet, or an interrupted one
            return {}

    def _record(self, entries: dict[str, list]) -> None:
        if not entries:
            return
        self._write("files.json", lambda file: file.write(json.dumps(self._recorded() | entries).encode()))

    def _write(self, name: str, write: Callable) -> None:
        """Write a file of the folder, whole or not at all."""
        path = self.folder / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
            try:
                with open(unfinished, "wb") as file:
                    write(file)
                os.replace(unfinished, path)
            finally:
                unfinished.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {reason_of_disk(error)}. Free some space, or pass another --cache_dir"
            ) from error

    def _bar(self, text: str, total: int, unit: str):
        from tqdm.auto import tqdm

        return tqdm(
            desc=text,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            disable=self.quiet or not total,
            delay=1,
            mininterval=progress_interval(),
        )


def entry_of(file: RemoteFile) -> list:
    return [file.size, file.version]


class Pages:
    """Pieces of remote videos: from the cache, or fetched. Any thread may ask.

    Args:
        cache: where pages are kept.
        remote: where they come from.
    """

    def __init__(self, cache: PageCache, remote: RemoteFolder):
        self.cache = cache
        self.remote = remote
        self.pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="fetch")
        self.lock = threading.Lock()  # held while `arriving` changes
        self.arriving: dict[tuple[bytes, int], Future] = {}  # pages that are asked for

    @property
    def capacity(self) -> int:
        """Pages that the cache holds."""
        return self.cache.max_segments * self.cache.pages_per_segment

    def request(self, video: "RemoteVideo", pages: list[int]) -> dict[int, Future]:
        """Ask for those of some pages that are not in the cache; returns what arrives for them, {page: bytes} each."""
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
                arriving = self.pool.submit(self._fetch_run, video, run)
                for page in run:
                    self.arriving[video.hash, page] = requested[page] = arriving
        return requested

    def _fetch_run(self, video: "RemoteVideo", run: list[int]) -> dict[int, bytes]:
        try:
            start = run[0] * PAGE
            content = self.remote.read_range(video.name, start, min(video.size, (run[-1] + 1) * PAGE))
            found = {}
            for page in run:
                found[page] = content[page * PAGE - start : (page + 1) * PAGE - start]
                self._keep(video, page, found[page])
            return found
        finally:
            with self.lock:
                for page in run:
                    self.arriving.pop((video.hash, page), None)

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


class RemoteVideo:
    """A video of a streamed dataset.

    Args:
        stream: the dataset.
        path: its placeholder.
        times: of its frames.
    """

    def __init__(self, stream: Stream, path: Path, times: FrameTimes):
        self.stream = stream
        self.path = path
        self.times = times
        self.name = path.relative_to(stream.folder).as_posix()
        self.size = path.stat().st_size
        version = stream.checked[self.name].version
        self.hash = hashlib.sha256(f"{self.name} {self.size} {version}".encode()).digest()[:16]
        self.kept = kept_spans(path)
        self._lock = threading.Lock()  # held while `_packets` is made

    def open(self) -> "VideoReader":
        """A file to read from, for one thread."""
        return VideoReader(self)

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` on, at most up to `end`: as many as are in one piece."""
        for first, last in self.kept:
            if first <= start < last:
                with open(self.path, "rb") as file:
                    file.seek(start)
                    return file.read(min(end, last) - start)
        page = start // PAGE
        return self.stream.pages.read(self, page)[start - page * PAGE : end - page * PAGE]

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

    def __init__(self, video: RemoteVideo):
        self.video = video
        self.position = 0

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
        content = self.video.read(self.position, end)
        self.position += len(content)
        return content

    def readinto(self, buffer) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)
