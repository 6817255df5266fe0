"""How long a save holds up training: Armature's, in the background and not, and LeRobot's, in turns in one process.

    python bench/checkpoint.py [--policy_args NAME=VALUE ...] [--device cpu] [--saves 5] [--json]

Trains act with its default settings (52M parameters) on the shipped dataset, and saves after a step. LeRobot's save is its
save_checkpoint, as lerobot-train calls it. Armature's also hashes every file and waits until it is on the disk.

Prints medians over the saves. The first background save also allocates its memory, so it has a figure of its own. It also
prints the time of a step while the background thread writes and while it does not, and the time from a resume to the first step.
"""

import statistics
import tempfile
import time
from pathlib import Path

from common import CORES, SHIPPED, benchmark_parser, built_run, print_json, seconds_of, take_step
from lerobot.common.train_utils import save_checkpoint
from lerobot.configs.default import DatasetConfig
from lerobot.configs.train import TrainPipelineConfig


def step(run) -> None:
    take_step(run, run.stopwatch.wait(run.loader))


def lerobot_save(run, folder: Path) -> None:
    """LeRobot's save of the same policy, optimizer and processors."""
    config = TrainPipelineConfig(dataset=DatasetConfig(repo_id="bench/data"), policy=run.policy.config)
    save_checkpoint(
        folder,
        run.step,
        config,
        run.policy,
        run.learner.optimizer,
        preprocessor=run.preprocess,
        postprocessor=run.postprocess,
    )


def disk_bytes(folder: Path) -> int:
    """Bytes on the disk. A file with two names counts once."""
    files = {}
    for path in folder.rglob("*"):
        if path.is_file():
            files[path.stat().st_ino] = path.stat().st_size
    return sum(files.values())


def measure(args, work: Path) -> dict:
    settings = {
        "dataset_id": str(SHIPPED),
        "policy": "act",
        "policy_args": args.policy_args,
        "device": args.device,
        "batch_size": 2,
    }
    seconds = {name: [] for name in ("lerobot", "async", "sync", "step", "meanwhile")}
    with (
        built_run(**settings, output_dir=str(work / "async")) as background,
        built_run(**settings, output_dir=str(work / "sync"), save_async="off") as waiting,
    ):
        # the first steps allocate the optimizer's state
        for _ in range(2):
            step(background)
            step(waiting)
        for number in range(args.saves + 1):
            seconds["step"].append(seconds_of(step, background))
            seconds["async"].append(seconds_of(background.save))
            seconds["meanwhile"].append(seconds_of(step, background))
            background.writer.wait()  # nothing is written while the other two are timed
            step(waiting)
            seconds["sync"].append(seconds_of(waiting.save))
            lerobot_folder = work / "lerobot" / f"{number:06}"
            seconds["lerobot"].append(seconds_of(lerobot_save, waiting, lerobot_folder))
        checkpoint = background.writer.saved

    begun = time.perf_counter()
    with built_run(resume_from_checkpoint=str(checkpoint), output_dir=str(work / "async")):
        resume_seconds = time.perf_counter() - begun
    # the first of each kind allocates memory and opens caches
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "lerobot_stall_s": median["lerobot"],
        "async_stall_s": median["async"],
        "sync_stall_s": median["sync"],
        "first_async_stall_s": seconds["async"][0],
        "step_s": median["step"],
        "step_meanwhile_s": median["meanwhile"],
        "resume_s": resume_seconds,
        "bytes": disk_bytes(checkpoint),
        "lerobot_bytes": disk_bytes(lerobot_folder),
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--policy_args", nargs="+", default=["pretrained_backbone_weights=none"], metavar="NAME=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as work:
        result = measure(args, Path(work))

    theirs = result["lerobot_stall_s"]
    size = result["bytes"] / 1e6
    print(f"act on {args.device}, {CORES} cores, {args.saves} saves of each kind")
    print(f"{'':<28}{'loop waits, s':>14}{'of LeRobot':>12}{'MB':>8}")
    print(f"{'LeRobot save_checkpoint':<28}{theirs:>14.3f}{'':>12}{result['lerobot_bytes'] / 1e6:>8.1f}")
    for name, key in (("Armature, in background", "async_stall_s"), ("Armature, --save_async off", "sync_stall_s")):
        print(f"{name:<28}{result[key]:>14.3f}{result[key] / theirs:>12.1%}{size:>8.1f}")
    print(f"the first save in the background: {result['first_async_stall_s']:.3f} s")
    print(f"a step: {result['step_s']:.3f} s, during a background save: {result['step_meanwhile_s']:.3f} s")
    print(f"a resume: {result['resume_s']:.2f} s")
    if args.json:
        print_json(result)


if __name__ == "__main__":
    main()
