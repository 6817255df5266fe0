"""Run a trained policy: `load_policy(checkpoint).act(observation)`."""

import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

import hub
from checkpoints.folder import verify_policy
from errors import UserError, nearest, one_line
from policy.async_policy import AsyncPolicy
from policy.chunk import predict_chunk
from policy.factory import build_policy, load_policy_config, policy_folder
from processors.pipelines import EMPTY_CAMERA, load_processors, renamed_from, resize_of
from processors.state_only import StateToEnvironmentState
from runtime import pick_device


class LoadedPolicy:
    """A policy with its processors, one observation at a time, as the arm asks for actions.

    Args:
        policy, preprocess, postprocess: LeRobot's, on their device.
        task: task text for observations that bring none.
    """

    def __init__(self, policy, preprocess, postprocess, task: str = ""):
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
            An ahead.AsyncPolicy, which acts and resets in this one's place.

        Raises:
            UserError: a chunk takes longer than half of its actions.
        """
        return AsyncPolicy(self, max(1, math.ceil(self.latency(task) * fps)))

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
    if n_action_steps is not None and n_action_steps < 1:
        raise UserError(f"--n_action_steps must be 1 or more, got {n_action_steps}")
    folder, on = policy_folder(hub.fetch(str(checkpoint), "policy")), str(pick_device(device))
    verify_policy(folder)
    overrides = None if n_action_steps is None else [f"n_action_steps={n_action_steps}"]
    policy = build_policy(load_policy_config(folder, overrides, on), None, folder).eval()
    return LoadedPolicy(policy, *load_processors(folder, on), task)


def expected_observation(config, preprocess, image_size) -> dict[str, tuple[str, tuple]]:
    """Key -> (kind, shape) that act() takes; None in a shape is any size."""
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
