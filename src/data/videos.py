"""Where a camera's frames are: which video file, and which frames of it, hold each episode.

E selected episodes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import video_paths
from data.frame_times import FrameTimes


@dataclass
class Videos:
    """A camera's video files.

    Attributes:
        files: videos that hold frames of the selected episodes.
        rows_per_file: how many frames each file holds by the metadata: a frame for each row, selected or not.
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


def skip_undescribed(videos: Videos, meta, key: str, episodes: list[int]) -> list[str]:
    """Place the episodes of a v3.0 video that holds more frames than they have rows, as after an episode was deleted by hand.

    Each begins at the frame of its from_timestamp in meta/episodes. A video where these do not fit its frames stays as it is.

    Args:
        videos: as `find_videos` gives it, with its times; changed.
        meta, key, episodes: as for `find_videos`.

    Returns:
        A line for each video whose frames are partly left out.
    """
    columns = [meta.episodes[f"videos/{key}/from_timestamp"][:], meta.episodes[f"videos/{key}/to_timestamp"][:]]
    columns += [meta.episodes["length"][:], meta.episodes["episode_index"][:]]
    path_of = video_paths(meta, key)
    half_frame = 0.5 / meta.fps
    warnings = []
    for file, path in enumerate(videos.files):
        times = videos.times[file]
        if isinstance(times, str) or len(times.pts) <= videos.rows_per_file[file]:
            continue
        seconds = times.seconds - times.seconds[0]  # (F,)
        firsts: dict[int, int] = {}  # each episode's first frame
        end = 0
        for begin, until, length, episode in sorted(zip(*columns, strict=True)):
            if path_of[episode] != path:
                continue
            first = int(np.searchsorted(seconds, begin - half_frame))
            fits = end <= first <= len(seconds) - length and abs(seconds[first] - begin) <= half_frame
            if not fits or abs(until - begin - length / meta.fps) > half_frame:
                break
            firsts[episode] = first
            end = first + length
        else:
            for position in np.flatnonzero(videos.file_index == file):
                videos.first_frame[position] = firsts[episodes[position]]
            undescribed = len(seconds) - videos.rows_per_file[file]
            warnings.append(
                f"{path.relative_to(meta.root)} holds {undescribed} frames of episodes that meta/episodes does not describe: "
                "they are left out"
            )
            videos.rows_per_file[file] = len(seconds)
    return warnings
