"""Steps a second of lerobot-train and of ours, against the same step on one resident batch, and time to the first step.

    python bench/train.py [--dataset_id FOLDER] [--policy_args NAME=VALUE ...] [--batch_size 8] [--device cpu]
                          [--variants fp32 bf16 bf16+compile] [--quick] [--json]

Same dataset, policy, batch size and device; LeRobot's loader with one worker a core (two at least); ours from a frame store
that is there already; the two commands run in turns. The ceiling is our step on one batch that stays where it is: with the
loader and with that batch in turns of a few steps within one process, stall = 1 - with / without, the median over the turns.
"Waiting" is the share of the time that our loop stood still for its next batch. On a GPU each variant's peak memory and the GPU's
mean utilisation, as nvidia-smi has it, are told as well.
"""

import argparse
import contextlib
import gc
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


def settings(args, variant: str, steps: int, output: str) -> dict:
    parts = variant.split("+")
    return {
        "precision": parts[0], "compile": "compile" in parts,
        "dataset_id": args.dataset_id, "policy": args.policy, "policy_args": args.policy_args, "batch_size": args.batch_size,
        "device": args.device, "steps": steps, "log_freq": 1, "save_freq": 0, "output_dir": output, "cache_dir": args.cache_dir,
        "frame_cache": "on",
    }  # fmt: skip


def ours(args, variant: str, steps: int) -> list[float]:
    """Step times of our command line."""
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as output:
        config = Path(output) / "config.json"
        config.write_text(json.dumps(settings(args, variant, steps, f"{output}/run")))
        return times_of([sys.executable, str(ROOT / "src" / "train.py"), "--config_path", str(config)], r"^step \d+/")


def in_turns(args, variant: str, turns: int, steps: int) -> dict:
    """Stall, waiting and the ceiling of a variant, with the loader and with a resident batch in turns; memory and use of a GPU."""
    import torch

    from train import Run
    from training.plan import settle

    def turn(loads: bool) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            run.train_step(run.watch.wait(run.loader) if loads else kept)
            run.loss_sum.item()  # waits for the device, as lerobot-train does at every step
        return time.perf_counter() - begun

    with tempfile.TemporaryDirectory(prefix="armature-bench-") as output, contextlib.ExitStack() as held:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()  # each variant's own
        run = Run(*settle({**settings(args, variant, 10**6, output), "quiet": True}, held), held)
        batch = run.watch.wait(run.loader)
        kept = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        if run.device.type == "cuda":  # as the loader's are
            kept |= {
                key: value.pin_memory()
                for key, value in kept.items()
                if key in run.learner.meta.camera_keys and not value.is_cuda
            }
        turn(True)  # to warm up
        turn(False)
        run.watch.waited = 0.0
        with watched(run.device) as use:
            took = [(turn(True), turn(False)) for _ in range(turns)]
        waiting = run.watch.waited / sum(mine for mine, _ in took)
        on_gpu = run.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(run.device) / 2**30 if on_gpu else None
    return {
        "ceiling_steps_per_s": statistics.median(steps / top for _, top in took),
        "stall": statistics.median(1 - top / mine for mine, top in took),
        "waiting": waiting,
        "peak_memory_gib": memory,
        "gpu_use": statistics.mean(use) / 100 if use else None,
    }


@contextlib.contextmanager
def watched(device):
    """Within this, nvidia-smi's utilisation of the GPU in per cent is kept, twice a second; nothing on other devices."""
    use: list[int] = []
    if device.type != "cuda":
        yield use
        return
    import torch

    here = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # of several, this one
    command = ["nvidia-smi", "-i", here, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield use
        process.terminate()
        use.extend(int(line) for line in process.stdout.read().split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_id", default=str(SHIPPED), help="a dataset folder")
    parser.add_argument("--policy", default="act")
    parser.add_argument("--policy_args", nargs="+", default=ACT.split(), metavar="NAME=VALUE")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", nargs="+", default=["fp32"], help="precision, with +compile where it is compiled")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--json", action="store_true", help="a last line with the figures")
    args = parser.parse_args()
    args.cache_dir = tempfile.mkdtemp(prefix="armature-bench-")
    try:
        ours(args, "fp32", 1)  # builds the store
        turns, steps = (1, 20) if args.quick else (3, 40)
        pairs = [
            (lerobot(args, steps), ours(args, args.variants[0], steps)) for _ in range(turns)
        ]  # these machines drift
        result = {
            "lerobot_steps_per_s": statistics.median(speed(theirs) for theirs, _ in pairs),
            "lerobot_first_step_s": statistics.median(theirs[0] for theirs, _ in pairs),
        }
        for variant in args.variants:
            times = [own for _, own in pairs] if variant == args.variants[0] else [ours(args, variant, steps)]
            result[variant] = {
                "steps_per_s": statistics.median(map(speed, times)),
                "first_step_s": statistics.median(own[0] for own in times),
                **in_turns(args, variant, *((4, 5) if args.quick else (16, 8))),
            }
    finally:
        shutil.rmtree(args.cache_dir)
    cores = len(os.sched_getaffinity(0))
    print(f"{args.policy} on {Path(args.dataset_id).name}, batch {args.batch_size}, {args.device}, {cores} cores")
    print(
        f"{'':<24}{'steps/s':>9}{'first step, s':>15}{'ceiling':>9}{'stall':>8}{'waiting':>9}{'memory, GiB':>13}{'GPU use':>9}"
    )
    print(f"{'lerobot-train':<24}{result['lerobot_steps_per_s']:>9.2f}{result['lerobot_first_step_s']:>15.1f}")
    for variant in args.variants:
        r = result[variant]
        gpu = f"{r['peak_memory_gib']:>13.1f}{r['gpu_use']:>9.0%}" if r["peak_memory_gib"] else ""
        row = f"{r['steps_per_s']:>9.2f}{r['first_step_s']:>15.1f}{r['ceiling_steps_per_s']:>9.2f}{r['stall']:>8.1%}"
        print(f"{'ours, ' + variant:<24}{row}{r['waiting']:>9.2%}{gpu}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
