"""What is wrong with a dataset: each check returns a line for each problem."""

import difflib
import math

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from data.column_checks import column_problems
from data.depth import GREYS, DepthRange, bits_of_codes, depth_problems, depth_ranges, depth_unit, is_depth
from data.episodes import ranges
from data.observations import observation_names, observations_flag
from data.pictures import decode_picture, picture_problems
from data.source import Source
from data.tasks import tasks_file
from errors import plural, rename_flag

MOST_OUTSIDE = 0.9  # of a depth picture, without a warning
MAX_DRIFT = 1e-3  # seconds that timestamps may differ from frame_index / fps without a warning


def table_problems(meta, table: pa.Table) -> list[str]:
    """What is wrong with the metadata or the table, and would keep the columns from being read."""
    return [*metadata_problems(meta), *column_problems(meta, table)]


def content_problems(source: Source) -> list[str]:
    """What is wrong with the values, once the columns are read."""
    return value_problems(source) + task_problems(source) + picture_problems(source) + rate_problems(source)


def content_warnings(source: Source) -> list[str]:
    """What is doubtful about the values, and can be trained on."""
    return text_warnings(source) + clock_warnings(source) + depth_warnings(source)


def depth_warnings(source: Source) -> list[str]:
    """A line for each depth camera whose distances are hardly within its range, as in another unit, or lack bits."""
    warnings = []
    for key, recorded in depth_ranges(source.meta.features).items():
        feature = source.meta.features[key]
        bits = bits_of_codes(feature)
        if bits is not None:
            warnings.append(
                f"{key}: its video has {bits} bits a pixel, LeRobot's codes of depth have 12: look at its pictures before you "
                "trust them"
            )
        if key in source.images and share_outside(source, key, recorded) > MOST_OUTSIDE:
            warnings.append(
                f"{key}: nearly all distances in its first picture are outside {recorded.depth_min:g} m to "
                f"{recorded.depth_max:g} m, thus black or white. If they are in another unit, write depth_unit (m or mm) into "
                "its info in info.json; else the range, as video.depth_min and video.depth_max"
            )
    return warnings


def share_outside(source: Source, key: str, recorded: DepthRange) -> float:
    """How many of the measured distances in the first picture of a camera of stored depth are at the ends of its range or past them."""
    distances = decode_picture(source.images[key], source.meta.root, 0, depth=True)
    measured = np.isfinite(distances) & (distances > 0)
    if not measured.any():
        return 0.0
    greys = recorded.picture(distances, depth_unit(source.meta.features[key]))[..., 0]
    return float(np.isin(greys[measured], (0, GREYS)).mean())


def text_warnings(source: Source) -> list[str]:
    """Rows without a text: in a batch they are None."""
    warnings = []
    for key, values in source.columns.items():
        empty = [] if isinstance(values, Tensor) else [row for row, text in enumerate(values) if text is None]
        if empty:
            first = source.name_row(empty[0])
            rows = plural(len(empty), "row")
            warnings.append(f"{key} has no text in {rows}, first in {first}: it is None in a batch")
    return warnings


def info_problems(info: dict) -> list[str]:
    """What is wrong with the content of info.json that all else relies on: fps, and each feature's dtype and shape."""
    problems = []
    fps = info["fps"]
    if not isinstance(fps, (int, float)) or isinstance(fps, bool) or not 0 < fps < math.inf:
        problems.append(f"fps: expected a number above 0, got {fps!r}. Write the rate that the frames were recorded at")
    if not isinstance(info["features"], dict):
        return [*problems, f"features: expected an object by name, got {info['features']!r:.80}"]
    for key, feature in info["features"].items():
        problems += description_problems(key, feature)
    return problems


def description_problems(key: str, feature) -> list[str]:
    """What is wrong with the dtype and the shape of a feature in info.json."""
    from lerobot.datasets.language import is_language_column

    if is_language_column(key):
        return []
    if not isinstance(feature, dict):
        feature = {}
    problems = []
    if not is_dtype(feature.get("dtype")):
        expected = "expected a dtype such as float32, image, video or string"
        problems.append(f"feature {key}: {expected}, got {feature.get('dtype', 'none')!r}. Write it into info.json")
    shape = feature.get("shape")
    if not isinstance(shape, (list, tuple)) or not all(is_size(size) for size in shape):
        expected = "expected a shape such as [6] or [480, 640, 3]"
        problems.append(f"feature {key}: {expected}, got {feature.get('shape', 'none')!r}. Write it into info.json")
    if not problems and is_depth(feature):
        problems += depth_problems(key, feature)
    return problems


def is_size(size) -> bool:
    """Whether a value in info.json can be a size within a shape. 0 is that of a feature without numbers."""
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


