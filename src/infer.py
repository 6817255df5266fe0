"""Compare a policy with a recorded episode: `python src/infer.py CHECKPOINT --dataset_id D --episode 0`.

In Python: `from infer import load_policy`, then `load_policy(checkpoint).act(observation)`.
"""

import argparse
import signal
import sys

from command_line import TRAINED_ON, OneLineParser, command, print_warnings
from errors import printable
from printing import command_output

AHEAD = (
    "predict each chunk in a thread while the last one is carried out, in real time at the dataset's fps, and print how the "
    "chunks fit together. flow blends them; smolvla, pi0 and pi05 continue them with LeRobot's real-time chunking"
)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(prog="infer.py", description="Compare a policy with a recorded episode, action by action.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, a run's folder, or a Hub id")
    parser.add_argument("--dataset_id", required=True, help="a dataset's folder or Hub id")
    parser.add_argument("--episode", type=int, default=0, help="episode to compare with [0]")
    parser.add_argument(
        "--rename",
        nargs="+",
        metavar="OLD=NEW",
        help="give observations of the dataset the names that the policy takes; auto pairs the cameras",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ... [auto]")
    parser.add_argument("--n_action_steps", type=int, help="actions executed of each predicted chunk [as trained]")
    parser.add_argument("--trained_on", metavar="DATASET", help=TRAINED_ON)
    parser.add_argument("--ahead", action="store_true", help=AHEAD)
    return parser.parse_args(argv)


if __name__ == "__main__":
    with command_output():
        parse_arguments(sys.argv[1:])  # before the imports that take seconds: --help and mistakes are answered at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes over, Ctrl-C ends the process without a traceback

import numpy as np
import torch

from policy.loaded import load_policy
from processors.statistics import is_still
from training.open_loop import EpisodeComparison, compare, open_for_policy, recorded_observations

__all__ = ["compare", "load_policy", "recorded_observations"]


def print_comparison(result: EpisodeComparison, device) -> None:
    """Print the error of each joint and the latency of act()."""
    width = max(len(name) for name in result.names)
    frames = len(result.milliseconds)
    print(f"{'joint':<{width}}  mean |error|  recorded std   (robot units, episode {result.episode}, {frames} frames)")
    for name, error, std in zip(result.names, result.error, result.recorded.std(0), strict=True):
        print(printable(f"{name:<{width}}  {error:12.4g}  {std:12.4g}"))
    first, *later = result.milliseconds
    latency = f"latency of act() on {device}: first frame {first:.1f} ms"
    if later:
        latency += f", then {np.median(later):.1f} ms (median) and {max(later):.1f} ms at most"
    print(latency)


def print_chunks(result: EpisodeComparison) -> None:
    """Print how far the action moves per frame where the chunk changes, and elsewhere."""
    std = result.recorded.std(0)
    moving = ~is_still(torch.from_numpy(result.recorded)).numpy()
    changes = np.diff(result.chunks) > 0  # (N - 1,), without the first chunk
    if not changes.any() or not moving.any():
        return
    moves = np.abs(np.diff(result.predicted, axis=0))[:, moving] / std[moving]
    moves = moves.mean(1)  # (N - 1,)
    print("how far the action moves from frame to frame, in recorded standard deviations, averaged over joints:")
    for where, rows in (("where a chunk begins", changes), ("elsewhere", ~changes)):
        if rows.any():
            print(f"  {where:<20}  mean {moves[rows].mean():.3g}  most {moves[rows].max():.3g}  frames {rows.sum()}")


@command
def main(argv: list[str]) -> int:
    args = parse_arguments(argv)
    policy = load_policy(args.checkpoint, args.device, args.n_action_steps, trained_on=args.trained_on)
    source = open_for_policy(policy, args.dataset_id, str(args.episode), args.rename, flag="--episode")
    print_warnings(source.warnings)
    fps = None
    if args.ahead:
        fps = source.meta.fps
        policy = policy.ahead(fps, next(iter(source.tasks.values()), ""))
        print(
            f"each chunk is requested {policy.lead} frames ahead, and {policy.actions_per_chunk} of its actions are executed"
        )
    result = compare(policy, source, args.episode, fps)
    print_comparison(result, policy.device)
    if args.ahead:
        print_chunks(result)
        print(policy.timing())
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
