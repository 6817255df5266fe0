"""A frame store whose frames are compressed, each by itself: smaller than a raw store, and slower to read.

    frames.bin    encoded frames, in the order in which they were written
    index.i64     (N, 3) int64: where in frames.bin each row's frame begins, its length and its CRC-32; zeros for a row that is
                  not there
    about.json    what it holds, for people

It is built as a raw store is (data/frame_store.py). A store that may be partial stays in its build folder when the room is used
up: its frames are read from there, and the next run continues as far as there is room.

N rows, n frames, C channels, h and w pixels at training size.
"""

import io
import os
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.decode import CHUNK, Decoder
from data.frame_store import FrameStore, NoRoomError, listed_episodes, mark_used, store_name, write_all
from errors import UserError

INDEX_BYTES = 24  # of a row in index.i64
SAMPLES = 24  # frames that are encoded to estimate the size of all
MARGIN = 1.1  # of the estimate
JPEG_QUALITY = 92  # above 38 dB of signal to noise at 128x128, 44 dB at 480x640; a frame of quality 95 takes a sixth longer to read


@dataclass(frozen=True)
class Codec:
    """A way to compress one frame.

    Attributes:
        name: part of the store's name.
        adjective: of the frames, for messages.
        encode: from (C, h, w) uint8 to bytes.
        decode: from (length,) uint8 to (C, h, w) uint8, not contiguous.
    """

    name: str
    adjective: str
    encode: Callable[[Tensor], bytes]
    decode: Callable[[Tensor], Tensor]


def encode_webp(pixels: Tensor) -> bytes:
    from PIL import Image

    encoded = io.BytesIO()
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    # More effort makes the file a little smaller, and takes several times as long.
    image.save(encoded, "WEBP", lossless=True, quality=0, method=0)
    return encoded.getvalue()


def decode_webp(content: Tensor) -> Tensor:
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_webp as decode

    return decode(content, ImageReadMode.RGB)


def encode_jpeg(pixels: Tensor) -> bytes:
    from torchvision.io import encode_jpeg as encode

    return encode(pixels.contiguous(), JPEG_QUALITY).numpy().tobytes()


def decode_jpeg(content: Tensor) -> Tensor:
    from torchvision.io import ImageReadMode
    from torchvision.io import decode_jpeg as decode

    return decode(content, ImageReadMode.RGB)


LOSSLESS = Codec("webp", "losslessly compressed", encode_webp, decode_webp)
COMPACT = Codec(f"jpeg{JPEG_QUALITY}", "compressed", encode_jpeg, decode_jpeg)


