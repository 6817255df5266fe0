"""Say how good a policy is: against recorded episodes, and in simulation. Writes numbers, pictures and a page of each.

    python src/evaluate.py CHECKPOINT --dataset_id D --episodes 0:5
    python src/evaluate.py CHECKPOINT --env metaworld --task drawer-open-v3 --num_episodes 50
    python src/evaluate.py expert --env metaworld --task drawer-open-v3        # the task's scripted expert, through the same path

N frames of an episode, A joints, T steps of a chunk.
"""

import json
import sys
from pathlib import Path

import numpy as np

from command_line import OneLineParser, command
from errors import UserError
from reports.pages import closed_loop_page, open_loop_page


def open_loop(policy, source, say=print) -> dict:
    """Run a policy over recorded episodes as inference does, and compare its actions with the recorded ones.

    Args:
        policy: an infer.LoadedPolicy.
        source: an open dataset, of the episodes to run over.

    Returns:
        episodes: dicts of episode, predicted and recorded (N, A) float32, milliseconds (N,) of each act().
        errors: validation.Errors over every frame of them, as predicted chunks.
        permutation_importance: of each observation how far the actions move without it, by validation.permutation_importance at 64 frames.
    """
    from data.frames import Frames
    from data.loader import Loader
    from infer import compare
    from processors.pipelines import resize_of, window_deltas
    from training.evaluation import measure, permutation_importance, spread

    episodes = []
    for episode in source.episodes:
        episodes.append({"episode": episode, **compare(policy, source, episode)})
        say(f"episode {episode}: {len(episodes[-1]['recorded'])} frames")
    deltas = window_deltas(policy.policy.config, source.meta)
    loader = Loader(source, Frames(source, resize_of(policy.preprocess)), deltas, batch_size=8, seed=0)
    try:
        parts = policy.policy, policy.preprocess, policy.postprocess
        errors = measure(*parts, loader, spread(source.starts, source.ends, 0), seed=0)
        some = spread(source.starts, source.ends, 64)
        used = permutation_importance(*parts, loader, list(policy.expected), some, errors.spread, seed=0)
    finally:
        loader.close()
    return {"episodes": episodes, "errors": errors, "permutation_importance": used}


def open_loop_numbers(result: dict) -> dict:
    """The figures of `open_loop` as JSON has them."""
    errors, episodes = result["errors"], result["episodes"]
    error = np.concatenate([np.abs(e["predicted"] - e["recorded"]) for e in episodes])  # (N, A)
    milliseconds = np.concatenate([e["milliseconds"] for e in episodes])
    return {
        "frames": len(error),
        "loss": errors.loss,
        "error_by_joint": dict(zip(errors.names, error.mean(0).tolist(), strict=True)),
        "recorded_std_by_joint": dict(zip(errors.names, errors.spread.tolist(), strict=True)),
        "error_by_step": None if errors.grid is None else errors.line()["val_error_by_step"],
        "error_by_step_and_joint": None if errors.grid is None else errors.grid.tolist(),
        "permutation_importance": result["permutation_importance"],
        "latency_ms": {f"p{p}": float(np.percentile(milliseconds, p)) for p in (50, 95, 99)},
        "episodes": [
            {"episode": e["episode"], "frames": len(e["recorded"]), "error_by_joint": e["error"].tolist()}
            for e in episodes
        ],
    }


def simulate(policy, args, folder: Path, name: str) -> dict:
    """Episodes in simulation from fixed seeds, with their pictures; `policy` None is the environment's expert."""
    from reports.figures import contact_sheet
    from sim.environments import OURS, make_env
    from sim.rollout import run_episodes, summary, write_video

    overrides = list(args.env_args or [])
    if args.max_steps and args.env in OURS:
        overrides.append(f"episode_length={args.max_steps}")
    env, config = make_env(args.env, args.task, overrides)
    try:
        seeds = list(range(args.seed, args.seed + args.num_episodes))
        limit = min(env.call("_max_episode_steps")[0], args.max_steps or 10**9)
        rename = dict(pair.split("=") for pair in args.rename or [])
        episodes = run_episodes(env, config, policy, seeds, rename, limit, args.num_videos)
    finally:
        env.close()
    result = {"env": args.env, "task": config.task, "max_steps": limit, **summary(episodes)}
    (folder / "numbers.json").write_text(json.dumps(result, indent=2) + "\n")
    sheet = contact_sheet(episodes, f"{name}, {config.task}: {result['successes']} of {len(episodes)} (seed: steps)")
    sheet.savefig(folder / "episodes.png", dpi=110)
    videos = []
    for kind in (True, False):
        for episode in [e for e in episodes if e.success == kind][: args.num_videos]:
            path = folder / f"{'success' if kind else 'failure'}_{episode.seed}.mp4"
            write_video(path, episode.frames, config.fps)
            videos.append((path, path.stem.replace("_", ", seed ")))
    (folder / "report.html").write_text(closed_loop_page(result, sheet, videos, name))
    return result


