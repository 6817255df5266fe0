"""Write small datasets in LeRobot's formats v2.1 and v2.0, which LeRobot no longer writes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helpers.videos import HEIGHT, WIDTH, write_video

FPS = 10
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 1234\n"


def state_of(episode: int, frame: int) -> list[float]:
    """The state and action of a frame: its episode, its number, and a number that varies."""
    return [float(episode), float(frame), float((frame * 7 + episode) % 5)]


def numbers_of(episode: int, length: int) -> list[int]:
    """What the pictures of an episode show."""
    return [episode * 16 + frame for frame in range(length)]


def write_v2(
    root: Path,
    lengths: dict[int, int],
    *,
    version: str = "v2.1",
    cameras: tuple[str, ...] = (),
    by_episode: bool = True,
    chunks_size: int = 1000,
    **info,
) -> Path:
    """A dataset of two tasks, lift and push.

    Args:
        root: its folder.
        lengths: {episode: number of frames}, at most 16.
        version: v2.1 or v2.0.
        cameras: names of video features.
        by_episode: whether statistics are by episode or in one stats.json.
        chunks_size: episodes in a folder.
        info: more fields of info.json, or others than usual.
    """
    vector = {"dtype": "float32", "shape": [3], "names": ["x", "y", "z"]}
    number = {"dtype": "int64", "shape": [1], "names": None}
    picture = {"dtype": "video", "shape": [HEIGHT, WIDTH, 3], "names": ["height", "width", "channel"]}
    features = {camera: dict(picture) for camera in cameras}
    features |= {"observation.state": dict(vector), "action": dict(vector)}
    features |= {"timestamp": {**number, "dtype": "float32"}}
    features |= {name: dict(number) for name in ("frame_index", "episode_index", "index", "task_index")}
    info = {
        "codebase_version": version,
        "robot_type": "made",
        "fps": FPS,
        "features": features,
        "total_episodes": len(lengths),
        "total_frames": sum(lengths.values()),
        "total_tasks": 2,
        "total_chunks": 1,
        "total_videos": len(lengths) * len(cameras),
        "chunks_size": chunks_size,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
    } | info
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))

    stats = {}
    index = 0
    for episode, length in lengths.items():
        states = [state_of(episode, frame) for frame in range(length)]
        table = {
            "observation.state": pa.array(states, pa.list_(pa.float32())),
            "action": pa.array(states, pa.list_(pa.float32())),
            "timestamp": pa.array([frame / FPS for frame in range(length)], pa.float32()),
            "frame_index": list(range(length)),
            "episode_index": [episode] * length,
            "index": list(range(index, index + length)),
            "task_index": [episode % 2] * length,
        }
        index += length
        path = root / DATA_PATH.format(episode_chunk=episode // chunks_size, episode_index=episode)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(table), path)
        stats[episode] = (
            {key: stats_of(np.array(states)) for key in ("observation.state", "action")} if length else None
        )
        for camera in cameras:
            video = root / VIDEO_PATH.format(
                episode_chunk=episode // chunks_size, episode_index=episode, video_key=camera
            )
            video.parent.mkdir(parents=True, exist_ok=True)
            write_video(video, numbers_of(episode, length), [frame / FPS for frame in range(length)])

    episodes = [
        {"episode_index": episode, "tasks": [("lift", "push")[episode % 2]], "length": length}
        for episode, length in lengths.items()
    ]
    write_lines(root / "meta" / "episodes.jsonl", episodes)
    write_lines(root / "meta" / "tasks.jsonl", [{"task_index": 0, "task": "lift"}, {"task_index": 1, "task": "push"}])
    if by_episode:
        lines = [{"episode_index": episode, "stats": value} for episode, value in stats.items() if value]
        write_lines(root / "meta" / "episodes_stats.jsonl", lines)
    else:
        everything = np.array([state_of(e, frame) for e, length in lengths.items() for frame in range(length)])
        whole = {key: stats_of(everything) for key in ("observation.state", "action")}
        (root / "meta" / "stats.json").write_text(json.dumps(whole))
    return root


def stats_of(values: np.ndarray) -> dict:
    """LeRobot's statistics of (N, 3) values."""
    functions = {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}
    return {name: function(values, axis=0).tolist() for name, function in functions.items()} | {"count": [len(values)]}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
