"""LeRobot v2.1 datasets as they are: one table and one video an episode, metadata in JSON lines, statistics by episode."""

import json
from pathlib import Path

from errors import UserError, one_line

PATH_FIELDS = {"episode_chunk:03d": "chunk_index:03d", "episode_index:06d": "file_index:06d"}  # v2.1's: v3.0's


def read_v2_metadata(folder: Path, repo_id: str, info: dict):
    """A v2.1 folder's metadata in LeRobot's v3.0 class, with the values that LeRobot's converter would write.

    Args:
        folder: the dataset.
        repo_id: its name.
        info: content of meta/info.json.

    Source: LeRobot 0.6.1 `scripts/convert_dataset_v21_to_v30.py`.

    Raises:
        UserError: a metadata file is missing or damaged.
    """
    import pandas
    from datasets import Dataset
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.io_utils import cast_stats_to_numpy

    episodes = read_json_lines(folder / "meta" / "episodes.jsonl", "episode_index")
    tasks = read_json_lines(folder / "meta" / "tasks.jsonl", "task_index")
    stats = read_json_lines(folder / "meta" / "episodes_stats.jsonl", "episode_index")

    meta = LeRobotDatasetMetadata.__new__(LeRobotDatasetMetadata)  # its constructor reads v3.0 files only
    meta.repo_id = repo_id
    meta.repo_type = "dataset"
    meta.root = folder
    meta.revision = "v2.1"
    meta.info = convert_info(info)
    meta.tasks = pandas.DataFrame(tasks).set_index("task")[["task_index"]]
    meta.stats = aggregate_stats([cast_stats_to_numpy(line["stats"]) for line in stats])
    meta.episodes = Dataset.from_list(episode_rows(episodes, meta))
    return meta


def convert_info(info: dict):
    """The content of a v2.1 info.json, which is changed, as LeRobot's v3.0 `DatasetInfo`."""
    from lerobot.datasets.utils import DatasetInfo

    for template in ("data_path", "video_path"):
        for old_field, new_field in PATH_FIELDS.items():
            if info[template]:  # a dataset without videos has no video_path
                info[template] = info[template].replace(old_field, new_field)
    if info["fps"] == int(info["fps"]):  # a rate such as 29.97 stays as it is
        info["fps"] = int(info["fps"])
    for feature in info["features"].values():
        if feature["dtype"] != "video":
            feature["fps"] = info["fps"]
    for name in ("total_chunks", "total_videos"):  # which v3.0 does not have
        info.pop(name, None)
    return DatasetInfo.from_dict(info)


def episode_rows(episodes: list[dict], meta) -> list[dict]:
    """meta/episodes of v3.0: each episode's rows in the whole dataset, and its files, one of each kind an episode."""
    rows = []
    end = 0
    for line in episodes:
        index = line["episode_index"]
        start = end
        end = start + line["length"]
        row = {"episode_index": index, "length": line["length"], "tasks": line["tasks"]}
        row |= {"dataset_from_index": start, "dataset_to_index": end}
        for files in ("data", *(f"videos/{key}" for key in meta.video_keys)):
            row |= {f"{files}/chunk_index": index // meta.info.chunks_size, f"{files}/file_index": index}
        for key in meta.video_keys:
            row[f"videos/{key}/from_timestamp"] = 0.0
            row[f"videos/{key}/to_timestamp"] = line["length"] / meta.info.fps
        rows.append(row)
    return rows


def read_json_lines(path: Path, order: str) -> list[dict]:
    """The objects of a JSON lines file, sorted by their field `order`."""
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
    return sorted(lines, key=lambda line: line[order])
