"""LeRobot v2.1 datasets as they are: one table and one video an episode, metadata in JSON lines, statistics by episode."""

import json
from pathlib import Path

from errors import UserError, one_line


def read_metadata(folder: Path, repo_id: str):
    """A v2.1 folder's metadata in LeRobot's v3.0 class, with the values that LeRobot's converter would write.

    Source: LeRobot 0.6.1 `scripts/convert_dataset_v21_to_v30.py`.

    Raises:
        UserError: a metadata file is missing or damaged.
    """
    import pandas
    from datasets import Dataset
    from lerobot.datasets.compute_stats import aggregate_stats
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.io_utils import cast_stats_to_numpy
    from lerobot.datasets.utils import DatasetInfo

    info = json.loads((folder / "meta" / "info.json").read_text())
    episodes = sorted(json_lines(folder / "meta" / "episodes.jsonl"), key=lambda line: line["episode_index"])
    tasks = sorted(json_lines(folder / "meta" / "tasks.jsonl"), key=lambda line: line["task_index"])
    stats = sorted(json_lines(folder / "meta" / "episodes_stats.jsonl"), key=lambda line: line["episode_index"])
    names = {"episode_chunk:03d": "chunk_index:03d", "episode_index:06d": "file_index:06d"}
    for template in ("data_path", "video_path"):
        for theirs, ours in names.items():
            info[template] = info[template] and info[template].replace(theirs, ours)
    info["fps"] = int(info["fps"]) if info["fps"] == int(info["fps"]) else info["fps"]  # 29.97 as it is
    for feature in info["features"].values():
        if feature["dtype"] != "video":
            feature["fps"] = info["fps"]

    meta = LeRobotDatasetMetadata.__new__(LeRobotDatasetMetadata)  # its own constructor reads v3.0 files alone
    meta.repo_id, meta.repo_type, meta.root, meta.revision = repo_id, "dataset", folder, "v2.1"
    meta.info = DatasetInfo.from_dict({k: v for k, v in info.items() if k not in ("total_chunks", "total_videos")})
    meta.tasks = pandas.DataFrame(
        {"task_index": [line["task_index"] for line in tasks]},
        index=pandas.Index([line["task"] for line in tasks], name="task"),
    )
    meta.stats = aggregate_stats([cast_stats_to_numpy(line["stats"]) for line in stats])
    rows, end = [], 0
    for line in episodes:
        index, start, end = line["episode_index"], end, end + line["length"]
        row = {"episode_index": index, "length": line["length"], "tasks": line["tasks"]}
        row |= {"dataset_from_index": start, "dataset_to_index": end}
        for place in ("data", *(f"videos/{key}" for key in meta.video_keys)):
            row |= {f"{place}/chunk_index": index // info["chunks_size"], f"{place}/file_index": index}
        for key in meta.video_keys:
            row |= {f"videos/{key}/from_timestamp": 0.0, f"videos/{key}/to_timestamp": line["length"] / info["fps"]}
        rows.append(row)
    meta.episodes = Dataset.from_list(rows)
    return meta


def json_lines(path: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}") from None
