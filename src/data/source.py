"""An open dataset: its selected episodes, with every column but the pixels in memory.

N rows of the selected episodes, one row a frame; E selected episodes.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from torch import Tensor

from data.videos import Videos
from errors import UserError, one_line

DTYPES = {"f": np.float32, "b": np.bool_}  # LeRobot's dtypes by NumPy's kind of the stored numbers; else int64


@dataclass
class Source:
    """A dataset's selected episodes. The rows of an episode are consecutive, in the order of its frames.

    Attributes:
        name: the dataset as the user wrote it.
        meta: LeRobot's `LeRobotDatasetMetadata`: folder, features, stats, tasks, fps.
        episodes: selected episode indices, ascending; for several datasets "dataset#index".
        starts: (E,) int64 first row of each episode.
        ends: (E,) int64 row after the last of each episode.
        tables: the files that the columns were read from.
        episodes_per_dataset: how many of `episodes` belong to each of several datasets; None for a single dataset.
        columns: (N, ...) tensors, or lists of N strings, in LeRobot's own dtypes.
        images: encoded pictures (PNG or JPEG bytes) of each `image` feature, one a row.
        videos: where the frames of each `video` feature are.
        problems: what makes the dataset unfit to train on, a line each. Columns and pixels may then be missing.
        warnings: what a user should know but can train with.
    """

    name: str
    meta: object
    episodes: list
    starts: Tensor
    ends: Tensor
    tables: list[Path]
    episodes_per_dataset: list[int] | None = None
    columns: dict[str, Tensor | list[str]] = field(default_factory=dict)
    images: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    videos: dict[str, Videos] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """N, the number of rows."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def dataset_of_episode(self) -> Tensor:
        """(E,) position of the dataset that each episode belongs to."""
        counts = torch.tensor(self.episodes_per_dataset or [len(self.episodes)])
        return torch.arange(len(counts)).repeat_interleave(counts)

    @property
    def episode_ids(self) -> list:
        """`episodes` without the folders' names, which may change before a resume: of several datasets "position#index"."""
        if self.episodes_per_dataset is None:
            return self.episodes
        indices = [name.rsplit("#", 1)[1] for name in self.episodes]
        return [f"{dataset}#{i}" for dataset, i in zip(self.dataset_of_episode.tolist(), indices, strict=True)]

    @property
    def tasks(self) -> list[str]:
        """Task texts by task_index."""
        return [] if self.meta.tasks is None else self.meta.tasks.sort_values("task_index").index.tolist()

    def episode_of(self, rows: Tensor) -> Tensor:
        """(B,) position in `episodes` of each of (B,) rows."""
        return torch.searchsorted(self.ends, rows, right=True)

    def locate(self, key: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) file and (n,) frame number in that file of camera `key` at (n,) rows: by row order, not by the clock."""
        videos = self.videos[key]
        episode = self.episode_of(rows)
        return videos.file_index[episode], videos.first_frame[episode] + rows - self.starts[episode]

    def require(self, more_problems=()) -> None:
        """Raise one UserError that lists all problems, the dataset's own and `more_problems`, if there are any."""
        problems = [*self.problems, *more_problems]
        if len(problems) == 1:
            raise UserError(f"dataset {self.name}: {problems[0]}")
        if problems:
            raise UserError(f"dataset {self.name} has {len(problems)} problems:\n  - " + "\n  - ".join(problems))


def read_table(files: list[Path], root: Path, episodes: list[int] | None) -> tuple[pa.Table, list[str]]:
    """The rows of `episodes` (None for all) in the order of `files`, and a line for each file that cannot be read.

    Raises:
        UserError: no file can be read, or the table does not say which episode a row belongs to.
    """
    selected = None if episodes is None else pa.dataset.field("episode_index").isin(episodes)
    tables = []
    problems = []
    for file in files:
        try:
            tables.append(pa.dataset.dataset(file, format="parquet").to_table(filter=selected))
        except (pa.ArrowInvalid, OSError) as error:
            problems.append(f"{file.relative_to(root)} cannot be read: {one_line(error)[:200]}")
    if not tables:
        reason = "; ".join(problems) or "data/*/*.parquet is missing"
        raise UserError(f"dataset {root} has no readable table: {reason}")
    table = pa.concat_tables(tables, promote_options="permissive")
    if "episode_index" not in table.column_names:
        raise UserError(f"dataset {root}: its table has no column episode_index, which separates its episodes")
    return table, problems


def episode_spans(table: pa.Table) -> tuple[list[int], Tensor, Tensor]:
    """Episode indices in the order of the table, (E,) int64 first rows, and (E,) int64 rows after the last."""
    index = table["episode_index"].to_numpy()  # (N,)
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))  # (E,) rows that differ from the row before
    ends = np.append(starts, len(index))[1:]
    return index[starts].tolist(), torch.from_numpy(starts), torch.from_numpy(ends)


def table_features(meta) -> dict[str, dict]:
    """The features that are columns of the table: all but videos, and without LeRobot's language columns."""
    from lerobot.datasets.language import is_language_column

    keys = [key for key in meta.features if key not in meta.video_keys and not is_language_column(key)]
    return {key: meta.features[key] for key in keys}


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column, row after row, without its lists."""
    values = column.combine_chunks()
    while isinstance(values.type, pa.ListType | pa.LargeListType | pa.FixedSizeListType):
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False)


def read_columns(meta, table: pa.Table) -> dict[str, Tensor | list[str]]:
    """Every column but pictures: a contiguous tensor (N, *shape) of numbers, or a list of N strings."""
    columns = {}
    for key, feature in table_features(meta).items():
        if feature["dtype"] == "string":
            columns[key] = table[key].to_pylist()
        elif feature["dtype"] != "image":
            shape = tuple(feature["shape"])
            if shape == (1,):  # LeRobot reads it as a scalar
                shape = ()
            values = flat_values(table[key])
            values = values.astype(DTYPES.get(values.dtype.kind, np.int64))  # a copy, since Arrow's memory is read-only
            columns[key] = torch.from_numpy(values.reshape(table.num_rows, *shape))
    return columns
