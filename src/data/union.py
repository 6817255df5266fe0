"""Several datasets with the same features as one: rows one after the other, statistics merged, tasks by their text.

N rows in all, E episodes in all.
"""

import copy
from dataclasses import replace

import pyarrow as pa
import torch

from data.source import Source
from data.videos import Videos
from errors import UserError, one_line


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
    problems = [f"{source.name}: {problem}" for source in sources for problem in problems_of(source)]
    replace(first, name=name, problems=problems).require()  # what is below takes every column, video and statistic
    offsets = torch.tensor([0, *(source.rows for source in sources)]).cumsum(0)[:-1].tolist()
    tasks = list(dict.fromkeys(task for source in sources for task in source.tasks))
    columns = {key: join([source.columns[key] for source in sources]) for key in first.columns}
    renumbered = [
        torch.tensor([tasks.index(task) for task in source.tasks])[source.columns["task_index"]] for source in sources
    ]
    columns["task_index"] = torch.cat(renumbered)
    return Source(
        name=name,
        meta=merged_metadata(sources, name, tasks),
        root=first.root,
        episodes=[f"{source.name}#{episode}" for source in sources for episode in source.episodes],
        starts=torch.cat([source.starts + offset for source, offset in zip(sources, offsets, strict=True)]),
        ends=torch.cat([source.ends + offset for source, offset in zip(sources, offsets, strict=True)]),
        columns=columns,
        images={key: pa.chunked_array([c for s in sources for c in s.images[key].chunks]) for key in first.images},
        videos={key: join_videos([source.videos[key] for source in sources]) for key in first.videos},
        tables=[path for source in sources for path in source.tables],
        parts=[episodes for source in sources for episodes in source.parts],
        warnings=[f"{source.name}: {warning}" for source in sources for warning in source.warnings],
    )


def problems_of(source: Source) -> list[str]:
    """What is wrong with one of several: its own problems, and that there are no statistics to merge."""
    missing = ["meta/stats.json is missing: lerobot-edit-dataset recomputes it"] if source.meta.stats is None else []
    return [*source.problems, *missing]


def check_alike(first: Source, other: Source) -> None:
    """Frame rate, and type, shape and names of each feature, are the same; how videos are encoded may differ."""
    if first.meta.fps != other.meta.fps:
        raise UserError(
            f"datasets differ: {first.name} has {first.meta.fps} fps, {other.name} {other.meta.fps}: train on each by itself"
        )
    for key in [*first.meta.features, *other.meta.features]:
        one, two = (described(source.meta.features.get(key, {})) for source in (first, other))
        if one != two:
            raise UserError(
                f"datasets differ in {key}: {first.name} has {one}, {other.name} has {two}: train on each by itself"
            )


def described(feature: dict) -> str:
    return f"{feature['dtype']} {tuple(feature['shape'])} {feature.get('names')}" if feature else "none"


def merged_metadata(sources: list[Source], name: str, tasks: list[str]):
    import pandas
    from lerobot.datasets.compute_stats import aggregate_stats

    meta = copy.copy(sources[0].meta)
    meta.repo_id = "+".join(source.meta.repo_id for source in sources)
    shared = set.intersection(*(set(source.meta.stats) for source in sources))
    try:
        meta.stats = aggregate_stats([{key: source.meta.stats[key] for key in shared} for source in sources])
    except (KeyError, ValueError) as error:
        remedy = "lerobot-edit-dataset recomputes meta/stats.json"
        raise UserError(f"the statistics of {name} cannot be merged ({one_line(error)[:160]}): {remedy}") from error
    meta.tasks = pandas.DataFrame({"task_index": range(len(tasks))}, index=pandas.Index(tasks, name="task"))
    return meta


def join(columns: list):
    return (
        torch.cat(columns)
        if isinstance(columns[0], torch.Tensor)
        else [value for column in columns for value in column]
    )


def join_videos(videos: list[Videos]) -> Videos:
    offsets = [0, *torch.tensor([len(v.files) for v in videos]).cumsum(0).tolist()][:-1]
    return Videos(
        [path for v in videos for path in v.files],
        [rows for v in videos for rows in v.rows],
        torch.cat([v.file + offset for v, offset in zip(videos, offsets, strict=True)]),
        torch.cat([v.first for v in videos]),
    )
