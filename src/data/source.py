"""Open a LeRobot dataset: metadata, columns in memory, where every frame lies, and everything wrong with it.

N rows of the selected episodes, E selected episodes.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from torch import Tensor

import hub
from data import v2
from data.checks import check_values
from data.videos import Videos, find_videos, video_problems
from errors import UserError, as_user_error, nearest, one_line

AXES = "height", "width", "channels"
REQUIRED = ("codebase_version", "fps", "features")  # in meta/info.json
ONLINE = "Pass a local folder, or try again online"


@dataclass
class Source:
    """A dataset's selected episodes, with every column but the pixels in memory.

    Attributes:
        name: the dataset as the user wrote it.
        meta: LeRobot's `LeRobotDatasetMetadata`: features, stats, tasks, fps.
        root: the dataset's folder.
        episodes: selected episode indices, ascending; for several datasets "dataset#index".
        starts, ends: (E,) int64 first row of each episode, and the row after its last.
        columns: (N, ...) tensors, or lists of N strings, in LeRobot's own dtypes.
        images: encoded pictures (PNG or JPEG bytes) of each `image` feature, one a row.
        videos: where the frames of each `video` feature lie.
        tables: the files that the columns were read from.
        parts: how many episodes each dataset has that this one is made of.
        problems: what makes the dataset unfit to train on, one line each.
        warnings: what a user should know but can train with.
    """

    name: str
    meta: object
    root: Path
    episodes: list
    starts: Tensor
    ends: Tensor
    columns: dict[str, Tensor | list[str]]
    images: dict[str, pa.ChunkedArray] = field(default_factory=dict)
    videos: dict[str, Videos] = field(default_factory=dict)
    tables: list[Path] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def places(self) -> list:
        """`episodes` for a resumed run, which may find its datasets in other folders: of several "position#index"."""
        if len(self.parts) == 1:
            return self.episodes
        positions = [i for i, episodes in enumerate(self.parts) for _ in range(episodes)]
        return [f"{i}#{name.rsplit('#', 1)[1]}" for i, name in zip(positions, self.episodes, strict=True)]

    @property
    def tasks(self) -> list[str]:
        """Task texts by task_index."""
        return [] if self.meta.tasks is None else self.meta.tasks.sort_values("task_index").index.tolist()

    def episode_of(self, rows: Tensor) -> Tensor:
        """(B,) position in `episodes` of each of (B,) rows."""
        return torch.searchsorted(self.ends, rows, right=True)

    def locate(self, key: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) file and (n,) frame number within it of camera `key` at (n,) rows: by row order, not by the clock."""
        episode = self.episode_of(rows)
        videos = self.videos[key]
        return videos.file[episode], videos.first[episode] + rows - self.starts[episode]

    def require(self, more_problems=()) -> None:
        """Raise one UserError that tells every problem found, if there is any."""
        problems = [*self.problems, *more_problems]
        if len(problems) == 1:
            raise UserError(f"dataset {self.name}: {problems[0]}")
        if problems:
            raise UserError(f"dataset {self.name} has {len(problems)} problems:\n  - " + "\n  - ".join(problems))


def open_dataset(
    dataset_id: str,
    dataset_root: str | None = None,
    revision: str | None = None,
    episodes: str | None = None,
    flag: str = "--episodes",
) -> Source:
    """Open a folder or a Hub dataset (downloaded first) and check it.

    Args:
        dataset_id: a folder, or a Hub id; LeRobot v3.0 or v2.1.
        dataset_root: folder that a Hub dataset is downloaded into.
        revision: branch, tag or commit of a Hub dataset.
        episodes: which episodes, such as "0:40,45"; None for all.
        flag: what they were passed as.

    Raises:
        UserError: there is no such dataset, it is in another format, or an episode is out of range.
    """
    folder = Path(dataset_id).expanduser()
    if not folder.is_dir() and not re.fullmatch(hub.HUB_ID, dataset_id):
        raise UserError(f"no dataset {dataset_id}: there is no such folder, and a Hub id is written user/name")
    if folder.is_dir():
        meta = open_folder(dataset_id, folder)
        selected = parse_episodes(episodes, meta.total_episodes, flag)
    else:
        meta = open_hub(dataset_id, dataset_root, revision)
        selected = parse_episodes(episodes, meta.total_episodes, flag)
        if meta.revision != "v2.1":  # of those, all is there already
            download(dataset_id, dataset_root, revision, selected if episodes else None)
    tables = sorted((meta.root / "data").glob("*/*.parquet"))
    table, problems = read_table(tables, meta.root, selected if episodes else None)
    if "action" not in meta.features:
        problems.append(f"it has no feature action{nearest('action', meta.features)}")
    problems += put_in_order(meta)
    place = episode_rows(table, selected, meta, problems)
    parts = [len(place[0])]
    source = Source(dataset_id, meta, meta.root, *place, columns={}, tables=tables, parts=parts, problems=problems)
    read_columns(source, table)
    for key in meta.video_keys:
        if meta.episodes is not None and f"videos/{key}/from_timestamp" not in meta.episodes.column_names:
            problems.append(f"info.json has a camera {key}, meta/episodes does not say where its videos are")
    if not problems:  # what is below indexes by what the checks above have found sound
        source.videos = {key: find_videos(meta, key, source.episodes) for key in meta.video_keys}
        check_values(source)
        for key, videos in source.videos.items():
            problems += video_problems(videos, meta.root, tuple(meta.features[key]["shape"]), meta.fps)
    return source


