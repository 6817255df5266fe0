"""Frames of a dataset's cameras by row: from a store of frames that were decoded once, or decoded when asked for.

N rows, C channels, h and w pixels at training size.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.compact_store import COMPACT, LOSSLESS, CompactStore, PackedFrames
from data.decode import LIBRARIES, Decoder
from data.frame_store import FrameStore
from data.growing_store import CAN_GROW, GrowingStore
from data.pixels import copy_picture
from data.read_ahead import read_ahead
from data.source import Source
from errors import UserError, reason_of_disk
from runtime import frame_cache_dir, is_out_of_memory, to_device

SPARE = 2 * 2**30  # bytes that `auto` leaves free on the disk, or a tenth of the disk if that is more
CODECS = {"lossless": LOSSLESS, "compact": COMPACT}  # by --frame_cache
LEAST_SHARE = 0.01  # of the frames, that is worth a partial store
UNPACKED_AT_ONCE = 8  # frames of a thread's job


class Frames:
    """Frames of every camera of a source, decoded when asked for, or from stores if made by `open_or_build`.

    A Loader takes any object with `keys`, `dtype`, `shape`, `places`, `read`, `on_device`, `is_streamed`,
    `stop_streams` and `close`.

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
        self.stored: dict[str, Tensor] = {}  # (N, C, h, w) uint8 of the cameras that have a raw store
        self.packed: dict[str, PackedFrames] = {}  # of those that have a compressed store
        self.growing: dict[str, GrowingStore] = {}  # of those whose raw store fills while it is read
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
        grow: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ) -> "Frames":
        """Open every camera's store, building those that are missing.

        Args:
            source, image_size, num_threads: as for the class.
            mode: auto (raw stores if the disk has room for them, else lossless ones of as many frames as it has room for), on
                (raw stores), lossless, compact (frames as JPEG), off, or device (raw stores, held in the device's memory).
            cache_dir: where stores are kept; None for the user's cache.
            device: where `device` holds the frames.
            quiet: no progress bar.
            grow: fill missing raw stores while frames are read, rather than before (mode `device` needs them before).
            say: called with each line that the user should read.

        Raises:
            UserError: a frame cannot be decoded, or the disk or the device has no room for what the mode needs.
        """
        frames = cls(source, image_size, num_threads)
        folder = frame_cache_dir(cache_dir)
        stores = frames.find_stores(mode, folder)
        missing = [key for key in frames.keys if key not in stores]

        if source.videos and missing:
            _, reason_for_pyav = frames.decoder.torchcodec
            if reason_for_pyav:
                say(reason_for_pyav)
        if missing and mode != "off":
            stores |= choose_stores(frames.decoder, missing, mode, folder, say)
        for key in missing:
            if key in stores:
                is_raw = not isinstance(stores[key], CompactStore)
                if grow and CAN_GROW and is_raw and mode != "device":
                    frames.growing[key] = start_growing(stores.pop(key))
                else:
                    stores[key].build(num_threads, quiet)
        for key, store in stores.items():
            if isinstance(store, CompactStore):
                packed = store.open_partial()
                if packed is not None:
                    frames.packed[key] = packed
            else:
                frames.stored[key] = store.open()
        if mode == "device":
            frames.stored = move_to(torch.device(device), frames.stored)
            frames.on_device = True
        return frames

    def find_stores(self, mode: str, folder: Path) -> dict[str, FrameStore]:
        """The finished stores that a mode reads, by camera."""
        found = {}
        for key in self.keys:
            for store in candidates(self.decoder, key, mode, folder):
                if store.is_finished and key not in found:
                    found[key] = store
        return found

    def identity(self, key: str, folder: Path) -> str:
        """A name that differs where the pixels of a camera differ. `folder` is that of the stores."""
        if key not in self.packed:
            return FrameStore.find(self.decoder, key, folder).folder.name
        packed = self.packed[key]
        name = packed.path.parent.name.removeprefix(".")  # hidden while it is partial
        for library in LIBRARIES:
            if name == CompactStore.name(self.decoder, key, library, LOSSLESS):
                return FrameStore.name(self.decoder, key, library)  # the same pixels
        return name

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
            self._read_each(key, rows, out)
        return out

    @property
    def is_streamed(self) -> bool:
        """Whether frames come over the network, so that `prefetch` is worth a call."""
        return any(self.source.videos[key].is_streamed for key in self._decoded_videos())

    def _decoded_videos(self) -> list[str]:
        return [key for key in self.source.videos if key not in self.stored]

    def stop_streams(self) -> None:
        """End what waits for the network, before `close`."""
        self.decoder.is_closed = True
        for videos in self.source.videos.values():
            for stream in {video.stream for video in videos.remote.values()}:
                stream.stop()

    def prefetch(self, rows: dict[str, Tensor]) -> float:
        """Bring what `read` will need of streamed videos to the disk.

        Args:
            rows: (n,) of each camera.

        Returns:
            Its share of the room for pieces of videos.
        """
        share = 0.0
        arriving = []
        for key in self._decoded_videos():
            wanted = rows[key]
            store = self.packed.get(key) or self.growing.get(key)
            if store is not None:
                wanted = wanted[~store.holds(wanted)]
            files, numbers = self.source.locate(key, wanted)
            videos = self.source.videos[key]
            for file in torch.unique(files).tolist():
                remote = videos.remote.get(videos.files[file])
                if remote is not None:
                    futures, share_of_video = remote.request(numbers[files == file].numpy())
                    arriving += futures
                    share += share_of_video
        for future in arriving:
            if self.decoder.is_closed:
                break
            future.result()
        return share

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
        """Copy (n,) rows of `stored`, (N, ...) over a mapped file, into `out`."""
        read_ahead(stored, rows)
        # In threads of our own: torch's do not take part in a call from the loader's thread, which halves the bandwidth
        # on two cores. list() waits for them and raises their first error.
        list(
            self.pool.map(
                lambda rows, out: torch.index_select(stored, 0, rows, out=out),
                rows.chunk(self.num_threads),
                out.chunk(self.num_threads),
            )
        )

    def _read_each(self, key: str, rows: Tensor, out: Tensor) -> None:
        """Read the frames that are in a compressed or growing store, and decode the others."""
        packed = self.packed.get(key)
        growing = self.growing.get(key)
        if growing is not None and growing.holds(rows).all():
            self.gather(growing.stored, rows, out)
            return
        # Each row once: neighbours in a window often share frames.
        slots: dict[int, list[int]] = {}  # of each row, where in `out` it goes
        for slot, row in enumerate(rows.tolist()):
            slots.setdefault(row, []).append(slot)

        def put(row: int, pixels: Tensor) -> None:
            for slot in slots.get(row, []):
                copy_picture(pixels, out[slot])

        def unpack(rows: Tensor) -> None:
            for row in rows.tolist():
                put(row, growing.stored[row] if packed is None else packed.read(row))

        def decode(rows: Tensor) -> None:
            for row, pixels in zip(rows.tolist(), self.decoder.read(key, rows), strict=True):
                put(row, pixels)

        wanted = torch.tensor(sorted(slots))
        is_there = torch.zeros(len(wanted), dtype=torch.bool)
        store = packed or growing
        if store is not None:
            is_there = store.holds(wanted)
        present = wanted[is_there]
        others = wanted[~is_there]
        jobs = []  # first what takes longest
        if growing is not None:
            read_ahead(growing.stored, present)
            jobs += growing.request(others, put, self.pool)
        elif len(others):
            jobs += [self.pool.submit(decode, some) for some in self.decoder.jobs(key, others, self.num_threads)]
        jobs += [self.pool.submit(unpack, some) for some in present.split(UNPACKED_AT_ONCE) if len(some)]
        for job in jobs:
            job.result()

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        while self.growing:
            _, store = self.growing.popitem()
            store.close()
        self.decoder.close()


