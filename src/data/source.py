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

from data.pictures import is_empty
from data.videos import Videos
from errors import UserError

DTYPES = {"f": np.float32, "b": np.bool_}  # LeRobot's dtypes by NumPy's kind of the stored numbers; else int64
MAX_ROUNDING = 1e-3  # seconds by which float32 may move a timestamp; it moves Unix seconds by up to 64


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
        columns: (N, ...) tensors, or lists of N strings, in LeRobot's own dtypes; `timestamp` is
            float64 where float32 would move it by more than a millisecond.
        images: encoded pictures (PNG or JPEG bytes) of each `image` feature, one a row.
        videos: where the frames of each `video` feature are.
        problems: what makes the dataset unfit to train on, a line each. Columns and pixels may then be missing.
        warnings: what a user should know but can train with.
        remedy: how to leave out the faulty episodes, where the problems are only theirs; else empty.
        left_out: observations that --observations leaves out.
        renamed: {name in the files: name here} of features that were renamed since.
        own_features: what each of several datasets has by itself, of padded ones (padding.py); else empty.
        recorded_sizes: (height, width) of each camera's pictures in each of several datasets; None for a single dataset.
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
    remedy: str = ""
    left_out: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    own_features: list = field(default_factory=list)
    recorded_sizes: dict[str, list[tuple[int, int]]] | None = None

    @property
    def is_streamed(self) -> bool:
        """Whether frames of videos come over the network."""
        return any(videos.is_streamed for videos in self.videos.values())

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
        """`episodes` by names that a moved folder does not change before a resume: for several datasets "position#index"."""
        if self.episodes_per_dataset is None:
            return self.episodes
        indices = [name.rsplit("#", 1)[1] for name in self.episodes]
        return [f"{dataset}#{i}" for dataset, i in zip(self.dataset_of_episode.tolist(), indices, strict=True)]

    @property
    def tasks(self) -> dict[int, str]:
        """Text of each task_index, ascending by index; the indices may have gaps."""
        tasks = self.meta.tasks
        return dict(zip(tasks["task_index"].tolist(), tasks.index.tolist(), strict=True))

    def episode_of(self, rows: Tensor) -> Tensor:
        """(B,) position in `episodes` of each of (B,) rows."""
        return torch.searchsorted(self.ends, rows, right=True)

    @property
    def frame_index(self) -> Tensor:
        """(N,) int64 number of each row's frame within its episode."""
        rows = torch.arange(self.rows)
        return rows - self.starts[self.episode_of(rows)]

    def name_row(self, row: int) -> str:
        """A row for people, such as "episode 3 frame 17"."""
        episode = int(self.episode_of(torch.tensor([row])))
        return f"episode {self.episodes[episode]} frame {row - int(self.starts[episode])}"

    def dataset_of(self, rows: Tensor) -> Tensor:
        """(B,) position of the dataset that each of (B,) rows belongs to."""
        return self.dataset_of_episode[self.episode_of(rows)]

    @property
    def picture_sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each camera, in each of several datasets."""
        if self.recorded_sizes is not None:
            return [size for sizes in self.recorded_sizes.values() for size in sizes]
        shapes = [tuple(self.meta.features[key]["shape"]) for key in self.meta.camera_keys]
        return [shape[:2] for shape in shapes if len(shape) == 3]  # one of other axes is among the problems

    def recorded_size(self, key: str, row: int) -> tuple[int, int]:
        """(height, width) of a camera's pictures in the dataset that a row belongs to."""
        if self.recorded_sizes is not None:
            return self.recorded_sizes[key][int(self.dataset_of(torch.tensor([row])))]
        height, width, _ = self.meta.features[key]["shape"]
        return height, width

    def picture_files(self, key: str) -> list[Path]:
        """The files of a camera's pictures that are not stored in the table."""
        paths = []
        for chunk in self.images[key].chunks:
            paths += chunk.field("path").filter(is_empty(chunk, "bytes")).to_pylist()
        return [self.meta.root / path for path in paths]

    def locate(self, key: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) file and (n,) frame number in that file of camera `key` at (n,) rows: by row order, not by the clock."""
        videos = self.videos[key]
        episode = self.episode_of(rows)
        return videos.file_index[episode], videos.first_frame[episode] + rows - self.starts[episode]

    def require(self, more_problems=()) -> None:
        """Raise one UserError that lists all problems, the dataset's own and `more_problems`, if there are any."""
        problems = [*self.problems, *more_problems]
        if len(problems) == 1:
            end = f". {self.remedy}" if self.remedy else ""
            raise UserError(f"dataset {self.name}: {problems[0]}{end}")
        if problems:
            lines = [f"  - {problem}" for problem in problems]
            if self.remedy and not more_problems:
                lines.append(self.remedy)
            raise UserError(f"dataset {self.name} has {len(problems)} problems:", *lines)


def episode_spans(table: pa.Table) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Episode indices in the order of the table, (E,) int64 first rows, and (E,) int64 rows after the last."""
    index = table["episode_index"].to_numpy()  # (N,)
    starts = np.flatnonzero(np.diff(index, prepend=index[:1] - 1))  # (E,) rows that differ from the row before
    ends = np.append(starts, len(index))[1:]
    return index[starts].tolist(), starts, ends


def table_features(meta) -> dict[str, dict]:
    """The features that are columns of the table: all but videos, and without LeRobot's language columns."""
    from lerobot.datasets.language import is_language_column

    keys = [key for key in meta.features if key not in meta.video_keys and not is_language_column(key)]
    return {key: meta.features[key] for key in keys}


def one_piece(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column as one array of plain values, however Arrow stores them: in chunks, by dictionary, as an extension type."""
    values = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if isinstance(values, pa.DictionaryArray):
        values = values.dictionary_decode()
    return values


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def flat_values(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of a column, row after row, without its lists."""
    values = one_piece(column)
    while is_list(values.type):
        values = one_piece(values.flatten())
    if pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
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
            with np.errstate(over="ignore"):  # what float32 cannot hold is inf, and reported as such
                values = values.astype(number_dtype(key, feature, values))  # a copy, since Arrow's memory is read-only
            columns[key] = torch.from_numpy(values.reshape(table.num_rows, *shape))
    return columns


def number_dtype(key: str, feature: dict, values: np.ndarray) -> type:
    """What a column's numbers are in a batch: as in LeRobot's, but a clock that float32 cannot hold stays float64."""
    if "f" in (np.dtype(feature["dtype"]).kind, values.dtype.kind):
        lost = 0.0
        if key == "timestamp":
            with np.errstate(over="ignore"):
                lost = np.abs(values.astype(np.float64) - values.astype(np.float32)).max(initial=0)
        return np.float64 if lost > MAX_ROUNDING else np.float32
    return DTYPES.get(values.dtype.kind, np.int64)
