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
import math
import re
import shutil
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from common import LEROBOT_TRAIN, ROOT, benchmark_parser, output_of, print_json

from reports.figures import COLOURS, new_figure

SPEED_STEPS = 60  # steps of the run that measures the speed
POLICIES = ["flow", "flow_regression", "act", "diffusion", "lerobot_act", "lerobot_diffusion"]


@dataclass(order=True)
class Point:
    """How a run did after some minutes of training; `of_minutes` is the length of the run."""

    task: str
    policy: str
    seed: int
    minutes: int
    of_minutes: int
    steps: int
    successes: int
    num_episodes: int
    success_rate: float
    success_low: float
    success_high: float

    @property
    def run(self) -> tuple:
        return self.task, self.policy, self.seed, self.of_minutes

    def row(self) -> str:
        count = f"{self.successes} / {self.num_episodes}"
        interval = f"{self.success_low:.0%} to {self.success_high:.0%}"
        return f"{self.task:<25}{self.policy:<18}{self.seed:>5}{self.minutes:>9}{self.steps:>8}{count:>10}   {interval}"


HEADER = f"{'task':<25}{'policy':<18}{'seed':>5}{'minutes':>9}{'steps':>8}{'success':>10}   95 % interval"


def demonstrations(task: str, work: Path) -> Path:
    """The shipped dataset of a task, or one that its expert records."""
    shipped = ROOT / "examples" / "datasets" / f"metaworld_{task.rsplit('-', 1)[0].replace('-', '_')}"
    if shipped.exists():
        return shipped
    recorded = work / "demonstrations" / task
    if not recorded.exists():
        run_to_end([sys.executable, "examples/record.py", "--env", "metaworld", "--task", task, "--output", recorded])
    return recorded


def run_to_end(command: list) -> str:
    return "".join(output_of(command))


def is_lerobot(policy: str) -> bool:
    return policy.startswith("lerobot_")


def config_of(policy: str) -> Path:
    if is_lerobot(policy):
        return ROOT / "configs" / "lerobot_train" / f"{policy.removeprefix('lerobot_')}.json"
    return ROOT / "configs" / f"{policy}.json"


def train_command(policy: str, data: Path, output: Path, steps: int, save_freq: int, seed: int) -> list[str]:
    flags = {
        "config_path": config_of(policy),
        "output_dir": output,
        "steps": steps,
        "save_freq": save_freq,
        "log_freq": 5,
        "seed": 1000 + seed,
    }
    if is_lerobot(policy):
        return [LEROBOT_TRAIN, f"--dataset.root={data}", *(f"--{name}={value}" for name, value in flags.items())]
    flags["dataset_id"] = data
    return [sys.executable, "src/train.py", *(f"--{name}={value}" for name, value in flags.items())]


def measured_speed(policy: str, data: Path) -> float:
    """Seconds a step, data loading included: the median over the log lines of a short run without the first two."""
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as folder:
        run = Path(folder) / "run"
        output = run_to_end(train_command(policy, data, run, SPEED_STEPS, save_freq=10**6, seed=0))
        if is_lerobot(policy):
            # LeRobot logs the seconds of the update and of the wait for data
            logged = re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", output)
            seconds = [float(update) + float(wait) for update, wait in logged]
        else:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            seconds = [line["step_s"] for line in lines if "step_s" in line]
    return round(statistics.median_high(seconds[2:]), 4)


def measure_speeds(policies: list[str], data: Path, work: Path) -> dict[str, float]:
    """Seconds a step of each policy, measured once for each --output_dir."""
    path = work / "seconds_per_step.json"
    speeds = json.loads(path.read_text()) if path.exists() else {}
    for policy in policies:
        if policy not in speeds:
            speeds[policy] = measured_speed(policy, data)
            print(f"{policy}: {speeds[policy]:.3f} s a step", flush=True)
            path.write_text(json.dumps(speeds, indent=2))
    return speeds


