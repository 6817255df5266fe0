"""Pixels from video files and encoded pictures, as uint8 at training size.

n frames, C channels, H and W as recorded, h and w at training size.
"""

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from data.depth import depth_ranges, depth_unit, grey_picture
from data.frame_times import FrameTimes
from data.pictures import decode_picture
from data.source import Source
from data.videos import BLANK
from errors import UserError, one_line

LIBRARIES = ("torchcodec", "pyav")  # they may round a pixel differently
OPEN_READERS = 64  # a few MB each
CHUNK = 16  # frames decoded at a time: 15 MB at 480x640, which malloc reuses; fresh memory costs more than the copy
UNSPECIFIED = 2  # FFmpeg's number for a file that names no colour matrix
NEAR = 8  # frames: PyAV decodes that far ahead instead of seeking, which takes longer


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
    """One open video, read by frame number."""

    def __init__(self, decoder, times: FrameTimes):
        self.decoder = decoder
        self.times = times

    def read(self, numbers: list[int]) -> Tensor:
        """(n, C, H, W) uint8 frames of ascending numbers.

        Raises:
            ValueError: torchcodec gives other frames.
        """
        first = numbers[0]
        last = numbers[-1]
        if last - first == len(numbers) - 1:  # without a gap: one seek
            batch = self.decoder.get_frames_in_range(first, last + 1)
        else:
            batch = self.decoder.get_frames_at(indices=numbers)
        seconds = batch.pts_seconds.numpy()
        expected = self.times.seconds[numbers]
        if len(seconds) != len(expected) or (np.abs(seconds - expected) > float(self.times.time_base) / 2).any():
            raise ValueError(f"expected frames at {expected} s, got {seconds}")
        return batch.data

    def close(self) -> None:
        self.decoder = None


