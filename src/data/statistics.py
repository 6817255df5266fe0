"""A dataset's statistics, `meta.stats`: read them, complete them from the data, and check them against the data.

What a policy makes of them is in processors/statistics.py.

N rows, D numbers a row, C channels.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.depth import is_depth
from data.files import check_readable, is_v2
from data.frames import Frames
from data.names import joint_names
from data.source import Source
from errors import RECOMPUTE_STATISTICS, UserError, one_line, plural

BASIC = ("mean", "std", "min", "max")  # what LeRobot has written since its first datasets
ASCENDING = (("min", "mean", "max"), ("min", "q01", "q10", "q50", "q90", "q99", "max"))
CHUNK = 16  # frames that are decoded at a time

# How far statistics may be from the table's without a warning. What LeRobot's tools write fits to 0.001; these limits are
# far wider, so that a warning means other units or other data.
MEAN_OFF = 0.5  # of a standard deviation
STD_RATIO = 2.0
OUTSIDE = 0.25  # of the range from min to max
NARROW = 20.0  # times that the range of every joint may be narrower, if only some episodes are open


def read_statistics(path: Path, features: dict) -> dict[str, dict[str, np.ndarray]]:
    """{feature: {statistic: array}} of a stats.json, without nulls. `complete_statistics` computes what is missing.

    LeRobot's reader would split the names of features at a slash.

    Args:
        path: the file.
        features: of info.json, in whose shapes the statistics are returned.

    Raises:
        UserError: the file is damaged.
    """
    check_readable(path)
    try:
        return as_arrays(json.loads(path.read_text(encoding="utf-8-sig")), features)
    except (OSError, ValueError, RecursionError) as error:
        reason = one_line(error)[:200].rstrip(".")
        raise UserError(f"{path} holds no statistics: {reason}. Delete it: they are computed from the data") from None


def as_arrays(stats, features: dict) -> dict[str, dict[str, np.ndarray]]:
    """The statistics of a JSON file as arrays, without values that are not numbers.

    Args:
        stats: content of the file.
        features: of info.json, in whose shapes the statistics are returned.

    Raises:
        ValueError: a list of numbers is ragged.
    """
    arrays = {}
    if not isinstance(stats, dict):
        return arrays
    for key, stats_of_key in stats.items():
        if not isinstance(stats_of_key, dict):
            continue
        arrays[key] = {}
        for name, value in stats_of_key.items():
            array = np.atleast_1d(np.array(value))
            if array.dtype.kind in "fiub":
                arrays[key][name] = in_own_shape(name, array, features[key]) if key in features else array
    return arrays


def in_own_shape(name: str, value: np.ndarray, feature: dict) -> np.ndarray:
    """A statistic in the shape that normalising needs: the feature's own, or (C, 1, 1) for a camera.

    Other tools write (D, 1), (1, D) or, for a camera, (C,). A statistic with another number of values is returned as it is.
    """
    shape = tuple(feature.get("shape") or (1,))
    if name == "count":
        return value
    if feature.get("dtype") in ("video", "image"):
        shape = (shape[-1], 1, 1)
    elif value.size != math.prod(shape):
        shape = shape[-1:]  # LeRobot computes them for every number, or for the last axis
    return value.reshape(shape) if value.size == math.prod(shape) else value


def merge_statistics(parts: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """Statistics of the whole from those of its episodes or datasets, for the features that have them in every part.

    Raises:
        ValueError: a feature's statistics differ in shape between parts.
    """
    from lerobot.datasets.compute_stats import aggregate_stats

    keys = parts[0] if parts else {}
    needed = {*BASIC, "count"}
    whole = [key for key in keys if all(needed <= set(part.get(key, {})) for part in parts)]
    return aggregate_stats([{key: part[key] for key in whole} for part in parts])


def statistics_file(meta) -> str:
    """The file of a dataset's statistics, within its folder."""
    by_episode = "meta/episodes_stats.jsonl"  # of v2.1
    return by_episode if is_v2(meta) and (meta.root / by_episode).is_file() else "meta/stats.json"


def remedy(meta) -> str:
    """What to do about wrong statistics."""
    delete = f"delete {meta.root / statistics_file(meta)}: what is missing is computed from the data"
    if is_v2(meta):  # which lerobot-edit-dataset does not read
        return delete[0].upper() + delete[1:]
    return f"{RECOMPUTE_STATISTICS}, or {delete}"


def number_features(source: Source) -> list[str]:
    """The features that a policy may normalise, other than cameras."""
    return [
        key
        for key, feature in source.meta.features.items()
        if key.startswith(("observation", "action"))
        and isinstance(source.columns.get(key), Tensor)
        and source.columns[key].numel()
    ]


