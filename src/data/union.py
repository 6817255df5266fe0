"""Several datasets with the same features as one: rows one after the other, statistics merged, tasks by their text."""

import copy
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa
import torch
from torch import Tensor

from data.depth import depth_ranges, depth_unit
from data.names import joint_names
from data.observations import is_vector, observation_names, observations_flag
from data.pictures import with_full_paths
from data.source import Source
from data.statistics import merge_statistics
from data.tasks import task_frame
from data.videos import Videos
from errors import DELETE_STATISTICS, UserError, likeliest_pairs, one_line, rename_flag


def unite(sources: list[Source], rename: dict[str, str] | None = None) -> Source:
    """One source over all of `sources`; a single one is returned as it is.

    Pictures of one camera may differ in size between datasets, see `size_problems`.

    Args:
        rename: {old: new} names that the user gave, for messages.

    Raises:
        UserError: their features or frame rates differ, or something is wrong with one of them.
    """
    first = sources[0]
    if len(sources) == 1:
        return first
    for other in sources[1:]:
        check_alike(first, other, rename or {})
    name = " + ".join(source.name for source in sources)
    problems = [f"{source.name}: {problem}" for source in sources for problem in source.problems]
    # What follows needs all columns, videos and statistics.
    replace(first, name=name, problems=problems, remedy="").require()

    # A task that several datasets have becomes one, so that task_index changes.
    tasks = list(dict.fromkeys(task for source in sources for task in source.tasks.values()))
    new_index = {task: index for index, task in enumerate(tasks)}
    columns = {key: join_columns([source.columns[key] for source in sources]) for key in first.columns}
    columns["task_index"] = torch.cat([renumber_tasks(source, new_index) for source in sources])

    first_rows = starts_of([source.rows for source in sources])
    episodes = []
    starts = []
    ends = []
    for source, first_row in zip(sources, first_rows, strict=True):
        episodes += [f"{source.name}#{episode}" for episode in source.episodes]
        starts.append(source.starts + first_row)
        ends.append(source.ends + first_row)
    return Source(
        name=name,
        meta=merge_metadata(sources, name, tasks),
        episodes=episodes,
        starts=torch.cat(starts),
        ends=torch.cat(ends),
        tables=[path for source in sources for path in source.tables],
        episodes_per_dataset=[len(source.episodes) for source in sources],
        columns=columns,
        images={key: join_images(sources, key) for key in first.images},
        videos={key: join_videos([source.videos[key] for source in sources]) for key in first.videos},
        warnings=[f"{source.name}: {warning}" for source in sources for warning in source.warnings],
        left_out=[name for source in sources for name in source.left_out],
        renamed={old: new for source in sources for old, new in source.renamed.items()},
        own_features=[own for source in sources for own in source.own_features],
        recorded_sizes={key: [source.recorded_size(key, 0) for source in sources] for key in first.meta.camera_keys},
    )


def check_alike(first: Source, other: Source, rename: dict[str, str]) -> None:
    """Raise a UserError unless both have the same fps, and the same type, width and names of each feature.

    Args:
        rename: {old: new} names that the user gave, which the message repeats.
    """
    expected = described(first)
    got = described(other)
    differences = [name for name in expected | got if expected.get(name) != got.get(name)]
    if not differences:
        return
    name = differences[0]
    raise UserError(
        f"datasets differ in {name}: {first.name} has {expected.get(name, 'none')}, {other.name} has "
        f"{got.get(name, 'none')}. {remedy_for(first, other, expected, got, rename)}"
    )


def remedy_for(first: Source, other: Source, expected: dict, got: dict, rename: dict[str, str]) -> str:
    """How to make two datasets alike: rename features, leave out the observations in which they differ, or both."""
    missing = {name: text for name, text in expected.items() if name not in got and name.startswith("observation.")}
    surplus = {name: text for name, text in got.items() if name not in expected}
    pairs = likeliest_pairs(missing, surplus) | other_action(expected, got) | other_action(got, expected)
    differences = {name for name in expected | got if expected.get(name) != got.get(name)}
    differences -= {*pairs, *pairs.values()}
    observations = dict.fromkeys([*observation_names(first.meta), *observation_names(other.meta)])
    kept = [name for name in observations if name not in differences]
    remedies = []
    if kept and differences <= observations.keys():
        flags = []
        if pairs:
            flags.append(rename_flag(pairs, rename))
        if differences:
            flags.append(observations_flag(kept, first.renamed | other.renamed))
        remedies.append(f"pass {' '.join(flags)}")
    if can_be_padded(first, other):
        remedies.append("pass --pad_datasets to pad what one of them lacks")
    remedies.append("train on each by itself")
    text = ", or ".join(remedies)
    return text[0].upper() + text[1:]


