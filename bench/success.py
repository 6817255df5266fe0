"""Success in simulation over minutes of training: our configuration, then lerobot-train with as many minutes.

    python bench/success.py [--config configs/drawer_open.json] [--task drawer-open-v3] [--num_episodes 50] [--picture FILE] [--json]

Same machine, demonstrations, policy settings, learning rate and batch; lerobot-train at the recorded size with its own image
transforms where ours augments (it has no --image_size), stopped when it has had the minutes that ours took from launch to end.
Then each checkpoint runs the same episodes, from the same seeds, through `evaluate.py`. Minutes are from launch to the checkpoint.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "src")
BIN = Path(sys.executable).parent


def train_ours(config: Path, output: Path) -> tuple[float, list[tuple[float, Path]]]:
    """(minutes in all, [(minutes, checkpoint)])."""
    from checkpoints.folder import find_checkpoints

    begun = time.time()
    command = [sys.executable, "src/train.py", "--config_path", str(config), "--output_dir", str(output)]
    subprocess.run(command, cwd=ROOT, check=True)
    minutes = (time.time() - begun) / 60
    return minutes, [((path.stat().st_mtime - begun) / 60, path) for path in find_checkpoints(output)]


def train_lerobot(settings: dict, output: Path, minutes: float, save_freq: int) -> list[tuple[float, Path]]:
    """lerobot-train for `minutes`: [(minutes, policy folder)] of the checkpoints it has written by then."""
    spelt = {"True": "true", "False": "false", "None": "null"}
    policy = [f"--policy.{name}={spelt.get(str(value), value)}" for name, value in settings["policy_args"].items()]
    command = [
        str(BIN / "lerobot-train"), "--dataset.repo_id=bench/data", f"--dataset.root={ROOT / settings['dataset_id']}",
        f"--policy.type={settings['policy']}", "--policy.push_to_hub=false", "--policy.device=cpu", *policy,
        f"--policy.optimizer_lr={settings['lr']}", f"--batch_size={settings['batch_size']}", "--steps=1000000",
        f"--num_workers={max(2, len(os.sched_getaffinity(0)))}", f"--output_dir={output}", "--log_freq=20", f"--save_freq={save_freq}",
        f"--dataset.image_transforms.enable={str(bool(settings.get('augment'))).lower()}",
    ]  # fmt: skip
    begun = time.time()
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, start_new_session=True
    ) as process:
        try:
            process.wait(60 * minutes)
            sys.exit(f"error: lerobot-train ended by itself with status {process.returncode}")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    folders = sorted((output / "checkpoints").glob("[0-9]*/pretrained_model"))
    done = [folder for folder in folders if (folder.parent / "training_state" / "optimizer_state.safetensors").exists()]
    return [((folder.stat().st_mtime - begun) / 60, folder) for folder in done]


def success(policy: Path, args, work: Path) -> dict:
    command = [
        sys.executable,
        "src/evaluate.py",
        str(policy),
        "--env",
        "metaworld",
        "--task",
        args.task,
        "--device",
        "cpu",
    ]
    command += ["--num_episodes", str(args.num_episodes), "--num_videos", "0", "--output_dir", str(work)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((work / f"metaworld_{args.task}" / "numbers.json").read_text())


def picture(path: str, curves: dict, task: str) -> None:
    from reports.figures import COLOURS, new_figure

    figure = new_figure(7, 3.6)
    axes = figure.add_subplot()
    for (name, points), colour in zip(curves.items(), COLOURS, strict=False):
        minutes = [point["minutes"] for point in points]
        rates = [point["success_rate"] for point in points]
        below = [max(0, point["success_rate"] - point["success_low"]) for point in points]
        above = [max(0, point["success_high"] - point["success_rate"]) for point in points]
        axes.errorbar(minutes, rates, (below, above), color=colour, marker="o", markersize=4, capsize=3, label=name)
    axes.set(xlabel="minutes of training, launch included", ylabel="success rate", title=task, ylim=(-0.03, 1.03))
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "drawer_open.json"))
    parser.add_argument("--task", default="drawer-open-v3")
    parser.add_argument("--num_episodes", type=int, default=50)
    parser.add_argument("--lerobot_save_freq", type=int, default=50)
    parser.add_argument("--output_dir", help="keep the runs here")
    parser.add_argument("--picture", help="write a picture of success over minutes here")
    parser.add_argument("--json", action="store_true", help="a last line with the figures")
    args = parser.parse_args()
    work = Path(args.output_dir or tempfile.mkdtemp(prefix="armature-bench-"))
    settings = json.loads(Path(args.config).read_text())
    minutes, ours = train_ours(Path(args.config), work / "ours")
    theirs = train_lerobot(settings, work / "lerobot", minutes, args.lerobot_save_freq)
    step = max(1, len(theirs) // 4)
    theirs = [pair for i, pair in enumerate(reversed(theirs)) if i % step == 0][:4][::-1]  # spread over its minutes
    curves = {"Armature": ours, "lerobot-train": theirs}
    for name, checkpoints in curves.items():
        curves[name] = []
        for at, path in checkpoints:
            result = success(path, args, work / "evaluation")
            steps = int(re.findall(r"\d+", str(path.relative_to(work)))[-1])
            keep = ("successes", "num_episodes", "success_rate", "success_low", "success_high")
            curves[name].append({"minutes": round(at, 2), "steps": steps, **{key: result[key] for key in keep}})
    print(f"{args.task}, {len(os.sched_getaffinity(0))} cores, {args.num_episodes} episodes each")
    print(f"{'':<16}{'minutes':>8}{'steps':>8}{'success':>10}   95 % interval")
    for name, points in curves.items():
        for p in points:
            interval = f"{p['success_low']:.0%} to {p['success_high']:.0%}"
            print(
                f"{name:<16}{p['minutes']:>8.1f}{p['steps']:>8}{p['successes']:>5} / {p['num_episodes']}   {interval}"
            )
    if args.picture:
        picture(args.picture, curves, args.task)
    if args.json:
        print(json.dumps(curves))


if __name__ == "__main__":
    main()
