"""What is wrong with a dataset: each check returns a line for each problem."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.source import Source, flat_values, table_features
from errors import nearest, one_line

MAX_DRIFT = 1e-3  # seconds that timestamps may differ from frame_index / fps without a warning


def table_problems(meta, table: pa.Table, selected: list[int], found: list[int]) -> list[str]:
    """What reading the columns relies on. Arguments as for `episode_problems`."""
    return [*metadata_problems(meta), *episode_problems(meta, selected, found), *column_problems(meta, table)]


def content_problems(source: Source) -> list[str]:
    """What is wrong with the values and the videos, once the columns are read."""
    problems = length_problems(source) + value_problems(source) + task_problems(source)
    return problems + rate_problems(source) + video_problems(source)


def metadata_problems(meta) -> list[str]:
    """An action to learn, and cameras with three channels whose videos can be found."""
    problems = []
    if "action" not in meta.features:
        problems.append(f"it has no feature action{nearest('action', meta.features)}")
    for key in meta.depth_keys:
        problems.append(f"{key} is a depth map, which no policy here reads: remove it with lerobot-edit-dataset")
    for key in meta.camera_keys:
        shape = meta.features[key]["shape"]
        if key not in meta.depth_keys and (len(shape) != 3 or shape[2] != 3):
            problems.append(f"camera {key}: expected shape (height, width, 3) in info.json, got {shape}")
    for key in meta.video_keys:
        if meta.episodes is not None and f"videos/{key}/from_timestamp" not in meta.episodes.column_names:
            problems.append(f"info.json has a camera {key}, but meta/episodes does not say where its videos are")
    return problems


def episode_problems(meta, selected: list[int], found: list[int]) -> list[str]:
    """The table's episodes against those that were selected, and those that the metadata describes.

    Args:
        meta: LeRobot's metadata.
        selected: episode indices that were asked for.
        found: episode indices in the order of the table.
    """
    described = [] if meta.episodes is None else meta.episodes["episode_index"]
    absent = set(selected) - set(found)
    uncounted = set(found) - set(selected)
    undescribed = set(found) - set(described)
    problems = []
    if absent:
        problems.append(f"its table has no rows of episodes {sorted(absent)[:10]}")
    if uncounted:
        counted = f"info.json counts {meta.total_episodes} episodes"
        problems.append(f"{counted}, but its table also has {sorted(uncounted)[:10]}")
    if undescribed:
        problems.append(f"its metadata does not describe episodes {sorted(undescribed)[:10]}")
    if found != sorted(set(found)):
        problems.append("its episodes are not in order in the table")
    if not found and not problems:
        problems.append("it has no episodes")
    return problems


def column_problems(meta, table: pa.Table) -> list[str]:
    """Every feature has its column, with as many numbers a row as its shape says."""
    problems = []
    for key, feature in table_features(meta).items():
        if key not in table.column_names:
            problems.append(f"its table has no column {key}, which info.json lists")
        elif feature["dtype"] not in ("image", "string"):
            shape = tuple(feature["shape"])
            count = flat_values(table[key]).size
            if count != table.num_rows * np.prod(shape):
                per_row = count / max(table.num_rows, 1)
                problems.append(f"{key}: expected shape {shape} in each row by info.json, got {per_row:g} numbers")
    return problems


def length_problems(source: Source) -> list[str]:
    """The table and the metadata agree on the length of every episode."""
    episodes = source.meta.episodes
    described = dict(zip(episodes["episode_index"], episodes["length"], strict=True))
    problems = []
    for episode, rows in zip(source.episodes, (source.ends - source.starts).tolist(), strict=True):
        if described[episode] != rows:
            problems.append(f"episode {episode} has {rows} rows in its table, but {described[episode]} in its metadata")
    return problems


def value_problems(source: Source) -> list[str]:
    """No number is NaN or infinite."""
    problems = []
    for key, values in source.columns.items():
        if not isinstance(values, Tensor) or torch.isfinite(values).all():
            continue
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero()[:, 0]
        episode = int(source.episode_of(rows[:1]))
        frame = int(rows[0] - source.starts[episode])
        problems.append(
            f"{key} is not finite in {len(rows)} rows, first in episode {source.episodes[episode]} frame {frame}: "
            "remove that episode or correct the value"
        )
    return problems


def task_problems(source: Source) -> list[str]:
    """Every row's task_index is that of a task in the metadata."""
    if "task_index" not in source.columns:
        return ["info.json has no feature task_index"]
    index = source.columns["task_index"]
    lowest = int(index.min())
    highest = int(index.max())
    if lowest >= 0 and highest < len(source.tasks):
        return []
    return [f"task_index is {lowest} to {highest} in its table, but its metadata has {len(source.tasks)} tasks"]


