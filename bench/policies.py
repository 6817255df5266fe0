"""Success in simulation over minutes of training: flow, ACT and Diffusion by Armature, ACT and Diffusion by lerobot-train.

    python bench/policies.py [--tasks drawer-open-v3 ...] [--minutes 5 10] [--policies flow act ...] [--picture FILE]

A policy is the name of a file in configs/, or lerobot_ and the name of one in configs/lerobot_train/. Its run lasts as long as
the last of --minutes, with a schedule that ends there, and is evaluated after each of --minutes, over the same episodes from the
same seeds. Minutes are turned into steps by the speed measured before anything else runs, so that load on the machine later
changes no result; start-up is left out for all policies.

    python bench/policies.py --tasks drawer-open-v3 --policies drawer_open lerobot_act --minutes 3 6 9 12 --picture FILE

compares one policy in both trainers: the same demonstrations, policy settings, learning rate and batch size; lerobot-train with
pictures as recorded and its own image transforms, as it has no --image_size.

Prints the successes of each run with their 95 % interval. What --output_dir holds already is not done again: delete a part of it
to repeat that part. Its points.json gathers the figures of every call, and --picture draws all of them; make a call for each
number of minutes that is to have its own schedule.
"""

import json
from dataclasses import asdict
from pathlib import Path

from common import ROOT, Point, benchmark_parser, draw, evaluate, measure_speeds, print_json, record, train

POLICIES = ["flow", "flow_regression", "act", "diffusion", "lerobot_act", "lerobot_diffusion"]
RESULT = ("successes", "num_episodes", "success_rate", "success_low", "success_high")
HEADER = f"{'task':<25}{'policy':<18}{'seed':>5}{'minutes':>9}{'steps':>8}{'success':>10}   95 % interval"


def demonstrations(task: str, work: Path) -> list[Path]:
    """The shipped dataset of a task, or one that its expert records."""
    shipped = ROOT / "examples" / "datasets" / f"metaworld_{task.rsplit('-', 1)[0].replace('-', '_')}"
    if shipped.exists():
        return [shipped]
    recorded = work / "demonstrations" / task
    record("metaworld", task, recorded)
    return [recorded]


def gather(path: Path, new: list[Point]) -> list[Point]:
    """The points of a file and the new ones, which replace those of the same run and minute; written back."""
    old = [Point(**point) for point in json.loads(path.read_text())] if path.exists() else []
    points = sorted({(*point.run, point.minutes): point for point in old + new}.values())
    path.write_text(json.dumps([asdict(point) for point in points], indent=1))
    return points


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=["drawer-open-v3", "button-press-topdown-v3", "window-open-v3"])
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--minutes", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--num_episodes", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each policy, from different seeds")
    parser.add_argument("--output_dir", default=str(ROOT / "outputs" / "bench_policies"))
    parser.add_argument("--picture", help="write a picture of success over minutes here")
    args = parser.parse_args()
    work = Path(args.output_dir).absolute()
    work.mkdir(parents=True, exist_ok=True)
    minutes = sorted(args.minutes)
    # All speeds first, on a machine that does nothing else.
    data = demonstrations("drawer-open-v3", work)
    speeds = measure_speeds(dict.fromkeys(args.policies, data), work / "seconds_per_step.json")
    points = []
    print(HEADER, flush=True)
    for task in args.tasks:
        data = demonstrations(task, work)
        for policy in args.policies:
            for seed in range(args.seeds):
                run = work / task / f"{policy}_{minutes[-1]}min_{seed}"
                # Train, then evaluate each checkpoint over the same seeds.
                trained = train(policy, data, run, speeds[policy], minutes, seed)
                for minute, (steps, folder) in zip(minutes, trained.items(), strict=True):
                    output = run / f"evaluation_{steps}"
                    (numbers,) = evaluate(folder, "metaworld", [task], args.num_episodes, output)
                    result = {key: numbers[key] for key in RESULT}
                    points.append(Point(task, policy, seed, minute, minutes[-1], steps, **result))
                    print(points[-1].row(), flush=True)
    gathered = gather(work / "points.json", points)
    if args.picture:
        draw(gathered, args.picture)
    if args.json:
        print_json({"points": [asdict(point) for point in points]})


if __name__ == "__main__":
    main()
