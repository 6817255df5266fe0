"""A camera's video files: which frames of them are which episode's, and what is wrong with them.

E selected episodes.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from errors import one_line


@dataclass
class Videos:
    """Where a camera's frames lie.

    Attributes:
        files: videos that hold frames of the selected episodes.
        rows: how many rows of the dataset each file holds, selected or not.
        file, first: (E,) file of each selected episode, and its first frame's number there.
    """

    files: list[Path]
    rows: list[int]
    file: Tensor
    first: Tensor


def find_videos(meta, key: str, episodes: list[int]) -> Videos:
    """Frames are counted, not found by their time: the video's clock may be another than the dataset's, 29.97 fps for 30."""
    of_key = [f"videos/{key}/{name}" for name in ("from_timestamp", "chunk_index", "file_index")]
    columns = [meta.episodes[name] for name in (*of_key, "episode_index", "length")]
    rows: dict[Path, int] = {}
    places: dict[int, tuple[Path, int]] = {}
    for _, chunk, file, episode, length in sorted(zip(*columns, strict=True)):
        path = meta.root / meta.video_path.format(video_key=key, chunk_index=chunk, file_index=file)
        places[episode] = path, rows.get(path, 0)
        rows[path] = places[episode][1] + length
    paths, first = zip(*(places[episode] for episode in episodes), strict=True)
    number = {path: i for i, path in enumerate(dict.fromkeys(paths))}
    file = torch.tensor([number[path] for path in paths])
    return Videos(list(number), [rows[path] for path in number], file, torch.tensor(first))


def video_problems(videos: Videos, root: Path, shape: tuple[int, ...], fps: float) -> list[str]:
    """A line for each file that is not there, is not whole, or has not a frame for each row."""
    message = [
        (file, video_problem(file, rows, shape, fps))
        for file, rows in sorted(zip(videos.files, videos.rows, strict=True))
    ]
    return [f"{file.relative_to(root)} {problem}" for file, problem in message if problem]


def video_problem(path: Path, rows: int, shape: tuple[int, ...], fps: float) -> str | None:
    """What is wrong with one video against its `rows` of the table and its (H, W, C) shape; None if nothing is."""
    import av

    if not path.is_file():
        return "is missing"
    av.logging.set_libav_level(av.logging.PANIC)  # its remarks on a damaged file; ours says which file
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            if frames != rows:
                return f"has {frames} frames, its episodes have {rows} rows"
            if (stream.height, stream.width) != shape[:2]:
                return f"is {stream.height}x{stream.width}, info.json says {shape}"
            if stream.average_rate and abs(float(stream.average_rate) - fps) > 0.01 * fps:
                return f"runs at {float(stream.average_rate):g} fps, info.json says {fps}"
            return None if has_last_frame(container, stream, rows) else "is cut short: its last frames cannot be read"
    except (av.FFmpegError, IndexError) as error:
        return f"cannot be read as a video: {one_line(error)[:160]}"


def has_last_frame(container, stream, rows: int) -> bool:
    """Whether the last of `rows` frames decodes: a file cut short may keep its header."""
    import av

    container.seek(max(0, round((rows - 1) / stream.average_rate / stream.time_base)), stream=stream)
    try:
        last = [frame.pts for frame in container.decode(stream)][-1:]
    except av.FFmpegError:
        return False
    return bool(last) and round(last[0] * stream.time_base * stream.average_rate) == rows - 1