def rate_problems(source: Source) -> list[str]:
    """The timestamps of a typical episode advance by 1 / fps: delta timestamps assume so."""
    fps = source.meta.fps
    last = source.ends - 1
    steps = last - source.starts  # (E,)
    if "timestamp" not in source.columns or not (steps > 0).any():
        return []
    times = source.columns["timestamp"]  # (N,)
    seconds_per_frame = ((times[last] - times[source.starts]) / steps.double())[steps > 0]
    typical = float(seconds_per_frame.sort().values[len(seconds_per_frame) // 2])
    if 0.75 < typical * fps < 1.25:
        return []
    return [
        f"timestamps advance by {typical:.4g} s a frame: expected {1 / fps:.4g} s at fps {fps} of info.json. "
        "Correct fps or the timestamps"
    ]


def clock_warnings(source: Source) -> list[str]:
    """How far the timestamps are from the frames' own. It does no harm, since frames are found by row."""
    if "timestamp" not in source.columns:
        return []
    rows = torch.arange(source.rows)
    frame_index = rows - source.starts[source.episode_of(rows)]  # (N,)
    drift = float((source.columns["timestamp"] - frame_index / source.meta.fps).abs().max())
    if drift > MAX_DRIFT:
        return [f"timestamps are up to {drift:.2f} s off frame_index / fps: frames are read by row, not by timestamp"]
    return []


def video_problems(source: Source) -> list[str]:
    """Every video is there, is whole, and has a frame for each row."""
    problems = []
    for key, videos in source.videos.items():
        shape = source.meta.features[key]["shape"]
        for file, rows in sorted(zip(videos.files, videos.rows_per_file, strict=True)):
            problem = video_problem(file, rows, shape, source.meta.fps)
            if problem is not None:
                problems.append(f"{file.relative_to(source.meta.root)} {problem}")
    return problems


def video_problem(path: Path, rows: int, shape: tuple[int, ...], fps: float) -> str | None:
    """What is wrong with one video, given its number of rows in the table and its (H, W, C) shape; None if nothing is."""
    import av

    if not path.is_file():
        return "is missing"
    av.logging.set_libav_level(av.logging.PANIC)  # FFmpeg's own messages on a damaged file do not name it
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            # Some containers do not store the number of frames: count packets, which needs no decoding.
            frames = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
            if frames != rows:
                return f"has {frames} frames, but its episodes have {rows} rows"
            if (stream.height, stream.width) != shape[:2]:
                return f"is {stream.height}x{stream.width}, but info.json says {shape}"
            if stream.average_rate and abs(float(stream.average_rate) - fps) > 0.01 * fps:
                return f"runs at {float(stream.average_rate):g} fps, but info.json says {fps}"
            if not has_last_frame(container, stream, rows):
                return "is cut short: its last frames cannot be read"
    except (av.FFmpegError, IndexError) as error:
        return f"cannot be read as a video: {one_line(error)[:160]}"
    return None


def has_last_frame(container, stream, rows: int) -> bool:
    """Whether the last of `rows` frames decodes: a file that was cut short may keep its header."""
    import av

    seconds = (rows - 1) / stream.average_rate
    container.seek(max(0, round(seconds / stream.time_base)), stream=stream)
    last = None
    try:
        for frame in container.decode(stream):
            last = frame
    except av.FFmpegError:
        return False
    return last is not None and round(last.pts * stream.time_base * stream.average_rate) == rows - 1
