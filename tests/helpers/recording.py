"""Record small LeRobot datasets."""

import contextlib
import os
from pathlib import Path

import numpy as np

ACTION_NAMES = ["shoulder", "elbow", "gripper"]
HEIGHT = 64
WIDTH = 96
SQUARE = 20  # pixels, the side of the square that moves through a picture


@contextlib.contextmanager
def usual_scheduling():
    """Undo what SVT-AV1's encoder does to its caller as root: it makes the thread real-time, which starves every other."""
    if not hasattr(os, "sched_setscheduler"):  # macOS
        yield
        return
    policy = os.sched_getscheduler(0)
    priority = os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, policy, priority)


def features_of(cameras: tuple[str, ...], video: bool, state_dims: int) -> dict:
    """The features of a recorded dataset, as LeRobot's info.json describes them."""
    features = {}
    for camera in cameras:
        features[f"observation.images.{camera}"] = {
            "dtype": "video" if video else "image",
            "shape": (HEIGHT, WIDTH, 3),
            "names": ["height", "width", "channels"],
        }
    features["observation.state"] = {
        "dtype": "float32",
        "shape": (state_dims,),
        "names": [f"joint_{i}" for i in range(state_dims)],
    }
    features["action"] = {"dtype": "float32", "shape": (len(ACTION_NAMES),), "names": ACTION_NAMES}
    return features


def record(root: Path, *, cameras=("top",), video=True, lengths=(13, 9, 11), state_dims=3, files_mb=None) -> Path:
    """A LeRobot dataset of moving coloured squares, two tasks, and a gripper that never moves."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset.create(
        "test/made",
        fps=10,
        features=features_of(cameras, video, state_dims),
        root=root,
        use_videos=video,
        robot_type="made",
    )
    if files_mb is not None:
        dataset.meta.update_chunk_settings(data_files_size_in_mb=files_mb, video_files_size_in_mb=files_mb)
    rng = np.random.default_rng(0)
    for episode, length in enumerate(lengths):
        for frame in range(length):
            values = {"task": ("lift", "push")[episode % 2]}
            for i, camera in enumerate(cameras):
                pixels = np.full((HEIGHT, WIDTH, 3), 40 * i + 30 * episode, np.uint8)
                left = 3 * frame
                pixels[10 : 10 + SQUARE, left : left + SQUARE] = rng.integers(0, 255, 3)
                values[f"observation.images.{camera}"] = pixels
            state = rng.standard_normal(state_dims).astype(np.float32)
            state[-1] = 0.3
            values["observation.state"] = state
            values["action"] = np.array([*rng.standard_normal(2), 0.7], np.float32)
            dataset.add_frame(values)
        dataset.save_episode()
    dataset.finalize()
    return root
