"""Tables with pictures, copied once to the cache in a format that is read where it is touched.

A row of a Parquet file is read by unpacking a large part of the file, so that pictures in it would have to be held in memory for
the whole run, in each process. A copy in Arrow's own format is mapped into memory instead: the system reads what is touched,
drops it when it needs the room, and shares it between processes.

The copies of a dataset are a folder of the cache:

    <hash of a file's name>.arrow   all rows of that file; its schema says of which file, by size and date
    about.json                      what it holds, for people
"""

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.files import arrow_reason
from data.frame_times import file_identity
from data.frames import SPARE, store_folder
from runtime import progress_interval

LARGE = 64 * 2**20  # bytes of Parquet from which a dataset's tables are copied
BATCH = 16 * 2**20  # bytes that are in memory at once while a file is copied
IDENTITY = b"armature.source"  # in the schema of a copy


class TableCopies:
    """The copies of a dataset's table files.

    Args:
        meta: LeRobot's metadata.
        cache_dir: where stores are kept; None for the user's cache.
        quiet: no progress bar.

    Attributes:
        warnings: why files are held in memory, a line.
    """

    def __init__(self, meta, cache_dir: str | Path | None, quiet: bool):
        digest = hashlib.sha256(str(meta.root.resolve()).encode()).hexdigest()
        readable = f"{meta.repo_id[:50]}-tables".replace("/", "--")
        self.meta = meta
        self.folder = store_folder(cache_dir) / f"{readable}-{digest[:16]}"
        self.quiet = quiet
        self.warnings: list[str] = []

    def open(self, file: Path) -> pa.Table | None:
        """All rows of a Parquet file, mapped from its copy, which is written if it is not there.

        Returns None if the disk has no room for it.

        Raises:
            pa.ArrowInvalid: the file is damaged.
        """
        from filelock import FileLock

        name = hashlib.sha256(str(file.relative_to(self.meta.root)).encode()).hexdigest()[:16]
        copy = self.folder / f"{name}.arrow"
        identity = json.dumps(file_identity(file))
        table = read_copy(copy, identity)
        if table is not None:
            with contextlib.suppress(OSError):  # the cache may be read-only, or another user's
                os.utime(self.folder)  # when it was last used, for `runs.py cache prune`
            return table
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder.with_name(f".{self.folder.name}.lock")):
                if read_copy(copy, identity) is None:  # no other process has written it meanwhile
                    self._write(file, copy, identity)
        except OSError as error:
            self.warnings = [f"pictures in its table are held in memory: {self.folder}: {arrow_reason(error)}"]
            return None
        return read_copy(copy, identity)

    def _write(self, file: Path, copy: Path, identity: str) -> None:
        from tqdm.auto import tqdm

        parquet = pq.ParquetFile(file, pre_buffer=False)
        num_rows = parquet.metadata.num_rows
        size = sum(parquet.metadata.row_group(i).total_byte_size for i in range(parquet.metadata.num_row_groups))
        check_room(self.folder, size)
        batch_rows = max(1, BATCH * num_rows // max(1, size))
        schema = parquet.schema_arrow.with_metadata({IDENTITY: identity.encode()})
        unfinished = copy.with_suffix(".part")
        bar = tqdm(
            desc=f"copying {file.name}",
            total=num_rows,
            unit="row",
            disable=self.quiet,
            mininterval=progress_interval(),
        )
        try:
            with bar, pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
                for batch in parquet.iter_batches(batch_rows, use_threads=False):
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
                    bar.update(batch.num_rows)
            os.replace(unfinished, copy)
        finally:
            unfinished.unlink(missing_ok=True)
            pa.default_memory_pool().release_unused()
        about = {
            "dataset": self.meta.repo_id,
            "camera": ", ".join(self.meta.image_keys),
            "frames": self.meta.total_frames,
            "shape": ["PNG/JPEG"],
        }
        (self.folder / "about.json").write_text(json.dumps(about))


def read_copy(copy: Path, identity: str) -> pa.Table | None:
    """The rows of a copy; None if it is not there, not whole, or of another file."""
    try:
        with pa.ipc.open_stream(pa.memory_map(str(copy))) as stream:
            recorded = (stream.schema.metadata or {}).get(IDENTITY)
            return stream.read_all() if recorded == identity.encode() else None
    except (OSError, pa.ArrowInvalid):
        return None


def check_room(folder: Path, size: int) -> None:
    """Raise an OSError if the disk of `folder` has no room for `size` more bytes."""
    disk = shutil.disk_usage(folder)
    spare = max(SPARE, disk.total // 10)
    if size > disk.free - spare:
        raise OSError(
            f"no room for {size / 1e9:.1f} GB, {disk.free / 1e9:.1f} GB free, {spare / 1e9:.1f} GB of them kept free"
        )
