"""Datasets that differ made alike, for --pad_datasets: what one lacks is padded, and each keeps its own statistics.

* A camera that a dataset lacks is black there, and `<camera>_padding_mask` is False.
* States and actions are as wide as the widest. Numbers that a dataset lacks are 0, with mean 0 and std 1.
* `dataset_index` says which dataset a row is from.

N rows of a dataset, W numbers of a state or action.
"""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from data.depth import is_depth
from data.frame_times import FrameTimes
from data.names import joint_names
from data.observations import is_vector, leave_out
from data.pictures import PICTURE
from data.source import Source
from data.statistics import column_statistics
from data.videos import BLANK, Videos
from runtime import MASK

# Statistics of numbers that are not there: by whichever of them a policy normalises, 0 stays 0.
NEUTRAL = {"mean": 0, "std": 1, "min": -1, "max": 1, "q01": -1, "q10": -1, "q50": 0, "q90": 1, "q99": 1}


@dataclass
class OwnFeatures:
    """What one of several padded datasets has by itself.

    Attributes:
        name: the dataset as the user wrote it.
        cameras: its cameras.
        widths: {state or action: how many numbers it has}, 0 for none.
        joint_names: {state or action: their names}, where they have some.
        stats: {state or action: its statistics}, padded.
    """

    name: str
    cameras: list[str]
    widths: dict[str, int]
    joint_names: dict[str, list[str]]
    stats: dict[str, dict[str, np.ndarray]]


def pad_sources(sources: list[Source]) -> list[str]:
    """Give each dataset the cameras of all, and states and actions of the same widths.

    Args:
        sources: the open datasets, which are changed.

    Returns:
        What was padded or left out, a line for each dataset.

    Raises:
        UserError: something is wrong with a dataset.
    """
    for source in sources:
        source.require()
    cameras = first_descriptions(sources, lambda source: source.meta.camera_keys)
    vectors = widest_descriptions(sources)
    own = [own_features(source, vectors) for source in sources]
    lacked = {key for key in cameras if any(key not in one.cameras for one in own)}
    lines = []
    for index, source in enumerate(sources):
        others = not_in_all(source, sources, {*cameras, *vectors})
        leave_out(source, others)
        for key, feature in cameras.items():
            if key not in own[index].cameras:
                add_blank_camera(
                    source, key, feature, next(s.meta.stats.get(key) for s in sources if key in s.meta.features)
                )
        for key, feature in vectors.items():
            pad_vector(source, key, feature)
        own[index].stats = {key: source.meta.stats[key] for key in vectors}
        source.own_features = [own[index]]
        source.columns["dataset_index"] = torch.full((source.rows,), index)
        for key in sorted(lacked):
            source.columns[f"{key}{MASK}"] = torch.full((source.rows,), key in own[index].cameras)
        lines += padding_lines(own[index], cameras, vectors, others)
    return lines


def first_descriptions(sources: list[Source], keys_of: Callable[[Source], Iterable[str]]) -> dict[str, dict]:
    """{feature: its description in the first dataset that has it}."""
    found = {}
    for source in sources:
        for key in keys_of(source):
            found.setdefault(key, source.meta.features[key])
    return found


def widest_descriptions(sources: list[Source]) -> dict[str, dict]:
    """{state or action: its description in the first of the widest datasets}."""
    found = {}
    others = set()  # features that are something else in a dataset: `unite` refuses these
    for source in sources:
        for key, feature in source.meta.features.items():
            if not is_vector(key, feature):
                others.add(key)
            elif key not in found or feature["shape"][0] > found[key]["shape"][0]:
                found[key] = feature
    return {key: feature for key, feature in found.items() if key not in others}


def own_features(source: Source, vectors: dict[str, dict]) -> OwnFeatures:
    features = source.meta.features
    widths = {key: features[key]["shape"][0] if key in features else 0 for key in vectors}
    names = {key: joint_names(features[key]) for key in vectors if key in features}
    return OwnFeatures(
        name=source.name,
        cameras=list(source.meta.camera_keys),
        widths=widths,
        joint_names={key: names_of_key for key, names_of_key in names.items() if names_of_key},
        stats={},
    )


def not_in_all(source: Source, sources: list[Source], padded: set[str]) -> list[str]:
    """Features of a dataset that some other lacks, and that are not padded, such as a reward."""
    features = [other.meta.features for other in sources]
    return [key for key in source.meta.features if key not in padded and not all(key in others for others in features)]


def add_blank_camera(source: Source, key: str, feature: dict, stats: dict | None) -> None:
    """Give a dataset a camera whose every picture is black.

    Args:
        feature, stats: the camera's, in a dataset that has it.
    """
    source.meta.info.features = {**source.meta.features, key: feature}
    if stats is not None:
        source.meta.stats = {**source.meta.stats, key: stats}
    height, width, _ = feature["shape"]
    if feature["dtype"] == "image":
        file = io.BytesIO()
        Image.new("I;16" if is_depth(feature) else "RGB", (width, height)).save(file, "png")
        content = pa.array([file.getvalue()], pa.binary()).take(pa.array(np.zeros(source.rows, np.int64)))
        nothing = pa.nulls(source.rows, pa.string())
        source.images[key] = pa.chunked_array([pa.StructArray.from_arrays([content, nothing], fields=list(PICTURE))])
        return
    number = np.arange(source.rows)
    times = FrameTimes(
        pts=number,
        key_pts=number,
        key_dts=number,
        time_base=Fraction(1, max(1, round(source.meta.fps))),
        height=height,
        width=width,
    )
    source.videos[key] = Videos(
        files=[BLANK],
        rows_per_file=[source.rows],
        file_index=torch.zeros(len(source.episodes), dtype=torch.int64),
        first_frame=source.starts.clone(),
        times=[times],
    )


def pad_vector(source: Source, key: str, feature: dict) -> None:
    """Append zeros to a state or action, up to the width in `feature`, and neutral statistics. A missing one becomes zeros."""
    width = feature["shape"][0]
    has = source.columns.get(key)
    own = torch.zeros(source.rows, 0) if has is None else has.reshape(source.rows, -1)
    source.meta.info.features = {**source.meta.features, key: feature}
    column = torch.zeros(source.rows, width, dtype=torch.float32)
    column[:, : own.shape[1]] = own
    source.columns[key] = column if width > 1 else column[:, 0]  # as LeRobot reads a single number
    stats = {name: np.asarray(value, np.float64).ravel() for name, value in source.meta.stats.get(key, {}).items()}
    if own.shape[1] and not NEUTRAL.keys() <= stats.keys():
        stats = column_statistics(own) | stats
    padded = {"count": stats.get("count", np.array([source.rows]))}
    for name, neutral in NEUTRAL.items():
        lacking = np.full(width - own.shape[1], float(neutral))
        padded[name] = np.append(stats.get(name, []), lacking)
    source.meta.stats = {**source.meta.stats, key: padded}


def padding_lines(own: OwnFeatures, cameras: dict, vectors: dict, others: list[str]) -> list[str]:
    """What a dataset lacks, for people: at most a line."""
    parts = [f"{key} is black" for key in cameras if key not in own.cameras]
    for key, feature in vectors.items():
        width = feature["shape"][0]
        if own.widths[key] < width:
            parts.append(f"{key} has {own.widths[key]} of {width} numbers")
    if others:
        parts.append(f"left out, since not all datasets have it: {', '.join(others)}")
    return [f"padded: in {own.name} {'; '.join(parts)}"] if parts else []
