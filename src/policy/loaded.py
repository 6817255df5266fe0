"""Run a trained policy: `load_policy(checkpoint).act(observation)`, and a CLI that compares it with recorded episodes."""

import math
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np

from command_line import OneLineParser, command
from config import UserError, nearest, one_line


class LoadedPolicy:
    """A policy with its processors, one observation at a time, as the arm asks for actions.

    Args:
        policy, preprocess, postprocess: LeRobot's, on their device.
        task: task text for observations that bring none.
    """

    def __init__(self, policy, preprocess, postprocess, task: str = ""):
        from processors import resize_of

        self.policy, self.preprocess, self.postprocess, self.task = policy, preprocess, postprocess, task
        self.device, self.kind = next(policy.parameters()).device, policy.config.type
        self.expected = expected_observation(policy.config, preprocess, resize_of(preprocess))
        # pi0's family can predict actions relative to the state; LeRobot's own loop refuses those, as a later state would be added
        self.relative = any(getattr(step, "relative_step", None) and step.enabled for step in postprocess.steps)
        self.reset()

    def reset(self) -> None:
        """Forget the actions still to come and the observations gone by: call it when an episode starts."""
        self.policy.reset()
        self.preprocess.reset()
        self.postprocess.reset()
        self.absolute: deque = deque()  # actions to come of a chunk that was predicted relative to the state

    def act(self, observation: dict) -> np.ndarray:
        """The action to carry out now.

        Args:
            observation: float (D,) arrays such as "observation.state" in robot units, uint8 (H, W, 3) pictures such as
                "observation.images.top", and optionally the "task" as text.

        Returns:
            (A,) float32 in robot units. A chunk is predicted when the last one is used up.

        Raises:
            UserError: a key, shape or dtype is not what the policy was trained on.
        """
        return self.select(self.batch_of(observation)).squeeze(0).cpu().numpy()

    def batch_of(self, observation: dict) -> dict:
        """LeRobot's batch of one observation.

        Raises:
            UserError: a key, shape or dtype is not what the policy was trained on.
        """
        batch = {key: self._tensor(key, observation) for key in self.expected}
        unknown = set(observation) - set(self.expected) - {"task"}
        if unknown:
            key = min(map(str, unknown))
            raise UserError(
                f"the observation has {key!r}, which this policy does not take{nearest(key, self.expected)}"
            )
        return {**batch, "task": observation.get("task", self.task)}

    def select(self, batch: dict):
        """(B, A) actions in robot units, a tensor, for a LeRobot batch of one moment's observations."""
        import torch

        from policy.chunk import predict_chunk

        with torch.inference_mode():
            ready = self.preprocess(batch)
            if not self.relative:
                return self.postprocess(self.policy.select_action(ready))
            if not self.absolute:
                chunk = self.postprocess(predict_chunk(self.policy, ready))  # (B, T, A), all by the state of now
                self.absolute.extend(chunk[:, : self.policy.config.n_action_steps].unbind(1))
            return self.absolute.popleft()

    def ahead(self, fps: float, task: str = ""):
        """This policy with chunks that are predicted ahead, so that an arm that asks `fps` times a second never waits for one.

        How far ahead is measured here. A policy that blends a chunk into the next (flow) keeps what is settled by then and blends after.

        Returns:
            An ahead.Ahead, which acts and resets in this one's place.

        Raises:
            UserError: a chunk takes longer than half of its actions.
        """
        from ahead import Ahead

        return Ahead(self, max(1, math.ceil(self.latency(task) * fps)))

    def latency(self, task: str = "", runs: int = 30, pixels: int = 480) -> float:
        """Seconds that an observation to a chunk takes, the 99th percentile over `runs`; `pixels` a side where any size goes."""
        times = []
        task = task or self.task or next(iter(getattr(self.policy.config, "tasks", None) or []), "")  # flow's own
        zeros = {
            key: np.zeros([size or pixels for size in shape], np.uint8 if kind == "uint8" else np.float32)
            for key, (kind, shape) in self.expected.items()
        }
        for _ in range(runs + 3):
            self.reset()
            begun = time.perf_counter()
            self.act({**zeros, "task": task})
            times.append(time.perf_counter() - begun)
        self.reset()
        return float(np.percentile(times[3:], 99))

    def _tensor(self, key: str, observation: dict):
        """(1, D) float32, or (1, C, H, W) in [0, 1]."""
        import torch

        kind, shape = self.expected[key]
        if key not in observation:
            raise UserError(
                f"the observation has no {key!r}: expected {kind} of shape {spell(shape)}, got keys {sorted(observation)}"
            )
        try:
            value = np.asarray(observation[key])
        except ValueError as error:  # a ragged list
            raise UserError(f"{key}: expected {kind} of shape {spell(shape)}: {one_line(error)}") from None
        fits = len(value.shape) == len(shape) and all(
            want in (None, got) for want, got in zip(shape, value.shape, strict=True)
        )
        if kind == "uint8" and (value.dtype != np.uint8 or not fits):
            raise UserError(
                f"{key}: expected uint8 of shape {spell(shape)} (height, width, channels), got {value.dtype} of {value.shape}"
            )
        if kind == "float" and (value.dtype.kind not in "fiub" or not fits):
            raise UserError(
                f"{key}: expected numbers of shape {spell(shape)}, got {value.dtype} of shape {value.shape}"
            )
        if kind == "uint8":
            return torch.from_numpy(np.ascontiguousarray(value)).permute(2, 0, 1).to(torch.float32)[None] / 255.0
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"{key}: expected finite numbers, got {value}")
        return torch.from_numpy(value)[None]


