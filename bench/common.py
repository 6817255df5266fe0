"""What the benchmarks share: folders, commands that are run and timed, a run that is built here, and the last line of figures.

`policies.py` and `tasks.py` also share how minutes become steps, training and evaluation that go on where they stopped, and the
picture of success over minutes.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"
LEROBOT_TRAIN = str(Path(sys.executable).with_name("lerobot-train"))
CORES = len(os.sched_getaffinity(0))
LEROBOT_WORKERS = max(2, CORES)  # one data worker a core, as LeRobot's documentation advises
SPEED_STEPS = 60  # steps of the run that measures the speed

sys.path.insert(0, str(ROOT / "src"))  # before bench/, whose train.py would hide that of src/


def benchmark_parser(docstring: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=docstring.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the figures as JSON in a last line")
    return parser


def output_of(command: list) -> Iterator[str]:
    """Run a command offline and yield its lines as they come. If it fails, the benchmark ends with its last lines."""
    last = deque(maxlen=20)
    with subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        # unbuffered, so that lines come when they are printed
        env={**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            last.append(line)
            yield line
    if process.returncode:
        sys.exit(f"error: {' '.join(process.args)} failed:\n{''.join(last)}")


def run_to_end(command: list) -> str:
    return "".join(output_of(command))


@contextlib.contextmanager
def built_run(**settings):
    """A run as train() builds it, to take single steps of."""
    from train import build_run, plan_run

    with plan_run({**settings, "quiet": True}) as plan, build_run(plan) as run:
        yield run


def take_step(run, batch: dict) -> None:
    """One step of train()'s loop."""
    result = run.learner.step(batch, run.step)
    run.count(result)
    run.losses.loss_sum.item()  # waits for the device, as lerobot-train does at every step


def seconds_of(call, *arguments) -> float:
    begun = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begun


def print_json(figures: dict) -> None:
    """The figures as one line of JSON, with four decimals."""

    def rounded(value):
        if isinstance(value, dict):
            return {name: rounded(item) for name, item in value.items()}
        if isinstance(value, list):
            return [rounded(item) for item in value]
        return round(value, 4) if isinstance(value, float) else value

    print(json.dumps(rounded(figures)))


def record(env: str, task: str, output: Path) -> None:
    """Record 50 demonstrations by the task's expert, unless they are there."""
    if not output.exists():
        run_to_end([sys.executable, "examples/record.py", "--env", env, "--task", task, "--output", output])


def is_lerobot(policy: str) -> bool:
    return policy.startswith("lerobot_")


def config_of(policy: str) -> Path:
    if is_lerobot(policy):
        return ROOT / "configs" / "lerobot_train" / f"{policy.removeprefix('lerobot_')}.json"
    return ROOT / "configs" / f"{policy}.json"


def train_command(policy: str, data: list[Path], output: Path, steps: int, save_freq: int, seed: int) -> list:
    """The command that trains a policy, from its last checkpoint in `output` if it has one. lerobot-train takes one dataset."""
    flags = {
        "config_path": config_of(policy),
        "output_dir": output,
        "steps": steps,
        "save_freq": save_freq,
        "log_freq": 5,
        "seed": 1000 + seed,
    }
    if is_lerobot(policy):
        last = output / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
        if last.exists():
            return [LEROBOT_TRAIN, f"--config_path={last}", "--resume=true"]
        return [LEROBOT_TRAIN, f"--dataset.root={data[0]}", *(f"--{name}={value}" for name, value in flags.items())]
    # Between those that are evaluated, the newest checkpoint is enough to go on from.
    flags |= {"save_minutes": 10, "keep_last": 1, "keep_every": save_freq, "resume_from_checkpoint": "auto"}
    words = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "src/train.py", "--dataset_id", *data, *words]


def measured_speed(policy: str, data: list[Path]) -> float:
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


def measure_speeds(data_of: dict[str, list[Path]], path: Path) -> dict[str, float]:
    """Seconds a step of each policy on its data, measured once and kept in a JSON file."""
    speeds = json.loads(path.read_text()) if path.exists() else {}
    for policy, data in data_of.items():
        if policy not in speeds:
            speeds[policy] = measured_speed(policy, data)
            print(f"{policy}: {speeds[policy]:.3f} s a step", flush=True)
            path.write_text(json.dumps(speeds, indent=2))
    return speeds


def train(
    policy: str, data: list[Path], run: Path, seconds_per_step: float, minutes: list[int], seed: int
) -> dict[int, Path]:
    """Train a policy, as far as its run is not there already. Returns {steps: folder of the policy} for each of `minutes`."""
    # Checkpoints are evenly spaced: one at least at each of `minutes`.
    between = math.gcd(*minutes)
    save_freq = max(1, round(60 * between / seconds_per_step))
    steps = [minute // between * save_freq for minute in minutes]
    if is_lerobot(policy):
        checkpoints = run / "checkpoints"
        folders = {step: checkpoints / f"{step:06d}" / "pretrained_model" for step in steps}
        last = checkpoints / "last"  # a link, set when a checkpoint is complete
        is_done = last.exists() and last.resolve().name == f"{steps[-1]:06d}"
        if not last.exists():
            shutil.rmtree(run, ignore_errors=True)  # lerobot-train refuses a folder with nothing to resume
    else:
        folders = {step: run / f"checkpoint-{step}" for step in steps}
        is_done = folders[steps[-1]].exists()
    if not is_done:
        run_to_end(train_command(policy, data, run, steps[-1], save_freq, seed))
    for folder in folders.values():
        if not folder.exists():
            sys.exit(f"error: {run} has no {folder.relative_to(run)}: it was trained with other --minutes. Delete it")
    return folders


def evaluate(
    policy: Path,
    env: str,
    tasks: list[str],
    num_episodes: int,
    output: Path,
    max_steps: int | None = None,
    num_workers: int | None = None,
) -> list[dict]:
    """Run a policy in tasks, those that `output` does not have already. Returns each task's numbers.json."""

    def numbers_of(task: str) -> dict | None:
        path = output / f"{env}_{task}" / "numbers.json"
        if not path.exists():
            return None
        numbers = json.loads(path.read_text())
        is_same = numbers["num_episodes"] == num_episodes and max_steps in (None, numbers["max_steps"])
        return numbers if is_same else None

    missing = [task for task in tasks if numbers_of(task) is None]
    if missing:
        command = [sys.executable, "src/evaluate.py", policy, "--env", env, "--task", ",".join(missing)]
        command += ["--device", "cpu", "--num_episodes", num_episodes, "--num_videos", 0, "--output_dir", output]
        if max_steps:
            command += ["--max_steps", max_steps]
        if num_workers:
            command += ["--num_workers", num_workers]
        run_to_end(command)
    return [numbers_of(task) for task in tasks]


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


def draw(points: list[Point], path: str) -> None:
    """Success over minutes: a panel for each task, a colour for each policy, a line for each run."""
    from reports.figures import COLOURS, new_figure

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
    figure.legend(handles=legend, loc="outside lower center", ncols=min(len(policies), 2 * len(tasks)))
    figure.savefig(path, dpi=110)
