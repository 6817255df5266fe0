"""Frames of a dataset's cameras by row: one gather from the frame store, or decoded when asked for.

The store of a camera holds its frames decoded once, at training size, row after row of the table. It is a folder in the
cache, named after a hash of all that decides its content, so that it is never stale:

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
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.decode import CHUNK, LIBRARIES, Decoder
from data.frame_times import file_identity
from data.source import Source
from errors import UserError, one_line, printable
from runtime import is_out_of_memory, progress_interval, to_device, user_cache_dir

LAYOUT = 2  # part of the hash. Stores of layout 1 may hold wrong frames, found by the video's rate
SPARE = 2 * 2**30  # bytes that `auto` leaves free on the disk, or a tenth of the disk if that is more


class Frames:
    """Frames of every camera of a source, decoded when asked for, or from stores if made by `open_or_build`.

    A Loader takes any object with `keys`, `dtype`, `shape`, `places`, `read`, `on_device` and `close`.

    Args:
        source: the open dataset.
        image_size: (h, w) that pictures are resized to, None for as recorded.
        num_threads: threads that decode and copy.
    """

    dtype = torch.uint8

    def __init__(self, source: Source, image_size: list[int] | None = None, num_threads: int = 1):
        self.source = source
        self.decoder = Decoder(source, image_size)
        self.keys = [*source.videos, *source.images]
        self.num_threads = num_threads
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")  # starts its threads at its first job
        self.stored: dict[str, Tensor] = {}  # (N, C, h, w) uint8 of each camera; empty if frames are decoded
        self.on_device = False  # whether `stored` is in the memory of an accelerator

    @classmethod
    def open_or_build(
        cls,
        source: Source,
        image_size: list[int] | None = None,
        *,
        mode: str,
        cache_dir: str | Path | None = None,
        num_threads: int = 1,
        device: torch.device | str = "cpu",
        quiet: bool = True,
        say=lambda line: None,
    ) -> "Frames":
        """Open every camera's store, building those that are missing.

        Args:
            source, image_size, num_threads: as for the class.
            mode: auto (stores if the disk has room for them), on, off, or device (stores, held in the device's memory).
            cache_dir: where stores are kept; None for the user's cache.
            device: where `device` holds the frames.
            quiet: no progress bar.
            say: called with each line that the user should read.

        Raises:
            UserError: a frame cannot be decoded, or the disk or the device has no room for what `on` or `device` need.
        """
        frames = cls(source, image_size, num_threads)
        folder = store_folder(cache_dir)
        stores = []
        if mode != "off":
            stores = [FrameStore.find(frames.decoder, key, folder) for key in frames.keys]
        missing = [store for store in stores if not store.is_finished]

        if source.videos and (missing or mode == "off"):
            _, reason_for_pyav = frames.decoder.torchcodec
            if reason_for_pyav:
                say(reason_for_pyav)
        if missing and not has_room(missing, folder, mode, say):
            return frames
        for store in missing:
            store.build(num_threads, quiet)
        frames.stored = {store.key: store.open() for store in stores}
        if mode == "device":
            frames.stored = move_to(torch.device(device), frames.stored)
            frames.on_device = True
        return frames

    def read(self, key: str, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, C, h, w) uint8 frames at (n,) rows, written into `out` if it is given.

        With mode `device` they are on the device, and `out` is not used.
        """
        if self.on_device:
            stored = self.stored[key]
            return stored.index_select(0, to_device(rows, stored.device))
        if out is None:
            out = torch.empty(len(rows), *self.shape(key), dtype=self.dtype)
        if key in self.stored:
            self.gather(self.stored[key], rows, out)
        else:
            self._decode(key, rows, out)
        return out

    def shape(self, key: str) -> tuple[int, ...]:
        """(C, h, w) of a camera's frames."""
        return self.decoder.shape(key)

    def places(self, rows: Tensor, samples: Tensor | None) -> Tensor:
        """Where `read` finds rows (B, ...): each row of the table has one frame, whichever samples take it."""
        return rows

    def forget_stores(self) -> None:
        """Free the stores' memory: from now on frames are decoded when asked for."""
        self.stored = {}
        self.on_device = False

    def gather(self, stored: Tensor, rows: Tensor, out: Tensor) -> None:
        """Copy rows of `stored` into `out`."""
        # In threads of our own: torch's do not take part in a call from the loader's thread, which halves the bandwidth
        # on two cores. list() waits for them and raises their first error.
        list(
            self.pool.map(
                lambda rows, out: torch.index_select(stored, 0, rows, out=out),
                rows.chunk(self.num_threads),
                out.chunk(self.num_threads),
            )
        )

    def _decode(self, key: str, rows: Tensor, out: Tensor) -> None:
        # Each row is decoded once: neighbours in a window often share frames.
        slots: dict[int, list[int]] = {}  # of each row, where in `out` it goes
        for slot, row in enumerate(rows.tolist()):
            slots.setdefault(row, []).append(slot)

        def decode(rows: Tensor) -> None:
            for row, pixels in zip(rows.tolist(), self.decoder.read(key, rows), strict=True):
                for slot in slots[row]:
                    out[slot].copy_(pixels)

        list(self.pool.map(decode, self.decoder.jobs(key, torch.tensor(sorted(slots)), self.num_threads)))

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()


@dataclass(frozen=True)
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

    @classmethod
    def find(cls, decoder: Decoder, key: str, cache_dir: Path) -> "FrameStore":
        """The finished store of a camera, decoded by either library; if there is none, the one to build."""
        for library in LIBRARIES:
            store = cls(decoder, key, cache_dir / store_name(decoder, key, library))
            if store.is_finished:
                return store
        return cls(decoder, key, cache_dir / store_name(decoder, key, decoder.library))

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
        """Bytes that a build still needs on the disk, without those that a stopped build has written."""
        path = self.build_folder / "frames.u8"
        return self.num_bytes - (on_disk(path) if os.path.exists(path) else 0)

    def open(self) -> Tensor:
        """(N, C, h, w) uint8 over the file, which the system reads where it is touched."""
        path = self.folder / "frames.u8"
        size = path.stat().st_size if path.exists() else 0
        if size != self.num_bytes:
            raise UserError(f"{path} is damaged: expected {self.num_bytes} bytes, got {size}. Delete {self.folder}")
        with contextlib.suppress(OSError):  # the cache may be read-only, or another user's
            os.utime(self.folder)  # when it was last used, for `runs.py cache prune`
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
        except OSError as error:
            if lock.is_locked:
                shutil.rmtree(self.build_folder, ignore_errors=True)
            raise UserError(
                f"the frames of {self.key} cannot be written to {cache_dir}: {error.strerror or one_line(error)}. "
                "Nothing is left behind. Free some space, or pass --frame_cache off"
            ) from error
        finally:
            lock.release()

    def _decode_all(self, num_threads: int, quiet: bool) -> None:
        from tqdm.auto import tqdm

        # The file has its full size from the start. What a stopped build wrote into it stays.
        source = self.decoder.source
        self.build_folder.mkdir(exist_ok=True)
        with open(self.build_folder / "frames.u8", "ab") as file:
            file.truncate(self.num_bytes)
        about = {"dataset": source.name, "camera": self.key, "frames": source.rows, "shape": self.shape[1:]}
        (self.build_folder / "about.json").write_text(json.dumps(about))
        journal = self.build_folder / "journal.txt"
        done = self._episodes_on_disk(journal)

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

    def _episodes_on_disk(self, journal: Path) -> set[int]:
        """Positions of the episodes that a stopped build wrote: those whose bytes have the CRC that its journal lists."""
        done = set()
        if not journal.exists():
            return done
        frame_bytes = int(np.prod(self.shape[1:]))
        source = self.decoder.source
        with open(self.build_folder / "frames.u8", "rb") as file:
            for episode, crc in re.findall(r"^(\d+) ([0-9a-f]{8})$", journal.read_text(errors="replace"), re.MULTILINE):
                if int(episode) >= len(source.episodes):
                    continue
                first = int(source.starts[int(episode)])
                end = int(source.ends[int(episode)])
                file.seek(first * frame_bytes)
                found = 0
                for _ in range(first, end):
                    found = zlib.crc32(file.read(frame_bytes), found)
                if found == int(crc, 16):
                    done.add(int(episode))
        return done

    def _decode_episode(self, episode: int, bar) -> int:
        """Decode one episode, by its position in `Source.episodes`, to its place in frames.u8; return its bytes' CRC-32."""
        first = int(self.decoder.source.starts[episode])
        end = int(self.decoder.source.ends[episode])
        crc = 0
        # Written, not mapped: a full disk is an error when writing, but a crash of the process in mapped memory.
        with open(self.build_folder / "frames.u8", "r+b", buffering=0) as file:
            file.seek(first * int(np.prod(self.shape[1:])))
            for rows in torch.arange(first, end).split(CHUNK):
                pixels = self.decoder.read(self.key, rows).contiguous()  # (n, C, h, w)
                unwritten = memoryview(pixels.numpy()).cast("B")
                crc = zlib.crc32(unwritten, crc)
                while unwritten:
                    unwritten = unwritten[file.write(unwritten) :]
                bar.update(len(rows))
            os.fsync(file.fileno())  # the journal may list the episode only once it is on disk
        return crc


def store_name(decoder: Decoder, key: str, library: str) -> str:
    """Name of a camera's store, with a hash of all that decides its content. `library` decodes its videos."""
    source = decoder.source
    spans = [source.episodes, source.starts.tolist(), source.ends.tolist()]
    facts = [LAYOUT, decoder.shape(key), *spans]
    if key in source.videos:
        videos = source.videos[key]
        facts += [library, videos.file_index.tolist(), videos.first_frame.tolist()]
        facts += [file_identity(path) for path in videos.files]
    else:
        facts += [f"pillow, {key}"]
        facts += [file_identity(path) for path in [*source.tables, *source.picture_files(key)]]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    readable = f"{source.meta.repo_id[:50]}-{key.split('.')[-1][:30]}".replace("/", "--")
    return f"{readable}-{digest[:16]}"


def store_folder(cache_dir: str | Path | None) -> Path:
    """Where stores are kept: `cache_dir`, or the user's cache."""
    return Path(os.path.expanduser(cache_dir)) if cache_dir else user_cache_dir() / "frames"


def move_to(device: torch.device, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stores in the memory of `device`.

    Raises:
        UserError: they do not fit.
    """
    size = sum(frames.nbytes for frames in stored.values())
    try:
        return {key: frames.to(device) for key, frames in stored.items()}
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--frame_cache device: {size / 1e9:.1f} GB of frames do not fit the memory of {device}. "
            "Pass --frame_cache on, or a smaller --image_size"
        ) from error


def has_room(
    stores: list[FrameStore],
    folder: Path,
    mode: str,
    say,
    what: str = "decoded frames",
    otherwise: str = "frames are decoded",
) -> bool:
    """Whether the disk of `folder` has room to build `stores`. Without room, mode `auto` only says so.

    Args:
        what: the stores hold.
        otherwise: what happens without the stores.

    Raises:
        UserError: there is no room, and the mode is not auto.
    """
    size = sum(store.bytes_to_write() for store in stores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # an existing folder may be another user's, or read-only
        disk = shutil.disk_usage(folder)
        spare = max(SPARE, disk.total // 10) if mode == "auto" else 0
        needed = f"{size / 1e9:.1f} GB of {what} in {folder}, {disk.free / 1e9:.1f} GB free"
        fits = size <= disk.free - spare
        if not fits and size <= disk.free:
            needed += f" (auto keeps {spare / 1e9:.1f} GB free, --frame_cache on does not)"
    except OSError as error:
        fits = False
        needed = f"{what} in {folder} ({error.strerror})"
    if fits:
        say(f"frame cache: {needed}")
        return True
    if mode != "auto":
        remedy = "Pass --frame_cache off, --image_size or another --cache_dir"
        raise UserError(f"--frame_cache {mode}: no room for {needed}. {remedy}")
    say(f"frame cache off, no room for {needed}: {otherwise} as they are needed (--cache_dir, --image_size)")
    return False


def on_disk(path: Path) -> int:
    """Bytes that a file takes on the disk: less than its size if parts were not written yet."""
    return path.stat().st_size if os.name == "nt" else path.stat().st_blocks * 512


if __name__ == "__main__":  # `python -m data.frames list` of earlier versions
    from runs import main

    sys.exit(main(["cache", *sys.argv[1:]]))