# Completing them.


def complete_statistics(source: Source) -> list[str]:
    """Compute the statistics of number features that `meta.stats` lacks.

    Returns:
        A line that says so, if any were computed.
    """
    lacking = {}
    for key in number_features(source):
        missing = [name for name in BASIC if name not in source.meta.stats.get(key, {})]
        if missing:
            lacking[key] = missing
    lines = fill_statistics(source, lacking)
    for key in number_features(source):
        source.meta.stats[key].setdefault("count", np.array([source.rows]))  # v2.0 did not write it
    return lines


def fill_statistics(source: Source, lacking: dict[str, list[str]], num_threads: int = 1) -> list[str]:
    """Compute statistics and add them to `meta.stats`.

    Args:
        source: the open dataset.
        lacking: {feature: names of statistics} to compute; features that the dataset does not have are left out.
        num_threads: threads that decode pictures.

    Returns:
        A line for numbers and one for pictures, if any were computed.
    """
    numbers = number_features(source)
    stats = dict(source.meta.stats)
    from_columns = []
    from_pictures = []
    for key, names in lacking.items():
        if key in numbers:
            computed = column_statistics(source.columns[key])
            from_columns.append(f"{' '.join(names)} of {key}")
        elif key in source.videos or key in source.images:
            computed = camera_statistics(source, key, num_threads)
            kind = " as a grey picture" if is_depth(source.meta.features[key]) else ""
            from_pictures.append(f"{' '.join(names)} of {key}{kind}")
        else:
            continue
        if not stats.get(key):
            names = list(computed)
        stats[key] = stats.get(key, {}) | {name: computed[name] for name in names if name in computed}
    source.meta.stats = stats

    file = statistics_file(source.meta)
    rows = plural(source.rows, "row")
    lines = []
    if from_columns:
        lines.append(f"{file} lacks {', '.join(from_columns)}: computed from the {rows} of the table")
    if from_pictures:
        lines.append(f"{file} lacks {', '.join(from_pictures)}: computed from frames of the {rows}")
    return lines


def column_statistics(values: Tensor) -> dict[str, np.ndarray]:
    """LeRobot's statistics of a column (N, ...), for each of its numbers, or for the last axis if there are several axes."""
    from lerobot.datasets.compute_stats import get_feature_stats

    numbers = values.double().numpy()
    return get_feature_stats(numbers, axis=0, keepdims=numbers.ndim == 1)


def camera_statistics(source: Source, key: str, num_threads: int = 1) -> dict[str, np.ndarray]:
    """LeRobot's statistics (C, 1, 1) of a camera in [0, 1], from evenly spaced frames."""
    from lerobot.datasets.compute_stats import RunningQuantileStats, auto_downsample_height_width, sample_indices

    running = RunningQuantileStats()
    rows = torch.tensor(sample_indices(source.rows))
    frames = Frames(source, num_threads=num_threads)
    try:
        for some in rows.split(CHUNK):
            pictures = [auto_downsample_height_width(picture) for picture in frames.read(key, some).numpy()]
            running.update(np.stack(pictures).transpose(0, 2, 3, 1))  # (n, H, W, C)
    finally:
        frames.close()
    stats = {name: (value / 255.0).reshape(-1, 1, 1) for name, value in running.get_statistics().items()}
    return {**stats, "count": np.array([len(rows)])}


# Checking them.


def statistics_problems(source: Source) -> list[str]:
    """Statistics that are impossible: not finite, of another width, or out of order. A line for each feature."""
    problems = []
    for key in number_features(source):
        faults = faults_of(source.meta.stats.get(key, {}), source.meta.features[key])
        if faults:
            problems.append(f"{statistics_file(source.meta)}: {key}: {'; '.join(faults)}. {remedy(source.meta)}")
    return problems