def put_in_order(meta) -> list[str]:
    """Have every camera's shape be (H, W, 3) and named so, whatever its axes are called; a line for each that has no such."""
    problems = []
    for key in meta.camera_keys:
        feature = meta.features[key]
        shape = tuple(feature["shape"])
        if len(shape) == 3 and shape[0] == 3 != shape[2]:
            shape = (*shape[1:], 3)
        if key not in meta.depth_keys and (len(shape) != 3 or shape[2] != 3):
            problems.append(f"camera {key} has shape {shape} by info.json, expected (height, width, 3)")
        feature["shape"], feature["names"] = shape, list(AXES)
    return problems


def open_folder(dataset_id: str, folder: Path):
    """Metadata of a folder, v3.0 or v2.1."""
    if not (folder / "meta" / "info.json").is_file():
        raise UserError(f"{dataset_id} is a folder without meta/info.json: not a LeRobot dataset")
    with as_user_error(f"dataset {dataset_id}", invalid=ValueError, offline=ONLINE):
        version = read_info(folder / "meta" / "info.json")["codebase_version"]
        name = folder.resolve().name
        if version == "v2.1":
            return v2.read_metadata(folder, name)
        if version == "v3.0":
            for file in ("tasks.parquet", "episodes/*/*.parquet"):  # LeRobot would look for them on the Hub
                if not any((folder / "meta").glob(file)):
                    raise UserError(f"dataset {dataset_id} has no meta/{file}: copy or download the whole of it again")
            from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

            return LeRobotDatasetMetadata(name, root=folder)
    raise UserError(
        f"dataset {dataset_id} is in LeRobot's format {version}, expected v3.0 or v2.1: convert it with LeRobot"
    )


def read_info(path: Path) -> dict:
    """The content of meta/info.json.

    Raises:
        UserError: it is not JSON, or lacks what every dataset has.
    """
    try:
        info = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {one_line(error)}") from error
    missing = [name for name in REQUIRED if name not in info]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}. Copy or download the dataset again")
    return info


def open_hub(dataset_id: str, dataset_root: str | None, revision: str | None):
    """Metadata of a Hub dataset, v3.0 or v2.1 (of which the whole is downloaded)."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.utils import BackwardCompatibilityError

    with as_user_error(f"dataset {dataset_id}", invalid=ValueError, offline=ONLINE):
        try:
            return LeRobotDatasetMetadata(dataset_id, root=dataset_root, revision=revision)
        except BackwardCompatibilityError:
            from huggingface_hub import snapshot_download
            from lerobot.utils.constants import HF_LEROBOT_HOME

            here = HF_LEROBOT_HOME / dataset_id  # where an older LeRobot has recorded it, or downloaded some of it
            if dataset_root is revision is None and (here / "meta" / "info.json").is_file():
                meta, tables, videos = open_folder(str(here), here), here.glob("data/*/*"), here.glob("videos/*/*/*")
                if (len(list(tables)), len(list(videos))) == (n := meta.total_episodes, n * len(meta.video_keys)):
                    return meta
            at = {"revision": revision or "v2.1", "local_dir": dataset_root}
            return open_folder(dataset_id, Path(snapshot_download(dataset_id, repo_type="dataset", **at)))


def download(dataset_id: str, dataset_root: str | None, revision: str | None, episodes: list[int] | None) -> None:
    """Have every file of the episodes on disk; nothing is fetched that is there already."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with as_user_error(f"dataset {dataset_id}", invalid=ValueError, offline=ONLINE):
        LeRobotDataset(dataset_id, root=dataset_root, revision=revision, episodes=episodes, video_backend="pyav")