def start_growing(store: FrameStore) -> GrowingStore:
    """A store to fill while it is read.

    Raises:
        UserError: the disk refuses.
    """
    try:
        return GrowingStore(store).start()
    except OSError as error:
        raise UserError(
            f"the frames of {store.key} cannot be written to {store.folder.parent}: {reason_of_disk(error)}. "
            "Free some space, or pass --frame_cache off"
        ) from error


def candidates(decoder: Decoder, key: str, mode: str, folder: Path) -> list[FrameStore]:
    """The stores of a camera that a mode may read, the best first."""
    stores = []
    if mode in ("auto", "on", "device"):
        stores.append(FrameStore.find(decoder, key, folder))
    if mode == "auto":
        stores.append(CompactStore.find(decoder, key, folder, LOSSLESS))
    if mode in CODECS:
        stores.append(CompactStore.find(decoder, key, folder, CODECS[mode]))
    return stores


def choose_stores(decoder: Decoder, keys: list[str], mode: str, folder: Path, say) -> dict[str, FrameStore]:
    """The stores to build for some cameras, which have none: of the best kind that the disk has room for. Empty if `auto` finds
    no room at all.

    Raises:
        UserError: there is no room, and the mode is not auto.
    """
    kinds = list(zip(*(candidates(decoder, key, mode, folder) for key in keys), strict=True))
    first = room_for(kinds[0], folder, mode)
    if first.fits:
        say(f"frame cache: {first.needed}")
        return dict(zip(keys, kinds[0], strict=True))

    # `auto` has no room for raw stores: losslessly compressed ones take a half to a sixth.
    stores = kinds[1]
    written = sum(store.bytes_written for store in stores)
    needed = first.needed
    if written or first.free > 0:
        room = room_for(stores, folder, mode)
        needed = room.needed
        if room.fits:
            say(f"frame cache: {needed}, since {first.size / 1e9:.1f} GB of decoded frames do not fit")
            return dict(zip(keys, stores, strict=True))
        share = (written + room.free) / (written + room.size)
        if share >= LEAST_SHARE:
            for store in stores:  # each the same share of its frames
                store.limit = store.bytes_written + int(room.free * store.bytes_to_write() / room.size)
            say(
                f"frame cache: no room for {needed}: about {share:.0%} of the frames are kept, the others are decoded as "
                "they are needed (--cache_dir, --image_size)"
            )
            return dict(zip(keys, stores, strict=True))
    say(f"frame cache off, no room for {needed}: frames are decoded as they are needed (--cache_dir, --image_size)")
    return {}


