"""Where a camera's frames are: which video file holds each episode, and at which frames.

E selected episodes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.files import video_paths
from data.frame_times import FrameTimes
from data.remote_videos import RemoteVideo

BLANK = Path("blank")  # in place of the video of a camera that a dataset lacks: its frames are black


@dataclass
class Videos:
    """A camera's video files.

    Attributes:
        files: videos that hold frames of the selected episodes.
        rows_per_file: how many frames each file must hold by the metadata: one for each row, selected or not.
        file_index: (E,) position in `files` of each selected episode's video.
        first_frame: (E,) number of each selected episode's first frame in that video.
        times: when the frames of each file are shown, or why it cannot be read; empty until the files are read.
        remote: what the decoder reads in place of a file, of a dataset that is streamed or stored in Lance tables.
    """

    files: list[Path]
    rows_per_file: list[int]
    file_index: Tensor
    first_frame: Tensor
    times: list[FrameTimes | str] = field(default_factory=list)
    remote: dict[Path, RemoteVideo] = field(default_factory=dict)

    @property
    def is_streamed(self) -> bool:
        """Whether frames come over the network."""
        return any(not video.stream.remote.is_local for video in self.remote.values())


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
    """Correct the places of episodes in v3.0 videos that still hold an episode that was deleted from the metadata by hand.

    This needs an episode that is missing from the metadata, a video with a regular clock, and a gap between from_timestamp
    and to_timestamp of the other episodes that the extra frames fill. Other videos stay as they are, and are refused for
    their number of frames.

    Args:
        videos: as `find_videos` gives it, with its times; changed.
        meta, key, episodes: as for `find_videos`.

    Returns:
        A line for each video whose frames are partly left out.
    """
    names = [f"videos/{key}/from_timestamp", f"videos/{key}/to_timestamp", "episode_index", "length"]
    described = meta.episodes["episode_index"][:]
    count = max(meta.info.total_episodes, max(described, default=-1) + 1)
    if len(described) == count or names[1] not in meta.episodes.column_names:
        return []
    spans = [span for span in zip(*(meta.episodes[name][:] for name in names), strict=True) if None not in span]
    path_of = video_paths(meta, key)
    warnings = []
    for file, path in enumerate(videos.files):
        times = videos.times[file]
        if isinstance(times, str) or len(times.pts) <= videos.rows_per_file[file]:
            continue
        of_file = sorted(span for span in spans if path_of[span[2]] == path)
        first_frames = frames_by_clock(times, of_file, may_have_tail=max(described) + 1 < count)
        if first_frames is None:
            continue
        for position in np.flatnonzero(videos.file_index == file):
            videos.first_frame[position] = first_frames[episodes[position]]
        frames = len(times.pts)
        warnings.append(
            f"{path.relative_to(meta.root)}: {frames - videos.rows_per_file[file]} of its {frames} frames are of an episode that "
            "meta/episodes does not describe: they are left out"
        )
        videos.rows_per_file[file] = frames
    return warnings


def frames_by_clock(times: FrameTimes, spans: list[tuple], may_have_tail: bool) -> dict[int, int] | None:
    """{episode: its first frame} by the times at which episodes begin and end; None if these do not fit the frames.

    Args:
        times: of the video. Nothing fits if its clock is irregular.
        spans: (from_timestamp, to_timestamp, episode, rows) of the episodes in it, in order.
        may_have_tail: whether frames may follow the last episode.
    """
    gaps = np.diff(times.seconds)
    gap = float(np.median(gaps))
    if np.abs(gaps - gap).max() > 0.1 * gap:
        return None
    first_frames = {}
    end = 0
    for begin, until, episode, rows in spans:
        first = round(begin / gap)
        if first < end or abs(first * gap - begin) > 0.25 * gap or abs((first + rows) * gap - until) > 0.25 * gap:
            return None
        first_frames[episode] = first
        end = first + rows
    frames = len(times.pts)
    return first_frames if end == frames or (may_have_tail and end < frames) else None