@dataclass
class CompactStore(FrameStore):
    """The compressed store of one camera, finished, partial or not begun.

    Attributes:
        codec: how each frame is compressed.
        limit: bytes that frames.bin may have; None for as many as it takes.
    """

    codec: Codec
    limit: int | None = None
    _end: int = field(default=0, init=False)  # of what is written
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)  # held while `_end` changes

    data_file = "frames.bin"
    mode = "lossless"

    @staticmethod
    def name(decoder: Decoder, key: str, library: str, codec: Codec) -> str:
        return store_name(decoder, key, library, codec.name)

    @cached_property
    def num_bytes(self) -> int:
        """About how many bytes all frames take, from some of them."""
        rows = torch.linspace(0, self.shape[0] - 1, min(SAMPLES, self.shape[0])).long().unique()
        lengths = [len(self.codec.encode(self.decoder.read(self.key, row[None])[0])) for row in rows]
        return int(MARGIN * np.mean(lengths) * self.shape[0]) + INDEX_BYTES * self.shape[0]

    @property
    def what(self) -> str:
        return f"{self.codec.adjective} frames"

    @property
    def bytes_written(self) -> int:
        has_any = bool(listed_episodes(self.build_folder / "journal.txt"))  # else a build starts from nothing
        return super().bytes_written if has_any else 0

    @property
    def may_be_partial(self) -> bool:
        return self.limit is not None

    def build(self, num_threads: int, quiet: bool) -> None:
        if self.limit is None or self.limit > self.bytes_written:
            super().build(num_threads, quiet)

    def open(self) -> "PackedFrames":
        """The frames of a finished store."""
        packed = self._open(self.folder)
        if (packed.index[:, 1] == 0).any():
            raise UserError(f"{self.folder / 'index.i64'} is damaged: it lacks rows. Delete {self.folder}")
        return packed

    def open_partial(self) -> "PackedFrames | None":
        """The frames of a store that is finished, or of those of its episodes that are there; None if none are."""
        if self.is_finished:
            return self.open()
        listed = listed_episodes(self.build_folder / "journal.txt")
        if not listed:
            return None
        packed = self._open(self.build_folder)
        source = self.decoder.source
        is_there = np.zeros(self.shape[0], bool)
        for episode in listed:
            if episode < len(source.episodes):
                is_there[int(source.starts[episode]) : int(source.ends[episode])] = True
        packed.index = np.where(is_there[:, None], packed.index, 0)
        return packed

    def _open(self, folder: Path) -> "PackedFrames":
        path = folder / "index.i64"
        expected = INDEX_BYTES * self.shape[0]
        size = path.stat().st_size if path.exists() else 0
        if size != expected:
            raise UserError(f"{path} is damaged: expected {expected} bytes, got {size}. Delete {folder}")
        index = np.fromfile(path, np.int64).reshape(-1, 3)
        size = (folder / self.data_file).stat().st_size if (folder / self.data_file).exists() else 0
        if size < index[:, :2].sum(1).max():
            raise UserError(f"{folder / self.data_file} is damaged: it ends before its last frame. Delete {folder}")
        mark_used(folder)
        return PackedFrames(folder / self.data_file, self.codec, index)

    def _prepare(self, listed: dict[int, int]) -> set[int]:
        source = self.decoder.source
        index_path = self.build_folder / "index.i64"
        with open(index_path, "ab") as file:
            file.truncate(INDEX_BYTES * self.shape[0])
        index = np.fromfile(index_path, np.int64).reshape(-1, 3)
        done = set()
        self._end = 0
        with open(self.build_folder / self.data_file, "a+b") as file:
            size = os.fstat(file.fileno()).st_size
            for episode, crc in listed.items():
                if episode >= len(source.episodes):
                    continue
                spans = index[int(source.starts[episode]) : int(source.ends[episode])]
                found = 0
                for start, length, _ in spans.tolist():
                    if not (0 <= start < size and 0 < length <= size):
                        break
                    file.seek(start)
                    found = zlib.crc32(file.read(length), found)
                else:
                    if found == crc:
                        done.add(episode)
                        self._end = max(self._end, int(spans[:, :2].sum(1).max()))
            file.truncate(self._end)  # of an episode that was not finished
        return done

    def _decode_episode(self, episode: int, bar) -> int:
        first = int(self.decoder.source.starts[episode])
        end = int(self.decoder.source.ends[episode])
        crc = 0
        spans = []
        with open(self.build_folder / self.data_file, "r+b", buffering=0) as file:
            for rows in torch.arange(first, end).split(CHUNK):
                encoded = [self.codec.encode(pixels) for pixels in self.decoder.read(self.key, rows)]
                start = self._reserve(sum(map(len, encoded)))
                file.seek(start)
                for content in encoded:
                    spans.append((start, len(content), zlib.crc32(content)))
                    start += len(content)
                written = b"".join(encoded)
                crc = zlib.crc32(written, crc)
                write_all(file, memoryview(written))
                bar.update(len(rows))
            os.fsync(file.fileno())
        with open(self.build_folder / "index.i64", "r+b", buffering=0) as file:
            file.seek(INDEX_BYTES * first)
            write_all(file, memoryview(np.array(spans, np.int64).tobytes()))
            os.fsync(file.fileno())
        return crc

    def _reserve(self, count: int) -> int:
        """A place in frames.bin for `count` bytes.

        Raises:
            NoRoomError: the limit is reached.
        """
        with self._lock:
            start = self._end
            if self.limit is not None and start + count > self.limit:
                raise NoRoomError
            self._end = start + count
        return start


class PackedFrames:
    """The frames of a compressed store, by row.

    Args:
        path: frames.bin.
        index: (N, 3) int64, as in index.i64.
    """

    def __init__(self, path: Path, codec: Codec, index: np.ndarray):
        self.path = path
        self.codec = codec
        self.index = index
        self.content = np.memmap(path, np.uint8, "c") if path.stat().st_size else np.empty(0, np.uint8)

    def holds(self, rows: Tensor) -> Tensor:
        """(n,) bool whether the frames at (n,) rows are there."""
        return torch.from_numpy(self.index[rows.numpy(), 1] > 0)

    def read(self, row: int) -> Tensor:
        """(C, h, w) uint8, not contiguous.

        Raises:
            UserError: the store is damaged.
        """
        start, length, crc = self.index[row].tolist()
        content = self.content[start : start + length]
        if zlib.crc32(content) != crc:
            raise UserError(f"{self.path} is damaged at byte {start}. Delete {self.path.parent}")
        return self.codec.decode(torch.from_numpy(content))