def load_policy(
    checkpoint: str | Path, device: str = "auto", n_action_steps: int | None = None, task: str = ""
) -> LoadedPolicy:
    """A trained policy, ready to act.

    Args:
        checkpoint: a checkpoint-<step> folder, a run's output folder, or any LeRobot policy folder or Hub id.
        device: auto, cpu, cuda, ...
        n_action_steps: actions that are carried out of each predicted chunk (else as trained).
        task: task text for observations that bring none.

    Raises:
        UserError: there is no policy, or it does not load.
    """
    import hub
    from checkpoint import verify_policy
    from convert import policy_folder
    from policy import build_policy, load_policy_config
    from processors import load_processors
    from runtime import pick_device

    if n_action_steps is not None and n_action_steps < 1:
        raise UserError(f"--n_action_steps must be 1 or more, got {n_action_steps}")
    folder, on = policy_folder(hub.fetch(str(checkpoint), "policy")), str(pick_device(device))
    verify_policy(folder)
    pairs = None if n_action_steps is None else [f"n_action_steps={n_action_steps}"]
    policy = build_policy(load_policy_config(folder, pairs, on), None, folder).eval()
    return LoadedPolicy(policy, *load_processors(folder, on), task)


def expected_observation(config, preprocess, image_size) -> dict[str, tuple[str, tuple]]:
    """Key -> (kind, shape) that act() takes; None in a shape is any size."""
    from processors import EMPTY_CAMERA, renamed_from
    from processors.state_only import StateToEnvironmentState

    expected = {}
    made_up = any(isinstance(step, StateToEnvironmentState) for step in preprocess.steps)
    for key, feature in config.input_features.items():
        if (key == "observation.environment_state" and made_up) or EMPTY_CAMERA in key:
            continue
        if feature.type.value == "VISUAL":
            channels, height, width = feature.shape
            expected[renamed_from(preprocess, key)] = (
                "uint8",
                (None, None, channels) if image_size else (height, width, channels),
            )
        else:
            expected[renamed_from(preprocess, key)] = ("float", tuple(feature.shape))
    return expected


def spell(shape: tuple) -> str:
    return (
        "(" + ", ".join("any" if size is None else str(size) for size in shape) + ("," if len(shape) == 1 else "") + ")"
    )


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
    """Run a LoadedPolicy (or Ahead) over a recorded episode, asking for an action at every frame, `fps` times a second at most.

    Returns:
        names (A,), predicted and recorded (N, A) in robot units, mean absolute error (A,), the recorded actions'
        standard deviation as spread (A,), milliseconds (N,) of each act().
    """
    from tqdm.auto import tqdm

    from runtime import EVAL, seed_all
    from validation import action_names

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
