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

LIBRARIES = ("torchcodec", "pyav")  # they may differ in a rounding
OPEN_READERS = 64  # a few MB each
CHUNK = 16  # frames decoded at a time: 15 MB at 480x640, which malloc reuses; fresh memory costs more than the copy


def load_torchcodec():
    """(torchcodec's VideoDecoder, []), or (None, [why PyAV decodes instead])."""
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError:
        return None, ["torchcodec is not installed: decoding video with PyAV"]
    except (RuntimeError, OSError):  # its own message is a page of tracebacks, one for each FFmpeg version
        return None, ["torchcodec finds no FFmpeg libraries (Debian: apt install ffmpeg): decoding video with PyAV"]
    return VideoDecoder, []


class TorchcodecReader:
    """One video, read by frame number as LeRobot does: approximate seeking, at the stream's average rate."""

    def __init__(self, path: Path, video_decoder):
        self.decoder = video_decoder(str(path), seek_mode="approximate", num_ffmpeg_threads=1)

    def read(self, numbers: list[int]) -> Tensor:
        if numbers[-1] - numbers[0] == len(numbers) - 1:  # in a row: no seeks
            return self.decoder.get_frames_in_range(numbers[0], numbers[-1] + 1).data  # (n, C, H, W)
        return self.decoder.get_frames_at(indices=numbers).data

    def close(self) -> None:
        self.decoder = None


class PyavReader:
    """One video, read by frame number: seek to the key frame before, decode on from there."""

    def __init__(self, path: Path):
        import av

        self.container = av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.rate = self.stream.average_rate
        self.decoded, self.position, self.frame = iter(()), None, None

    def read(self, numbers: list[int]) -> Tensor:
        frames = []
        for number in numbers:  # ascending
            if self.position is None or not 0 <= number - self.position <= 8:  # nearer, decoding on beats a seek
                offset = round(number / self.rate / self.stream.time_base)
                self.container.seek(offset, stream=self.stream, backward=True)
                self.decoded, self.position = self.container.decode(self.stream), None
            while self.position is None or self.position < number:
                self.frame = next(self.decoded)
                self.position = round(self.frame.pts * self.stream.time_base * self.rate)
            frames.append(torch.from_numpy(self.frame.to_ndarray(format="rgb24")))  # (H, W, C), LeRobot's conversion
        return torch.stack(frames).permute(0, 3, 1, 2)  # (n, C, H, W)

    def close(self) -> None:
        self.container.close()  # it is in a cycle with its streams: dropped, it would keep its file open until a collection


class Decoder:
    """Frames of a source by camera and row, decoded when asked; any thread may ask.

    Args:
        source: the open dataset.
        image_size: (h, w) that pictures are resized to, None for as recorded.
    """

    def __init__(self, source: Source, image_size: list[int] | None):
        self.source, self.image_size = source, image_size
        self.idle: list[tuple[Path, object]] = []  # open readers, least recently used first
        self.lock = threading.Lock()

    @functools.cached_property
    def loaded(self) -> tuple:
        """torchcodec's VideoDecoder or None, and why: loaded once a frame has to be decoded, which may be never."""
        return load_torchcodec()

    @property
    def library(self) -> str:
        """Which of LIBRARIES decodes video here."""
        return LIBRARIES[0] if self.loaded[0] else LIBRARIES[1]

    def recorded_shape(self, key: str) -> tuple[int, int, int]:
        """(C, H, W) of a camera by info.json."""
        height, width, channels = self.source.meta.features[key]["shape"]
        return channels, height, width

    def shape(self, key: str) -> tuple[int, int, int]:
        """(C, h, w) of a camera."""
        channels, *size = self.recorded_shape(key)
        return (channels, *(self.image_size or size))

    def jobs(self, key: str, rows: Tensor, pieces: int) -> list[Tensor]:
        """(n,) ascending rows, split into `pieces` of one file each and each of at most CHUNK."""
        files = [rows]
        if key in self.source.videos:
            file, _ = self.source.locate(key, rows)
            files = [rows[file == index] for index in torch.unique(file).tolist()]
        parts = [part for mine in files for part in mine.tensor_split(min(pieces, len(mine)))]
        return [chunk for part in parts for chunk in part.split(CHUNK)]

    def read(self, key: str, rows: Tensor) -> Tensor:
        """(n, C, h, w) uint8 frames at (n,) rows of one file, ascending; not contiguous.

        Raises:
            UserError: a frame cannot be decoded, or is a picture of another size than info.json says.
        """
        if key in self.source.images:
            frames = torch.stack([self._picture(key, row) for row in rows.tolist()])
        else:
            file, number = self.source.locate(key, rows)
            assert (file == file[0]).all()
            frames = self._video(self.source.videos[key].files[int(file[0])], number.tolist())
        return to_size(frames, self.image_size)

    def _video(self, path: Path, numbers: list[int]) -> Tensor:
        try:
            with self._reader(path) as reader:
                return reader.read(numbers)
        except (RuntimeError, OSError, ValueError, IndexError, StopIteration) as error:  # FFmpeg's, by either library
            message = f"{path}: frames {numbers[0]} to {numbers[-1]} cannot be decoded: {one_line(error)[:200]}"
            raise UserError(message) from error

    @contextlib.contextmanager
    def _reader(self, path: Path):
        """An open reader of a file, for one thread at a time; one that failed is not used again."""
        with self.lock:
            places = [place for place, (idle, _) in enumerate(self.idle) if idle == path]
            reader = self.idle.pop(places[-1])[1] if places else None
        if reader is None:
            reader = TorchcodecReader(path, self.loaded[0]) if self.loaded[0] else PyavReader(path)
        try:
            yield reader
        except BaseException:
            reader.close()
            raise
        with self.lock:
            self.idle.append((path, reader))
            oldest = self.idle[:-OPEN_READERS]
            del self.idle[:-OPEN_READERS]
        for _, reader in oldest:
            reader.close()

    def close(self) -> None:
        while self.idle:
            self.idle.pop()[1].close()

    def _picture(self, key: str, row: int) -> Tensor:
        from PIL import Image

        stored = self.source.images[key][row].as_py()
        try:
            with Image.open(
                io.BytesIO(stored["bytes"]) if stored["bytes"] else self.source.root / stored["path"]
            ) as image:
                pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)  # (C, H, W)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{key}: the picture of row {row} cannot be read: {one_line(error)}") from error
        if pixels.shape != self.recorded_shape(key):
            found, said = ("{1}x{2}x{0}".format(*shape) for shape in (pixels.shape, self.recorded_shape(key)))
            raise UserError(
                f"{key}: the picture of row {row} is {found} as RGB, info.json says {said}: mend one of them"
            )
        return pixels


def to_size(frames: Tensor, image_size: list[int] | None) -> Tensor:
    """(n, C, H, W) uint8 frames at (h, w): LeRobot's image_crop_resize_processor, rounded to uint8."""
    if image_size is None or list(frames.shape[-2:]) == list(image_size):
        return frames
    from torchvision.transforms import functional

    small = functional.resize(frames.to(torch.float32) / 255.0, list(image_size)).clamp(0.0, 1.0)
    return (small * 255.0).round().to(torch.uint8)