class PyavReader:
    """One open video, read by frame number: seek to the key frame before it and decode from there.

    Args:
        pixels_of: makes (H, W, 3) uint8 of PyAV's frame.
    """

    def __init__(self, container, times: FrameTimes, pixels_of: Callable):
        self.container = container
        self.times = times
        self.pixels_of = pixels_of
        self.stream = container.streams.best("video")
        # Jobs run in parallel already, and a forked process hangs when it frees a decoder that has threads.
        self.stream.codec_context.thread_count = 1
        self.frames = iter(())  # the decoder's output since the last seek
        self.frame = None  # the newest of them

    def read(self, numbers: list[int]) -> Tensor:
        """(n, C, H, W) uint8 frames of ascending numbers, turned as the file's rotation flag says.

        Raises:
            ValueError: a frame that the file lists is not among those that it decodes to.
        """
        pixels = []
        for number in numbers:
            self._go_to(number)
            pixels.append(torch.from_numpy(self.pixels_of(self.frame)))  # (H, W, C)
        frames = torch.stack(pixels).permute(0, 3, 1, 2)  # (n, C, H, W)
        if self.times.rotation:
            frames = frames.rot90(self.times.rotation // 90, dims=(2, 3))
        return frames

    def _go_to(self, number: int) -> None:
        """Decode up to the frame of this number, which is then `frame`."""
        wanted = int(self.times.pts[number])
        if self.frame is not None:
            ahead = number - int(np.searchsorted(self.times.pts, self.frame.pts))
            if 0 <= ahead <= NEAR and self._decode_until(wanted):
                return
        for start in self.times.starts(number):
            self.container.seek(start, stream=self.stream, backward=True)
            self.frames = self.container.decode(self.stream)
            self.frame = None
            if self._decode_until(wanted):
                return
        raise ValueError(f"the frame at {self.times.seconds[number]:.4f} s does not decode")

    def _decode_until(self, pts: int) -> bool:
        """Decode up to the frame that is shown at `pts`; False if the decoder is past it, or has no more frames."""
        while self.frame is None or self.frame.pts is None or self.frame.pts < pts:
            frame = next(self.frames, None)
            if frame is None:
                return False
            self.frame = frame
        return self.frame.pts == pts

    def close(self) -> None:
        # The container and its streams refer to each other: unclosed, it keeps its file open until a garbage collection.
        self.container.close()


def rgb_of(frame) -> np.ndarray:
    """(H, W, 3) uint8 pixels of PyAV's frame, by the colour matrix and range in its file, as torchcodec converts them."""
    if frame.colorspace == UNSPECIFIED:
        return frame.to_ndarray(format="rgb24")
    other = 5 if frame.colorspace == 1 else 1  # PyAV applies the frame's own matrix only where it differs from this
    rgb = frame.reformat(
        format="rgb24", src_colorspace=frame.colorspace, dst_colorspace=other, src_color_range=frame.color_range
    )
    return rgb.to_ndarray()


def grey_of(frame) -> np.ndarray:
    """(H, W, 3) uint8 pixels of PyAV's frame of a depth video, whose codes are read as LeRobot reads them."""
    return grey_picture(frame.to_ndarray(format="gray12le"))


def open_reader(
    file: str | BinaryIO, times: FrameTimes, video_decoder: type | None, depth: bool
) -> TorchcodecReader | PyavReader:
    """Open a video with torchcodec's VideoDecoder, or with PyAV if it is None.

    Args:
        depth: whether it is a depth camera's, which only PyAV decodes.
    """
    # Some versions of torchcodec apply a rotation flag, others ignore it.
    if video_decoder is not None and not times.rotation:
        decoder = video_decoder(file, custom_frame_mappings=times.mappings(), num_ffmpeg_threads=1)
        return TorchcodecReader(decoder, times)
    import av

    return PyavReader(av.open(file), times, grey_of if depth else rgb_of)


@dataclass(eq=False)
class OpenVideo:
    """A reader, and what it reads from.

    Attributes:
        wanted: path, and torchcodec's VideoDecoder or None.
        file: a path, or a VideoReader of a stream.
        reader: None before it is open.
    """

    wanted: tuple
    file: str | BinaryIO
    reader: TorchcodecReader | PyavReader | None = None

    def close(self) -> None:
        if self.reader is not None:
            self.reader.close()


class Decoder:
    """Frames of a source by camera and row, decoded when asked for. Any thread may ask.

    Args:
        source: the open dataset.
        image_size: (h, w) that pictures are resized to, None for as recorded.
    """

    action = "decoding"  # beside a progress bar

    def __init__(self, source: Source, image_size: list[int] | None):
        self.source = source
        self.image_size = image_size
        self.depth = depth_ranges(source.meta.features)  # of each depth camera
        self.idle: list[OpenVideo] = []  # least recently used first
        self.lock = threading.Lock()  # held while `idle` changes
        self.is_closed = False

    @functools.cached_property
    def torchcodec(self) -> tuple[type | None, str | None]:
        """The result of `load_torchcodec`, which is called only when a frame has to be decoded."""
        return load_torchcodec()

    @property
    def library(self) -> str:
        """Which of LIBRARIES decodes video here."""
        return "torchcodec" if self.torchcodec[0] else "pyav"

    def shape(self, key: str) -> tuple[int, int, int]:
        """(C, h, w) of a camera."""
        height, width, channels = self.source.meta.features[key]["shape"]
        if self.image_size is not None:
            height, width = self.image_size
        return channels, height, width

    def jobs(self, key: str, rows: Tensor, num_threads: int) -> list[Tensor]:
        """Split (n,) ascending rows into jobs for one thread each: at most CHUNK rows of one file or dataset."""
        if key in self.source.videos:
            groups, _ = self.source.locate(key, rows)
        else:
            groups = self.source.dataset_of(rows)
        jobs = []
        for group in torch.unique(groups).tolist():
            rows_of_group = rows[groups == group]
            for rows_of_thread in rows_of_group.tensor_split(min(num_threads, len(rows_of_group))):
                jobs += rows_of_thread.split(CHUNK)
        return jobs

    def read(self, key: str, rows: Tensor) -> Tensor:
        """(n, C, h, w) uint8 frames at (n,) rows of one file or dataset, ascending; not contiguous.

        Raises:
            UserError: a frame cannot be decoded, or does not have the size that info.json says.
        """
        if key in self.source.images:
            frames = torch.stack([self._read_picture(key, row) for row in rows.tolist()])
        else:
            frames = self._read_video(key, rows)
        return resize(frames, self.image_size)

    def _read_video(self, key: str, rows: Tensor) -> Tensor:
        files, numbers = self.source.locate(key, rows)
        file = int(files[0])
        assert (files == file).all()
        path = self.source.videos[key].files[file]
        times = self.source.videos[key].times[file]
        if path == BLANK:
            return torch.zeros(len(rows), 3, times.height, times.width, dtype=torch.uint8)
        frames = None
        # PyAV finds frames that torchcodec does not, such as the last of an open group. Pixels differ by rounding at most.
        decoders = dict.fromkeys([self.torchcodec[0], None])
        if key in self.depth:
            decoders = [None]  # torchcodec gives 8 bits of the 12
        for video_decoder in decoders:
            try:
                with self._reader(key, path, times, video_decoder) as reader:
                    frames = reader.read(numbers.tolist())
                break
            except UserError:  # of a stream
                raise
            except (RuntimeError, OSError, ValueError, IndexError) as error:  # FFmpeg's, by either library
                reason = error
        which = f"{path}: frames {numbers[0]} to {numbers[-1]}, from {self.source.name_row(int(rows[0]))} on,"
        remedy = "Leave that episode out with --episodes"
        if frames is None:
            raise UserError(f"{which} cannot be decoded: {one_line(reason)[:200]}. {remedy}") from reason
        expected = (len(rows), 3, times.height, times.width)
        if frames.shape != expected:  # a video may change its size on the way
            raise UserError(f"{which} have another size: expected {expected}, got {tuple(frames.shape)}. {remedy}")
        return frames

    @contextlib.contextmanager
    def _reader(self, key: str, path: Path, times: FrameTimes, video_decoder: type | None):
        """Lend an open reader of a file to one thread. A reader that failed is not used again."""
        wanted = (path, video_decoder)
        with self.lock:
            opened = next((entry for entry in reversed(self.idle) if entry.wanted == wanted), None)
            if opened is not None:
                self.idle.remove(opened)
        if opened is None:
            opened = OpenVideo(wanted, self._file(key, path))
        try:
            if opened.reader is None:
                opened.reader = open_reader(opened.file, times, video_decoder, key in self.depth)
            yield opened.reader
        except BaseException:
            opened.close()
            hidden = getattr(opened.file, "error", None)
            if hidden is not None:  # what a stream raised, and the library turned into an error of its own
                raise hidden from None
            raise
        with self.lock:
            self.idle.append(opened)
            surplus = self.idle[:-OPEN_READERS]
            del self.idle[:-OPEN_READERS]
        for unused in surplus:
            unused.close()

    def _file(self, key: str, path: Path) -> str | BinaryIO:
        """What a library opens to read a video."""
        if self.is_closed:
            raise UserError(f"{path} was closed")
        remote = self.source.videos[key].remote.get(path)
        return str(path) if remote is None else remote.open()

    def close(self) -> None:
        self.is_closed = True
        while self.idle:
            self.idle.pop().close()

    def _read_picture(self, key: str, row: int) -> Tensor:
        """(C, H, W) uint8 picture of an `image` feature."""
        try:
            depth = key in self.depth
            picture = decode_picture(self.source.images[key], self.source.meta.root, row, depth)
            if depth:
                picture = self.depth[key].picture(picture, depth_unit(self.source.meta.features[key]))
            pixels = torch.from_numpy(picture).permute(2, 0, 1)  # of (H, W, C)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{key}: the picture of row {row} cannot be read: {one_line(error)}") from error
        recorded_shape = (3, *self.source.recorded_size(key, row))
        if pixels.shape != recorded_shape:
            expected = "{1}x{2}x{0}".format(*recorded_shape)
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
