"""Where a camera's frames are: which video file, and which frames of it, hold each episode.

E selected episodes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from data.files import video_paths
from data.frame_times import FrameTimes


@dataclass
class Videos:
    """A camera's video files.

    Attributes:
        files: videos that hold frames of the selected episodes.
        rows_per_file: how many rows of the dataset each file holds, selected or not.
        file_index: (E,) position in `files` of each selected episode's video.
        first_frame: (E,) number of each selected episode's first frame in that video.
        times: when the frames of each of `files` are shown, or why it cannot be read; empty until they are read.
    """

    files: list[Path]
    rows_per_file: list[int]
    file_index: Tensor
    first_frame: Tensor
    times: list[FrameTimes | str] = field(default_factory=list)


def find_videos(meta, key: str, episodes: list[int]) -> Videos:
    """Find the frames of camera `key` by counting, in the order of the videos' own clock.

    A frame's number is not its time multiplied by fps: a video may run at 29.97 fps in a dataset of 30.
    """
    names = [f"videos/{key}/{name}" for name in ("from_timestamp", "chunk_index", "file_index")]
    described = [meta.episodes[name][:] for name in (*names, "episode_index", "length")]
    path_of = video_paths(meta, key)
    rows: dict[Path, int] = {}  # of each file, counted so far
    positions: dict[int, tuple[Path, int]] = {}  # each episode's file and first frame
    for _, _, _, episode, length in sorted(zip(*described, strict=True)):
        path = path_of[episode]
        first_frame = rows.get(path, 0)
        positions[episode] = (path, first_frame)
        rows[path] = first_frame + length

    paths = [positions[episode][0] for episode in episodes]
    index = {path: i for i, path in enumerate(dict.fromkeys(paths))}  # of each file, in the order of the episodes
    return Videos(
        files=list(index),
        rows_per_file=[rows[path] for path in index],
        file_index=torch.tensor([index[path] for path in paths]),
        first_frame=torch.tensor([positions[episode][1] for episode in episodes]),
    )
