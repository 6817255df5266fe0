"""Samples a second of flow's training step by how it sees: convolutions that are trained, a frozen backbone, a store of features.

    python bench/features.py [--dataset_id FOLDER] [--image_size 96 96] [--batch_size 64] [--turns 8] [--variants ...] [--json]

All runs take their steps in turns, in one process, with the loader, from a frame store that is there already:

    conv        flow's encoder of older checkpoints
    pyramid     flow's encoder
    computed    EfficientNet-Lite0, frozen, which each step runs on its augmented pictures
    stored      the same, read from the store of features
    compiled    flow's encoder with --compile, which needs a C++ compiler: only if --variants names it

Prints samples/s (median over the turns), how they compare with the pyramid's, and how long the store took to encode.
"""

import contextlib
import statistics
import tempfile
import time
from pathlib import Path

from common import CORES, SHIPPED, benchmark_parser, built_run, print_json, take_step

VARIANTS = {
    "conv": {"policy_args": ["backbone=conv"]},
    "pyramid": {"policy_args": ["backbone=pyramid"]},
    # Features are not stored where cameras may be dropped.
    "computed": {"policy_args": ["backbone=efficientnet_lite0"], "camera_dropout": 1e-6},
    "stored": {"policy_args": ["backbone=efficientnet_lite0"]},
    "compiled": {"policy_args": ["backbone=pyramid"], "compile": True},
}


def settings_of(args, variant: str, folder: Path) -> dict:
    return {
        "dataset_id": args.dataset_id,
        "policy": "flow",
        "image_size": args.image_size,
        "batch_size": args.batch_size,
        "device": args.device,
        "steps": 10**6,
        "save_freq": 0,
        "frame_cache": "on",
        "cache_dir": str(folder / "cache"),
        "output_dir": str(folder / variant),
        **VARIANTS[variant],
    }


def measure(args, folder: Path) -> dict:
    rates = {variant: [] for variant in args.variants}
    build_seconds = {}
    with contextlib.ExitStack() as stack:
        runs = {}
        for variant in args.variants:
            begun = time.perf_counter()
            runs[variant] = stack.enter_context(built_run(**settings_of(args, variant, folder)))
            build_seconds[variant] = time.perf_counter() - begun
        for turn in range(args.turns + 1):
            for variant, run in runs.items():
                begun = time.perf_counter()
                for _ in range(args.steps):
                    take_step(run, run.next_batch())
                if turn > 0:  # the first one warms up
                    rates[variant].append(args.steps * args.batch_size / (time.perf_counter() - begun))
        store = runs["stored"].loader.frames
    return {
        "samples_per_s": {variant: statistics.median(values) for variant, values in rates.items()},
        "times_pyramid": {
            variant: statistics.median(a / b for a, b in zip(values, rates["pyramid"], strict=True))
            for variant, values in rates.items()
        },
        "encoding_s": build_seconds["stored"] - build_seconds["computed"],
        "frames": len(store.stored) // store.versions,
        "versions": store.versions,
    }


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--dataset_id", default=str(SHIPPED))
    parser.add_argument("--image_size", type=int, nargs=2, default=[96, 96])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["conv", "pyramid", "computed", "stored"])
    parser.add_argument("--steps", type=int, default=4, help="steps of each turn")
    args = parser.parse_args()
    if missing := {"pyramid", "computed", "stored"} - {*args.variants}:
        parser.error(f"--variants lacks {', '.join(missing)}, which the others are compared with")
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as folder:
        figures = measure(args, Path(folder))
    print(f"flow on {Path(args.dataset_id).name}, batch {args.batch_size}, {args.device}, {CORES} cores")
    for variant, rate in figures["samples_per_s"].items():
        print(f"{variant:<10}{rate:>8.0f} samples/s{figures['times_pyramid'][variant]:>7.2f} of the pyramid's")
    frames, versions = figures["frames"], figures["versions"]
    print(
        f"encoding {frames:,} frames in {versions} versions: {figures['encoding_s']:.0f} s more than without the store"
    )
    if args.json:
        print_json(figures)


if __name__ == "__main__":
    main()
