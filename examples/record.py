"""Record demonstrations of a simulated task by its scripted expert into a LeRobot v3.0 dataset, without a screen.

    python examples/record.py --env metaworld --task drawer-open-v3 --episodes 40 --output outputs/demonstrations
    python examples/record.py --env so101 --output outputs/so101

The n-th attempt starts from seed + n (where things are, and the noise), so the same command gives the same states and
actions. Only successes are kept. Noise is executed, not recorded: `action` is what the expert wants to do from where
the noise has put the arm, so the dataset shows how to recover (DART, Laskey et al. 2017).

Cameras, `observation.state`, actions and the task's words are those of the simulation in which `evaluate.py --env` tries
a policy that was trained on the dataset.
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

from sim.environments import OURS

HOLD = 10  # frames kept after the first success: the policy learns to stay there


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def demonstrate(task, max_steps, noise, seed):
    """One attempt of the expert: its frames, or none if it failed."""
    rng = np.random.default_rng(seed)
    drift = np.zeros(len(task.action_names))
    fresh = np.sqrt(1 - task.noise_smoothness**2)
    observation, _ = task.reset(seed=seed)
    frames = []
    end = max_steps
    while len(frames) < end:
        action = task.expert_action()
        frame = {f"observation.images.{camera}": picture for camera, picture in observation["pixels"].items()}
        frame["observation.state"] = observation["agent_pos"].astype(np.float32)
        frame["action"] = action
        noisy = action.astype(np.float64)
        disturbed = task.noise_scale > 0
        drift[disturbed] = task.noise_smoothness * drift[disturbed] + fresh * rng.standard_normal(disturbed.sum())
        noisy[disturbed] += noise * task.noise_scale[disturbed] * drift[disturbed]
        noisy = np.clip(noisy, task.action_space.low, task.action_space.high).astype(np.float32)
        observation, _, terminated, _, info = task.step(noisy)
        frame["next.success"] = np.array([info["is_success"]])
        frames.append(frame)
        if info["is_success"] and end == max_steps:
            end = min(len(frames) + HOLD, end)
        elif terminated and not info["is_success"] and end == max_steps:
            break
    return frames if any(frame["next.success"] for frame in frames) else []


def record(args, output, simulation):
    import av
    import datasets
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    datasets.disable_progress_bars()  # one bar, ours, and no ffmpeg lines in it
    av.logging.set_libav_level(av.logging.ERROR)
    warnings.filterwarnings("ignore", message="Constant")  # Meta-World's experts ask for moves beyond 1 and are clipped
    config = simulation.config
    task = simulation.env.envs[0]
    noise = task.noise if args.noise is None else args.noise

    shape = task.observation_space["pixels"][task.cameras[0]].shape
    image = {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}
    features = {
        **{f"observation.images.{camera}": image for camera in task.cameras},
        "observation.state": {"dtype": "float32", "shape": (len(task.state_names),), "names": task.state_names},
        "action": {"dtype": "float32", "shape": (len(task.action_names),), "names": task.action_names},
        "next.success": {"dtype": "bool", "shape": (1,), "names": None},
    }
    # h264 decodes faster than LeRobot's default AV1; g=2 as in LeRobot: no frame is more than one from a key frame
    encoder = RGBEncoderConfig(vcodec="h264", g=2, crf=args.crf, preset="slow")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))  # `output` is whole or not there
    try:
        dataset = LeRobotDataset.create(
            output.name,
            config.fps,
            features,
            root=staging / "dataset",
            robot_type=task.robot_type,
            rgb_encoder=encoder,
            video_backend="pyav",
            streaming_encoding=True,  # no PNG of each frame first
            encoder_threads=1,
            encoder_queue_maxsize=10_000,  # an episode comes at once, and LeRobot drops frames from a full queue
        )
        tries = kept = 0
        with tqdm(total=args.episodes, desc=task.task, unit="episode") as bar:
            while kept < args.episodes and tries < 2 * args.episodes + 10:
                frames = demonstrate(task, config.expert_steps, noise, args.seed + tries)
                for frame in frames:
                    dataset.add_frame({**frame, "task": task.task_description})
                if frames:
                    dataset.save_episode()
                tries, kept = tries + 1, dataset.num_episodes
                bar.set_postfix(frames=dataset.num_frames, success=f"{kept / tries:.0%}", refresh=False)
                bar.update(bool(frames))
        if kept < args.episodes:
            fail(f"the expert succeeded in {kept} of {tries} attempts at {task.task}: pass a lower --noise")
        dataset.finalize()
        os.rename(staging / "dataset", output)
    finally:
        shutil.rmtree(staging)
    total = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{output}: {kept} episodes, {dataset.num_frames} frames, {total / 1e6:.1f} MB; success {kept} of {tries}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.add_argument
    flag("--output", required=True, help="folder of the new dataset; must not exist")
    flag("--env", default="metaworld", choices=OURS, help="the simulation (default: %(default)s)")
    flag("--task", help="any task of it, such as drawer-open-v3 (default: the simulation's)")
    flag("--episodes", type=int, default=50, help="successful demonstrations to record (default: %(default)s)")
    flag("--seed", type=int, default=0, help="of the first attempt; evaluate.py's is 1000 (default: %(default)s)")
    flag(
        "--noise",
        type=float,
        help="standard deviation of the noise on executed actions, in their unit (default: the simulation's; "
        "0.2 in metaworld)",
    )
    flag("--image_size", type=int, help="in pixels, even (default: the simulation's)")
    flag(
        "--env_args",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings of the simulation, as evaluate.py takes them: look=lerobot, cameras=front,wrist",
    )
    flag("--crf", type=int, default=8, help="video quality, lower is better and bigger (default: %(default)s)")
    args = parser.parse_args()

    output = Path(args.output)
    if output.exists():
        fail(f"{output} already exists: choose another --output or remove it")
    if args.episodes < 1 or args.seed < 0 or (args.noise is not None and args.noise < 0):
        fail("expected --episodes of at least 1, --noise and --seed of at least 0")
    if args.image_size is not None and (args.image_size < 16 or args.image_size % 2):
        fail(f"--image_size is {args.image_size}, expected an even number from 16: h264 stores colour at half size")
    if importlib.util.find_spec("lerobot") is None:
        fail("lerobot is not installed: run ./setup, then .venv/bin/python examples/record.py")
    from errors import UserError
    from sim.environments import open_simulation

    overrides = list(args.env_args)
    if args.image_size is not None:
        overrides.append(f"image_size={args.image_size}")
    try:
        simulation = open_simulation(args.env, args.task, overrides)
        print(f"renderer: {os.environ.get('MUJOCO_GL', 'the system')}")
        try:
            record(args, output, simulation)
        finally:
            simulation.close()
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
