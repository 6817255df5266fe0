"""Record demonstrations of a Meta-World task by its scripted expert into a LeRobot v3.0 dataset, without a screen.

    python examples/record_metaworld.py --task drawer-open-v3 --episodes 40 --output outputs/drawer_open

The n-th attempt starts from seed + n (object and goal positions, noise), so the same command gives the same states and
actions. Only successes are kept. Noise is executed, not recorded: `action` is what the expert wants to do from where
the noise has put the arm, so the dataset shows how to recover (DART, Laskey et al. 2017).

Camera, image orientation, `observation.state` (gripper x, y, z, opening), actions in [-1, 1] and the task's words are
those of LeRobot's environment (lerobot/envs/metaworld.py), so a policy trained on the dataset can be run in it.
"""

import argparse
import difflib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from tqdm import tqdm

HOLD = 10  # frames kept after the first success: the policy learns to stay there
PACKAGES = {"lerobot": "'lerobot[dataset]==0.6.1'", "metaworld": "metaworld==3.1.1 mujoco==3.3.0"}


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def check_name(name, names, what):
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
        fail(f"unknown {what} {name!r}, did you mean {nearest!r}? Known: {', '.join(sorted(names))}")


def pick_renderer():
    """Set MUJOCO_GL, which has to happen before mujoco is imported: EGL where it works, else OSMesa."""
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return os.environ.get("MUJOCO_GL", "the system's own")
    probe = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    for backend in ("egl", "osmesa"):  # tried in another process: a failed attempt cannot be undone in this one
        os.environ["MUJOCO_GL"] = backend
        if subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0:
            return backend
    fail("no library for rendering without a screen: apt-get install -y libegl1 libgl1 libosmesa6")


def make_env(task, camera, image_size, look):
    """The task as LeRobot sets it up. Make one per process: under EGL, closing one turns the others' images black."""
    import metaworld
    import mujoco

    benchmark = metaworld.MT1(task, seed=42)
    make = benchmark.train_classes[task]
    env = make(render_mode="rgb_array", camera_name=camera, width=image_size, height=image_size)
    check_name(camera, [env.model.camera(i).name for i in range(env.model.ncam)], "camera")
    env.set_task(benchmark.train_tasks[0])
    env._freeze_rand_vec, env.seeded_rand_vec = False, True  # new positions at each reset, drawn from the seed
    if camera == "corner2":
        env.model.cam_pos[2] = [0.75, 0.075, 0.7]  # LeRobot's viewpoint, closer than Meta-World's
    if look == "plain":  # these before the first render, which allocates the buffers; the flags need it done
        env.model.vis.quality.offsamples = env.model.vis.quality.shadowsize = 0
        env.model.mat_reflectance[:] = 0
        env.render()
        flags = env.mujoco_renderer.viewer.scn.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return env


def render(env, camera):
    image = env.render()
    if image.mean() < 1:
        fail("the renderer gives black images: try again with MUJOCO_GL=osmesa")
    return np.flip(image, (0, 1)).copy() if camera == "corner2" else image.copy()  # corner2 hangs upside down


def demonstrate(env, expert, camera, noise, seed):
    """One attempt of the expert: its frames, or none if it failed."""
    import mujoco

    rng = np.random.default_rng(seed)
    env.seed(seed)
    env.reset()
    mujoco.mj_forward(env.model, env.data)  # reset() moves the object but still shows it where it was before
    observation = env._get_obs()

    frames, end = [], env.max_path_length
    while len(frames) < end:
        action = np.clip(expert.get_action(observation), -1, 1).astype(np.float32)
        frame = {
            "observation.state": observation[:4].astype(np.float32),
            f"observation.images.{camera}": render(env, camera),
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

    datasets.disable_progress_bars()  # one bar, ours, and no ffmpeg lines in it
    av.logging.set_libav_level(av.logging.ERROR)
    warnings.filterwarnings("ignore", message="Constant")  # experts ask for moves beyond 1 and are clipped
    check_name(args.task, list(TASK_POLICY_MAPPING), "task")
    env = make_env(args.task, args.camera, args.image_size, args.look)

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
    print(f"renderer: {pick_renderer()}")
    record(args, output)


if __name__ == "__main__":
    main()
