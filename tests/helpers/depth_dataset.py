"""Record a small LeRobot dataset with a depth camera beside a usual one."""

from pathlib import Path

import numpy as np

CAMERA = "observation.images.top_depth"
SIDE = 32  # pixels
CLOSE = {"depth_min": 0.2, "depth_max": 1.4, "use_log": False}  # another range than LeRobot's default


def features_of(dtype: str, shape: tuple[int, ...]) -> dict:
    axes = ["height", "width", "channels"]
    joints = {"dtype": "float32", "shape": (3,), "names": ["a", "b", "c"]}
    return {
        "observation.images.top": {"dtype": dtype, "shape": (SIDE, SIDE, 3), "names": axes},
        CAMERA: {"dtype": dtype, "shape": shape, "names": axes, "info": {"is_depth_map": True}},
        "observation.state": dict(joints),
        "action": dict(joints),
    }


def depth_of_frame(number: int, in_metres: bool) -> np.ndarray:
    """(H, W, 1) depth of the n-th frame: a slope with noise, a near and a far object, and pixels without a value (0)."""
    rng = np.random.default_rng(number)
    depth = np.linspace(200, 9000, SIDE * SIDE).reshape(SIDE, SIDE) + rng.integers(0, 90, (SIDE, SIDE))
    depth[4:9, number : number + 5] = 310
    depth[20:24, :6] = 12_500
    depth[:2] = 0
    millimetres = depth.astype(np.uint16)[..., None]
    return (millimetres / np.float32(1000)).astype(np.float32) if in_metres else millimetres


def record_depth(
    root: Path, *, video=True, in_metres=False, lengths=(6, 5), encoder: dict | None = None, channels_first=False
) -> Path:
    """A LeRobot dataset of two cameras, one of them for depth.

    Args:
        video: else pictures are stored in the table.
        in_metres: depth frames as float32 metres instead of uint16 millimetres.
        encoder: settings of LeRobot's DepthEncoderConfig.
        channels_first: describe and give depth as (1, H, W).
    """
    from lerobot.configs.video import DepthEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    shape = (1, SIDE, SIDE) if channels_first else (SIDE, SIDE, 1)
    dataset = LeRobotDataset.create(
        "test/depth",
        fps=10,
        features=features_of("video" if video else "image", shape),
        root=root,
        use_videos=video,
        depth_encoder=DepthEncoderConfig(**encoder or {}),
    )
    rng = np.random.default_rng(0)
    number = 0
    for length in lengths:
        for _ in range(length):
            dataset.add_frame(
                {
                    "observation.images.top": rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8),
                    CAMERA: depth_of_frame(number, in_metres).reshape(shape),
                    "observation.state": rng.standard_normal(3).astype(np.float32),
                    "action": rng.standard_normal(3).astype(np.float32),
                    "task": "lift",
                }
            )
            number += 1
        dataset.save_episode()
    dataset.finalize()
    return root
