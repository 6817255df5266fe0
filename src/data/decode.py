"""Pixels from video files and encoded pictures, as uint8 at training size.

n frames, C channels, H and W as recorded, h and w at training size.
"""

import contextlib
import functools
import io
import threading
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.source import Source
from errors import UserError, one_line

LIBRARIES = ("torchcodec", "pyav")  # they may round a pixel differently
OPEN_READERS = 64  # a few MB each
CHUNK = 16  # frames decoded at a time: 15 MB at 480x640, which malloc reuses; fresh memory costs more than the copy
NEAR = 8  # frames ahead up to which PyAV decodes on instead of seeking, which is slower


def load_torchcodec() -> tuple[type | None, str | None]:
    """torchcodec's VideoDecoder and None, or None and why PyAV decodes instead."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        return None, "torchcodec is not installed: decoding video with PyAV"
    except (RuntimeError, OSError):  # its own message is a page of tracebacks, one for each FFmpeg version
        return None, "torchcodec finds no FFmpeg libraries (Debian: apt install ffmpeg): decoding video with PyAV"
    return VideoDecoder, None


class TorchcodecReader:
    """One open video, read by frame number as LeRobot does: approximate seeking, at the stream's average rate."""

    def __init__(self, decoder):
        self.decoder = decoder

    def read(self, numbers: list[int]) -> Tensor:
        """(n, C, H, W) uint8 frames of ascending numbers."""
        first = numbers[0]
        last = numbers[-1]
        if last - first == len(numbers) - 1:  # without a gap: one seek
            return self.decoder.get_frames_in_range(first, last + 1).data
        return self.decoder.get_frames_at(indices=numbers).data

    def close(self) -> None:
        self.decoder = None


class PyavReader:
    """One open video, read by frame number: seek to the key frame before it and decode from there."""

    def __init__(self, container):
        self.container = container
        self.stream = container.streams.video[0]
        self.rate = self.stream.average_rate
        self.frames = iter(())  # the decoder's output since the last seek
        self.frame = None  # the newest of them
        self.number = None  # and its frame number

    def read(self, numbers: list[int]) -> Tensor:
        """(n, C, H, W) uint8 frames of ascending numbers."""
        pixels = []
        for number in numbers:
            if self.number is None or not 0 <= number - self.number <= NEAR:
                self._seek(number)
            while self.number is None or self.number < number:
                self.frame = next(self.frames)
                self.number = round(self.frame.pts * self.stream.time_base * self.rate)
            pixels.append(torch.from_numpy(self.frame.to_ndarray(format="rgb24")))  # (H, W, C), LeRobot's conversion
        return torch.stack(pixels).permute(0, 3, 1, 2)  # (n, C, H, W)

    def _seek(self, number: int) -> None:
        offset = round(number / self.rate / self.stream.time_base)
        self.container.seek(offset, stream=self.stream, backward=True)
        self.frames = self.container.decode(self.stream)
        self.number = None

    def close(self) -> None:
        # The container and its streams refer to each other: unclosed, it keeps its file open until a garbage collection.
        self.container.close()


def open_reader(path: Path, video_decoder: type | None) -> TorchcodecReader | PyavReader:
    """Open a video with torchcodec's VideoDecoder, or with PyAV if it is None."""
    if video_decoder is not None:
        return TorchcodecReader(video_decoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1))
    import av

    return PyavReader(av.open(str(path)))


