"""Several datasets with the same features as one: rows one after the other, statistics merged, tasks by their text."""

import copy
from dataclasses import replace
from itertools import accumulate

import pyarrow as pa
import torch
from torch import Tensor

from data.source import Source
from data.videos import Videos
from errors import RECOMPUTE_STATISTICS, UserError, one_line


def unite(sources: list[Source]) -> Source:
    """One source over all of `sources`; a single one is returned as it is.

    Raises:
        UserError: their features or frame rates differ, or something is wrong with one of them.
    """
    first = sources[0]
    if len(sources) == 1:
        return first
    for other in sources[1:]:
        check_alike(first, other)
    name = " + ".join(source.name for source in sources)
    problems = [f"{source.name}: {problem}" for source in sources for problem in problems_in_union(source)]
    replace(first, name=name, problems=problems).require()  # what follows needs all columns, videos and statistics

    # A task that several datasets have becomes one, so that task_index changes.
    tasks = list(dict.fromkeys(task for source in sources for task in source.tasks))
    columns = {key: join_columns([source.columns[key] for source in sources]) for key in first.columns}
    columns["task_index"] = torch.cat([renumber_tasks(source, tasks) for source in sources])

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
        images={key: join_images([source.images[key] for source in sources]) for key in first.images},
        videos={key: join_videos([source.videos[key] for source in sources]) for key in first.videos},
        warnings=[f"{source.name}: {warning}" for source in sources for warning in source.warnings],
    )


def problems_in_union(source: Source) -> list[str]:
    """A dataset's own problems, and that it has no statistics to merge."""
    if source.meta.stats is None:
        return [*source.problems, f"meta/stats.json is missing. {RECOMPUTE_STATISTICS}"]
    return source.problems


def check_alike(first: Source, other: Source) -> None:
    """Raise a UserError unless both have the same fps, and the same type, shape and names of each feature."""
    expected = described(first)
    got = described(other)
    for name in expected | got:
        if expected.get(name) != got.get(name):
            raise UserError(
                f"datasets differ in {name}: {first.name} has {expected.get(name, 'none')}, "
                f"{other.name} has {got.get(name, 'none')}. Train on each by itself"
            )


def described(source: Source) -> dict[str, str]:
    """What datasets must have in common. How their videos are encoded may differ."""
    facts = {"fps": f"{source.meta.fps}"}
    for key, feature in source.meta.features.items():
        facts[key] = f"{feature['dtype']} {tuple(feature['shape'])} {feature.get('names')}"
    return facts


def merge_metadata(sources: list[Source], name: str, tasks: list[str]):
    """The first dataset's metadata, with the statistics that all have, merged, and the tasks of all."""
    import pandas
    from lerobot.datasets.compute_stats import aggregate_stats

    meta = copy.copy(sources[0].meta)
    meta.repo_id = "+".join(source.meta.repo_id for source in sources)
    shared = set.intersection(*(set(source.meta.stats) for source in sources))
    try:
        meta.stats = aggregate_stats([{key: source.meta.stats[key] for key in shared} for source in sources])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"the statistics of {name} cannot be merged ({one_line(error)[:160]}). {RECOMPUTE_STATISTICS}"
        ) from error
    meta.tasks = pandas.DataFrame({"task_index": range(len(tasks))}, index=pandas.Index(tasks, name="task"))
    return meta


def starts_of(lengths: list[int]) -> list[int]:
    """Where each of several pieces starts when they follow each other."""
    return list(accumulate(lengths[:-1], initial=0))


def renumber_tasks(source: Source, tasks: list[str]) -> Tensor:
    """(N,) task_index of a source's rows as positions in `tasks`."""
    positions = torch.tensor([tasks.index(task) for task in source.tasks])
    return positions[source.columns["task_index"]]


def join_columns(columns: list):
    if isinstance(columns[0], Tensor):
        return torch.cat(columns)
    return [value for column in columns for value in column]


def join_images(images: list[pa.ChunkedArray]) -> pa.ChunkedArray:
    return pa.chunked_array([chunk for column in images for chunk in column.chunks])


def join_videos(videos: list[Videos]) -> Videos:
    first_files = starts_of([len(camera.files) for camera in videos])
    indices = [camera.file_index + first for camera, first in zip(videos, first_files, strict=True)]
    return Videos(
        files=[path for camera in videos for path in camera.files],
        rows_per_file=[rows for camera in videos for rows in camera.rows_per_file],
        file_index=torch.cat(indices),
        first_frame=torch.cat([camera.first_frame for camera in videos]),
    )
