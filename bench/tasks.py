"""One policy for many tasks: success by task, by group of difficulty and over all, with the outcome of every episode.

    python bench/tasks.py --tasks mt10 --policies flow --minutes 20 60
    python bench/tasks.py --tasks mt50 --policies flow act diffusion lerobot_act lerobot_diffusion --minutes 240 --picture FILE

Trains each policy on the demonstrations of all tasks together, --seeds times, and evaluates it in each task after each of
--minutes, over the same episodes from the same seeds. Policies, minutes and steps are as in bench/policies.py: minutes become
steps by the speed measured before anything else runs. Demonstrations are one dataset for each task, in a folder of its name in
--demonstrations; what is missing there is recorded, 50 episodes each. lerobot-train takes one dataset, so they are merged for it.

Goes on where it stopped: training at its last checkpoint, evaluation at the first task that is not done. Delete a part of
--output_dir to repeat that part. results.json in it has a line for each evaluation: the run's settings, success of tasks, groups
and all, and of each episode its seed, outcome and steps. Intervals are Wilson's, of 95 %. Those over several seeds pool the
episodes as if they were independent, though each seed's run is tried from the same beginnings.

Published results of Meta-World MT50 (SmolVLA, arXiv 2506.01844; Evo-1, github.com/MINT-SJTU/Evo-1) are the plain mean of the
success of LeRobot's four groups, which have 28, 11, 6 and 5 tasks; "all" is the mean over tasks. Both are printed. As theirs, this
takes one policy for all tasks, 50 demonstrations and 10 trials a task, one camera (corner2), and an episode ends at its first
success. What differs:

* Demonstrations are recorded here, by Meta-World's scripted experts, with noise on the executed actions and a few frames after the
  success. LeRobot's, in lerobot/metaworld_mt50, end at the success; we do not know whether theirs had noise. Evo-1 has its own.
* Pictures have 128x128 pixels, without shadows and reflections, in place of 480x480 (LeRobot) or 448x448 (Evo-1, cropped, and
  from the camera's original place, which LeRobot changes).
* The state is LeRobot's: the hand's position and the gripper. Evo-1's evaluation also gives its policy the first object's position.
* An episode fails after 500 steps, as in LeRobot's environment; after 400 in Evo-1's. We do not know SmolVLA's limit. Trials have
  the seeds 1000 to 1009, Evo-1's count up from 4042.
* ACT and Diffusion, here and by lerobot-train, do not read the task: they know it only by what they see.
"""

import json
import shutil
from collections import defaultdict
from pathlib import Path

from common import (
    CORES,
    ROOT,
    Point,
    benchmark_parser,
    draw,
    evaluate,
    is_lerobot,
    measure_speeds,
    print_json,
    record,
    train,
)

from errors import UserError
from sim.suites import difficulty_groups, tasks_of

POLICIES = ["flow", "act", "diffusion", "lerobot_act", "lerobot_diffusion"]
MAX_STEPS = {"metaworld": 500}  # of LeRobot's environment; ours stops earlier by itself
RUN = ("suite", "policy", "minutes", "of_minutes")  # what the seeds of a run have in common


def demonstrations(env: str, tasks: list[str], folder: Path) -> list[Path]:
    """A dataset for each task."""
    for task in tasks:
        record(env, task, folder / task)
    return [folder / task for task in tasks]


