"""What the benchmarks share: folders, commands that are run and timed, a run that is built here, and the last line of figures."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"
LEROBOT_TRAIN = str(Path(sys.executable).with_name("lerobot-train"))
CORES = len(os.sched_getaffinity(0))
LEROBOT_WORKERS = max(2, CORES)  # one data worker a core, as LeRobot's documentation advises

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
