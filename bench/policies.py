"""Success in simulation over minutes of training: flow, ACT and Diffusion trained here, ACT and Diffusion by lerobot-train.

    python bench/policies.py [--tasks drawer-open-v3 ...] [--minutes 5 10] [--policies flow act ...]

Each policy is a file in configs/. A run is as long as the last of --minutes, its schedule ends with it, and it is tried at each
of them over the same episodes from the same seeds. Minutes are turned into steps by the speed that is measured first, before
anything else runs, so that load on the machine later changes no result; start-up is left out for all of them.
What is in --output_dir already is not done again: remove a part of it to repeat that part. Its points.json gathers what every call
has measured, and --picture draws all of that; call it once for each number of minutes where each is to have its own schedule.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "src")
BIN = Path(sys.executable).parent
MEASURED = 60  # steps that the speed is measured over
POLICIES = ["flow", "flow_regression", "act", "diffusion", "lerobot_act", "lerobot_diffusion"]


def demonstrations(task: str, work: Path) -> Path:
    """The shipped dataset, or one that the task's expert records."""
    shipped = ROOT / "examples" / "datasets" / f"metaworld_{task.rsplit('-', 1)[0].replace('-', '_')}"
    recorded = work / "demonstrations" / task
    if shipped.exists():
        return shipped
    if not recorded.exists():
        command = ["examples/record_metaworld.py", "--task", task, "--output", str(recorded)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return recorded


def config_of(policy: str) -> Path:
    """Its file in configs/: of ours, or of lerobot-train."""
    name = policy.removeprefix("lerobot_")
    return ROOT / "configs" / ("" if name == policy else "lerobot_train") / f"{name}.json"


def command_of(policy: str, data: Path, output: Path, steps: int, save_freq: int, seed: int) -> list[str]:
    """The command that trains a policy for so many steps."""
    config = str(config_of(policy))
    if policy.startswith("lerobot_"):
        return [
            str(BIN / "lerobot-train"), f"--config_path={config}", f"--dataset.root={data}", f"--output_dir={output}",
            f"--steps={steps}", f"--save_freq={save_freq}", "--log_freq=5", f"--seed={1000 + seed}",
        ]  # fmt: skip
    return [
        sys.executable, "src/train.py", "--config_path", config, "--dataset_id", str(data), "--output_dir", str(output),
        "--steps", str(steps), "--save_freq", str(save_freq), "--log_freq", "5", "--seed", str(1000 + seed),
    ]  # fmt: skip


def call(command: list[str]) -> str:
    """Run a command offline; its output. One that fails ends the benchmark with its last lines."""
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)}\n" + "\n".join((done.stdout + done.stderr).splitlines()[-5:]))
    return done.stdout + done.stderr