def merged(datasets: list[Path], output: Path) -> Path:
    """One dataset of all, for lerobot-train."""
    if not output.exists():
        from lerobot.datasets import LeRobotDataset
        from lerobot.datasets.dataset_tools import merge_datasets

        unfinished = output.with_name(f".{output.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        opened = [LeRobotDataset(f"bench/{path.name}", root=path) for path in datasets]
        merge_datasets(opened, "bench/demonstrations", unfinished)
        unfinished.rename(output)
    return output


def result_of(numbers: list[dict], groups: dict[str, list[str]]) -> dict:
    """Success of tasks, groups and all; of each episode the seed, and the steps until its success or None."""
    from sim.rollout import summary_of_tasks

    result = summary_of_tasks(numbers, groups)
    for task in result["tasks"].values():
        episodes = task.pop("episodes")
        task["steps_to_success"] = {str(e["seed"]): e["steps"] if e["success"] else None for e in episodes}
    return result


def over_seeds(results: list[dict], groups: dict[str, list[str]]) -> dict:
    """The success of several runs, their episodes put together."""
    from sim.rollout import rates, summary_of_tasks

    pooled = []
    for task, first in results[0]["tasks"].items():
        counted = {key: sum(result["tasks"][task][key] for result in results) for key in ("successes", "num_episodes")}
        pooled.append({"task": task, "max_steps": first["max_steps"], "episodes": [], **rates(**counted)})
    return summary_of_tasks(pooled, groups)


def row(result: dict, seed: int | str) -> list[str]:
    """A line of the table: a run and its success over all episodes, as the mean of groups, and in each group."""
    everything = result["all"]
    cells = [result["policy"], f"{seed}", f"{result['minutes']}", f"{result['steps']}"]
    cells.append(f"{everything['successes']} / {everything['num_episodes']}")
    cells.append(f"{everything['success_rate']:.1%}")
    cells.append(f"{everything['success_low']:.1%} to {everything['success_high']:.1%}")
    if result["groups"]:
        cells.append(f"{result['mean_of_groups']:.1%}")
    cells += [f"{group['success_rate']:.1%}" for group in result["groups"].values()]
    return cells


def print_rows(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def print_tables(results: list[dict], groups: dict[str, list[str]]) -> None:
    """Each run, all seeds of it together, and then the success of each task."""
    heads = ["policy", "seed", "minutes", "steps", "success", "all", "95 % interval"]
    if results[0]["groups"]:
        heads += ["mean of groups", *results[0]["groups"]]
    rows = [heads]
    runs = defaultdict(list)
    for result in results:
        rows.append(row(result, result["seed"]))
        runs[tuple(result[key] for key in RUN)].append(result)
    pooled = {run: over_seeds(of_run, groups) for run, of_run in runs.items()}
    for run, of_run in runs.items():
        if len(of_run) > 1:
            rows.append(row({**of_run[0], **pooled[run]}, "all"))
    print_rows(rows)

    print()
    rows = [["task", *(f"{policy}, {minutes} min" for _, policy, minutes, _ in pooled)]]
    for task in results[0]["tasks"]:
        counts = [result["tasks"][task] for result in pooled.values()]
        rows.append([task, *(f"{count['successes']} / {count['num_episodes']}" for count in counts)])
    print_rows(rows)


def gather(path: Path, new: list[dict]) -> list[dict]:
    """The results of a file and the new ones, which replace those of the same run and minute; written back, one a line."""
    old = json.loads(path.read_text()) if path.exists() else []
    by_run = {tuple(result[key] for key in (*RUN, "seed")): result for result in old + new}
    results = [by_run[run] for run in sorted(by_run)]
    path.write_text("[\n" + ",\n".join(json.dumps(result) for result in results) + "\n]\n")
    return results


def point_of(result: dict) -> Point:
    names = ("policy", "seed", "minutes", "of_minutes", "steps")
    kept = {name: value for name, value in result["all"].items() if name != "num_tasks"}
    return Point(task=result["suite"], **{name: result[name] for name in names}, **kept)


def main() -> None:
    parser = benchmark_parser(__doc__)
    flag = parser.add_argument
    flag("--env", default="metaworld", help="one of our simulations")
    flag("--tasks", default="mt10", help="tasks, separated by commas, or a suite such as mt50")
    flag("--policies", nargs="+", default=["flow"], help=f"of {', '.join(POLICIES)}, or other names of configs")
    flag("--minutes", nargs="+", type=int, default=[20, 60])
    flag("--seeds", type=int, default=3, help="runs of each policy, from different seeds")
    flag("--num_episodes", type=int, default=10, help="trials of each task")
    flag("--max_steps", type=int, help="steps after which an episode has failed (default: 500 in metaworld)")
    flag("--num_workers", type=int, help="processes that evaluate (default: one for each core, if memory allows)")
    flag("--demonstrations", help="folder with a dataset for each task (default: in --output_dir)")
    flag("--output_dir", default=str(ROOT / "outputs" / "bench_tasks"))
    flag("--picture", help="write a picture of success over minutes here")
    args = parser.parse_args()
    try:
        tasks = tasks_of(args.env, args.tasks)
    except UserError as error:
        parser.error(str(error))
    groups = difficulty_groups(args.env)
    max_steps = args.max_steps or MAX_STEPS.get(args.env)
    minutes = sorted(args.minutes)
    output = Path(args.output_dir).absolute()
    work = output / args.tasks  # one policy is trained on exactly these
    work.mkdir(parents=True, exist_ok=True)
    datasets = demonstrations(args.env, tasks, Path(args.demonstrations or output / "demonstrations").absolute())
    data_of = {}
    for policy in args.policies:
        data_of[policy] = datasets
        if is_lerobot(policy) and len(datasets) > 1:
            data_of[policy] = [merged(datasets, work / "merged")]
    # All speeds first, on a machine that does nothing else.
    speeds = measure_speeds(data_of, work / "seconds_per_step.json")

    results = []
    for policy in args.policies:
        for seed in range(args.seeds):
            run = work / f"{policy}_{minutes[-1]}min_{seed}"
            # Train, then evaluate each checkpoint over the same seeds.
            trained = train(policy, data_of[policy], run, speeds[policy], minutes, seed)
            for minute, (steps, folder) in zip(minutes, trained.items(), strict=True):
                evaluation = run / f"evaluation_{steps}"
                numbers = evaluate(folder, args.env, tasks, args.num_episodes, evaluation, max_steps, args.num_workers)
                result = {
                    "suite": args.tasks,
                    "policy": policy,
                    "seed": seed,
                    "minutes": minute,
                    "of_minutes": minutes[-1],
                    "steps": steps,
                    "seconds_per_step": speeds[policy],
                    "cores": CORES,
                    **result_of(numbers, groups),
                }
                results.append(result)
                print(" ".join(row(result, seed)), flush=True)
                gathered = gather(output / "results.json", [result])
    print()
    print_tables(results, groups)
    if args.picture:
        draw([point_of(result) for result in gathered], args.picture)
    if args.json:
        print_json({"results": results})


if __name__ == "__main__":
    main()
