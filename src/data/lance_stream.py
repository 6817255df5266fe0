"""Datasets that LeRobot stores as Lance tables (`storage_format: lance`), in a folder or an object store.

    frames.lance    one row a frame: every feature but videos, their names with underscores for dots
    videos.lance    one row a video file: its camera, its numbers, its bytes
    meta            as in any v3.0 dataset
    meta.lance      the same files, one a row; an object store that has it need not have `meta`

Lance's own library (pylance) reads them. Everything else sees a Stream (stream.py): a v3.0 folder in the cache. Its tables are
copies of frames.lance, its videos placeholders for the bytes in videos.lance.
"""

import hashlib
import os
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.parquet

from data.episodes import ranges
from data.files import data_paths, episodes_by_file, filled_in, read_json
from data.page_cache import PAGE
from data.remote import RemoteFile, RemoteFolder, is_remote
from data.remote_videos import RemoteVideo
from data.stream import Stream
from errors import UserError, one_line

VIDEO_BYTES = "video_bytes"
ROWS_AT_ONCE = 8192  # that are copied to a table
PLACE_IN_LANCE = re.compile(r",? /\S+\.rs:\d+:\d+")  # the line of Lance's source code that its messages end with
REFUSED = re.compile(r"\b(401|403)\b|Unauthorized|Forbidden|PermissionDenied|[Cc]redential")
# Lance tries a request again itself; so do we, with a line, so that its own tries need not be many.
NETWORK_OPTIONS = {"client_max_retries": "2", "client_retry_timeout": "20", "connect_timeout": "15s", "timeout": "60s"}


def is_lance(folder: Path) -> bool:
    """Whether a folder's dataset is stored as Lance tables."""
    info = folder / "meta" / "info.json"
    stored_as = None
    if os.path.isfile(info):  # False where it may not be read
        stored_as = read_json(info).get("storage_format")
    if stored_as is None:  # from before the field
        return os.path.isdir(folder / "frames.lance") and not os.path.isdir(folder / "data")
    return stored_as == "lance"


