"""Steps a second of lerobot-train and of Armature, against the same step without a loader, and the time to the first step.

    python bench/train.py [--dataset_id FOLDER] [--policy_args NAME=VALUE ...] [--batch_size 8] [--device cpu]
                          [--variants fp32 bf16 bf16+compile] [--quick] [--json]

Both commands train the same policy on the same dataset, batch size and device, in turns. LeRobot's loader has one worker a core
(at least two); Armature's reads from a frame store that is there already.

Prints for each variant:
    steps/s       of the command, without its first steps
    first step    seconds from launch
    ceiling       steps/s on one batch that stays in memory
    stall         1 - (steps/s with the loader) / (steps/s without), both measured in turns of a few steps in one process
    waiting       share of the time that the loop waited for its next batch
    memory, use   peak memory of a GPU, and its mean utilisation by nvidia-smi
"""

import contextlib
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import torch

ACT = (
    "chunk_size=20 n_action_steps=20 dim_model=256 n_heads=4 dim_feedforward=1024 n_encoder_layers=2 "
    "pretrained_backbone_weights=none"
)
WARM_UP = 5  # first steps that do not count


def step_times(command: list, pattern: str) -> list[float]:
    """Seconds after launch at which a command printed each line that matches `pattern`, which it does at every step."""
    begun = time.perf_counter()
    return [time.perf_counter() - begun for line in common.output_of(command) if re.search(pattern, line)]


def steps_per_second(times: list[float]) -> float:
    return (len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP])


def lerobot_times(args, steps: int) -> list[float]:
    policy_args = [f"--policy.{pair.replace('=none', '=null')}" for pair in args.policy_args]
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as folder:
        command = [
            common.LEROBOT_TRAIN,
            "--dataset.repo_id=bench/data",
            f"--dataset.root={args.dataset_id}",
            f"--policy.type={args.policy}",
            "--policy.push_to_hub=false",
            f"--policy.device={args.device}",
            *policy_args,
            f"--batch_size={args.batch_size}",
            f"--num_workers={common.LEROBOT_WORKERS}",
            f"--steps={steps}",
            "--log_freq=1",
            "--save_checkpoint=false",
            f"--output_dir={folder}/run",
        ]
        return step_times(command, r"step:\d+")  # --log_freq=1: a line for each step


def settings_of(args, variant: str, steps: int, output_dir: str) -> dict:
    """Armature's settings of a variant such as bf16+compile."""
    precision, _, compiled = variant.partition("+")
    return {
        "dataset_id": args.dataset_id,
        "policy": args.policy,
        "policy_args": args.policy_args,
        "batch_size": args.batch_size,
        "device": args.device,
        "precision": precision,
        "compile": compiled == "compile",
        "steps": steps,
        "log_freq": 1,
        "save_freq": 0,
        "frame_cache": "on",
        "cache_dir": args.cache_dir,
        "output_dir": output_dir,
    }


def armature_times(args, variant: str, steps: int) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(settings_of(args, variant, steps, f"{folder}/run")))
        command = [sys.executable, common.ROOT / "src" / "train.py", "--config_path", config]
        return step_times(command, r"^step \d+/")


