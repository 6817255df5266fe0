"""Train on a dataset that is not downloaded: metadata and tables first, videos by the pages that are needed.

A streamed dataset has a folder in the cache, which looks like the dataset itself:

    meta, data        the files, whole
    videos            placeholders: files of the right size that hold what lists the frames (an MP4's moov box), the first frames and
                      a piece in the middle; the rest are holes
    pages-<n>         pieces of the videos, bounded by --cache_gb (page_cache.py); one for each process
    files.json        {name: [size, version]} of what was fetched, to notice what has changed

Opening, checking and indexing read it as any other folder. Only the decoder reads videos through `RemoteVideo.open`
(remote_videos.py), which fetches what is missing. As the order of a run is known in advance, the loader asks for pages ahead of it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from data.files import is_v2
from data.frame_times import FrameTimes
from data.page_cache import PageCache
from data.placeholders import first_packets, is_kept, kept_spans, list_path, listing_spans
from data.remote import RemoteFile, RemoteFolder, in_parallel
from data.remote_videos import Pages, RemoteVideo
from errors import UserError, read_json, reason_of_disk
from runtime import frame_cache_dir, progress_interval

V3_FILES = ("meta/tasks.parquet", "meta/stats.json")
V2_FILES = ("meta/tasks.jsonl", "meta/episodes.jsonl", "meta/episodes_stats.jsonl", "meta/stats.json")


class Stream:
    """A dataset behind a URL, and its folder in the cache.

    Args:
        remote: the dataset's folder.
        cache_dir: the frame cache; None for the user's.
        cache_gb: bound of the pieces of videos, in 1e9 bytes; None for a quarter of the free disk.
        quiet: no progress bar.
    """

    def __init__(self, remote: RemoteFolder, cache_dir: str | Path | None, cache_gb: float | None, quiet: bool):
        self._opening = threading.RLock()  # held while the pieces are opened
        self._pages: Pages | None = None
        self._lock = None  # a FileLock of the pieces, held while they are open
        self.remote = remote
        digest = hashlib.sha256(self.remote.url.encode()).hexdigest()[:16]
        name = self.remote.url.rpartition("/")[2][:50]
        self.folder = frame_cache_dir(cache_dir) / f"{name}-stream-{digest}"
        self.cache_gb = cache_gb
        self.quiet = quiet
        self.checked: dict[str, RemoteFile | None] = {}  # what this process has asked the server about

    def open(self) -> Path:
        """Fetch the metadata; returns the folder.

        Raises:
            UserError: the server has no such dataset, or does not answer; or the cache cannot be written to.
        """
        self._make_folder("pieces of its videos")
        if not self.fetch(["meta/info.json"]):
            raise UserError(
                f"no dataset at {self.remote.url}: it has no meta/info.json, or you may not read it. Check the URL and your login"
            )
        self.remote.check_ranges("meta/info.json")
        info = read_json(self.folder / "meta" / "info.json")
        if not str(info.get("codebase_version")).startswith("v3"):
            self.fetch(list(V2_FILES))
            return self.folder
        self.fetch(list(V3_FILES))
        self._fetch_numbered("meta/episodes")
        return self.folder

    def _make_folder(self, content: str) -> None:
        """Make the folder in the cache, with what `runs.py cache list` says of it."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._refused(self.folder, error) from error
        about = {"dataset": self.remote.url, "camera": content, "frames": 0, "shape": ["streamed"]}
        with contextlib.suppress(OSError):  # the cache may be read-only
            (self.folder / "about.json").write_text(json.dumps(about))

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
        """The names of files, with those that are missing looked for in chunk-000: some published v2.0 datasets have them all there."""
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

    def video(self, path: Path, times: FrameTimes) -> RemoteVideo | None:
        """What the decoder reads in place of a placeholder; None for a file that is whole."""
        if kept_spans(path) is None:
            return None
        return RemoteVideo(self, path, times)

    @property
    def pages(self) -> Pages:
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

    def _open_pages(self) -> Pages:
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
        return Pages(cache, self.remote.reopened())

    def stop(self) -> None:
        """End whatever waits for the network. The next request opens the pieces again."""
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
