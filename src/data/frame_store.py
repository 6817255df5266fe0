"""The frame store of a camera: its frames at training size, decoded once, row after row of the table.

A store is a folder in the cache, named after a hash of all that decides its content, so that it is never stale:

    frames.u8     (N, C, h, w) uint8
    about.json    what it holds, for people

It is built in a hidden folder beside its place, which is renamed when all frames are there. There, journal.txt lists the
episodes that are on disk, each with the CRC-32 of its bytes, so that a build that was stopped continues.

N rows, C channels, h and w pixels at training size.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.decode import CHUNK, LIBRARIES, Decoder
from data.depth import depth_unit
from data.frame_times import file_identity
from data.pixels import contiguous_pictures
from errors import UserError, one_line, printable
from runtime import progress_interval

LAYOUT = 2  # part of the hash. Stores of layout 1 may hold wrong frames, found by the video's rate


class NoRoomError(Exception):
    """A build has used all the room that it was given."""


@dataclass
class FrameStore:
    """The store of one camera, finished or not.

    Attributes:
        decoder: of the open dataset, at training size.
        key: the camera.
        folder: where the finished store is.
    """

    decoder: Decoder
    key: str
    folder: Path

    data_file = "frames.u8"
    what = "decoded frames"  # that it holds, for messages
    mode = "on"  # the --frame_cache that builds it

    @classmethod
    def find(cls, decoder: Decoder, key: str, cache_dir: Path, *more) -> "FrameStore":
        """The finished store of a camera, decoded by either library; if there is none, the one to build.

        Args:
            more: further arguments of the class.
        """
        for library in LIBRARIES:
            store = cls(decoder, key, cache_dir / cls.name(decoder, key, library, *more), *more)
            if store.is_finished:
                return store
        return cls(decoder, key, cache_dir / cls.name(decoder, key, decoder.library, *more), *more)

    @staticmethod
    def name(decoder: Decoder, key: str, library: str) -> str:
        """Name of the store's folder. `library` decodes its videos."""
        return store_name(decoder, key, library)

    @property
    def may_be_partial(self) -> bool:
        """Whether what fits on the disk is worth keeping."""
        return False

    @property
    def is_finished(self) -> bool:
        return os.path.isdir(self.folder)  # also where its content may not be read

    @property
    def build_folder(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}")

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, h, w)."""
        return self.decoder.source.rows, *self.decoder.shape(self.key)

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape))

    def bytes_to_write(self) -> int:
        """Bytes that a build still needs on the disk, without those that are written already."""
        return self.num_bytes - self.bytes_written

    @property
    def bytes_written(self) -> int:
        """Bytes on the disk that a stopped build has written."""
        path = self.build_folder / self.data_file
        return on_disk(path) if os.path.exists(path) else 0

    def open(self) -> Tensor:
        """(N, C, h, w) uint8 over the file, which the system reads where it is touched."""
        path = self.folder / self.data_file
        size = path.stat().st_size if path.exists() else 0
        if size != self.num_bytes:
            raise UserError(f"{path} is damaged: expected {self.num_bytes} bytes, got {size}. Delete {self.folder}")
        mark_used(self.folder)
        # torch wants write access; mode "c" gives it without an effect on the file.
        return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=self.shape))

    def build(self, num_threads: int, quiet: bool) -> None:
        """Decode every frame, or wait for another process that does.

        Raises:
            UserError: a frame cannot be decoded, or the cache cannot be written to.
        """
        from filelock import FileLock, Timeout

        cache_dir = self.folder.parent
        lock = FileLock(cache_dir / f".{self.folder.name}.lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                message = f"another process is decoding {self.key} into {cache_dir}: waiting for it"
                print(printable(message), file=sys.stderr, flush=True)
                lock.acquire()
            if not self.folder.is_dir():
                self._decode_all(num_threads, quiet)
                os.rename(self.build_folder, self.folder)
        except NoRoomError:
            pass  # what fits is in the build folder
        except OSError as error:
            if self.may_be_partial:
                return
            if lock.is_locked:
                shutil.rmtree(self.build_folder, ignore_errors=True)
            raise UserError(
                f"the frames of {self.key} cannot be written to {cache_dir}: {error.strerror or one_line(error)}. "
                "Nothing is left behind. Free some space, or pass --frame_cache off"
            ) from error
        finally:
            lock.release()

    def _decode_all(self, num_threads: int, quiet: bool) -> None:
        """
        Raises:
            NoRoomError: the rest would not fit.
        """
        from tqdm.auto import tqdm

        source = self.decoder.source
        self.build_folder.mkdir(exist_ok=True)
        self.write_about()
        journal = self.build_folder / "journal.txt"
        done = self._prepare(listed_episodes(journal))

        lengths = (source.ends - source.starts).tolist()
        bar = tqdm(
            desc=f"{self.decoder.action} {self.key}",
            total=source.rows,
            unit="frame",
            disable=quiet,
            mininterval=progress_interval(),
        )
        bar.update(sum(lengths[episode] for episode in done))
        with bar, open(journal, "a") as log, ThreadPoolExecutor(num_threads, thread_name_prefix="decode") as pool:
            jobs = {}
            for episode in range(len(lengths)):
                if episode not in done:
                    jobs[pool.submit(self._decode_episode, episode, bar)] = episode
            try:
                for job in as_completed(jobs):
                    log.write(f"{jobs[job]} {job.result():08x}\n")
                    log.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)  # else the block would end after all the jobs
                raise
        journal.unlink()

    def write_about(self) -> None:
        """Note in the build folder what it holds, for `runs.py cache list`."""
        source = self.decoder.source
        about = {"dataset": source.name, "camera": self.key, "frames": source.rows, "shape": self.shape[1:]}
        (self.build_folder / "about.json").write_text(json.dumps(about))

    def _prepare(self, listed: dict[int, int]) -> set[int]:
        """Make the file of the frames.

        Args:
            listed: {position of an episode: CRC-32 of its bytes} by the journal of a build that was stopped.

        Returns:
            Those of the listed episodes whose bytes are on disk.
        """
        # The file has its full size from the start. What a stopped build wrote into it stays.
        path = self.build_folder / self.data_file
        with open(path, "ab") as file:
            file.truncate(self.num_bytes)
        done = set()
        frame_bytes = int(np.prod(self.shape[1:]))
        source = self.decoder.source
        with open(path, "rb") as file:
            for episode, crc in listed.items():
                if episode >= len(source.episodes):
                    continue
                first = int(source.starts[episode])
                end = int(source.ends[episode])
                file.seek(first * frame_bytes)
                found = 0
                for _ in range(first, end):
                    found = zlib.crc32(file.read(frame_bytes), found)
                if found == crc:
                    done.add(episode)
        return done

    def _decode_episode(self, episode: int, bar) -> int:
        """Decode one episode, by its position in `Source.episodes`, to its place in the file; return its bytes' CRC-32."""
        first = int(self.decoder.source.starts[episode])
        end = int(self.decoder.source.ends[episode])
        crc = 0
        # Written, not mapped: a full disk is an error when writing, but a crash of the process in mapped memory.
        with open(self.build_folder / self.data_file, "r+b", buffering=0) as file:
            file.seek(first * int(np.prod(self.shape[1:])))
            for rows in torch.arange(first, end).split(CHUNK):
                pixels = contiguous_pictures(self.decoder.read(self.key, rows))  # (n, C, h, w)
                written = memoryview(pixels.numpy()).cast("B")
                crc = zlib.crc32(written, crc)
                write_all(file, written)
                bar.update(len(rows))
            os.fsync(file.fileno())  # the journal may list the episode only once it is on disk
        return crc


