"""Steps a second of lerobot-train and of ours, against the same step on one resident batch, and time to the first step.

    python bench/train.py [--dataset_id FOLDER] [--policy_args NAME=VALUE ...] [--batch_size 8] [--device cpu] [--quick] [--json]

Same dataset, policy, batch size and device; LeRobot's loader with one worker a core (two at least); ours from a frame store
that is there already; the two commands run in turns. The ceiling is our step on one batch that stays where it is: with the
loader and with that batch in turns of a few steps within one process, stall = 1 - with / without, the median over the turns.
"Waiting" is the share of the time that our loop stood still for its next batch.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "src")  # this file is called train.py as well
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"
ACT = "chunk_size=20 n_action_steps=20 dim_model=256 n_heads=4 dim_feedforward=1024 n_encoder_layers=2 pretrained_backbone_weights=none"
WARM = 5  # steps left out at the start


def times_of(command: list[str], pattern: str) -> list[float]:
    """Seconds after launch at which a process printed each line that matches `pattern`."""
    begun, times, lines = time.perf_counter(), [], []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if re.search(pattern, line):
                times.append(time.perf_counter() - begun)
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} failed:\n{''.join(lines[-20:])}")
    return times


def speed(times: list[float]) -> float:
    return (len(times) - 1 - WARM) / (times[-1] - times[WARM])


def lerobot(args, steps: int) -> list[float]:
    """Step times of lerobot-train, logging each step as ours does."""
    output = tempfile.mkdtemp(prefix="armature-bench-")
    shutil.rmtree(output)  # lerobot-train wants to make it
    command = [
        str(Path(sys.executable).with_name("lerobot-train")), "--dataset.repo_id=bench/data", f"--dataset.root={args.dataset_id}",
        f"--policy.type={args.policy}", "--policy.push_to_hub=false", f"--policy.device={args.device}", f"--batch_size={args.batch_size}",
        f"--steps={steps}", "--log_freq=1", "--save_checkpoint=false", f"--num_workers={max(2, len(os.sched_getaffinity(0)))}",
        f"--output_dir={output}", *(f"--policy.{pair.replace('=none', '=null')}" for pair in args.policy_args),
    ]  # fmt: skip
    try:
        return times_of(command, r"step:\d+")
    finally:
        shutil.rmtree(output, ignore_errors=True)


def settings(args, steps: int, output: str) -> dict:
    return {
        "dataset_id": args.dataset_id, "policy": args.policy, "policy_args": args.policy_args, "batch_size": args.batch_size,
        "device": args.device, "steps": steps, "log_freq": 1, "save_freq": 0, "output_dir": output, "cache_dir": args.cache_dir,
        "frame_cache": "on",
    }  # fmt: skip


def ours(args, steps: int) -> list[float]:
    """Step times of our command line."""
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as output:
        config = Path(output) / "config.json"
        config.write_text(json.dumps(settings(args, steps, f"{output}/run")))
        return times_of([sys.executable, str(ROOT / "src" / "train.py"), "--config_path", str(config)], r"^step \d+/")


def in_turns(args, turns: int, steps: int) -> tuple[list[float], list[float], float]:
    """Steps a second of each turn with the loader and with a resident batch, and the share of waiting in the former."""
    import torch

    from train import Run, settle

    def turn(loads: bool) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            run.train_step(run.watch.wait(run.loader) if loads else kept)
            run.loss_sum.item()  # waits for the device, as lerobot-train does at every step
        return time.perf_counter() - begun

    with tempfile.TemporaryDirectory(prefix="armature-bench-") as output, contextlib.ExitStack() as held:
        run = Run(*settle({**settings(args, 10**6, output), "quiet": True}, held), held)
        batch = run.watch.wait(run.loader)
        kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        turn(True)  # to warm up
        run.watch.waited = 0.0
        took = [(turn(True), turn(False)) for _ in range(turns)]
        waiting = run.watch.waited / sum(mine for mine, _ in took)
    return [steps / mine for mine, _ in took], [steps / top for _, top in took], waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_id", default=str(SHIPPED), help="a dataset folder")
    parser.add_argument("--policy", default="act")
    parser.add_argument("--policy_args", nargs="+", default=ACT.split(), metavar="NAME=VALUE")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", action="store_true", help="a last line with the figures")
    args = parser.parse_args()
    args.cache_dir = tempfile.mkdtemp(prefix="armature-bench-")
    try:
        ours(args, 1)  # builds the store
        turns, steps = (1, 20) if args.quick else (3, 40)
        pairs = [(lerobot(args, steps), ours(args, steps)) for _ in range(turns)]  # in turns: these machines drift
        mine, top, waiting = in_turns(args, *((4, 5) if args.quick else (16, 8)))
    finally:
        shutil.rmtree(args.cache_dir)
    result = {
        "lerobot_steps_per_s": statistics.median(speed(theirs) for theirs, _ in pairs),
        "steps_per_s": statistics.median(speed(own) for _, own in pairs),
        "ceiling_steps_per_s": statistics.median(top),
        "stall": statistics.median(1 - a / b for a, b in zip(mine, top, strict=True)),
        "waiting": waiting,
        "first_step_s": statistics.median(own[0] for _, own in pairs),
        "lerobot_first_step_s": statistics.median(theirs[0] for theirs, _ in pairs),
    }
    cores = len(os.sched_getaffinity(0))
    print(f"{args.policy} on {Path(args.dataset_id).name}, batch {args.batch_size}, {args.device}, {cores} cores")
    print(f"{'':<24}{'steps/s':>10}{'launch to first step, s':>26}")
    print(f"{'lerobot-train':<24}{result['lerobot_steps_per_s']:>10.2f}{result['lerobot_first_step_s']:>26.1f}")
    print(f"{'ours':<24}{result['steps_per_s']:>10.2f}{result['first_step_s']:>26.1f}")
    print(f"{'one resident batch':<24}{result['ceiling_steps_per_s']:>10.2f}")
    print(f"stall {100 * result['stall']:.1f} %, waiting {100 * waiting:.2f} %")
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
