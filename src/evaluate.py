"""Evaluate a policy on recorded episodes (open loop) or in simulation (closed loop): numbers, figures and an HTML page.

    python src/evaluate.py CHECKPOINT --dataset_id D --episodes 0:5
    python src/evaluate.py CHECKPOINT --env metaworld --task drawer-open-v3 --num_episodes 50
    python src/evaluate.py CHECKPOINT --env metaworld --task mt10 --num_episodes 10   # ten tasks, with a table and a summary
    python src/evaluate.py expert --env metaworld --task drawer-open-v3        # the task's scripted expert, the same way

N frames of an episode, A joints.
"""

import argparse
import functools
import json
import os
import signal
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

from command_line import TRAINED_ON, OneLineParser, command, print_warnings
from errors import UserError, find_path, printable, reason_of_disk
from printing import command_output
from sim.environments import OURS
from sim.suites import difficulty_groups, tasks_of
from sim.workers import InProcess, Workers, available_cores, start_server

AHEAD = (
    "in simulation: predict each chunk N steps before it is needed, as on an arm that does not wait for predictions. flow "
    "blends the chunks; smolvla, pi0 and pi05 continue them with LeRobot's real-time chunking"
)
MINIMUM = {
    "num_episodes": 1,
    "max_steps": 1,
    "n_action_steps": 1,
    "ahead": 1,
    "seed": 0,
    "num_videos": 0,
    "num_workers": 1,
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="evaluate.py", description="Evaluate a policy. Defaults are in brackets.")
    flag = parser.add_argument
    flag("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id; expert for the simulation's own")
    flag("--dataset_id", metavar="PATH_OR_ID", help="compare with recorded episodes of this dataset")
    flag("--episodes", default="0", help='episodes of the dataset, such as "0:5,9" [0]')
    flag("--env", help=f"run in this simulation: {', '.join(OURS)}, or any environment type of LeRobot")
    flag(
        "--task",
        help="task of the simulation, such as drawer-open-v3, or several separated by commas; for metaworld also mt10, mt50, "
        "easy, medium, hard, very_hard [the type's default]",
    )
    flag("--num_episodes", type=int, default=50, metavar="N", help="episodes to run of each task [50]")
    flag(
        "--num_workers", type=int, metavar="N", help="processes that run episodes [one for each core, if memory allows]"
    )
    flag("--seed", type=int, default=1000, metavar="N", help="seed of the first episode; the next ones count up [1000]")
    flag("--max_steps", type=int, metavar="N", help="steps after which an episode has failed [the type's default]")
    flag("--env_args", nargs="+", metavar="NAME=VALUE", help="settings of the environment, such as look=lerobot")
    flag(
        "--rename",
        nargs="+",
        default=[],
        metavar="OLD=NEW",
        help="give observations of the dataset or the simulation the names that the policy takes; auto pairs the cameras",
    )
    flag("--num_videos", type=int, default=2, metavar="N", help="videos of successes, and as many of failures [2]")
    flag("--output_dir", metavar="FOLDER", help="where reports are written [evaluation/ beside the checkpoint]")
    flag("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    flag("--n_action_steps", type=int, metavar="N", help="actions executed of each predicted chunk [as trained]")
    flag("--trained_on", metavar="DATASET", help=TRAINED_ON)
    flag("--ahead", type=int, metavar="N", help=AHEAD)
    args = parser.parse_args(argv)

    for name, minimum in MINIMUM.items():
        value = getattr(args, name)
        if value is not None and value < minimum:
            parser.error(f"--{name} must be at least {minimum}, got {value}")
    if not args.dataset_id and not args.env:
        parser.error("nothing to evaluate on. Pass --dataset_id with --episodes, or --env with --task")
    if args.checkpoint == "expert" and (args.dataset_id or args.env not in (*OURS, *OURS.values())):
        parser.error(
            f"expert is a simulation's scripted expert: expected --env {' or '.join(OURS)}, and no --dataset_id"
        )
    for pair in args.rename:
        if pair.count("=") != 1 and pair != "auto":
            parser.error(f"--rename {pair}: expected OLD=NEW, such as observation.image=observation.images.top")
    return args


if __name__ == "__main__":
    with command_output():
        given = parse_arguments(sys.argv[1:])  # before the imports that take seconds: mistakes are answered at once
    if given.env and (given.num_workers or available_cores()) > 1:
        start_server("training.closed_loop")  # which imports the same in the meantime
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes over, Ctrl-C ends the process without a traceback

import numpy as np
from tqdm.auto import tqdm

from data.frames import Frames
from data.loader import Loader
from data.source import Source
from policy.loaded import LoadedPolicy, load_policy
from policy.requirements import fetch_policy
from processors.features import window_deltas
from processors.pipelines import resize_of
from reports.figures import contact_sheet
from reports.pages import closed_loop_page, open_loop_page
from sim.rollout import Episode, summary, summary_of_tasks
from training.closed_loop import Runner, Setup, TaskResult, count_workers, run_tasks
from training.open_loop import (
    EpisodeComparison,
    OpenLoopErrors,
    compare,
    evenly_spaced_rows,
    measure,
    open_for_policy,
    permutation_importance,
)

WORST_MOMENTS = 6
PERMUTED_SAMPLES = 64


def evaluate_recorded(policy: LoadedPolicy, args: argparse.Namespace, name: str) -> None:
    """Compare a policy with recorded episodes, write the report and print the main numbers."""
    source = open_for_policy(policy, args.dataset_id, args.episodes, args.rename, rename_others=bool(args.env))
    print_warnings(source.warnings)
    folder = report_folder(args.checkpoint, args.output_dir, "open_loop")

    # Frame by frame, as the arm would ask for actions.
    episodes = []
    for episode in source.episodes:
        episodes.append(compare(policy, source, episode))
        print(f"episode {episode}: {len(episodes[-1].recorded)} frames")

    # In batches: the whole chunk at each frame.
    frames = Frames(source, resize_of(policy.preprocess))
    loader = Loader(source, frames, window_deltas(policy.policy.config, source.meta), batch_size=8, seed=0)
    try:
        errors = measure(policy, loader, evenly_spaced_rows(source.starts, source.ends, 0), seed=0)
        rows = evenly_spaced_rows(source.starts, source.ends, PERMUTED_SAMPLES)
        importance = permutation_importance(
            policy, loader, policy.needed(source.meta.features), rows, errors.std, seed=0
        )
    finally:
        loader.close()

    numbers = open_loop_numbers(episodes, errors, importance)
    moments = worst_moments(episodes, errors.std, source) if source.meta.camera_keys else []
    page = open_loop_page(name, source.name, numbers, errors, episodes, moments)
    report = write_report(folder, numbers, page)
    print(f"mean |action error| in robot units: {named(numbers['error_by_joint'], '.4g')}")
    if importance:
        print(f"permutation importance, in standard deviations: {named(importance, '.2g')}")
    print(f"latency of act(), ms: {named(numbers['latency_ms'], '.1f')}")
    print(f"report: {report}")


def open_loop_numbers(
    episodes: list[EpisodeComparison], errors: OpenLoopErrors, importance: dict[str, float] | None
) -> dict:
    """The content of numbers.json."""
    error = np.concatenate([np.abs(episode.predicted - episode.recorded) for episode in episodes])  # (N, A)
    milliseconds = np.concatenate([episode.milliseconds for episode in episodes])
    has_chunks = errors.error is not None
    return {
        "frames": len(error),
        "loss": errors.loss,
        "error_by_joint": dict(zip(errors.names, error.mean(0).tolist(), strict=True)),
        "recorded_std_by_joint": dict(zip(errors.names, errors.std.tolist(), strict=True)),
        "error_by_step": errors.error_by_step().tolist() if has_chunks else None,
        "error_by_step_and_joint": errors.error.tolist() if has_chunks else None,
        "permutation_importance": importance,
        "latency_ms": {f"p{p}": float(np.percentile(milliseconds, p)) for p in (50, 95, 99)},
        "episodes": [
            {"episode": e.episode, "frames": len(e.recorded), "error_by_joint": e.error.tolist()} for e in episodes
        ],
    }


@dataclass
class Moment:
    """A frame of a recorded episode: where it is, the cameras' images, and actions (A,) in standard deviations."""

    title: str
    images: list[np.ndarray]
    recorded: np.ndarray
    predicted: np.ndarray


def worst_moments(episodes: list[EpisodeComparison], std: np.ndarray, source: Source) -> list[Moment]:
    """The frames at which the action is furthest off, at least a second apart."""
    fps = source.meta.fps
    candidates = []
    for position, episode in enumerate(episodes):
        off = np.abs(episode.predicted - episode.recorded)  # (N, A)
        off = off / np.where(std > 0, std, np.inf)  # 0 for a joint that is still
        candidates += [(distance, position, frame) for frame, distance in enumerate(off.mean(1))]
    worst = []
    for distance, position, frame in sorted(candidates, reverse=True):
        is_near = any(position == other and abs(frame - near) < fps for _, other, near in worst)
        if not is_near and len(worst) < WORST_MOMENTS:
            worst.append((distance, position, frame))

    scale = np.where(std > 0, std, 1)
    frames = Frames(source)
    moments = []
    for distance, position, frame in worst:
        episode = episodes[position]
        row = source.starts[position : position + 1] + frame  # (1,)
        where = f"episode {episode.episode}, frame {frame} ({frame / fps:.1f} s)"
        moment = Moment(
            title=f"{where}: off by {distance:.2f} standard deviations",
            images=[frames.read(key, row)[0].permute(1, 2, 0).numpy() for key in frames.keys],
            recorded=episode.recorded[frame] / scale,
            predicted=episode.predicted[frame] / scale,
        )
        moments.append(moment)
    frames.close()
    return moments


def evaluate_simulated(args: argparse.Namespace, name: str) -> None:
    """Run episodes in simulation, write a report with videos for each task, and print the success rates."""
    tasks = tasks_of(args.env, args.task)
    seeds = range(args.seed, args.seed + args.num_episodes)
    checkpoint = None if args.checkpoint == "expert" else fetch_policy(args.checkpoint, "policy")
    folders = {
        task: report_folder(args.checkpoint, args.output_dir, f"{args.env}_{task or 'default'}") for task in tasks
    }
    count = count_workers(args.num_workers, len(tasks) * len(seeds), checkpoint, args.device)
    setup = Setup(
        checkpoint=checkpoint and str(checkpoint),
        env=args.env,
        device=args.device,
        n_action_steps=args.n_action_steps,
        ahead=args.ahead,
        env_args=args.env_args,
        max_steps=args.max_steps,
        rename=args.rename,
        trained_on=args.trained_on,
    )
    make_runner = functools.partial(Runner, setup)
    pool = InProcess(make_runner) if count == 1 else Workers(make_runner, count)
    numbers = {}
    first_episodes = {}
    try:
        with tqdm(total=len(tasks) * len(seeds), unit="episode", disable=not sys.stderr.isatty()) as bar:
            outcomes = []

            def on_episode(episode: Episode) -> None:
                outcomes.append(episode.success)
                bar.set_postfix(success=f"{np.mean(outcomes):.0%}", refresh=False)
                bar.update()

            for result in run_tasks(pool, tasks, seeds, args.num_videos, on_episode):
                numbers[result.task] = report_task(folders[result.task], result, args, name)
                first = result.episodes[0]  # one picture of it is enough
                first_episodes[result.task] = replace(first, frames=first.frames[-1:])
                lines = task_lines(numbers[result.task], seeds, folders[result.task], is_one=len(tasks) == 1)
                tqdm.write("\n".join(lines))
    finally:
        pool.close()
    if len(tasks) > 1:
        together = summary_of_tasks([numbers[task] for task in tasks], difficulty_groups(args.env))
        print_table(together)
        suite = args.task if "," not in args.task else f"{len(tasks)}_tasks"
        path = folders[tasks[0]].with_name(f"{args.env}_{suite}.json")
        write_json(path, {"env": args.env, "checkpoint": args.checkpoint, **together})
        sheet = tasks_sheet([first_episodes[task] for task in tasks], together, name)
        sheet.savefig(path.with_suffix(".png"), dpi=110)
        print(f"seeds {seeds[0]} to {seeds[-1]} of each task; summary: {path}, {path.with_suffix('.png')}")


def report_task(folder: Path, result: TaskResult, args: argparse.Namespace, name: str) -> dict:
    """Write the report of one task, with its videos. Returns the content of its numbers.json, which is written last."""
    from lerobot.utils.io_utils import write_video

    numbers = {"env": args.env, "task": result.name, "max_steps": result.max_steps, **summary(result.episodes)}
    for seed in result.changed:
        warning = (
            f"{result.name}: seed {seed} ended differently when it was run again to be filmed. There is no video of it"
        )
        print_warnings([warning])
    successes = f"{numbers['successes']} of {numbers['num_episodes']}"
    sheet = contact_sheet(
        images=[episode.frames[-1] for episode in result.episodes],
        labels=[f"{episode.seed}: {episode.steps}" for episode in result.episodes],
        successes=[episode.success for episode in result.episodes],
        title=f"{name}, {result.name}: {successes} (seed: steps)",
    )
    sheet.savefig(folder / "episodes.png", dpi=110)
    videos = {}
    for success, kind in ((True, "success"), (False, "failure")):
        filmed = [episode for episode in result.episodes if episode.success == success and len(episode.frames) > 1]
        for episode in filmed[: args.num_videos]:
            path = folder / f"{kind}_{episode.seed}.mp4"
            write_video(path, episode.frames, round(result.fps))
            videos[f"{kind}, seed {episode.seed}"] = path
    write_report(folder, numbers, closed_loop_page(name, numbers, sheet, videos))
    return numbers


def tasks_sheet(first_episodes: list[Episode], result: dict, name: str):
    """A figure with the last image of each task's first episode, under how many of its episodes succeeded.

    Args:
        result: what `summary_of_tasks` returns.
    """
    labels = []
    for task, row in result["tasks"].items():
        short = textwrap.fill(task, 18)
        labels.append(f"{short}\n{row['successes']} of {row['num_episodes']}")
    overall = result["all"]
    title = f"{name}: {overall['successes']} of {overall['num_episodes']} (pictures: seed {first_episodes[0].seed})"
    return contact_sheet(
        images=[episode.frames[-1] for episode in first_episodes],
        labels=labels,
        successes=[episode.success for episode in first_episodes],
        title=title,
    )


def task_lines(numbers: dict, seeds: range, folder: Path, is_one: bool) -> list[str]:
    """What is printed of a task: all if it is the only one, else one line."""
    count = f"{numbers['successes']} of {numbers['num_episodes']}"
    interval = f"95 % interval {numbers['success_low']:.1%} to {numbers['success_high']:.1%}"
    if not is_one:
        return [f"{numbers['task']}: {count} ({interval})"]
    return [
        f"success {count}: {numbers['success_rate']:.1%} ({interval})",
        f"seeds {seeds[0]} to {seeds[-1]}; report: {folder / 'report.html'}",
    ]


def print_table(result: dict) -> None:
    """The success of tasks, groups and all of them, as `summary_of_tasks` returns it."""
    rows = dict(result["tasks"])
    rows |= {f"{name} ({group['num_tasks']} tasks)": group for name, group in result["groups"].items()}
    rows |= {f"all ({result['all']['num_tasks']} tasks)": result["all"]}
    width = max(map(len, rows)) + 2
    print(f"{'':<{width}}{'success':>12}{'rate':>8}   95 % interval")
    for label, row in rows.items():
        count = f"{row['successes']} of {row['num_episodes']}"
        interval = f"{row['success_low']:.1%} to {row['success_high']:.1%}"
        print(f"{label:<{width}}{count:>12}{row['success_rate']:>8.1%}   {interval}")
    if len(result["groups"]) > 1:
        print(f"mean of the groups' rates: {result['mean_of_groups']:.1%}")


def report_folder(checkpoint: str, output_dir: str | None, kind: str) -> Path:
    """Where an evaluation is written: beside the checkpoint, which must hold only its own files."""
    path = Path(os.path.expanduser(checkpoint))
    if output_dir:
        folder = find_path(output_dir, "--output_dir") or Path(os.path.expanduser(output_dir))
    elif not path.is_dir():
        folder = Path("outputs") / "evaluation" / checkpoint.replace("/", "_")
    elif path.name.startswith("checkpoint-"):
        folder = path.parent / "evaluation" / path.name
    else:
        folder = path / "evaluation" / "final"
    try:
        (folder / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder / kind} cannot be written: {reason_of_disk(error)}. Pass another --output_dir"
        ) from error
    return folder / kind


def write_report(folder: Path, numbers: dict, page: str) -> Path:
    report = folder / "report.html"
    report.write_text(page, encoding="utf-8")
    write_json(folder / "numbers.json", numbers)  # last: where it is, the report is complete
    return report


def write_json(path: Path, content: dict) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(content, indent=2) + "\n")
    unfinished.replace(path)


def named(values: dict[str, float], digits: str) -> str:
    return printable(", ".join(f"{name} {value:{digits}}" for name, value in values.items()))


@command
def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    name = "/".join(Path(args.checkpoint).parts[-2:])
    if args.dataset_id:
        policy = load_policy(args.checkpoint, args.device, args.n_action_steps, trained_on=args.trained_on)
        evaluate_recorded(policy, args, name)
    if args.env:
        evaluate_simulated(args, name)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