def parse_episodes(text: str | None, total: int, flag: str = "--episodes") -> list[int]:
    """Episode indices of "0:40,45" (ends exclusive, as in Python), ascending and once each.

    Raises:
        UserError: not of that form, or not within the dataset's `total` episodes.
    """
    if text is None:
        return list(range(total))
    chosen = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?::\s*(\d+)\s*)?", part)
        if match is None:
            raise UserError(f'{flag} {text}: {part!r} is neither a number nor a range such as "0:40"')
        first = int(match[1])
        end = first + 1 if match[2] is None else int(match[2])
        if end > total or first >= end:
            raise UserError(f"{flag} {text}: {part.strip()} is out of range, the dataset has episodes 0 to {total - 1}")
        chosen.update(range(first, end))
    return sorted(chosen)


def read_table(files: list[Path], root: Path, episodes: list[int] | None) -> tuple[pa.Table, list[str]]:
    """The rows of the selected episodes in the order of their files, and what kept files from being read."""
    chosen = None if episodes is None else pa.dataset.field("episode_index").isin(episodes)
    tables, problems = [], []
    for file in files:
        try:
            tables.append(pa.dataset.dataset(file, format="parquet").to_table(filter=chosen))
        except (pa.ArrowInvalid, OSError) as error:
            problems.append(f"{file.relative_to(root)} cannot be read: {one_line(error)[:200]}")
    if not tables:
        raise UserError(
            f"dataset {root} has no readable table: " + ("; ".join(problems) or "data/*/*.parquet is missing")
        )
    table = pa.concat_tables(tables, promote_options="permissive")
    if "episode_index" not in table.column_names:
        raise UserError(f"dataset {root}: its table has no column episode_index, which tells its episodes apart")
    return table, problems


def episode_rows(table: pa.Table, selected: list[int], meta, problems: list[str]) -> tuple[list[int], Tensor, Tensor]:
    """Selected episodes with (E,) first rows and (E,) ends, as they lie in the table."""
    index = table["episode_index"].to_numpy()
    changes = np.flatnonzero(np.diff(index)) + 1
    starts = np.concatenate([[0], changes]) if len(index) else np.empty(0, int)
    found = index[starts].tolist() if len(index) else []
    known = [] if meta.episodes is None else meta.episodes["episode_index"]
    for message, episodes in (
        ("its table has no rows of episodes", set(selected) - set(found)),
        (f"info.json counts {meta.total_episodes} episodes, its table has also", set(found) - set(selected)),
        ("its metadata does not describe episodes", set(found) - set(known)),
    ):
        if episodes:
            problems.append(f"{message} {sorted(episodes)[:10]}")
    if found != sorted(set(found)):
        problems.append("its episodes are not in order in the table")
    if not found and not problems:
        problems.append("it has no episodes")
    ends = np.append(starts[1:], len(index))
    return found, torch.from_numpy(starts.astype(np.int64)), torch.from_numpy(ends.astype(np.int64))


def read_columns(source: Source, table: pa.Table) -> None:
    """Every feature but video as one contiguous tensor (N, *shape), a list of strings, or encoded pictures."""
    from lerobot.datasets.language import is_language_column

    for key, feature in source.meta.features.items():
        dtype, shape = feature["dtype"], tuple(feature["shape"])
        if key in source.meta.depth_keys:
            source.problems.append(
                f"{key} is a depth map, which no policy here reads: remove it with lerobot-edit-dataset"
            )
        if dtype == "video" or is_language_column(key):
            continue
        if key not in table.column_names:
            source.problems.append(f"its table has no column {key}, which info.json promises")
        elif dtype == "image":
            source.images[key] = table[key]
        elif dtype == "string":
            source.columns[key] = table[key].to_pylist()
        else:
            flat = table[key].combine_chunks()
            while (
                pa.types.is_list(flat.type)
                or pa.types.is_fixed_size_list(flat.type)
                or pa.types.is_large_list(flat.type)
            ):
                flat = flat.flatten()
            values = flat.to_numpy(zero_copy_only=False)
            per_row = () if shape == (1,) else shape  # LeRobot reads a (1,) feature as a scalar
            if values.size != table.num_rows * int(np.prod(per_row)):
                source.problems.append(
                    f"{key} has {values.size / max(table.num_rows, 1):g} values a row, info.json says {shape}"
                )
                continue
            kind = np.float32 if values.dtype.kind == "f" else bool if values.dtype.kind == "b" else np.int64
            source.columns[key] = torch.from_numpy(values.astype(kind, copy=True).reshape(table.num_rows, *per_row))
