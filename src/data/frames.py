"""Pixels: any frames of any camera as uint8, decoded a batch at a time, grouped by file and sorted by frame.

n frames, C channels, H and W as recorded.
"""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from config import UserError, one_line
from data.source import Source

OPEN_DECODERS = 64  # a few MB each


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

    def read(self, numbers: list[int], out: Tensor) -> None:
        out.copy_(self.decoder.get_frames_at(indices=numbers).data)


class PyavReader:
    """One video, read by frame number: seek to the key frame before, decode on from there."""

    def __init__(self, path: Path):
        import av

        self.container = av.open(str(path))
        self.stream = self.container.streams.video[0]
        self.rate = self.stream.average_rate

    def read(self, numbers: list[int], out: Tensor) -> None:
        decoded, position = iter(()), None
        for slot, number in enumerate(numbers):  # ascending
            if position is None or not 0 <= number - position <= 8:  # nearer than that, decoding on beats a seek
                self.container.seek(
                    round(number / self.rate / self.stream.time_base), stream=self.stream, backward=True
                )
                decoded, position = self.container.decode(self.stream), None
            while position is None or position < number:
                frame = next(decoded)
                position = round(frame.pts * self.stream.time_base * self.rate)
            picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))  # (H, W, C), LeRobot's own conversion
            out[slot].copy_(picture.permute(2, 0, 1))


class Frames:
    """Frames of a source by camera and row.

    Args:
        source: the open dataset.
        num_threads: decoders that work at once.
    """

    def __init__(self, source: Source, num_threads: int):
        self.source = source
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        self.num_threads = num_threads
        self.idle: list[
            tuple[Path, object]
        ] = []  # open readers, least recently used first; one thread at a time uses one
        self.lock = threading.Lock()
        self.keys = [*source.meta.video_keys, *source.images]
        self.video_decoder, self.warnings = load_torchcodec() if source.meta.video_keys else (None, [])
        self.places = {key: self._places(key) for key in source.meta.video_keys}

    def _places(self, key: str) -> tuple[list[Path], Tensor, Tensor]:
        """Files of a camera, and for each selected episode (E,) its file and its first frame's number there."""
        meta = self.source.meta
        first_time = meta.episodes[f"videos/{key}/from_timestamp"]
        paths = [self.source.root / meta.get_video_file_path(episode, key) for episode in self.source.episodes]
        files = list(dict.fromkeys(paths))
        first = [round(first_time[episode] * meta.fps) for episode in self.source.episodes]
        return files, torch.tensor([files.index(path) for path in paths]), torch.tensor(first)

    def read(self, key: str, rows: Tensor) -> Tensor:
        """(n, C, H, W) uint8 frames of camera `key` at (n,) int64 rows.

        Raises:
            UserError: a file cannot be decoded.
        """
        unique, back = torch.unique(rows, return_inverse=True)  # neighbours in a window often share frames
        jobs = self._image_jobs(key, unique) if key in self.source.images else self._video_jobs(key, unique)
        height, width, channels = self._shape(key)
        frames = torch.empty(len(unique), channels, height, width, dtype=torch.uint8)
        for done in [self.pool.submit(job, frames) for job in jobs]:
            done.result()
        return frames[back]

    def _shape(self, key: str) -> tuple[int, int, int]:
        """(H, W, C) of a camera, whichever way round info.json has it."""
        a, b, c = self.source.meta.features[key]["shape"]
        names = self.source.meta.features[key].get("names") or ["height", "width", "channels"]
        return (a, b, c) if str(names[2]).startswith("channel") else (b, c, a)

    def _video_jobs(self, key: str, rows: Tensor):
        files, file_of, first = self.places[key]
        episode = self.source.episode_of(rows)  # (n,)
        numbers = first[episode] + rows - self.source.starts[episode]  # (n,) frame numbers within their files
        for index in torch.unique(file_of[episode]).tolist():
            slots = (file_of[episode] == index).nonzero()[:, 0]
            slots = slots[numbers[slots].argsort()]
            for part in slots.tensor_split(min(self.num_threads, len(slots))):
                yield lambda frames, part=part, path=files[index]: self._decode(
                    path, numbers[part].tolist(), part, frames
                )

    def _decode(self, path: Path, numbers: list[int], slots: Tensor, frames: Tensor) -> None:
        out = torch.empty(len(slots), *frames.shape[1:], dtype=torch.uint8)
        try:
            reader = self._take(path)
            reader.read(numbers, out)
        except (RuntimeError, OSError, ValueError, IndexError, StopIteration) as error:  # FFmpeg's, by either library
            raise UserError(
                f"{path}: frames {numbers[0]} to {numbers[-1]} cannot be decoded: {one_line(error)[:200]}"
            ) from error
        frames[slots] = out
        with self.lock:
            self.idle.append((path, reader))
            del self.idle[:-OPEN_DECODERS]

    def _take(self, path: Path):
        with self.lock:
            for place in range(len(self.idle) - 1, -1, -1):
                if self.idle[place][0] == path:
                    return self.idle.pop(place)[1]
        return TorchcodecReader(path, self.video_decoder) if self.video_decoder else PyavReader(path)

    def _image_jobs(self, key: str, rows: Tensor):
        for part in torch.arange(len(rows)).tensor_split(min(self.num_threads, len(rows))):
            yield lambda frames, part=part: self._open_images(key, rows, part, frames)

    def _open_images(self, key: str, rows: Tensor, slots: Tensor, frames: Tensor) -> None:
        from PIL import Image

        for slot in slots.tolist():
            stored = self.source.images[key][int(rows[slot])].as_py()
            try:
                with Image.open(
                    io.BytesIO(stored["bytes"]) if stored["bytes"] else self.source.root / stored["path"]
                ) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError) as error:
                raise UserError(
                    f"{key}: the picture of row {int(rows[slot])} cannot be read: {one_line(error)}"
                ) from error
            frames[slot].copy_(torch.from_numpy(pixels.copy()).permute(2, 0, 1))

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.idle.clear()