def faults_of(stats: dict, feature: dict) -> list[str]:
    """What is wrong with the statistics of one feature, with the joint and the value."""
    shape = tuple(feature["shape"])
    widths = {math.prod(shape), *shape[-1:]}  # LeRobot computes them for every number, or for the last axis
    names = list(dict.fromkeys(name for names in (("std",), *ASCENDING) for name in names if name in stats))
    values = {}
    for name in names:
        value = stats[name]
        if value.size not in widths:
            return [f"expected {plural(math.prod(shape), 'number')} as {name}, got {value.size}"]
        values[name] = value.astype(np.float64).ravel()
    if len({value.size for value in values.values()}) > 1:
        sizes = ", ".join(f"{value.size} as {name}" for name, value in values.items())
        return [f"expected as many numbers of each kind, got {sizes}"]

    faults = []
    for name, value in values.items():
        wrong = ~np.isfinite(value)
        if name == "std":
            wrong |= value < 0
        if wrong.any():
            expected = "0 or more" if name == "std" else "a finite number"
            faults.append(
                f"expected {expected} as {name} of {joint(feature, value.size, wrong)}, got {value[wrong][0]:g}"
            )
    if faults or not values:
        return faults
    for order in ASCENDING:
        known = [name for name in order if name in values]
        for low, high in itertools.pairwise(known):
            wrong = values[low] > values[high] + slack(values)
            if wrong.any():
                name = joint(feature, wrong.size, wrong)
                pair = f"got {values[low][wrong][0]:g} and {values[high][wrong][0]:g}"
                faults.append(f"expected {low} <= {high} of {name}, {pair}")
    return faults


def slack(values: dict[str, np.ndarray]) -> np.ndarray:
    """How far rounding and estimates of quantiles may put statistics out of order."""
    largest = np.max(np.abs(list(values.values())), axis=0)
    width = values["max"] - values["min"] if "min" in values and "max" in values else 0
    return 1e-3 * largest + 1e-2 * np.maximum(width, 0) + 1e-6


def joint(feature: dict, size: int, wrong: np.ndarray) -> str:
    """The first joint of a mask, by its name or its number."""
    index = int(np.flatnonzero(wrong)[0])
    names = joint_names(feature)
    if names is not None and len(names) == size:
        return names[index]
    return f"number {index}"


def statistics_warnings(source: Source) -> list[str]:
    """Features whose statistics are of other data than the table's, such as from before a change of units: a line each.

    The statistics are those of the whole dataset. If only some episodes are open, whose joints may move less, there is a
    line only if the data leave the range of the statistics, or all joints move far less.
    """
    lines = []
    whole = source.rows == source.meta.total_frames
    for key in number_features(source):
        stats = source.meta.stats.get(key, {})
        if not stats.keys() >= set(BASIC) or source.rows < 2:
            continue
        written = {name: stats[name].astype(np.float64).ravel() for name in BASIC}
        got = table_statistics(source.columns[key], written["mean"].size)
        wrong = unlike(written, got, whole)
        if wrong.any():
            index = int(np.flatnonzero(wrong)[0])
            lines.append(
                f"{statistics_file(source.meta)} does not fit the table in {wrong.sum()} of {plural(wrong.size, 'number')} of {key}: "
                f"{joint(source.meta.features[key], wrong.size, wrong)} has {summary(written, index)} there, and "
                f"{summary(got, index)} in the table. {remedy(source.meta)}"
            )
    return lines


def summary(stats: dict[str, np.ndarray], index: int) -> str:
    """The statistics of one number, for a message."""
    mean, std, low, high = (stats[name][index] for name in BASIC)
    return f"mean {mean:.4g}, std {std:.4g}, {low:.4g} to {high:.4g}"


def table_statistics(values: Tensor, size: int) -> dict[str, np.ndarray]:
    """Mean, std, min and max of (N, ...) for each of `size` numbers: all of a row, or those of the last axis."""
    numbers = values.double().reshape(-1, size).numpy()
    return {"mean": numbers.mean(0), "std": numbers.std(0), "min": numbers.min(0), "max": numbers.max(0)}


def unlike(written: dict, got: dict, whole: bool) -> np.ndarray:
    """(D,) whether the statistics in the file are of other data than those of the table.

    Args:
        written, got: {statistic: (D,)} of the file and of the table.
        whole: whether the table has all episodes of the dataset.
    """
    width = written["max"] - written["min"]
    # LeRobot computes the std of float32 as the root of a small difference: it is off by a few 1e-4 of the values.
    rounding = 2e-3 * np.maximum(np.abs(written["min"]), np.abs(written["max"])) + 1e-6
    outside = np.maximum(written["min"] - got["min"], got["max"] - written["max"]) > OUTSIDE * width + rounding
    if not whole:
        moves = got["max"] - got["min"] > rounding
        narrow = NARROW * (got["max"] - got["min"]) < width
        if moves.sum() > 1 and narrow[moves].all():
            return outside | (narrow & moves)
        return outside
    mean_off = np.abs(got["mean"] - written["mean"]) > MEAN_OFF * np.maximum(got["std"], written["std"]) + rounding
    wider = got["std"] > STD_RATIO * written["std"] + rounding
    narrower = written["std"] > STD_RATIO * got["std"] + rounding
    return outside | mean_off | wider | narrower