def seconds_per_step(policy: str, data: Path) -> float:
    """Median over the logged stretches of a short run, the first ones left out; data loading is part of a step."""
    with tempfile.TemporaryDirectory() as folder:
        said = call(command_of(policy, data, Path(folder) / "run", MEASURED, 10**6, 0))
        if policy.startswith("lerobot"):
            pairs = re.findall(r"updt_s:([\d.]+) data_s:([\d.]+)", said)
            seconds = [float(update) + float(wait) for update, wait in pairs]
        else:
            lines = map(json.loads, (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines())
            batch = json.loads(config_of(policy).read_text())["batch_size"]
            seconds = [batch / line["samples_per_s"] for line in lines if "samples_per_s" in line]
    return sorted(seconds[2:])[len(seconds[2:]) // 2]


def speeds(policies: list[str], data: Path, work: Path) -> dict:
    path = work / "seconds_per_step.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    for policy in policies:
        if policy not in known:
            known[policy] = round(seconds_per_step(policy, data), 4)
            print(f"{policy}: {known[policy]:.3f} s a step", flush=True)
            path.write_text(json.dumps(known, indent=2))
    return known


def train(policy: str, data: Path, run: Path, seconds: float, minutes: list[int], seed: int) -> list[tuple]:
    """[(minutes, steps, checkpoint)]; the run is made in a hidden folder, and is whole once it has its name."""
    between = math.gcd(*minutes)
    save_freq = round(60 * between / seconds)
    steps = [m // between * save_freq for m in minutes]
    if not run.exists():
        begun = run.with_name(f".{run.name}")
        subprocess.run(["rm", "-rf", str(begun)], check=True)
        call(command_of(policy, data, begun, steps[-1], save_freq, seed))
        begun.rename(run)
    folder = (
        (lambda s: next((run / "checkpoints").glob(f"*{s:06d}/pretrained_model")))
        if policy.startswith("lerobot")
        else (lambda s: run / f"checkpoint-{s}")
    )
    return [(m, s, folder(s)) for m, s in zip(minutes, steps, strict=True)]


def success(checkpoint: Path, task: str, episodes: int, work: Path) -> dict:
    numbers = work / f"metaworld_{task}" / "numbers.json"
    if not numbers.exists():
        call([
            sys.executable, "src/evaluate.py", str(checkpoint), "--env", "metaworld", "--task", task, "--device", "cpu",
            "--num_episodes", str(episodes), "--num_videos", "0", "--output_dir", str(work),
        ])  # fmt: skip
    result = json.loads(numbers.read_text())
    return {key: result[key] for key in ("successes", "num_episodes", "success_rate", "success_low", "success_high")}


def gather(path: Path, points: list[dict]) -> list[dict]:
    """The points of a file and these, which take the place of those of the same runs; written back."""
    key = ("task", "policy", "seed", "minutes", "of_minutes")
    known = json.loads(path.read_text()) if path.exists() else []
    every = {tuple(point[name] for name in key): point for point in known + points}
    together = [every[name] for name in sorted(every)]
    path.write_text(json.dumps(together, indent=1))
    return together


def picture(path: str, points: list[dict]) -> None:
    """Success over minutes, a panel a task, a colour a policy, a line a run."""
    from reports.figures import COLOURS, new_figure

    tasks, policies = (sorted({point[name] for point in points}) for name in ("task", "policy"))
    figure = new_figure(4.2 * len(tasks), 3.6)
    panels = figure.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    runs: dict[tuple, list[dict]] = {}
    for point in points:
        runs.setdefault((point["task"], point["policy"], point["seed"], point["of_minutes"]), []).append(point)
    for (task, policy, _, _), run in runs.items():
        i = policies.index(policy)
        at = [p["minutes"] + 0.15 * (i - len(policies) / 2) for p in run]  # side by side, where they would hide
        rates = [p["success_rate"] for p in run]
        below = [max(0, p["success_rate"] - p["success_low"]) for p in run]
        above = [max(0, p["success_high"] - p["success_rate"]) for p in run]
        style = {"color": COLOURS[i], "marker": "o", "markersize": 4, "capsize": 3}
        panels[tasks.index(task)].errorbar(at, rates, (below, above), **style)
    last = max(point["minutes"] for point in points)
    for axes, task in zip(panels, tasks, strict=True):
        axes.set(xlabel="minutes of training", title=task, xlim=(0, 1.1 * last), ylim=(-0.03, 1.03))
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("success rate, 95 % interval")
    names = [panels[0].plot([], [], color=COLOURS[i], marker="o", label=name)[0] for i, name in enumerate(policies)]
    figure.legend(handles=names, loc="outside lower center", ncols=len(policies))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["drawer-open-v3", "button-press-topdown-v3", "window-open-v3"])
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--minutes", nargs="+", type=int, default=[5, 10])
    parser.add_argument("--num_episodes", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each policy, from different seeds")
    parser.add_argument("--output_dir", default=str(ROOT / "outputs" / "bench_policies"))
    parser.add_argument("--picture", help="write a picture of success over minutes here")
    args = parser.parse_args()
    work, points = Path(args.output_dir).absolute(), []
    work.mkdir(parents=True, exist_ok=True)
    minutes = sorted(args.minutes)
    seconds = speeds(args.policies, demonstrations("drawer-open-v3", work), work)
    print(f"{'task':<25}{'policy':<13}{'seed':>5}{'minutes':>9}{'steps':>8}{'success':>10}   95 % interval", flush=True)
    for task in args.tasks:
        data = demonstrations(task, work)
        for policy in args.policies:
            for seed in range(args.seeds):
                run = work / task / f"{policy}_{minutes[-1]}min_{seed}"
                for m, steps, checkpoint in train(policy, data, run, seconds[policy], minutes, seed):
                    result = success(checkpoint, task, args.num_episodes, run / f"evaluation_{steps}")
                    place = {"task": task, "policy": policy, "seed": seed, "minutes": m, "of_minutes": minutes[-1]}
                    points.append({**place, "steps": steps, **result})
                    interval = f"{result['success_low']:.0%} to {result['success_high']:.0%}"
                    count = f"{result['successes']} / {result['num_episodes']}"
                    print(f"{task:<25}{policy:<13}{seed:>5}{m:>9}{steps:>8}{count:>10}   {interval}", flush=True)
    points = gather(work / "points.json", points)
    if args.picture:
        picture(args.picture, points)


if __name__ == "__main__":
    main()