class LanceFolder(RemoteFolder):
    """The videos of a Lance dataset as files of a v3.0 folder, and its other tables. Any thread may read.

    Args:
        location: the dataset's folder, or its URL.
    """

    def __init__(self, location: str):
        self.is_local = not is_remote(location)
        self.named: dict[str, int] = {}  # rows of videos.lance by the videos' names as files
        if self.is_local:
            self.url = location
            self.protocol = "file"
            self.stopped = threading.Event()
        else:
            super().__init__(location)
        if self.is_http:
            raise UserError(
                f"dataset {self.url}: a Lance dataset cannot be read over {self.protocol}://. Download it, or use s3://, gs:// or hf://"
            )

    def open_table(self, name: str):
        """Lance's dataset of the table `name`.

        Raises:
            FileNotFoundError: there is no such table.
            UserError: it cannot be read, or pylance is not installed.
        """
        # Lance would write warnings of what it does itself.
        os.environ.setdefault("LANCE_LOG", "error")
        try:
            import lance
        except ImportError:
            raise UserError(
                f"dataset {self.url} is in Lance tables: reading it needs pylance. Install it with: uv pip install pylance"
            ) from None
        options = self._storage_options()
        url = self.url if "revision" not in options else self.url.rpartition("@")[0]
        return self.retried(
            f"{name}.lance", lambda: lance.dataset(f"{url}/{name}.lance", storage_options=options or None)
        )

    def _storage_options(self) -> dict[str, str]:
        """What Lance's library does not find out by itself as fsspec's do."""
        if self.is_local:
            return {}
        options = dict(NETWORK_OPTIONS)
        if self.protocol == "s3":
            endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
            if endpoint:
                options["aws_endpoint"] = endpoint
                options["allow_http"] = "true"
            if os.environ.get("FSSPEC_S3_ANON", "").lower() == "true":
                options["aws_skip_signature"] = "true"
        if self.protocol == "hf":
            from huggingface_hub import get_token

            token = get_token()
            if token:
                options["token"] = token
            if "@" in self.url:
                options["revision"] = self.url.rpartition("@")[2]
        return options

    def read(self, table, name: str) -> pa.Table:
        """All of a small table."""
        return self.retried(f"{name}.lance", table.to_table)

    def retried(self, name: str, request: Callable):
        """As in RemoteFolder, for Lance's errors. What is on this disk is not tried again."""

        def with_known_errors():
            try:
                return request()
            except BaseException as error:
                if not is_lances(error):
                    raise
                reason = PLACE_IN_LANCE.sub("", one_line(error))[:300]
            if "was not found" in reason or reason.startswith("Not found"):
                raise FileNotFoundError(name)
            if self.is_local:
                raise UserError(f"{self.url}/{name} cannot be read: {reason}. Copy or convert the dataset again")
            if REFUSED.search(reason):
                raise PermissionError(reason)
            raise ConnectionError(reason)

        return with_known_errors() if self.is_local else super().retried(name, with_known_errors)

    @cached_property
    def videos(self):
        """Lance's dataset of the videos.

        Raises:
            UserError: there is none.
        """
        try:
            return self.open_table("videos")
        except FileNotFoundError:
            raise UserError(f"dataset {self.url} has no videos.lance. Copy or convert the dataset again") from None

    @cached_property
    def rows(self) -> dict[tuple[str, int, int], int]:
        """{(camera, chunk, file): the row of videos.lance that has the video}."""
        columns = ["video_key", "chunk_index", "file_index"]
        table = self.retried("videos.lance", lambda: self.videos.to_table(columns=columns, with_row_id=True))
        keys = list(zip(*(table[name].to_pylist() for name in columns), strict=True))
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.url}/videos.lance has more than one row of camera {twice[0][0]}, chunk {twice[0][1]}, file {twice[0][2]}. "
                "Delete the row that is left over, or convert the dataset again"
            )
        return dict(zip(keys, table["_rowid"].to_pylist(), strict=True))

    def name_videos(self, meta) -> None:
        """Give the videos the names that info.json would give them as files."""
        for (camera, chunk, file), row in self.rows.items():
            numbers = {"chunk_index": chunk, "chunk": chunk, "file_index": file, "file": file}
            self.named[filled_in(meta, "video_path", {"video_key": camera, "key": camera, **numbers})] = row

    def look_up(self, name: str) -> RemoteFile | None:
        blob = self.open_blob(name) if name in self.named else None
        return None if blob is None else RemoteFile(blob.size(), version_of(self.videos))

    def open_blob(self, name: str):
        """The bytes of a video as Lance's file, for one thread; None if they are null."""
        row = self.named[name]
        found = self.retried("videos.lance", lambda: self.videos.take_blobs(VIDEO_BYTES, ids=[row]))
        return found[0] if found else None

    def read_range(self, name: str, start: int, end: int, version: str = "") -> bytes:
        if start == end:
            return b""
        request = (self.named[name], start, end - start)
        answers = self.retried(
            "videos.lance", lambda: self.videos.read_blob_ranges(VIDEO_BYTES, [request], selector="ids")
        )
        return answers[0][2]


