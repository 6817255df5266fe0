"""What is wrong with a dataset's videos, or doubtful, by each file's own list of frame times."""

from collections import Counter
from pathlib import Path

import numpy as np

from data.frame_times import FrameTimes
from data.source import Source
from data.videos import Videos

MAX_RATE_ERROR = 0.25  # of fps, for the typical time between a video's frames: clocks jitter, frames are dropped
MAX_CLOCK_ERROR = 1e-3  # seconds by which a video's clock may differ from the table's without a warning


def video_faults(source: Source) -> dict[str, dict[Path, str]]:
    """{camera: {file: what is wrong with it}} for videos that are missing, cut short, or unlike the table and info.json."""
    faults = {}
    for key, videos in source.videos.items():
        problems = {path: video_problem(source, key, file) for file, path in enumerate(videos.files)}
        faults[key] = {path: problem for path, problem in problems.items() if problem is not None}
    return faults


def video_problem(source: Source, key: str, file: int) -> str | None:
    """What is wrong with one video file of a camera; None if nothing is."""
    videos = source.videos[key]
    times = videos.times[file]
    rows = videos.rows_per_file[file]
    height, width, _ = source.meta.features[key]["shape"]
    fps = source.meta.fps
    if isinstance(times, str):
        return times
    frames = len(times.pts)
    if frames < rows and times.unreadable:
        return f"is cut short: {frames} of its {frames + times.unreadable} frames can be read, its episodes have {rows} rows"
    if frames != rows:
        return f"has {frames} frames, but its episodes have {rows} rows"
    if (times.height, times.width) != (height, width):
        turned = f", turned by {times.rotation} degrees by its rotation flag" if times.rotation else ""
        return f"is shown at {times.height}x{times.width}{turned}, but info.json says {height}x{width}: correct its shape there"
    if frames > 1:
        rate = 1 / float(np.median(np.diff(times.seconds)))
        if abs(rate - fps) > MAX_RATE_ERROR * fps:
            return f"runs at {rate:.4g} fps, but info.json says {fps}"
    return None


def video_warnings(source: Source) -> list[str]:
    """Rotation flags, and how far each camera's clock is off the table's. Frames are read right in spite of either."""
    warnings = []
    for key, videos in source.videos.items():
        rotations = Counter(times.rotation for times in videos.times if times.rotation)
        for rotation, files in rotations.items():
            warnings.append(
                f"{key}: the rotation flag of its videos turns their frames by {rotation} degrees ({files} of {len(videos.files)})"
            )
        warnings += clock_warnings_of(source, key, videos)
    return warnings


def clock_warnings_of(source: Source, key: str, videos: Videos) -> list[str]:
    """A line if a camera's frames are shown neither at the table's timestamps nor at frame_index / fps."""
    regular = source.frame_index.double() / source.meta.fps
    in_table = source.columns.get("timestamp", regular).double()
    errors = clock_errors(source, videos, in_table.numpy())  # (N,)
    limit = MAX_CLOCK_ERROR + max(float(times.time_base) for times in videos.times)  # to which a clock is rounded
    if errors.max() <= limit or clock_errors(source, videos, regular.numpy()).max() <= limit:
        return []
    doubtful = np.flatnonzero(errors > limit)
    return [
        f"{key}: the clock of its videos is up to {errors.max():.2g} s off the table's timestamps in {len(doubtful)} of "
        f"{source.rows} frames, first in {source.name_row(int(doubtful[0]))}: frames are read in their order, not by time"
    ]


def clock_errors(source: Source, videos: Videos, clock: np.ndarray) -> np.ndarray:
    """(N,) seconds between a (N,) clock and the times at which frames are shown, both counted from the episode's first frame."""
    errors = np.zeros(source.rows)
    for position, start in enumerate(source.starts.tolist()):
        end = int(source.ends[position])
        first_frame = int(videos.first_frame[position])
        times: FrameTimes = videos.times[int(videos.file_index[position])]
        shown = times.seconds[first_frame : first_frame + end - start]
        expected = clock[start:end]
        errors[start:end] = np.abs((shown - shown[0]) - (expected - expected[0]))
    return errors