def train(
    policy: str, data: Path, run: Path, seconds_per_step: float, minutes: list[int], seed: int
) -> dict[int, Path]:
    """Train a policy unless its run is there already. Returns {steps: folder of the policy} for each of `minutes`."""
    # Checkpoints are evenly spaced: one at least at each of `minutes`.
    between = math.gcd(*minutes)
    save_freq = round(60 * between / seconds_per_step)
    steps = [minute // between * save_freq for minute in minutes]
    if not run.exists():
        unfinished = run.with_name(f".{run.name}")  # a run that has its name is complete
        shutil.rmtree(unfinished, ignore_errors=True)
        run_to_end(train_command(policy, data, unfinished, steps[-1], save_freq, seed))
        unfinished.rename(run)
    if is_lerobot(policy):
        return {step: next((run / "checkpoints").glob(f"*{step:06d}/pretrained_model")) for step in steps}
    return {step: run / f"checkpoint-{step}" for step in steps}


def evaluate(policy_folder: Path, task: str, episodes: int, output: Path) -> dict:
    """Success of a policy over episodes of a task, unless `output` has it already."""
    numbers = output / f"metaworld_{task}" / "numbers.json"
    if not numbers.exists():
        command = [sys.executable, "src/evaluate.py", policy_folder, "--env", "metaworld", "--task", task]
        command += ["--device", "cpu", "--num_episodes", episodes, "--num_videos", 0, "--output_dir", output]
        run_to_end(command)
    result = json.loads(numbers.read_text())
    return {key: result[key] for key in ("successes", "num_episodes", "success_rate", "success_low", "success_high")}


def gather(path: Path, new: list[Point]) -> list[Point]:
    """The points of a file and the new ones, which replace those of the same run and minute; written back."""
    old = [Point(**point) for point in json.loads(path.read_text())] if path.exists() else []
    points = sorted({(*point.run, point.minutes): point for point in old + new}.values())
    path.write_text(json.dumps([asdict(point) for point in points], indent=1))
    return points


def draw(points: list[Point], path: str) -> None:
    """Success over minutes: a panel for each task, a colour for each policy, a line for each run."""
    tasks = sorted({point.task for point in points})
    policies = sorted({point.policy for point in points})
    figure = new_figure(4.2 * len(tasks), 3.6)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    last_minute = max(point.minutes for point in points)
    for axes, task in zip(panels, tasks, strict=True):
        axes.set(xlabel="minutes of training", title=task, xlim=(0, 1.1 * last_minute), ylim=(-0.03, 1.03))
        axes.grid(alpha=0.25)
        for run in sorted({point.run for point in points if point.task == task}):
            line = [point for point in points if point.run == run]
            number = policies.index(line[0].policy)
            shift = 0.15 * (number - len(policies) / 2)  # policies side by side, where they would hide each other
            rates = [point.success_rate for point in line]
            below = [max(0, point.success_rate - point.success_low) for point in line]
            above = [max(0, point.success_high - point.success_rate) for point in line]
            minutes = [point.minutes + shift for point in line]
            style = {"color": COLOURS[number % len(COLOURS)], "marker": "o", "markersize": 4, "capsize": 3}
            axes.errorbar(minutes, rates, (below, above), **style)
    panels[0].set_ylabel("success rate, 95 % interval")
    legend = []
    for number, name in enumerate(policies):
        legend += panels[0].plot([], [], color=COLOURS[number % len(COLOURS)], marker="o", label=name)
    figure.legend(handles=legend, loc="outside lower center", ncols=len(policies))
    figure.savefig(path, dpi=110)


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
    speeds = measure_speeds(args.policies, demonstrations("drawer-open-v3", work), work)
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
                    result = evaluate(folder, task, args.num_episodes, run / f"evaluation_{steps}")
                    points.append(Point(task, policy, seed, minute, minutes[-1], steps, **result))
                    print(points[-1].row(), flush=True)
    gathered = gather(work / "points.json", points)
    if args.picture:
        draw(gathered, args.picture)
    if args.json:
        print_json({"points": [asdict(point) for point in points]})


if __name__ == "__main__":
    main()
