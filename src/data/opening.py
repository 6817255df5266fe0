"""Open a LeRobot dataset from a folder or the Hub, and check it."""

import json
import re
from pathlib import Path

import hub
from data.checks import clock_warnings, content_problems, table_problems
from data.episodes import parse_episodes
from data.source import Source, episode_spans, read_columns, read_table
from data.v2 import read_v2_metadata
from data.videos import find_videos
from errors import UserError, as_user_error, one_line

REQUIRED = ("codebase_version", "fps", "features")  # in meta/info.json


def open_source(
    dataset_id: str,
    dataset_root: str | None = None,
    revision: str | None = None,
    episodes: str | None = None,
    observations: list[str] | None = None,
    cache_dir: str | None = None,
    flag: str = "--episodes",
) -> Source:
    """Open a folder or a Hub dataset (downloaded first) and check it.

    Args:
        dataset_id: a folder, or a Hub id; LeRobot v3.0 or v2.1.
        dataset_root: folder that a Hub dataset is downloaded into.
        revision: branch, tag or commit of a Hub dataset.
        episodes: which episodes, such as "0:40,45"; None for all.
        observations: names or patterns of the cameras and states to read; None for all.
        cache_dir: where the times of the videos' frames are remembered; None for the user's cache.
        flag: the flag that `episodes` comes from, for messages.

    Returns:
        The open dataset. `Source.problems` lists what is wrong with it, and `Source.require` raises if anything is.

    Raises:
        UserError: there is no such dataset, it is in another format, or an episode is out of range.
    """
    # The metadata: features, fps, tasks, and which episodes there are.
    folder = Path(dataset_id).expanduser()
    if folder.is_dir():
        meta = open_folder(dataset_id, folder)
    elif re.fullmatch(hub.HUB_ID, dataset_id):
        meta = open_hub(dataset_id, dataset_root, revision)
    else:
        raise UserError(f"no dataset {dataset_id}: there is no such folder, and a Hub id is written user/name")
    set_camera_axes(meta)
    selected = parse_episodes(episodes, range(meta.total_episodes), flag)
    only = selected if episodes else None

    # The files of the selected episodes. A v2.1 dataset of the Hub was downloaded whole.
    if not folder.is_dir() and meta.revision != "v2.1":
        download(dataset_id, dataset_root, revision, only)

    # The table, one row a frame.
    tables = sorted((meta.root / "data").glob("*/*.parquet"))
    table, problems = read_table(tables, meta.root, only)
    found, starts, ends = episode_spans(table)
    problems += table_problems(meta, table, selected, found)
    source = Source(dataset_id, meta, found, starts, ends, tables, problems=problems)
    if problems:  # the stages below rely on what was checked
        return source

    # Columns in memory, and where the pixels are: pictures in the table, frames in videos.
    source.columns = read_columns(meta, table)
    source.images = {key: table[key] for key in meta.image_keys}
    source.videos = {key: find_videos(meta, key, found) for key in meta.video_keys}

    source.problems = content_problems(source)
    source.warnings = clock_warnings(source)
    return source


def open_folder(dataset_id: str, folder: Path):
    """Read the metadata of a folder, v3.0 or v2.1."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise UserError(f"{dataset_id} is a folder without meta/info.json: not a LeRobot dataset")
    name = folder.resolve().name
    with opening(dataset_id):
        info = read_info(path)
        version = info["codebase_version"]
        if version == "v2.1":
            return read_v2_metadata(folder, name, info)
        if version != "v3.0":
            raise UserError(
                f"dataset {dataset_id} is in LeRobot's format {version}, expected v3.0 or v2.1: convert it with LeRobot"
            )
        for file in ("tasks.parquet", "episodes/*/*.parquet"):
            if not any((folder / "meta").glob(file)):  # LeRobot would look for it on the Hub
                raise UserError(f"dataset {dataset_id} has no meta/{file}: copy or download the whole of it again")
        return LeRobotDatasetMetadata(name, root=folder)


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
    """Read the metadata of a Hub dataset, v3.0 or v2.1. A v2.1 dataset is downloaded whole."""
    from huggingface_hub import snapshot_download
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.utils import BackwardCompatibilityError
    from lerobot.utils.constants import HF_LEROBOT_HOME

    with opening(dataset_id):
        try:
            return LeRobotDatasetMetadata(dataset_id, root=dataset_root, revision=revision)
        except BackwardCompatibilityError:  # older than v3.0
            kept = HF_LEROBOT_HOME / dataset_id  # where an older LeRobot recorded it, or downloaded some of it
            if dataset_root is None and revision is None and (kept / "meta" / "info.json").is_file():
                meta = open_folder(str(kept), kept)
                if has_all_files(meta):
                    return meta
            tag = revision or "v2.1"
            folder = snapshot_download(dataset_id, repo_type="dataset", revision=tag, local_dir=dataset_root)
            return open_folder(dataset_id, Path(folder))


def has_all_files(meta) -> bool:
    """Whether a v2.1 folder has a table, and a video of each camera, for every episode."""
    tables = len(list(meta.root.glob("data/*/*")))
    videos = len(list(meta.root.glob("videos/*/*/*")))
    return tables == meta.total_episodes and videos == meta.total_episodes * len(meta.video_keys)


def opening(dataset_id: str):
    """A context that turns what keeps LeRobot from opening a dataset into a UserError."""
    return as_user_error(
        f"dataset {dataset_id}", invalid=ValueError, offline="Pass a local folder, or try again online"
    )


def set_camera_axes(meta) -> None:
    """Write every camera's shape as (height, width, channels) and name its axes so, as LeRobot's decoders give it."""
    for key in meta.camera_keys:
        feature = meta.features[key]
        shape = tuple(feature["shape"])
        if len(shape) == 3 and shape[0] == 3 and shape[2] != 3:  # channels first
            shape = (*shape[1:], 3)
        feature["shape"] = shape
        feature["names"] = ["height", "width", "channels"]


def download(dataset_id: str, dataset_root: str | None, revision: str | None, episodes: list[int] | None) -> None:
    """Download the files of `episodes` (None for all) that are not on disk yet."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    with opening(dataset_id):
        LeRobotDataset(dataset_id, root=dataset_root, revision=revision, episodes=episodes, video_backend="pyav")
