"""Datasets to test on: the shipped one, real data where it is at hand, and small ones made here."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"
REAL = Path(os.environ.get("ARMATURE_REAL_DATA", ROOT.parent / "shared" / "datasets"))
SMALL = {  # the smallest settings of each policy that still have all its parts
    "act": "chunk_size=4 dim_model=32 dim_feedforward=32 n_heads=2 n_encoder_layers=1 n_vae_encoder_layers=1 "
    "latent_dim=4 pretrained_backbone_weights=none",
    "flow": "size=tiny chunk_size=6 n_action_steps=3 num_keypoints=4",
    "vqbet": "n_action_pred_token=2 action_chunk_size=2 gpt_n_layer=1 gpt_n_head=2 gpt_hidden_dim=16 gpt_output_dim=16 gpt_input_dim=16 "
    "n_obs_steps=2 vqvae_n_embed=4 vqvae_embedding_dim=8 vqvae_enc_hidden_dim=8 spatial_softmax_num_keypoints=4 crop_shape=[40,56] "
    "n_vqvae_training_steps=7 pretrained_backbone_weights=none",
    "diffusion": "horizon=4 n_action_steps=2 down_dims=[8,16] n_groups=4 spatial_softmax_num_keypoints=4 "
    "diffusion_step_embed_dim=8 num_train_timesteps=4 drop_n_last_frames=1 pretrained_backbone_weights=none",
}
JOINTS = ["shoulder", "elbow", "gripper"]


def pytest_configure(config):
    """A warning from any module of ours is an error; those of libraries stay warnings."""
    ours = "|".join(path.stem for path in sorted((ROOT / "src").iterdir()) if not path.name.startswith("_"))
    config.addinivalue_line("filterwarnings", rf"error:::({ours})(\..*)?$")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Decoded frames of tests stay out of the user's cache."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["XDG_CACHE_HOME"]) / "armature" / "frames"


@pytest.fixture(scope="session")
def cr5():
    if not (REAL / "cr5_banana").is_dir():
        pytest.skip(f"no real data: {REAL}/cr5_banana is missing (ARMATURE_REAL_DATA names its folder)")
    return REAL / "cr5_banana"


@contextlib.contextmanager
def usual_scheduling():
    """Undo what SVT-AV1's encoder does to its caller as root: a real-time thread, whose peers' spinning starves every other."""
    there = hasattr(os, "sched_setscheduler")  # not on macOS
    before = (os.sched_getscheduler(0), os.sched_getparam(0)) if there else ()
    yield
    if there:
        os.sched_setscheduler(0, *before)


def record(root: Path, *, cameras=("top",), video=True, lengths=(13, 9, 11), state_dims=3, files_mb=None) -> Path:
    """A LeRobot dataset of moving coloured squares, two tasks, and a gripper that never moves."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    height, width = 64, 96
    picture = {
        "dtype": "video" if video else "image",
        "shape": (height, width, 3),
        "names": ["height", "width", "channels"],
    }
    features = {f"observation.images.{camera}": picture for camera in cameras}
    features["observation.state"] = {
        "dtype": "float32",
        "shape": (state_dims,),
        "names": [f"joint_{i}" for i in range(state_dims)],
    }
    features["action"] = {"dtype": "float32", "shape": (3,), "names": JOINTS}
    dataset = LeRobotDataset.create(
        "test/made", fps=10, features=features, root=root, use_videos=video, robot_type="made"
    )
    if files_mb is not None:
        dataset.meta.update_chunk_settings(data_files_size_in_mb=files_mb, video_files_size_in_mb=files_mb)
    rng = np.random.default_rng(0)
    for episode, length in enumerate(lengths):
        for frame in range(length):
            values = {"task": ("lift", "push")[episode % 2]}
            for i, camera in enumerate(cameras):
                pixels = np.full((height, width, 3), 40 * i + 30 * episode, np.uint8)
                pixels[10 : 10 + 20, 3 * frame : 3 * frame + 20] = rng.integers(0, 255, 3)
                values[f"observation.images.{camera}"] = pixels
            state = rng.standard_normal(state_dims).astype(np.float32)
            state[-1] = 0.3
            values["observation.state"] = state
            values["action"] = np.array([*rng.standard_normal(2), 0.7], np.float32)
            dataset.add_frame(values)
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """name -> folder of a dataset made once a session."""
    kinds = {
        "video": {},
        "two_cameras": {"cameras": ("top", "wrist")},
        "many_files": {"cameras": ("top", "wrist"), "files_mb": 0.001},
        "images": {"video": False},
        "front": {"cameras": ("front",)},
        "no_camera": {"cameras": ()},
        "wide": {"state_dims": 5, "lengths": (5, 5)},
    }
    folders = {}

    def make(name: str) -> Path:
        if name not in folders:
            with usual_scheduling():
                folders[name] = record(tmp_path_factory.mktemp("made") / name, **kinds[name])
        return folders[name]

    return make


@pytest.fixture
def copy_of(tmp_path, made):
    """A copy of a made dataset to break."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(made(name), tmp_path / name))

    return copy


@pytest.fixture(scope="session")
def renderer():
    from errors import UserError
    from sim.environments import pick_renderer

    try:
        return pick_renderer()
    except UserError as error:
        pytest.skip(str(error))


def small(policy: str = "act", **settings) -> dict:
    """Settings of a run that takes seconds."""
    return {"policy": policy, "policy_args": SMALL[policy].split(), "device": "cpu", "batch_size": 4, "steps": 4,
            "log_freq": 2, "save_freq": 2, "lr": 1e-3, "quiet": True, **settings}  # fmt: skip