def listed_episodes(journal: Path) -> dict[int, int]:
    """{position of an episode: CRC-32 of its bytes} that a journal lists; empty if there is none."""
    if not journal.exists():
        return {}
    found = re.findall(r"^(\d+) ([0-9a-f]{8})$", journal.read_text(errors="replace"), re.MULTILINE)
    return {int(episode): int(crc, 16) for episode, crc in found}


def write_all(file, content: memoryview) -> None:
    """Write to an unbuffered file, which may take less than it is given at once."""
    while content:
        content = content[file.write(content) :]


def mark_used(folder: Path) -> None:
    """Note when a store was last used, for `runs.py cache prune`."""
    with contextlib.suppress(OSError):  # the cache may be read-only, or another user's
        os.utime(folder)


def store_name(decoder: Decoder, key: str, library: str, kind: str | None = None) -> str:
    """Name of a camera's store, with a hash of all that decides its content.

    Args:
        library: decodes its videos.
        kind: how its frames are compressed; None if they are not.
    """
    source = decoder.source
    spans = [source.episodes, source.starts.tolist(), source.ends.tolist()]
    facts = [LAYOUT, decoder.shape(key), *spans]
    if kind is not None:
        facts.append(kind)
    if key in decoder.depth:
        library = "pyav"
        facts.append([asdict(decoder.depth[key]), depth_unit(source.meta.features[key])])
    if key in source.videos:
        videos = source.videos[key]
        facts += [library, videos.file_index.tolist(), videos.first_frame.tolist()]
        facts += [file_identity(path) for path in videos.files]
    else:
        facts += [f"pillow, {key}"]
        facts += [file_identity(path) for path in [*source.tables, *source.picture_files(key)]]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    readable = f"{source.meta.repo_id[:50]}-{key.split('.')[-1][:30]}".replace("/", "--")
    if kind is not None:
        readable += f"-{kind}"
    return f"{readable}-{digest[:16]}"


def on_disk(path: Path) -> int:
    """Bytes that a file takes on the disk: less than its size if parts were not written yet."""
    return path.stat().st_size if os.name == "nt" else path.stat().st_blocks * 512
