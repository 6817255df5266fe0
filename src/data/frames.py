"""The frame store: every frame of the selected episodes decoded once, into memory-mapped uint8 at training size.

A camera's frames lie in one file, row after row of the source's table, so that a batch is one gather. A file is built in
a hidden folder beside its place, episode by episode with a journal, so that a build that was stopped goes on; then the
folder is renamed. Its name is a hash of all that decides its content, so it is never stale.

    python -m data.frames list     what is in the cache
    python -m data.frames prune    delete it, or what --days has not used

N rows, B samples, C channels, h and w pixels at training size.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.decode import CHUNK, LIBRARIES, Decoder
from data.source import Source
from errors import UserError, one_line
from runtime import in_notebook, sent, user_cache_dir

LAYOUT = 1  # another arrangement of the file is another store
SPARE = 2 * 2**30  # bytes that `auto` leaves free on the disk, and a tenth of it


class Frames:
    """Frames of every camera of a source by row, from the store or decoded when asked.

    Args:
        source: the open dataset.
        image_size: (h, w) that pictures are resized to, None for as recorded.
        mode: auto (the store if it fits the disk), on, off, or device (the store, held in the device's memory).
        cache_dir: where stores are kept; None for the user's cache.
        num_threads: threads that decode.
        device: where `device` holds the frames.
        quiet: no progress bar.
        say: takes what a person should know, a line at a time.

    Raises:
        UserError: a frame cannot be decoded, or the disk or the device has no room for what `on` or `device` ask.
    """

    def __init__(
        self,
        source: Source,
        image_size: list[int] | None = None,
        mode: str = "off",
        cache_dir: str | Path | None = None,
        num_threads: int = 1,
        device: torch.device | str = "cpu",
        quiet: bool = True,
        say=lambda line: None,
    ):
        self.source, self.decoder = source, Decoder(source, image_size)
        self.keys = [*source.videos, *source.images]
        self.say = say
        self.num_threads = num_threads
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.store: dict[str, Tensor] = {}  # (N, C, h, w) uint8 of each camera
        self.on_device = mode == "device"
        if not self.keys:
            return
        folder = Path(cache_dir).expanduser() if cache_dir else user_cache_dir() / "frames"
        places = {} if mode == "off" else {key: self.finished(key, folder) for key in self.keys}
        missing = [key for key in self.keys if places.get(key) is None]
        if source.videos and missing:
            for line in self.decoder.loaded[1]:
                say(line)
        if mode == "off" or (missing and not self.fits(folder, missing, mode)):
            self.on_device = False
            return
        places |= {key: self.place(key, folder, self.decoder.library) for key in missing}
        for key in self.keys:
            if key in missing:
                self.build(key, places[key], quiet)
            self.store[key] = self.open(key, places[key])
        if self.on_device:
            self.move_to(torch.device(device))

    def bytes_of(self, key: str) -> int:
        return self.source.rows * int(np.prod(self.decoder.shape(key)))

    def begun(self, key: str, folder: Path) -> int:
        """Bytes of a camera's store that are on the disk already: a building that was stopped goes on."""
        place = self.place(key, folder, self.decoder.library)
        path = place.with_name(f".{place.name}") / "frames.u8"
        return on_disk(path) if os.path.exists(path) else 0

    def fits(self, folder: Path, keys: list[str], mode: str) -> bool:
        """Whether what is missing of the stores of `keys` goes on the cache's disk; `auto` says what it does about it."""
        size = sum(self.bytes_of(key) - self.begun(key, folder) for key in keys)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):  # a folder that is there may be another's, or read-only
                pass
            disk = shutil.disk_usage(folder)
            room = disk.free - (max(SPARE, disk.total // 10) if mode == "auto" else 0)
            message = f"{size / 1e9:.1f} GB of decoded frames in {folder}, {disk.free / 1e9:.1f} GB free"
        except OSError as error:
            room, message = 0, f"decoded frames in {folder} ({error.strerror})"
        if size <= room:
            self.say(f"frame cache: {message}")
            return True
        if mode == "auto":
            self.say(
                f"frame cache off, no room for {message}: frames are decoded as they are needed (--cache_dir, --image_size)"
            )
            return False
        raise UserError(
            f"--frame_cache {mode}: no room for {message}: pass --frame_cache off, --image_size or another --cache_dir"
        )

    def finished(self, key: str, folder: Path) -> Path | None:
        """A store of this very content, decoded by either library."""
        places = [self.place(key, folder, library) for library in LIBRARIES]
        return next((place for place in places if os.path.isdir(place)), None)  # also if it may not be looked into

    def place(self, key: str, folder: Path, library: str) -> Path:
        """Where a camera's store is, or will be: its name holds a hash of all that decides the content."""
        by = library if key in self.source.videos else f"pillow, {key}, sizes checked"  # older stores may hold garbage
        facts = [LAYOUT, by, self.decoder.shape(key)]
        facts += [self.source.episodes, self.source.starts.tolist(), self.source.ends.tolist()]
        files = self.source.tables
        if key in self.source.videos:
            videos = self.source.videos[key]
            files = videos.files
            facts += [videos.file.tolist(), videos.first.tolist()]
        for path in files:
            stat = path.stat()
            facts.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        name = f"{self.source.meta.repo_id.replace('/', '--')[:50]}-{key.split('.')[-1][:30]}"
        return folder / f"{name}-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]}"

    def open(self, key: str, place: Path) -> Tensor:
        """(N, C, h, w) uint8 over the file, read by the system when touched."""
        shape, path = (self.source.rows, *self.decoder.shape(key)), place / "frames.u8"
        there = path.stat().st_size if path.exists() else 0
        if there != self.bytes_of(key):
            raise UserError(f"{path} has {there} bytes, expected {self.bytes_of(key)}: delete {place}")
        with contextlib.suppress(OSError):  # a cache that others keep, or that is read-only
            os.utime(place)  # when it was last used, for prune
        return torch.from_numpy(np.memmap(path, np.uint8, "c", shape=shape))  # private: never written

    def build(self, key: str, place: Path, quiet: bool) -> None:
        """Decode a camera's frames into `place`, unless another process has done so by the time it lets us."""
        from filelock import FileLock, Timeout

        lock, hidden = FileLock(place.with_name(f".{place.name}.lock")), place.with_name(f".{place.name}")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                message = f"another process is decoding {key} into {place.parent}: waiting for it"
                print(message, file=sys.stderr, flush=True)
                lock.acquire()
            if not place.is_dir():
                self.decode_all(key, hidden, quiet)
                os.rename(hidden, place)
        except OSError as error:
            if lock.is_locked:
                shutil.rmtree(hidden, ignore_errors=True)
            message = f"the frames of {key} cannot be written to {place.parent}: {error.strerror or one_line(error)}"
            raise UserError(f"{message}: nothing is left behind; free some space, or pass --frame_cache off") from error
        finally:
            lock.release()

    def decode_all(self, key: str, folder: Path, quiet: bool) -> None:
        """Every episode into `folder`/frames.u8, leaving out those that journal.txt has already."""
        from tqdm.auto import tqdm

        folder.mkdir(exist_ok=True)
        path, journal = folder / "frames.u8", folder / "journal.txt"
        done = set(journal.read_text().split()) if journal.exists() else set()
        with open(path, "ab") as file:
            file.truncate(self.bytes_of(key))
        facts = {
            "dataset": self.source.name,
            "camera": key,
            "frames": self.source.rows,
            "shape": self.decoder.shape(key),
        }
        (folder / "about.json").write_text(json.dumps(facts))
        lengths = (self.source.ends - self.source.starts).tolist()
        every = 1 if sys.stderr.isatty() or in_notebook() else 30  # seconds; a log file keeps each update
        bar = tqdm(total=self.source.rows, unit="frame", desc=f"decoding {key}", disable=quiet, mininterval=every)
        with bar, open(journal, "a") as log, ThreadPoolExecutor(self.num_threads, thread_name_prefix="decode") as pool:
            jobs = {
                pool.submit(self.decode_episode, key, i, path, bar): i
                for i in range(len(lengths))
                if str(i) not in done
            }
            bar.update(sum(lengths[int(i)] for i in done))
            try:
                for job in as_completed(jobs):
                    job.result()
                    log.write(f"{jobs[job]}\n")
                    log.flush()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        journal.unlink()

    def decode_episode(self, key: str, episode: int, path: Path, bar) -> None:
        first, end = int(self.source.starts[episode]), int(self.source.ends[episode])
        frame_bytes = int(np.prod(self.decoder.shape(key)))
        with open(path, "r+b", buffering=0) as file:  # written, not mapped: a full disk is an error here, a crash there
            file.seek(first * frame_bytes)
            for start in range(first, end, CHUNK):
                pixels = self.decoder.read(key, torch.arange(start, min(start + CHUNK, end))).contiguous()
                pixels = memoryview(pixels.numpy()).cast("B")
                while pixels:
                    pixels = pixels[file.write(pixels) :]
                bar.update(min(CHUNK, end - start))
            os.fsync(file.fileno())  # the journal may say so only once it is on the disk

    def move_to(self, device: torch.device) -> None:
        size = sum(frames.numel() for frames in self.store.values())
        try:
            self.store = {key: frames.to(device) for key, frames in self.store.items()}
        except (torch.OutOfMemoryError, RuntimeError) as error:
            message = f"{size / 1e9:.1f} GB of frames do not fit the memory of {device}"
            raise UserError(
                f"--frame_cache device: {message}: pass --frame_cache on, or a smaller --image_size"
            ) from error

    def read(self, key: str, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, C, h, w) uint8 frames at (n,) rows, into `out` where that is given.

        With mode `device` they are on the device, and `out` is left alone.
        """
        if key in self.store:
            store = self.store[key]
            if self.on_device:
                return store.index_select(0, sent(rows, store.device))
            out = torch.empty(len(rows), *store.shape[1:], dtype=torch.uint8) if out is None else out
            parts = zip(rows.chunk(self.num_threads), out.chunk(self.num_threads), strict=True)
            # torch's own threads do not take part in a call from the loader's thread: half the bandwidth on two cores
            for _ in self.pool.map(lambda part: torch.index_select(store, 0, part[0], out=part[1]), parts):
                pass
            return out
        out = torch.empty(len(rows), *self.decoder.shape(key), dtype=torch.uint8) if out is None else out
        slots: dict[int, list[int]] = {}  # neighbours in a window often share frames
        for slot, row in enumerate(rows.tolist()):
            slots.setdefault(row, []).append(slot)

        def decode(part: Tensor) -> None:
            for row, pixels in zip(part.tolist(), self.decoder.read(key, part), strict=True):
                for slot in slots[row]:
                    out[slot].copy_(pixels)

        for _ in self.pool.map(decode, self.decoder.jobs(key, torch.tensor(sorted(slots)), self.num_threads)):
            pass
        return out

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.decoder.close()


def on_disk(path: Path) -> int:
    """Bytes that a file takes there: less than its size where nothing was written yet."""
    return path.stat().st_blocks * 512 if os.name != "nt" else path.stat().st_size


if __name__ == "__main__":  # `python -m data.frames list` of earlier versions
    from runs import main

    sys.exit(main(["cache", *sys.argv[1:]]))
