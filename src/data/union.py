"""Several datasets with the same features as one: rows one after the other, statistics merged, tasks by their text.

N rows in all, E episodes in all.
"""

import copy

import pyarrow as pa
import torch

from config import UserError
from data.source import Source
from data.videos import Videos


def unite(sources: list[Source]) -> Source:
    """One source over all of `sources`; a single one is returned as it is.

    Raises:
        UserError: their features or frame rates differ.
    """
    first = sources[0]
    if len(sources) == 1:
        return first
    for other in sources[1:]:
        check_alike(first, other)
    offsets = torch.tensor([0, *(source.rows for source in sources)]).cumsum(0)[:-1].tolist()
    tasks = list(dict.fromkeys(task for source in sources for task in source.tasks))
    columns = {key: join([source.columns[key] for source in sources]) for key in first.columns}
    renumbered = [
        torch.tensor([tasks.index(task) for task in source.tasks])[source.columns["task_index"]] for source in sources
    ]
    columns["task_index"] = torch.cat(renumbered)
    return Source(
        name=" + ".join(source.name for source in sources),
        meta=merged_metadata(sources, tasks),
        root=first.root,
        episodes=[f"{source.name}#{episode}" for source in sources for episode in source.episodes],
        starts=torch.cat([source.starts + offset for source, offset in zip(sources, offsets, strict=True)]),
        ends=torch.cat([source.ends + offset for source, offset in zip(sources, offsets, strict=True)]),
        columns=columns,
        images={key: pa.chunked_array([c for s in sources for c in s.images[key].chunks]) for key in first.images},
        videos={key: join_videos([source.videos[key] for source in sources]) for key in first.videos},
        tables=[path for source in sources for path in source.tables],
        parts=[len(source.episodes) for source in sources],
        problems=[f"{source.name}: {problem}" for source in sources for problem in source.problems],
        warnings=[f"{source.name}: {warning}" for source in sources for warning in source.warnings],
    )


def check_alike(first: Source, other: Source) -> None:
    from lerobot.datasets.feature_utils import features_equal_for_merge

    if first.meta.fps != other.meta.fps:
        raise UserError(
            f"datasets differ: {first.name} has {first.meta.fps} fps, {other.name} {other.meta.fps}: train on each by itself"
        )
    if features_equal_for_merge(without_fps(first), without_fps(other)):
        return
    mine, theirs = first.meta.features, other.meta.features
    for key in [*mine, *theirs]:
        one, two = mine.get(key, {}), theirs.get(key, {})
        if (
            one.get("shape") != two.get("shape")
            or one.get("dtype") != two.get("dtype")
            or one.get("names") != two.get("names")
        ):
            told = (
                f"{one.get('dtype')} {one.get('shape')} {one.get('names')}",
                f"{two.get('dtype')} {two.get('shape')} {two.get('names')}",
            )
            raise UserError(
                f"datasets differ in {key}: {first.name} has {told[0]}, {other.name} has {told[1]}: train on each by itself"
            )
    raise UserError(f"datasets differ: {first.name} and {other.name} describe their features otherwise in info.json")


def without_fps(source: Source) -> dict:
    """Features without their fps, which v2.1 leaves out and v3.0 repeats."""
    return {key: {k: v for k, v in feature.items() if k != "fps"} for key, feature in source.meta.features.items()}


def merged_metadata(sources: list[Source], tasks: list[str]):
    import pandas
    from lerobot.datasets.compute_stats import aggregate_stats

    meta = copy.copy(sources[0].meta)
    meta.repo_id = "+".join(source.meta.repo_id for source in sources)
    meta.stats = aggregate_stats([source.meta.stats for source in sources])
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
