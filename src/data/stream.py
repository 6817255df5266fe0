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

import contextlib
import hashlib
import io
import itertools
import json
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from functools import cached_property
from pathlib import Path

import numpy as np

from data.files import is_v2
from data.frame_times import FrameTimes
from data.page_cache import PAGE, PageCache
from data.placeholders import AS_LISTED, first_packets, is_kept, kept_spans, list_path, listing_spans
from data.remote import CONNECTIONS, RemoteFile, RemoteFolder, in_parallel
from errors import UserError, read_json, reason_of_disk
from runtime import frame_cache_dir, progress_interval

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
        self._opening = threading.RLock()  # held while the pieces are opened
        self._pages: Pages | None = None
        self._lock = None  # a FileLock of the pieces, held while they are open

    def open(self) -> Path:
        """Fetch the metadata; returns the folder.

        Raises:
            UserError: the server has no such dataset, or does not answer; or the cache cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(self.folder, error) from error
        if not self.fetch(["meta/info.json"]):
            raise UserError(
                f"no dataset at {self.remote.url}: it has no meta/info.json, or you may not read it. Check the URL and your login"
            )
        self.remote.check_ranges("meta/info.json")
        info = read_json(self.folder / "meta" / "info.json")
        about = {"dataset": self.remote.url, "camera": "pieces of its videos", "frames": 0, "shape": ["streamed"]}
        with contextlib.suppress(OSError):  # the cache may be read-only
            (self.folder / "about.json").write_text(json.dumps(about))
        if not str(info.get("codebase_version")).startswith("v3"):
            self.fetch(list(V2_FILES))
            return self.folder
        self.fetch(list(V3_FILES))
        self._fetch_numbered("meta/episodes")
        return self.folder

    def _fetch_numbered(self, folder: str) -> None:
        """Fetch the Parquet files below a folder: those of its listing; without one, counting up until there is no other."""
        listed = self.remote.listing(folder)
        if listed is not None:
            self.fetch([name for name in listed if name.endswith(".parquet")])
            return
        for chunk in itertools.count():
            for file in itertools.count():
                if not self.fetch([f"{folder}/chunk-{chunk:03d}/file-{file:03d}.parquet"]):
                    break
            if file == 0:
                return

    def fetch(self, names: list[str]) -> list[str]:
        """Bring whole files up to date; returns those that the server has."""
        found = self._look_up(names)
        recorded = self._recorded()
        missing = []
        for name in names:
            if found[name] is None:
                if (self.folder / name).exists():  # from before it was deleted there
                    (self.folder / name).unlink()
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
            content = self._read(name, start, min(size, start + 16 * 2**20))
            file.write(content)
            bar.update(len(content))

    def fetch_videos(self, meta, names: list[str]) -> None:
        """Make the placeholders of videos that have none yet, or an older one. What the server lacks is left out."""
        names = self._where(meta, names)
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
            spans = listing_spans(lambda start, end: self._read(name, start, end), size)
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
                        file.write(self._read(name, start, end))
                        kept.append([start, end])
            list_path(path).write_text(json.dumps(kept))

        with self._bar("reading the lists of videos", len(missing), "file") as bar:
            in_parallel(make, missing, bar)
        self._record({name: entry_of(found[name]) for name in missing})

    def _where(self, meta, names: list[str]) -> list[str]:
        """The names of files, in the first folder where the server does not have them in their own: so are some published v2.0
        datasets."""
        if not is_v2(meta):
            return names
        absent = [name for name, found in self._look_up(names).items() if found is None]
        elsewhere = {name: re.sub(r"chunk-\d+", "chunk-000", name) for name in absent}
        found = self._look_up(list(elsewhere.values()))
        return [elsewhere[name] if found.get(elsewhere.get(name)) else name for name in names]

    def fetch_tables(self, meta, names: list[str] | None) -> None:
        """Fetch the tables of a dataset; `names` is None where its metadata do not name them."""
        if names is None:
            self._fetch_numbered("data")
        else:
            self.fetch(self._where(meta, names))

    def complete(self, path: Path, size: int) -> None:
        """Download a video whole, since its frames cannot be listed without that."""
        name = path.relative_to(self.folder).as_posix()
        with self._bar(f"downloading {path.name}", size, "B") as bar:
            self._write(name, lambda file: self._download(file, name, size, bar))
        list_path(path).unlink(missing_ok=True)

    def video(self, path: Path, times: FrameTimes) -> "RemoteVideo | None":
        """What the decoder reads in place of a placeholder; None for a file that is whole."""
        if kept_spans(path) is None:
            return None
        return RemoteVideo(self, path, times)

    @property
    def pages(self) -> "Pages":
        """The pieces of videos of this process.

        Raises:
            UserError: the cache cannot be written to.
        """
        with self._opening:
            if self._pages is None:
                try:
                    self._pages = self._open_pages()
                except OSError as error:
                    raise self._refused(self.folder, error) from error
            return self._pages

    def _open_pages(self) -> "Pages":
        from filelock import FileLock, Timeout

        for number in itertools.count():
            # Not of this thread: any may open the pieces, and another may close them.
            self._lock = FileLock(self.folder / f".pages-{number}.lock", thread_local=False)
            try:
                self._lock.acquire(timeout=0)
                break
            except Timeout:  # another process'
                continue
        # Those of processes that have ended.
        for other in self.folder.glob("pages-*"):
            if other.name != f"pages-{number}":
                with contextlib.suppress(Timeout), FileLock(self.folder / f".{other.name}.lock", timeout=0):
                    shutil.rmtree(other, ignore_errors=True)
        max_bytes = int(1e9 * self.cache_gb) if self.cache_gb else shutil.disk_usage(self.folder).free // 4
        cache = PageCache(self.folder / f"pages-{number}", max_bytes).open()
        return Pages(cache, RemoteFolder(self.remote.url))

    def stop(self) -> None:
        """End what waits for the network. Asking for a piece opens it again."""
        with self._opening:
            pages, self._pages = self._pages, None
            if pages is not None:
                pages.stop()
                self._lock.release()

    def __del__(self):
        if sys is not None and not sys.is_finalizing():
            self.stop()

    def _read(self, name: str, start: int, end: int) -> bytes:
        return self.remote.read_range(name, start, end, self.checked[name].version)

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
            raise self._refused(path, error) from error

    def _refused(self, path: Path, error: OSError) -> UserError:
        return UserError(
            f"{path} cannot be written: {reason_of_disk(error)}. Free some space, or pass another --cache_dir"
        )

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
