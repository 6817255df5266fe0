"""How long a save holds up training: ours, in the background and not, against LeRobot's, in turns in one process.

    python bench/checkpoint.py [--policy_args NAME=VALUE ...] [--device cpu] [--saves 5] [--json]

Default ACT (52M parameters) on the shipped dataset; each save follows a training step. LeRobot's is its `save_checkpoint`,
as lerobot-train calls it. Ours hashes every file and waits until the disk has it, which LeRobot's does not. Figures are
medians; the first save in the background, which also takes its memory, stands by itself. "Meanwhile" is a step's time
while the background thread writes, against one while it does not. Resuming is from the call until the first batch is asked for.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "src")  # this file is called checkpoint.py as well
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"


def timed(call) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def a_run(output: Path, held: contextlib.ExitStack, **settings):
    from train import Run
    from training.plan import settle

    return Run(*settle({**settings, "output_dir": str(output), "quiet": True}, held), held)


def step(run) -> float:
    import torch

    def one():
        run.train_step(run.watch.wait(run.loader))
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)

    return timed(one)


def lerobot_save(run, folder: Path) -> float:
    """LeRobot's save of the same policy, optimizer and processors."""
    from lerobot.common.train_utils import save_checkpoint
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig

    cfg = TrainPipelineConfig(dataset=DatasetConfig(repo_id="bench/data"), policy=run.policy.config)
    parts = {"preprocessor": run.preprocess, "postprocessor": run.postprocess}
    return timed(lambda: save_checkpoint(folder, run.step, cfg, run.policy, run.learner.optimizer, **parts))


def size_of(folder: Path) -> int:
    """Bytes on the disk, files with two names counted once."""
    stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
    return sum({stat.st_ino: stat.st_size for stat in stats}.values())


def measure(args, work: Path) -> dict:
    common = {
        "dataset_id": str(SHIPPED),
        "policy": "act",
        "policy_args": args.policy_args,
        "device": args.device,
        "batch_size": 2,
    }
    times = {name: [] for name in ("lerobot", "async", "sync", "step", "meanwhile")}
    with contextlib.ExitStack() as held:
        background = a_run(work / "async", held, **common)
        waiting = a_run(work / "sync", held, **common, save_async="off")
        for _ in range(2):
            step(background)
            step(waiting)
        for turn in range(args.saves + 1):
            times["step"].append(step(background))
            times["async"].append(timed(background.save))
            times["meanwhile"].append(step(background))
            background.writer.wait()
            step(waiting)
            times["sync"].append(timed(waiting.save))
            folder = work / "lerobot" / f"{turn:06}"
            times["lerobot"].append(lerobot_save(waiting, folder))
    saved = background.writer.saved
    with contextlib.ExitStack() as held:
        resume_s = timed(lambda: a_run(work / "async", held, resume_from_checkpoint=str(saved)))
    median = {name: statistics.median(values[1:]) for name, values in times.items()}
    return {
        "lerobot_stall_s": median["lerobot"],
        "async_stall_s": median["async"],
        "sync_stall_s": median["sync"],
        "first_async_stall_s": times["async"][0],
        "step_s": median["step"],
        "step_meanwhile_s": median["meanwhile"],
        "resume_s": resume_s,
        "bytes": size_of(saved),
        "lerobot_bytes": size_of(folder),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy_args", nargs="+", default=["pretrained_backbone_weights=none"], metavar="NAME=VALUE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--saves", type=int, default=5, help="saves of each kind")
    parser.add_argument("--json", action="store_true", help="a last line with the figures")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="armature-bench-"))
    try:
        result = measure(args, work)
    finally:
        shutil.rmtree(work)
    theirs = result["lerobot_stall_s"]
    print(f"act on {args.device}, {len(os.sched_getaffinity(0))} cores, {args.saves} saves of each kind")
    print(f"{'':<28}{'loop waits, s':>14}{'of LeRobot':>12}{'MB':>8}")
    print(f"{'LeRobot save_checkpoint':<28}{theirs:>14.3f}{'':>12}{result['lerobot_bytes'] / 1e6:>8.1f}")
    for name, key in (("ours, in the background", "async_stall_s"), ("ours, --save_async off", "sync_stall_s")):
        print(f"{name:<28}{result[key]:>14.3f}{result[key] / theirs:>12.1%}{result['bytes'] / 1e6:>8.1f}")
    print(f"the first in the background {result['first_async_stall_s']:.3f} s")
    print(
        f"a step {result['step_s']:.3f} s, meanwhile {result['step_meanwhile_s']:.3f} s; resuming {result['resume_s']:.2f} s"
    )
    if args.json:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))


if __name__ == "__main__":
    main()