@dataclass(frozen=True)
class Room:
    """What stores need of a disk, and what it has.

    Attributes:
        size: bytes that are missing of the stores.
        free: bytes that may be written.
        needed: both in words.
    """

    size: int
    free: int
    needed: str

    @property
    def fits(self) -> bool:
        return self.size <= self.free


def room_for(stores: Sequence[FrameStore], folder: Path, mode: str) -> Room:
    """How much room the disk of `folder` has to build `stores`, which hold the same.

    Raises:
        UserError: there is no room, and the mode is not auto.
    """
    what = stores[0].what
    size = sum(store.bytes_to_write() for store in stores)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # an existing folder may be another user's, or read-only
        disk = shutil.disk_usage(folder)
        spare = max(SPARE, disk.total // 10) if mode == "auto" else 0
        needed = f"{size / 1e9:.1f} GB of {what} in {folder}, {disk.free / 1e9:.1f} GB free"
        if disk.free - spare < size <= disk.free:
            needed += f" (auto keeps {spare / 1e9:.1f} GB free, --frame_cache {stores[0].mode} does not)"
        room = Room(size, max(0, disk.free - spare), needed)
    except OSError as error:
        room = Room(max(size, 1), 0, f"{what} in {folder} ({error.strerror})")
    if not room.fits and mode != "auto":
        remedy = "Pass --frame_cache off, --image_size or another --cache_dir"
        raise UserError(f"--frame_cache {mode}: no room for {room.needed}. {remedy}")
    return room


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


if __name__ == "__main__":  # `python -m data.frames list` of earlier versions
    from runs import main

    sys.exit(main(["cache", *sys.argv[1:]]))
