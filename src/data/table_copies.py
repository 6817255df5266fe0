"""Tables with pictures, copied once to the cache in Arrow's IPC format, so that rows are read from the disk on access.

Reading one row of a Parquet file decodes a whole row group. Without a copy, each process of a run would hold all pictures in
memory. A copy is mapped into memory instead: the system reads what is used, shares it between processes, and drops it when it
needs the room.

The copies of a dataset are a folder of the cache:

    about.json                             what it holds, for people
    <hash of a Parquet file's name>.arrow  all rows of that file; the schema's metadata record the file's path, size and
                                           modification time, and the number of rows
"""

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.files import arrow_reason, is_lfs_pointer
from data.frame_times import file_identity
from runtime import frame_cache_dir, progress_interval

LARGE = 64 * 2**20  # bytes of Parquet files; smaller tables stay in memory
MOST_FILES = 10_000  # each copy is one memory mapping, and Linux allows a process 65,530
BATCH = 16 * 2**20  # bytes of rows that are copied at once
SOURCE = b"armature.source"  # in the metadata of a copy's schema
ROWS = b"armature.rows"


@dataclass
class MappedTables:
    """The tables of Parquet files, mapped from their copies.

    Attributes:
        tables: {file: all its rows}, without files that could not be copied.
        reason: why pictures are held in memory, if the cache cannot take them.
    """

    tables: dict[Path, pa.Table]
    reason: str | None = None


def open_or_copy(meta, files: list[Path], cache_dir: str | Path | None, quiet: bool) -> MappedTables:
    """Map the copies of Parquet files, and write those that are missing.

    Small tables and tables without pictures are not copied. A file that cannot be read is left out: the caller reads it next,
    and reports it.

    Args:
        meta: LeRobot's metadata.
        cache_dir: where stores are kept; None for the user's cache.
        quiet: no progress bar.
    """
    files = [file for file in files if file.is_file() and not is_lfs_pointer(file)]
    if not meta.image_keys or len(files) > MOST_FILES or sum(file.stat().st_size for file in files) < LARGE:
        return MappedTables({})
    digest = hashlib.sha256(str(meta.root.resolve()).encode()).hexdigest()
    readable = f"{meta.repo_id[:50]}-tables".replace("/", "--")
    folder = frame_cache_dir(cache_dir) / f"{readable}-{digest[:16]}"
    mapped = MappedTables(read_copies(meta, files, folder))
    missing = [file for file in files if file not in mapped.tables]
    if not missing:
        return mapped
    size = sum(file.stat().st_size for file in missing)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        # Decoded frames are larger than encoded ones, and need the other three quarters.
        if size > free / 4:
            needed = f"{size / 1e9:.1f} GB of pictures are more than a quarter of the {free / 1e9:.1f} GB that are free"
            return MappedTables(mapped.tables, f"{needed} in {folder}")
        write_copies(meta, missing, folder, quiet)
    except OSError as error:
        return MappedTables(mapped.tables, f"{folder}: {arrow_reason(error)}")
    return MappedTables(mapped.tables | read_copies(meta, missing, folder))


def write_copies(meta, files: list[Path], folder: Path, quiet: bool) -> None:
    """Copy Parquet files, or wait for another process that does.

    Raises:
        OSError: the disk refuses.
    """
    from filelock import FileLock
    from tqdm.auto import tqdm

    with FileLock(folder.with_name(f".{folder.name}.lock")):
        folder.mkdir(exist_ok=True)
        about = {
            "dataset": meta.repo_id,
            "camera": ", ".join(meta.image_keys),
            "frames": meta.total_frames,
            "shape": ["PNG/JPEG"],
        }
        (folder / "about.json").write_text(json.dumps(about))  # first: `runs.py cache prune` knows the folder by it
        bar = tqdm(files, "copying tables", unit="file", disable=quiet, mininterval=progress_interval())
        for file in bar:
            copy_path = folder / copy_name(meta, file)
            if read_copy(copy_path, file) is not None:  # another process has written it meanwhile
                continue
            unfinished = copy_path.with_suffix(".part")
            try:
                write_copy(file, unfinished)
                os.replace(unfinished, copy_path)
            except (pa.ArrowException, OSError) as error:
                is_of_disk = isinstance(error, OSError) and error.errno is not None
                if is_of_disk:
                    raise
                # Otherwise the Parquet file is damaged, or has a column that Arrow cannot read in batches.
            finally:
                unfinished.unlink(missing_ok=True)
                pa.default_memory_pool().release_unused()


def write_copy(file: Path, output: Path) -> None:
    """Copy a Parquet file. In memory at once are a batch and what it was decoded from: a part of a row group."""
    with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as parquet:
        num_rows = parquet.metadata.num_rows
        batch_rows = max(1, BATCH * num_rows // max(1, file.stat().st_size))
        schema = parquet.schema_arrow.with_metadata({SOURCE: identity_of(file), ROWS: str(num_rows).encode()})
        with open(output, "wb") as sink:
            # A stream, since dictionaries may differ from batch to batch, which Arrow's file format does not allow.
            with pa.ipc.new_stream(sink, schema) as writer:
                for batch in parquet.iter_batches(batch_rows, use_threads=False):
                    writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            sink.flush()
            os.fsync(sink.fileno())  # before it is renamed, so that a power cut cannot leave half a copy


def read_copies(meta, files: list[Path], folder: Path) -> dict[Path, pa.Table]:
    """The tables of those files that have a copy."""
    tables = {}
    for file in files:
        table = read_copy(folder / copy_name(meta, file), file)
        if table is not None:
            tables[file] = table
    if tables:
        with contextlib.suppress(OSError):  # the cache may be read-only, or another user's
            os.utime(folder)  # when it was last used, for `runs.py cache prune`
    return tables


def read_copy(copy_path: Path, file: Path) -> pa.Table | None:
    """The rows of a copy; None if it is not there, not whole, or of another state of the file."""
    try:
        with pa.memory_map(str(copy_path)) as mapping, pa.ipc.open_stream(mapping) as stream:
            metadata = stream.schema.metadata or {}
            if metadata.get(SOURCE) != identity_of(file):
                return None
            table = stream.read_all()
    except (OSError, pa.ArrowInvalid):
        return None
    is_whole = metadata.get(ROWS) == str(table.num_rows).encode()
    return table if is_whole else None


def copy_name(meta, file: Path) -> str:
    return f"{hashlib.sha256(str(file.relative_to(meta.root)).encode()).hexdigest()[:16]}.arrow"


def identity_of(file: Path) -> bytes:
    return json.dumps(file_identity(file)).encode()