def can_be_padded(first: Source, other: Source) -> bool:
    """Whether --pad_datasets makes two datasets alike: each feature that both have differs at most in its width."""
    if first.meta.fps != other.meta.fps:
        return False
    expected = described(first)
    got = described(other)
    for name in expected.keys() & got.keys():
        features = (first.meta.features.get(name), other.meta.features.get(name))
        if expected[name] != got[name] and name != "fps" and not all(is_vector(name, feature) for feature in features):
            return False
    return "action" in expected and "action" in got


def other_action(has: dict, lacks: dict) -> dict[str, str]:
    """{name: "action"} for the feature of `lacks` that is most like the action of `has`; empty if none is, or none is needed."""
    if "action" not in has or "action" in lacks:
        return {}
    candidates = {name: text for name, text in lacks.items() if name not in has}
    return likeliest_pairs({"action": has["action"]}, candidates)


def described(source: Source) -> dict[str, str]:
    """What datasets must have in common. Their videos' encoding and their pictures' size may differ."""
    facts = {"fps": f"{source.meta.fps}"}
    depth = depth_ranges(source.meta.features)
    for key, feature in source.meta.features.items():
        shape = tuple(feature["shape"])
        if key in source.meta.camera_keys:
            facts[key] = f"{feature['dtype']} of shape (height, width, {', '.join(map(str, shape[2:]))})"
            if key in depth:
                facts[key] += f", depth from {depth[key]}"
                if feature["dtype"] == "image":
                    facts[key] += f", stored in {depth_unit(feature) or 'the unit of its dtype'}"
        else:
            facts[key] = f"{feature['dtype']} of shape {shape}, names {joint_names(feature)}"
    return facts


def size_problems(source: Source, keys: set[str], image_size: list[int] | None) -> list[str]:
    """A line for each camera whose pictures differ in size between datasets, while nothing resizes them.

    Args:
        keys: the cameras that are read.
        image_size: (h, w) that pictures are resized to; None for as recorded.
    """
    problems = []
    for key, sizes in (source.recorded_sizes or {}).items():
        if key in keys and image_size is None and len(set(sizes)) > 1:
            height, width = min(sizes)
            texts = ", ".join(f"{h}x{w}" for h, w in sizes)
            problems.append(
                f"{key} is {texts} in the datasets, in their order: expected one size. "
                f"Pass --image_size HEIGHT WIDTH, such as --image_size {height} {width}"
            )
    return problems


def merge_metadata(sources: list[Source], name: str, tasks: list[str]):
    """The first dataset's metadata, with the statistics that all have, merged, and the tasks of all."""
    meta = copy.copy(sources[0].meta)
    meta.repo_id = "+".join(source.meta.repo_id for source in sources)
    try:
        meta.stats = merge_statistics([source.meta.stats for source in sources])
    except ValueError as error:
        raise UserError(
            f"the statistics of {name} cannot be merged ({one_line(error)[:160]}). {DELETE_STATISTICS}"
        ) from error
    meta.tasks = task_frame(dict(enumerate(tasks)))
    return meta


def starts_of(lengths: list[int]) -> list[int]:
    """Where each of several pieces starts when they follow each other."""
    return list(accumulate(lengths[:-1], initial=0))


def renumber_tasks(source: Source, new_index: dict[str, int]) -> Tensor:
    """(N,) task_index of a source's rows by the {text: index} of all datasets together."""
    indices = torch.tensor(list(source.tasks))  # ascending
    renumbered = torch.tensor([new_index[task] for task in source.tasks.values()])
    return renumbered[torch.searchsorted(indices, source.columns["task_index"])]


def join_columns(columns: list):
    if isinstance(columns[0], Tensor):
        return torch.cat(columns)
    return [value for column in columns for value in column]


def join_images(sources: list[Source], key: str) -> pa.ChunkedArray:
    columns = [with_full_paths(source.images[key], source.meta.root) for source in sources]
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks])


def join_videos(videos: list[Videos]) -> Videos:
    first_files = starts_of([len(camera.files) for camera in videos])
    indices = [camera.file_index + first for camera, first in zip(videos, first_files, strict=True)]
    return Videos(
        files=[path for camera in videos for path in camera.files],
        rows_per_file=[rows for camera in videos for rows in camera.rows_per_file],
        file_index=torch.cat(indices),
        first_frame=torch.cat([camera.first_frame for camera in videos]),
        times=[times for camera in videos for times in camera.times],
        remote={path: video for camera in videos for path, video in camera.remote.items()},
    )