class Decoder:
    """Frames of a source by camera and row, decoded when asked for. Any thread may ask.

    Args:
        source: the open dataset.
        image_size: (h, w) that pictures are resized to, None for as recorded.
    """

    def __init__(self, source: Source, image_size: list[int] | None):
        self.source = source
        self.image_size = image_size
        self.idle: list[tuple[Path, TorchcodecReader | PyavReader]] = []  # open readers, least recently used first
        self.lock = threading.Lock()  # held while `idle` changes

    @functools.cached_property
    def torchcodec(self) -> tuple[type | None, str | None]:
        """What `load_torchcodec` returns, called when the first frame has to be decoded, which may be never."""
        return load_torchcodec()

    @property
    def library(self) -> str:
        """Which of LIBRARIES decodes video here."""
        return "torchcodec" if self.torchcodec[0] else "pyav"

    def recorded_shape(self, key: str) -> tuple[int, int, int]:
        """(C, H, W) of a camera by info.json."""
        height, width, channels = self.source.meta.features[key]["shape"]
        return channels, height, width

    def shape(self, key: str) -> tuple[int, int, int]:
        """(C, h, w) of a camera."""
        channels, *recorded_size = self.recorded_shape(key)
        return channels, *(self.image_size or recorded_size)

    def jobs(self, key: str, rows: Tensor, num_threads: int) -> list[Tensor]:
        """Split (n,) ascending rows into what one thread reads at a time: rows of one file, at most CHUNK."""
        files = torch.zeros_like(rows)
        if key in self.source.videos:
            files, _ = self.source.locate(key, rows)
        jobs = []
        for file in torch.unique(files).tolist():
            rows_of_file = rows[files == file]
            for rows_of_thread in rows_of_file.tensor_split(min(num_threads, len(rows_of_file))):
                jobs += rows_of_thread.split(CHUNK)
        return jobs

    def read(self, key: str, rows: Tensor) -> Tensor:
        """(n, C, h, w) uint8 frames at (n,) rows of one file, ascending; not contiguous.

        Raises:
            UserError: a frame cannot be decoded, or is a picture of another size than info.json says.
        """
        if key in self.source.images:
            frames = torch.stack([self._read_picture(key, row) for row in rows.tolist()])
        else:
            files, numbers = self.source.locate(key, rows)
            assert (files == files[0]).all()
            frames = self._read_video(self.source.videos[key].files[int(files[0])], numbers.tolist())
        return resize(frames, self.image_size)

    def _read_video(self, path: Path, numbers: list[int]) -> Tensor:
        try:
            with self._reader(path) as reader:
                return reader.read(numbers)
        except (RuntimeError, OSError, ValueError, IndexError, StopIteration) as error:  # FFmpeg's, by either library
            message = f"{path}: frames {numbers[0]} to {numbers[-1]} cannot be decoded: {one_line(error)[:200]}"
            raise UserError(message) from error

    @contextlib.contextmanager
    def _reader(self, path: Path):
        """Lend an open reader of a file to one thread. A reader that failed is not used again."""
        with self.lock:
            idle = next((entry for entry in reversed(self.idle) if entry[0] == path), None)
            if idle is not None:
                self.idle.remove(idle)
        reader = idle[1] if idle is not None else open_reader(path, self.torchcodec[0])
        try:
            yield reader
        except BaseException:
            reader.close()
            raise
        with self.lock:
            self.idle.append((path, reader))
            surplus = self.idle[:-OPEN_READERS]
            del self.idle[:-OPEN_READERS]
        for _, reader in surplus:
            reader.close()

    def close(self) -> None:
        while self.idle:
            _, reader = self.idle.pop()
            reader.close()

    def _read_picture(self, key: str, row: int) -> Tensor:
        """(C, H, W) uint8 picture of an `image` feature."""
        from PIL import Image

        stored = self.source.images[key][row].as_py()
        file = io.BytesIO(stored["bytes"]) if stored["bytes"] else self.source.meta.root / stored["path"]
        try:
            with Image.open(file) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{key}: the picture of row {row} cannot be read: {one_line(error)}") from error
        if pixels.shape != self.recorded_shape(key):
            expected = "{1}x{2}x{0}".format(*self.recorded_shape(key))
            got = "{1}x{2}x{0}".format(*pixels.shape)
            raise UserError(
                f"{key}: the picture of row {row} does not have the size in info.json: expected {expected}, got {got} as "
                "RGB. Correct one of them"
            )
        return pixels


def resize(frames: Tensor, image_size: list[int] | None) -> Tensor:
    """(n, C, H, W) uint8 frames at (h, w): LeRobot's image_crop_resize_processor, rounded to uint8."""
    if image_size is None or list(frames.shape[-2:]) == list(image_size):
        return frames
    from torchvision.transforms import functional

    resized = functional.resize(frames.to(torch.float32) / 255.0, list(image_size)).clamp(0.0, 1.0)
    return (resized * 255.0).round().to(torch.uint8)
