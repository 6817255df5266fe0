"""Record demonstrations of a Meta-World task by its scripted expert into a LeRobot v3.0 dataset, without a screen.

    python examples/record_metaworld.py --task drawer-open-v3 --episodes 40 --output outputs/demonstrations

The n-th attempt starts from seed + n (object and goal positions, noise), so the same command gives the same states and
actions. Only successes are kept. Noise is executed, not recorded: `action` is what the expert wants to do from where
the noise has put the arm, so the dataset shows how to recover (DART, Laskey et al. 2017).

Camera, image orientation, `observation.state` (gripper x, y, z, opening), actions in [-1, 1] and the task's words are
those of LeRobot's environment (lerobot/envs/metaworld.py), so a policy trained on the dataset can be run in it.
"""

import argparse
import importlib.util
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

HOLD = 10  # frames kept after the first success: the policy learns to stay there
PACKAGES = {"lerobot": "'lerobot[dataset]==0.6.1'", "metaworld": "metaworld==3.1.1 mujoco==3.3.0"}


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def demonstrate(env, expert, camera, noise, seed):
    """One attempt of the expert: its frames, or none if it failed."""
    from sim.metaworld import render_upright, start_episode

    rng, observation = np.random.default_rng(seed), start_episode(env, seed)
    frames, end = [], env.max_path_length
    while len(frames) < end:
        action = np.clip(expert.get_action(observation), -1, 1).astype(np.float32)
        frame = {
            "observation.state": observation[:4].astype(np.float32),
            f"observation.images.{camera}": render_upright(env, camera),
            "action": action,
        }
        noisy = action + np.append(noise * rng.standard_normal(3), 0)  # not the gripper: it would drop things
        observation, _, _, _, info = env.step(np.clip(noisy, -1, 1).astype(np.float32))
        frames.append({**frame, "next.success": np.array([bool(info["success"])])})
        if info["success"] and end == env.max_path_length:
            end = min(len(frames) + HOLD, end)
    return frames if any(frame["next.success"] for frame in frames) else []


def record(args, output):
    import av
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS, TASK_POLICY_MAPPING

    from sim.metaworld import make_task

    datasets.disable_progress_bars()  # one bar, ours, and no ffmpeg lines in it
    av.logging.set_libav_level(av.logging.ERROR)
    warnings.filterwarnings("ignore", message="Constant")  # experts ask for moves beyond 1 and are clipped
    env = make_task(args.task, args.camera, args.image_size, args.look)

    image = {"shape": (args.image_size, args.image_size, 3), "names": ["height", "width", "channels"]}
    features = {
        f"observation.images.{args.camera}": {"dtype": "video", **image},
        "observation.state": {"dtype": "float32", "shape": (4,), "names": ["x", "y", "z", "gripper"]},
        "action": {"dtype": "float32", "shape": (4,), "names": ["dx", "dy", "dz", "gripper"]},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    # h264 decodes faster than LeRobot's default AV1; g=2 as in LeRobot: no frame is more than one from a key frame
    encoder = RGBEncoderConfig(vcodec="h264", g=2, crf=args.crf, preset="slow")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))  # `output` is whole or not there
    try:
        dataset = LeRobotDataset.create(
            output.name,
            args.fps,
            features,
            root=staging / "dataset",
            robot_type="sawyer",
            rgb_encoder=encoder,
            video_backend="pyav",
        )
        tries = kept = 0
        with tqdm(total=args.episodes, desc=args.task, unit="episode") as bar:
            while kept < args.episodes and tries < 2 * args.episodes + 10:
                frames = demonstrate(env, TASK_POLICY_MAPPING[args.task](), args.camera, args.noise, args.seed + tries)
                for frame in frames:
                    dataset.add_frame({**frame, "task": TASK_DESCRIPTIONS[args.task]})
                if frames:
                    dataset.save_episode()
                tries, kept = tries + 1, dataset.num_episodes
                bar.set_postfix(frames=dataset.num_frames, success=f"{kept / tries:.0%}", refresh=False)
                bar.update(bool(frames))
        if kept < args.episodes:
            fail(f"the expert succeeded in {kept} of {tries} attempts at {args.task}: lower --noise {args.noise}")
        dataset.finalize()
        os.rename(staging / "dataset", output)
    finally:
        shutil.rmtree(staging)
        env.close()
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {kept} episodes, {dataset.num_frames} frames, {size / 1e6:.1f} MB; success {kept} of {tries}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--output", required=True, help="folder of the new dataset; must not exist")
    flag("--task", default="drawer-open-v3", help="any Meta-World task (default: %(default)s)")
    flag("--episodes", type=int, default=50, help="successful demonstrations to record (default: %(default)s)")
    flag("--seed", type=int, default=0, help="of the first attempt; lerobot-eval's is 1000 (default: %(default)s)")
    flag("--noise", type=float, default=0.2, help="standard deviation, on executed moves (default: %(default)s)")
    flag("--camera", default="corner2", help="LeRobot's environment shows corner2 (default: %(default)s)")
    flag("--image_size", type=int, default=128, help="in pixels, even (default: %(default)s)")
    flag(
        "--look",
        choices=["plain", "lerobot"],
        default="plain",
        help="lerobot: as lerobot-eval renders; plain: no "
        "shadows, reflections or antialiasing, 10x faster without a GPU (default: %(default)s)",
    )
    # an action is 5 physics steps of 2.5 ms: 80 a second, which is also what LeRobot's environment declares
    flag("--fps", type=int, default=80, help="actions per second (default: %(default)s)")
    flag("--crf", type=int, default=23, help="video quality, lower is better and bigger (default: %(default)s)")
    args = parser.parse_args()

    output = Path(args.output)
    if output.exists():
        fail(f"{output} already exists: choose another --output or remove it")
    if min(args.episodes, args.fps) < 1 or min(args.noise, args.seed) < 0:
        fail("expected --episodes and --fps of at least 1, --noise and --seed of at least 0")
    if args.image_size < 16 or args.image_size % 2:
        fail(f"--image_size is {args.image_size}, expected an even number from 16: h264 stores colour at half size")
    for package, pinned in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            fail(f"{package} is not installed: pip install {pinned}")
    from errors import UserError
    from sim.metaworld import pick_renderer

    try:
        print(f"renderer: {pick_renderer()}")
        record(args, output)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