def folder_for(checkpoint: str, asked: str | None, kind: str) -> Path:
    """Where the results of an evaluation go: beside the checkpoint, not into it."""
    place = Path(checkpoint).expanduser()
    if asked:
        folder = Path(asked).expanduser() / kind
    elif not place.is_dir():
        folder = Path("outputs") / "evaluation" / checkpoint.replace("/", "_") / kind
    elif place.name.startswith("checkpoint-"):
        folder = place.parent / "evaluation" / place.name / kind
    else:
        folder = place / "evaluation" / "final" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder} cannot be written: {error.strerror}") from error
    return folder


def evaluate(args) -> None:
    if not (args.dataset_id or args.env):
        raise UserError("nothing to evaluate on: pass --dataset_id with --episodes, or --env with --task")
    for pair in args.rename or []:
        if pair.count("=") != 1:
            raise UserError(f"--rename {pair}: expected THEIRS=OURS, such as observation.image=observation.images.top")
    if args.checkpoint == "expert" and args.dataset_id:
        raise UserError("the expert plays in simulation: pass --env metaworld instead of --dataset_id")
    from policy.loaded import load_policy

    policy = None if args.checkpoint == "expert" else load_policy(args.checkpoint, args.device, args.n_action_steps)
    name = "/".join(Path(args.checkpoint).parts[-2:])
    if args.dataset_id:
        from data.source import open_dataset

        source = open_dataset(args.dataset_id, episodes=args.episodes)
        source.require()
        folder = folder_for(args.checkpoint, args.output_dir, "open_loop")
        result = open_loop(policy, source)
        numbers = open_loop_numbers(result)
        (folder / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
        (folder / "report.html").write_text(open_loop_page(result, numbers, source, name))
        joints = ", ".join(f"{joint} {error:.4g}" for joint, error in numbers["error_by_joint"].items())
        latency = ", ".join(f"{p} {ms:.1f}" for p, ms in numbers["latency_ms"].items())
        print(f"mean |action error| in robot units: {joints}")
        if used := numbers["permutation_importance"]:
            moved = ", ".join(f"{key} {value:.2g}" for key, value in used.items())
            print(f"actions move, when one observation is another moment's, by standard deviations: {moved}")
        print(f"latency of act(), ms: {latency}\nreport: {folder / 'report.html'}")
    if args.env:
        folder = folder_for(args.checkpoint, args.output_dir, f"{args.env}_{args.task or 'default'}")
        if args.ahead and policy is not None:
            from policy.async_policy import AsyncPolicy

            policy = AsyncPolicy(policy, args.ahead)
        result = simulate(policy, args, folder, name)
        interval = f"95 % interval {result['success_low']:.1%} to {result['success_high']:.1%}"
        print(f"success {result['successes']} of {result['num_episodes']}: {result['success_rate']:.1%} ({interval})")
        print(f"seeds {args.seed} to {args.seed + args.num_episodes - 1}; report: {folder / 'report.html'}")


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="evaluate.py", description="Say how good a policy is. In brackets: the default.")
    flag = parser.add_argument
    flag("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id; expert for the simulation's own")
    flag("--dataset_id", metavar="PATH_OR_ID", help="compare with recorded episodes of this dataset")
    flag("--episodes", default="0", help='which, such as "0:5,9" [0]')
    flag("--env", help="try in this simulation: metaworld, or any type that LeRobot knows")
    flag("--task", help="its task, such as drawer-open-v3 [the type's own]")
    flag("--num_episodes", type=int, default=50, metavar="N", help="episodes to try [50]")
    flag("--seed", type=int, default=1000, metavar="N", help="of the first episode; the next ones follow [1000]")
    flag("--max_steps", type=int, metavar="N", help="steps after which an episode has failed [the type's own]")
    flag("--env_args", nargs="+", metavar="NAME=VALUE", help="settings of the environment's own, such as look=lerobot")
    flag("--rename", nargs="+", metavar="THEIRS=OURS", help="what the environment gives, by the name the policy knows")
    flag("--num_videos", type=int, default=2, metavar="N", help="videos of successes, and of failures [2]")
    flag("--output_dir", metavar="FOLDER", help="where the reports go [evaluation/ beside the checkpoint]")
    flag("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    flag("--n_action_steps", type=int, metavar="N", help="actions carried out of each predicted chunk [as trained]")
    flag(
        "--ahead", type=int, metavar="N", help="in simulation: predict chunks N steps ahead, as where they take so long"
    )
    args = parser.parse_args(argv)
    for name in ("num_episodes", "max_steps", "n_action_steps", "ahead", "seed", "num_videos"):
        low = 0 if name in ("seed", "num_videos") else 1
        if (value := getattr(args, name)) is not None and value < low:
            parser.error(f"--{name} must be at least {low}, got {value}")
    evaluate(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
