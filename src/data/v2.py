"""LeRobot v2.1 and v2.0 datasets as they are: one table and one video an episode, metadata in JSON lines.

Statistics are by episode in v2.1, and of the whole dataset in v2.0.
"""

import json
from pathlib import Path

from data.episodes import counted
from data.files import read_text
from data.statistics import as_arrays, merge_statistics, read_statistics
from errors import UserError, one_line

DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"


def fill_v2_metadata(meta, info: dict) -> None:
    """Read a v2.1 or v2.0 folder's metadata into LeRobot's v3.0 class, with the values that LeRobot's converter writes.

    Args:
        meta: LeRobot's metadata with its `root`.
        info: content of meta/info.json.

    Source: LeRobot 0.6.1 `scripts/convert_dataset_v21_to_v30.py`.

    Raises:
        UserError: a metadata file is missing or damaged.
    """
    import pandas
    from datasets import Dataset
    from lerobot.datasets.utils import DatasetInfo

    folder = meta.root / "meta"
    episodes = read_json_lines(folder / "episodes.jsonl", {"episode_index": int, "length": int})
    tasks = read_json_lines(folder / "tasks.jsonl", {"task_index": int})
    meta.info = DatasetInfo(**converted_info(info))
    meta.tasks = pandas.DataFrame(tasks)
    described = {line["episode_index"] for line in episodes if line["length"] > 0}
    meta.stats = read_stats(meta, described, info["features"])
    meta.episodes = Dataset.from_list(episode_rows(episodes, meta)) if episodes else None


def converted_info(info: dict) -> dict:
    """The settings of a v2.1 or v2.0 info.json, with fps in each feature as v3.0 has it. File names stay as they are."""
    converted = {"data_path": DATA_PATH, "video_path": VIDEO_PATH, **info}
    if converted["video_path"] is None:  # a dataset without videos may say so
        converted["video_path"] = VIDEO_PATH
    if info["fps"] == int(info["fps"]):  # a rate such as 29.97 stays as it is
        converted["fps"] = int(info["fps"])
    for feature in info["features"].values():
        if feature["dtype"] != "video":
            feature["fps"] = converted["fps"]
    return converted


def read_stats(meta, described: set[int], features: dict) -> dict:
    """Statistics of the whole dataset, merged from its episodes' in v2.1; empty if there are none, or an episode has none.

    Args:
        meta: LeRobot's metadata, whose `warnings` get a line for what is left out.
        described: the episodes that have rows.
        features: as for `as_arrays`.
    """
    by_episode = meta.root / "meta" / "episodes_stats.jsonl"
    if not by_episode.exists():
        whole = meta.root / "meta" / "stats.json"
        return read_statistics(whole, features) if whole.exists() else {}
    lines = read_json_lines(by_episode, {"episode_index": int, "stats": dict})
    lines = [line for line in lines if line["episode_index"] in described]
    absent = described - {line["episode_index"] for line in lines}
    if absent:
        meta.warnings.append(f"meta/episodes_stats.jsonl is left out: it has no statistics of {counted(absent)}")
        return {}
    merged = {}
    for key in dict.fromkeys(key for line in lines for key in line["stats"]):
        try:
            parts = [as_arrays({key: line["stats"].get(key)}, features) for line in lines]
            merged |= merge_statistics(parts)
        except ValueError as error:
            meta.warnings.append(
                f"meta/episodes_stats.jsonl: the statistics of {key} do not fit each other ({one_line(error)[:200].rstrip('.')}): "
                "they are left out"
            )
    return merged


def episode_rows(episodes: list[dict], meta) -> list[dict]:
    """meta/episodes as in v3.0: each episode's rows in the whole dataset, and its own table and videos."""
    rows = []
    end = 0
    for line in episodes:
        index = line["episode_index"]
        start = end
        end = start + line["length"]
        tasks = line.get("tasks") or []
        if not isinstance(tasks, list):
            tasks = [tasks]
        row = {"episode_index": index, "length": line["length"], "tasks": [str(task) for task in tasks]}
        row |= {"dataset_from_index": start, "dataset_to_index": end}
        for files in ("data", *(f"videos/{key}" for key in meta.video_keys)):
            row |= {f"{files}/chunk_index": index // meta.info.chunks_size, f"{files}/file_index": index}
        for key in meta.video_keys:
            row[f"videos/{key}/from_timestamp"] = 0.0
            row[f"videos/{key}/to_timestamp"] = line["length"] / meta.info.fps
        rows.append(row)
    return rows


def read_json_lines(path: Path, fields: dict[str, type]) -> list[dict]:
    """The objects of a JSON lines file, sorted by the first of `fields`. A line that is there twice is read once.

    Args:
        fields: what each line must have, with its type. The first is unique.

    Raises:
        UserError: the file is missing, or a line is damaged, incomplete or contradicts another one.
    """
    text = read_text(path)
    key = next(iter(fields))
    lines: dict[int, dict] = {}
    first_seen: dict[int, int] = {}  # the number of the line
    for number, content in enumerate(text.split("\n"), start=1):  # a text may hold what str.splitlines splits at
        if not content.strip():
            continue
        where = f"{path} line {number}"
        try:
            line = json.loads(content)
        except (ValueError, RecursionError) as error:  # the latter of deeply nested lists
            raise UserError(f"{where} is not valid JSON: {one_line(error)}. Copy or download the file again") from None
        for name, kind in fields.items():
            got = line.get(name) if isinstance(line, dict) else None
            if not isinstance(got, kind) or isinstance(got, bool) or (kind is int and not 0 <= got < 2**63):
                raise UserError(f"{where}: expected {name} of type {kind.__name__}, got {got!r}. Correct that line")
        index = line[key]
        if index in lines and lines[index] != line:
            raise UserError(f"{where} has {key} {index}, as line {first_seen[index]}: remove one of the two")
        first_seen.setdefault(index, number)
        lines[index] = line
    return [lines[index] for index in sorted(lines)]