def is_dtype(name) -> bool:
    """Whether a feature's dtype is one that can be read."""
    if name in ("image", "video", "string"):
        return True
    try:
        return isinstance(name, str) and np.dtype(name).kind in "fiub"
    except TypeError:
        return False


def metadata_problems(meta) -> list[str]:
    """There is an action to learn, and every camera has three channels and videos that can be found."""
    problems = []
    if "action" not in meta.features:
        candidates = [key for key in meta.features if is_possible_action(meta, key)]
        remedy = ". Pass a dataset with actions"
        for likeliest in difflib.get_close_matches("action", candidates, n=1, cutoff=0.5):
            remedy = f", did you mean {likeliest!r}? Pass {rename_flag({likeliest: 'action'})}"
        problems.append(f"it has no feature action{remedy}")
    reasons = {}  # of each camera that cannot be trained on
    for key in meta.camera_keys:
        shape = meta.features[key]["shape"]
        if len(shape) != 3 or shape[2] != 3 or min(shape) < 1:
            reasons[key] = f"camera {key}: expected shape (height, width, 3) in info.json, got {shape}"
            if len(shape) == 3 and shape[2] == 1:
                reasons[key] += '. If it holds depth, write "info": {"is_depth_map": true} beside its shape'
    for key in meta.video_keys:
        needed = {f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")}
        known = needed <= set(meta.episodes.column_names)
        if not known or any(value is None or value != value for name in needed for value in meta.episodes[name][:]):
            reasons[key] = f"info.json has a camera {key}, but meta/episodes does not say where its videos are"
    others = [name for name in observation_names(meta) if name not in reasons]
    remedy = f". Leave it out: {observations_flag(others, {})}" if others else ""
    return problems + [reason + remedy for reason in reasons.values()]


def is_possible_action(meta, key: str) -> bool:
    """Whether a feature could hold the actions under another name: numbers that are no observation, clock or reward."""
    is_something_else = key.startswith(("observation.", "next.", "timestamp"))
    return meta.features[key]["dtype"].startswith("float") and not is_something_else


def value_problems(source: Source) -> list[str]:
    """No number is NaN or infinite."""
    problems = []
    for key, values in source.columns.items():
        if not isinstance(values, Tensor) or torch.isfinite(values).all():
            continue
        rows = (~torch.isfinite(values)).reshape(len(values), -1).any(dim=1).nonzero()[:, 0]
        problems.append(
            f"{key} is not finite in {plural(len(rows), 'row')}, first in {source.name_row(int(rows[0]))}: "
            "remove that episode or correct the value"
        )
    return problems


def task_problems(source: Source) -> list[str]:
    """Every row's task_index is that of a task in the metadata."""
    index = source.columns["task_index"]
    known = torch.tensor(list(source.tasks), dtype=index.dtype)
    rows = (~torch.isin(index, known)).nonzero()[:, 0]
    if len(rows) == 0:
        return []
    return [
        f"no task in {tasks_file(source.meta)} has task_index {float(index[rows[0]]):g} of {source.name_row(int(rows[0]))}: "
        f"expected one of {ranges(list(source.tasks)) or 'none'}. Add that task to the file with its text"
    ]


def rate_problems(source: Source) -> list[str]:
    """The timestamps of a typical episode advance by 1 / fps: delta timestamps assume so."""
    fps = source.meta.fps
    last = source.ends - 1
    steps = last - source.starts  # (E,)
    if "timestamp" not in source.columns or not (steps > 0).any():
        return []
    times = source.columns["timestamp"].double()  # (N,)
    seconds_per_frame = ((times[last] - times[source.starts]) / steps)[steps > 0]
    typical = float(seconds_per_frame.sort().values[len(seconds_per_frame) // 2])
    if 0.75 < typical * fps < 1.25:
        return []
    return [
        f"timestamps advance by {typical:.4g} s a frame: expected {1 / fps:.4g} s at fps {fps} of info.json. "
        "Correct fps or the timestamps"
    ]


def clock_warnings(source: Source) -> list[str]:
    """How far the timestamps drift from frame_index / fps, counted from each episode's first. Frames are read by row anyway."""
    if "timestamp" not in source.columns:
        return []
    times = source.columns["timestamp"].double()  # (N,)
    first = torch.arange(source.rows) - source.frame_index  # (N,) row
    drift = float((times - times[first] - source.frame_index.double() / source.meta.fps).abs().max())
    if drift > MAX_DRIFT:
        size = f"{drift:.2f}" if drift >= 0.01 else f"{drift:.4f}"
        return [f"timestamps are up to {size} s off frame_index / fps: frames are read by row, not by timestamp"]
    return []