class LanceStream(Stream):
    """A dataset in Lance tables, and its folder in the cache."""

    def open(self) -> Path:
        self._make_folder("a copy of its table")
        if self.remote.is_local and os.path.isdir(os.path.join(self.remote.url, "meta")):
            self._link_metadata(Path(self.remote.url) / "meta")
        elif has_only_tables(self.remote):
            self._unpack_metadata()
        return self.folder

    def _link_metadata(self, source: Path) -> None:
        """Let `meta` be the dataset's own folder, so that messages' remedies apply to it."""
        link = self.folder / "meta"
        if link.is_symlink() and link.resolve() == source.resolve():
            return
        try:
            remove(link)
            link.symlink_to(source, target_is_directory=True)
        except OSError as error:
            raise self._refused(link, error) from error

    def _unpack_metadata(self) -> None:
        """Write the files that meta.lance holds, unless they are there already."""
        try:
            table = self.remote.open_table("meta")
        except FileNotFoundError:
            raise UserError(
                f"dataset {self.remote.url} has no meta folder and no meta.lance. Convert it again"
            ) from None
        entry = {"meta.lance": [0, version_of(table)]}
        if entry.items() <= self._recorded().items() and (self.folder / "meta" / "info.json").is_file():
            return
        try:
            remove(self.folder / "meta")  # files of another version
        except OSError as error:
            raise self._refused(self.folder / "meta", error) from error
        for row in self.remote.read(table, "meta").to_pylist():
            name = PurePosixPath("meta", row["path"])
            if name.is_absolute() or ".." in name.parts:
                raise UserError(
                    f"{self.remote.url}/meta.lance has a file outside of meta: {name}. Convert the dataset again"
                )
            self._write(str(name), lambda file, content=row["data"]: file.write(content))
        self._record(entry)

    def fetch_tables(self, meta, names: list[str] | None) -> None:
        """Copy the rows of frames.lance to the tables that the metadata names, or to one."""
        try:
            frames = self.remote.open_table("frames")
        except FileNotFoundError:
            raise UserError(f"dataset {self.remote.url} has no frames.lance. Copy or convert it again") from None
        holds = {}
        if names is not None:
            for path, episodes in episodes_by_file(data_paths(meta)).items():
                holds[path.relative_to(self.folder).as_posix()] = episodes
        recorded = self._recorded()
        version = version_of(frames)
        entries = {}
        for name in names or ["data/chunk-000/file-000.parquet"]:
            entry = [ranges(holds.get(name, [])), version]
            if recorded.get(name) != entry or not (self.folder / name).is_file():
                entries[name] = entry
        with self._bar("copying tables", len(entries), "file") as bar:
            for name, (episodes, _) in entries.items():
                self._write(name, lambda file, episodes=episodes: self._copy_rows(frames, episodes, file))
                bar.update()
        self._record(entries)

    def _copy_rows(self, frames, episodes: str, file) -> None:
        """Write the rows of some episodes as Parquet, under the features' own names.

        Args:
            frames: Lance's dataset.
            episodes: in the form of --episodes; empty for all.
        """
        spans = []
        for part in episodes.split(",") if episodes else []:
            first, _, end = part.partition(":")
            last = int(end) - 1 if end else int(first)
            spans.append(f"(episode_index >= {first} AND episode_index <= {last})")
        features = read_json(self.folder / "meta" / "info.json")["features"]
        names = {}
        for feature in features:
            column = feature.replace(".", "_")
            if column in names:
                raise UserError(
                    f"dataset {self.remote.url}: the features {names[column]} and {feature} have one column in frames.lance, "
                    f"{column}. Rename one of them before you convert the dataset"
                )
            names[column] = feature

        def copy() -> None:
            file.seek(0)
            file.truncate()
            scanner = frames.scanner(filter=" OR ".join(spans) or None, batch_size=ROWS_AT_ONCE)
            writer = None
            for batch in scanner.to_batches():
                batch = batch.rename_columns([names.get(name, name) for name in batch.schema.names])
                if writer is None:
                    writer = pyarrow.parquet.ParquetWriter(file, batch.schema)
                writer.write_batch(batch)
            if writer is None:
                raise UserError(
                    f"{self.remote.url}/frames.lance has no row of {f'episodes {episodes}' if episodes else 'any episode'}. "
                    "Copy or convert the dataset again"
                )
            writer.close()

        self.remote.retried("frames.lance", copy)

    def fetch_videos(self, meta, names: list[str]) -> None:
        self.remote.name_videos(meta)
        super().fetch_videos(meta, names)

    @property
    def pages(self):
        """The pieces of videos, for one reader: those on this disk are read where they are."""
        if self.remote.is_local:
            return LocalPages(self.remote)
        return super().pages


class LocalPages:
    """Pieces of a video on this disk, for one reader."""

    def __init__(self, folder: LanceFolder):
        self.folder = folder
        self.blob = None  # opened at the first read

    def read(self, video: RemoteVideo, page: int) -> bytes:
        if self.blob is None:
            self.blob = self.folder.open_blob(video.name)

        def read() -> bytes:
            self.blob.seek(page * PAGE)
            return self.blob.read(PAGE)

        return self.folder.retried("videos.lance", read)


def has_only_tables(remote: RemoteFolder) -> bool:
    """Whether a dataset consists of Lance tables, without a `meta` folder beside them."""
    if remote.is_local:
        return os.path.isdir(os.path.join(remote.url, "meta.lance"))
    return (
        not remote.is_http
        and RemoteFolder.look_up(remote, "meta/info.json") is None
        and bool(remote.listing("meta.lance"))
    )


def remove(path: Path) -> None:
    """Delete a folder or a link to one, if it is there."""
    if path.is_symlink():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def is_lances(error: BaseException) -> bool:
    """Whether an error is Lance's own, rather than ours or the system's."""
    if isinstance(error, UserError) or getattr(error, "errno", None) is not None:
        return False
    # Its code in Rust also stops in a panic, which is no Exception.
    return isinstance(error, (OSError, ValueError, RuntimeError)) or type(error).__name__ == "PanicException"


def version_of(table) -> str:
    """A text that differs once a table has changed, even if it was made again."""
    files = sorted(file.path for fragment in table.get_fragments() for file in fragment.data_files())
    return f"{table.version} {hashlib.sha256(' '.join(files).encode()).hexdigest()[:16]}"