def take_turns(args, variant: str, turns: int, steps: int) -> dict:
    """Ceiling, stall and waiting of a variant, `steps` with the loader and `steps` without in turns; memory and use of a GPU."""

    def seconds(with_loader: bool) -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            batch = run.stopwatch.wait(run.loader) if with_loader else resident
            common.take_step(run, batch)
        return time.perf_counter() - begun

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # each variant has its own peak
    with (
        tempfile.TemporaryDirectory(prefix="armature-bench-") as folder,
        common.built_run(**settings_of(args, variant, 10**6, folder)) as run,
    ):
        device = run.distributed.device
        # the ceiling: the same step on a batch that is never loaded again
        resident = copy_of(run.stopwatch.wait(run.loader), device.type == "cuda")
        seconds(with_loader=True)  # warm-up
        seconds(with_loader=False)
        run.stopwatch.waited = 0.0
        loaded = []
        unloaded = []
        with gpu_use(device) as use:
            for _ in range(turns):
                loaded.append(seconds(with_loader=True))
                unloaded.append(seconds(with_loader=False))
        result = {
            "ceiling_steps_per_s": statistics.median(steps / best for best in unloaded),
            "stall": statistics.median(1 - best / real for real, best in zip(loaded, unloaded, strict=True)),
            "waiting": run.stopwatch.waited / sum(loaded),
            "peak_memory_gib": None,
            "gpu_use": None,
        }
        if device.type == "cuda":
            result["peak_memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
            result["gpu_use"] = statistics.mean(use) / 100
    return result


def copy_of(batch: dict, pinned: bool) -> dict:
    """A batch in memory of its own, pinned as the loader's pictures are for a GPU."""
    copy = {}
    for key, value in batch.items():
        if isinstance(value, torch.Tensor):
            value = value.clone()
            if pinned and value.dtype == torch.uint8 and not value.is_cuda:
                value = value.pin_memory()
        copy[key] = value
    return copy


@contextlib.contextmanager
def gpu_use(device):
    """A list that on exit holds the GPU's utilisation in per cent, twice a second; empty for other devices."""
    use: list[int] = []
    if device.type != "cuda":
        yield use
        return
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", uuid, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield use
        process.terminate()
        use.extend(int(line) for line in process.stdout.read().split())


def measure(args) -> dict:
    turns, steps = (1, 20) if args.quick else (3, 40)
    short_turns, short_steps = (4, 5) if args.quick else (16, 8)
    armature_times(args, "fp32", 1)  # builds the frame store
    first_variant = args.variants[0]
    theirs = []
    ours = {variant: [] for variant in args.variants}
    for _ in range(turns):  # in turns: the speed of a shared machine drifts
        theirs.append(lerobot_times(args, steps))
        ours[first_variant].append(armature_times(args, first_variant, steps))
    result = {
        "lerobot_steps_per_s": statistics.median(steps_per_second(times) for times in theirs),
        "lerobot_first_step_s": statistics.median(times[0] for times in theirs),
    }
    for variant in args.variants:
        # lerobot-train has no variants: only the first one was timed beside it
        if variant != first_variant:
            ours[variant].append(armature_times(args, variant, steps))
        result[variant] = {
            "steps_per_s": statistics.median(steps_per_second(times) for times in ours[variant]),
            "first_step_s": statistics.median(times[0] for times in ours[variant]),
            **take_turns(args, variant, short_turns, short_steps),
        }
    return result


def print_table(args, result: dict) -> None:
    print(
        f"{args.policy} on {Path(args.dataset_id).name}, batch {args.batch_size}, {args.device}, {common.CORES} cores"
    )
    print(
        f"{'':<24}{'steps/s':>9}{'first step, s':>15}{'ceiling':>9}{'stall':>8}{'waiting':>9}"
        f"{'memory, GiB':>13}{'GPU use':>9}"
    )
    print(f"{'lerobot-train':<24}{result['lerobot_steps_per_s']:>9.2f}{result['lerobot_first_step_s']:>15.1f}")
    for variant in args.variants:
        figures = result[variant]
        row = (
            f"{'Armature, ' + variant:<24}{figures['steps_per_s']:>9.2f}{figures['first_step_s']:>15.1f}"
            f"{figures['ceiling_steps_per_s']:>9.2f}{figures['stall']:>8.1%}{figures['waiting']:>9.2%}"
        )
        if figures["peak_memory_gib"]:
            row += f"{figures['peak_memory_gib']:>13.1f}{figures['gpu_use']:>9.0%}"
        print(row)


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--dataset_id", default=str(common.SHIPPED), help="a dataset folder")
    parser.add_argument("--policy", default="act")
    parser.add_argument("--policy_args", nargs="+", default=ACT.split(), metavar="NAME=VALUE")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--variants", nargs="+", default=["fp32"], help="a precision, with +compile to compile the policy"
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as args.cache_dir:
        result = measure(args)
    print_table(args, result)
    if args.json:
        common.print_json(result)


if __name__ == "__main__":
    main()
