"""Compare a policy with a recorded episode."""

import sys
import time

import numpy as np

from command_line import OneLineParser, command
from errors import UserError
from policy.loaded import load_policy


def recorded_observations(source, episode: int, keys):
    """(observation, action) of each recorded frame of one episode, in order, as act() takes and gives them."""
    import torch

    from data.frames import Frames

    place = source.episodes.index(episode)
    frames = Frames(source)
    try:
        for row in range(int(source.starts[place]), int(source.ends[place])):
            observation = {"task": source.tasks[int(source.columns["task_index"][row])]} if source.tasks else {}
            for key in keys:
                if key in frames.keys:
                    observation[key] = frames.read(key, torch.tensor([row]))[0].permute(1, 2, 0).numpy()  # (H, W, C)
                else:
                    observation[key] = np.atleast_1d(source.columns[key][row].numpy())
            yield observation, np.atleast_1d(source.columns["action"][row].numpy())
    finally:
        frames.close()


def compare(policy, source, episode: int, fps: float | None = None) -> dict:
    """Run a LoadedPolicy (or AsyncPolicy) over a recorded episode, asking for an action at every frame, `fps` times a second at most.

    Returns:
        names (A,), predicted and recorded (N, A) in robot units, mean absolute error (A,), the recorded actions'
        standard deviation as spread (A,), milliseconds (N,) of each act().
    """
    from tqdm.auto import tqdm

    from runtime import EVAL, seed_all
    from training.evaluation import action_names

    for key in policy.expected:
        if key not in source.meta.features:
            raise UserError(
                f"dataset {source.name} has no {key}, which the policy takes: pass the dataset it was trained on"
            )
    has, gives = source.meta.features["action"]["shape"][0], policy.policy.config.action_feature.shape[0]
    if has != gives:
        raise UserError(
            f"dataset {source.name} has {has} actions, the policy gives {gives}: pass the dataset it was trained on"
        )
    policy.reset()  # which may wait for a chunk that draws still
    seed_all(EVAL, episode)  # for policies that draw noise: the same numbers each time
    predicted, recorded, times, due = [], [], [], 0.0
    pairs = recorded_observations(source, episode, policy.expected)
    for observation, action in tqdm(pairs, desc=f"episode {episode}", disable=not sys.stderr.isatty()):
        time.sleep(max(0.0, due - time.perf_counter()))
        begun = time.perf_counter()
        due = begun + (1 / fps if fps else 0)
        predicted.append(policy.act(observation))
        times.append(1000 * (time.perf_counter() - begun))
        recorded.append(action)
    predicted, recorded = np.stack(predicted), np.stack(recorded)  # (N, A)
    return {
        "names": action_names(source.meta),
        "predicted": predicted,
        "recorded": recorded,
        "error": np.abs(predicted - recorded).mean(0),
        "spread": recorded.std(0),
        "milliseconds": np.array(times),
    }


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="infer.py", description="Compare a policy with a recorded episode, action by action.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id")
    parser.add_argument("--dataset_id", required=True, help="a folder or a Hub id")
    parser.add_argument("--episode", type=int, default=0, help="episode to run over [0]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument("--n_action_steps", type=int, help="actions carried out of each chunk [as trained]")
    parser.add_argument("--ahead", action="store_true", help="predict ahead, as far as the dataset's fps asks for")
    args = parser.parse_args(argv)
    from data.source import open_dataset

    source = open_dataset(args.dataset_id, episodes=str(args.episode), flag="--episode")
    source.require()
    policy = load_policy(args.checkpoint, args.device, args.n_action_steps)
    if args.ahead:
        policy = policy.ahead(source.meta.fps, next(iter(source.tasks), ""))
        print(f"a chunk is asked for {policy.lead} frames ahead, and {policy.count} actions are carried out of each")
    result = compare(policy, source, args.episode, source.meta.fps if args.ahead else None)
    width = max(len(name) for name in result["names"])
    print(
        f"{'joint':<{width}}  mean |error|  recorded std   (robot units, episode {args.episode}, {len(result['milliseconds'])} frames)"
    )
    for name, error, spread in zip(result["names"], result["error"], result["spread"], strict=True):
        print(f"{name:<{width}}  {error:12.4g}  {spread:12.4g}")
    first, *times = result["milliseconds"]
    later = f", then {np.median(times):.1f} ms (median) and {max(times):.1f} ms at most" if times else ""
    print(f"latency of act() on {policy.device}: first frame {first:.1f} ms{later}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
