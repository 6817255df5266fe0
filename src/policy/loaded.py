"""Run a trained policy: `load_policy(checkpoint).act(observation)`.

B observations, T steps of a chunk, A joints, D numbers, C channels, H and W pixels.
"""

import logging
import math
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
from lerobot.configs import FeatureType

from checkpoints.folder import verify_policy
from checkpoints.tensors import is_finite
from errors import UserError, first_of, nearest, one_line
from policy.async_policy import AsyncPolicy
from policy.chunk import count_planned, predict_chunk, rtc_off, supports_rtc
from policy.factory import build_policy, load_policy_config
from policy.migration import resolve_policy_folder
from policy.observation import to_tensor
from policy.requirements import check_requirements, fetch_policy
from policy.training_record import (
    trained_datasets,
    trained_depth,
    trained_joint_names,
    trained_rename,
)
from processors.bases import AUTO, cameras_of, does_without_cameras, match_statistics, resizes_pictures, trained_cameras
from processors.features import NEED_STATE, parse_rename
from processors.padding import CutAction, act_for, number_of, padding_of
from processors.pipelines import load_processors, name_before_rename, resize_of, set_rename
from processors.state_only import StateToEnvironmentState
from processors.statistics import EMPTY_CAMERA, rename_map_of, require_statistics
from runtime import pick_device
from trust import OTHER_COPY

LOG = logging.getLogger(__name__)
PIXELS = 480  # height and width of pictures to try a policy on that takes any


class LoadedPolicy:
    """A policy with its processors, which acts on one observation at a time.

    Args:
        policy, preprocess, postprocess: LeRobot's, on their device.
        task: task text for observations without one.
        joint_names: {feature: names} that it was trained with, see `trained_joint_names`.
        depth: {camera: DepthRange} of the depth cameras that it was trained with, under its own names.
        trained_rename: OLD=NEW names of --rename in its training.

    Attributes:
        expected: {key: (kind, shape)} of an observation, see `expected_observation`.
        depth: {key: DepthRange} of an observation's depth cameras.
        optional: cameras among them that the policy does without, as long as an observation has one of them.
        relative: whether it predicts actions relative to the robot's state (a setting of pi0's family).
    """

    def __init__(
        self,
        policy,
        preprocess,
        postprocess,
        task: str = "",
        *,
        joint_names: dict | None = None,
        depth: dict | None = None,
        trained_rename=(),
    ):
        self.policy = policy
        self.preprocess = preprocess
        self.postprocess = postprocess
        self.task = task
        self.told_of_task = False
        self.joint_names = joint_names or {}
        self.depth = {name_before_rename(preprocess, key): recorded for key, recorded in (depth or {}).items()}
        self.trained_rename = list(trained_rename)
        self.device = next(policy.parameters()).device
        self.kind = policy.config.type
        self.expected = expected_observation(policy.config, preprocess)
        self.optional = optional_cameras(policy.config, preprocess)
        self.relative = any(getattr(step, "relative_step", None) and step.enabled for step in postprocess.steps)
        self.reset()

    def reset(self) -> None:
        """Start an episode: forget past observations and planned actions."""
        self.policy.reset()
        self.preprocess.reset()
        self.postprocess.reset()
        self.planned: deque[torch.Tensor] = deque()  # (B, A) each, of a chunk relative to the state

    def act(self, observation: dict) -> np.ndarray:
        """The action to carry out now. A chunk is predicted when the last one is used up.

        Args:
            observation: float arrays (D,) in robot units such as "observation.state", uint8 pictures (H, W, 3) such as
                "observation.images.top", and optionally the text "task". A depth camera's may also be what robots give, which
                becomes the picture of the training: (H, W, 1) or (H, W), integers in millimetres or floats in metres.

        Returns:
            (A,) float32 in robot units.

        Raises:
            UserError: a key, shape or dtype is not what the policy was trained on.
        """
        return self.select(self.batch_of(observation)).squeeze(0).cpu().numpy()

    def batch_of(self, observation: dict) -> dict:
        """A batch of one observation, as LeRobot's processors take it.

        Raises:
            UserError: a key, shape or dtype is not what the policy was trained on.
        """
        batch = {}
        for key, (kind, shape) in self.needed(observation).items():
            batch[key] = to_tensor(observation, key, kind, shape, self.depth.get(key))
        unknown = set(observation) - set(self.expected) - {"task"}
        if unknown:
            key = min(map(str, unknown))
            raise UserError(
                f"the observation has {key!r}, which this policy does not take{nearest(key, self.expected)}"
            )
        task = observation.get("task", self.task)
        if not isinstance(task, str):
            raise UserError(f"task: expected text, got {type(task).__name__}")
        if not (task.strip() or self.told_of_task) and getattr(self.policy.config, "reads_words", False):
            self.told_of_task = True
            tasks = first_of(self.policy.config.tasks)
            LOG.warning("the policy does several tasks, and none is given: expected one like %s", tasks)
        return {**batch, "task": task}

    def needed(self, names) -> dict[str, tuple[str, tuple]]:
        """`expected`, without the cameras that an observation of these names lacks and the policy does without."""
        absent = {key for key in self.optional if key not in names}
        if len(absent) == len(self.optional):
            absent = set()
        return {key: expected for key, expected in self.expected.items() if key not in absent}

    def select(self, batch: dict) -> torch.Tensor:
        """(B, A) actions in robot units, for LeRobot's batch of one moment's observations."""
        with torch.inference_mode():
            ready = self.preprocess(batch)
            if not self.relative:
                with rtc_off(self.policy):
                    return self.postprocess(self.policy.select_action(ready)).float()  # bf16 weights may give bf16
            # The postprocessor adds the latest state: postprocess a chunk whole, at the state that it was predicted from.
            if not self.planned:
                chunk = self.postprocess(predict_chunk(self.policy, ready))  # (B, T, A)
                self.planned.extend(chunk[:, : self.policy.config.n_action_steps].unbind(1))
            return self.planned.popleft()

    @property
    def action_width(self) -> int:
        """A, how many numbers an action has."""
        widths = [step.width for step in self.postprocess.steps if isinstance(step, CutAction)]
        return widths[0] if widths else self.policy.config.action_feature.shape[0]

    @property
    def is_padded(self) -> bool:
        """Whether it was trained with --pad_datasets, and acts for one of those datasets."""
        return padding_of(self.preprocess) is not None

    @property
    def looks(self) -> bool:
        """Whether the next `select` uses the pictures of its observation; True where that is not known.

        A policy carries out a chunk without looking, and looks again when it predicts the next one.
        """
        planned = len(self.planned) if self.relative else count_planned(self.policy)
        # A policy with history also looks at the observations before the one that it predicts from.
        oldest = min(self.policy.config.observation_delta_indices or [0])
        return planned is None or planned <= -oldest

    def ahead(self, fps: float, task: str = "") -> AsyncPolicy:
        """This policy, with chunks predicted in a thread so that an arm with `fps` actions a second never waits for one.

        Measures how long a prediction takes, without the first ones, which take longer. Policies that continue the current
        chunk (flow, which blends, and those with LeRobot's real-time chunking) do so from that time on.

        Returns:
            An AsyncPolicy, which acts and resets like this one.

        Raises:
            UserError: predicting a chunk takes longer than half of its actions.
        """
        if not supports_rtc(self.policy):
            return AsyncPolicy(self, lead=max(1, math.ceil(self.latency(task) * fps)), fps=fps)
        policy = AsyncPolicy(self, lead=1, fps=fps)
        policy.warm_up(self.blank_observation(task))
        return policy

    def latency(self, task: str = "", runs: int = 30, pixels: int = PIXELS) -> float:
        """Seconds from an observation to a chunk, the 99th percentile.

        Args:
            task: task text to act on.
            runs: predictions to measure, after three that warm up.
            pixels: height and width of pictures, where the policy takes any.
        """
        observation = self.blank_observation(task, pixels)
        seconds = []
        for _ in range(runs + 3):
            self.reset()
            begun = time.perf_counter()
            self.act(observation)
            seconds.append(time.perf_counter() - begun)
        self.reset()
        return float(np.percentile(seconds[3:], 99))

    def blank_observation(self, task: str = "", pixels: int = PIXELS) -> dict:
        """An observation of zeros, for `act`; arguments as for `latency`."""
        tasks = getattr(self.policy.config, "tasks", None) or [""]  # flow with a task embedding knows only these
        return {"task": task or self.task or tasks[0], **blank_values(self.expected, pixels)}


def load_policy(
    checkpoint: str | Path,
    device: str = "auto",
    n_action_steps: int | None = None,
    task: str = "",
    rename: list[str] | None = None,
    trained_on: str | None = None,
) -> LoadedPolicy:
    """Load a trained policy to act.

    Args:
        checkpoint: a checkpoint-<step> folder, a run's output folder, or any LeRobot policy folder or Hub id.
        device: auto, cpu, cuda, ...
        n_action_steps: actions to carry out of each predicted chunk; by default as trained.
        task: task text for observations without one.
        rename: OLD=NEW, from names that observations come with to those that the policy takes.
        trained_on: of a policy that was trained with --pad_datasets, the dataset whose robot it acts for, by name or number; by
            default the first.

    Raises:
        UserError: there is no policy, it does not load, it lacks the statistics that it normalises by, or it does not take
            a name of `rename`.
    """
    overrides = None
    if n_action_steps is not None:
        if n_action_steps < 1:
            raise UserError(f"--n_action_steps must be 1 or more, got {n_action_steps}")
        overrides = [f"n_action_steps={n_action_steps}"]
    fetched = fetch_policy(str(checkpoint), "policy")
    verify_policy(fetched)  # before `resolve_policy_folder` looks for another folder in it
    folder = resolve_policy_folder(fetched)
    config = load_policy_config(folder, overrides, str(pick_device(device)))
    check_requirements(config, folder)
    preprocess, postprocess = load_processors(folder, config.device, config=config)
    match_statistics(config, preprocess)
    untrained = untrained_cameras(config, preprocess)
    normalised = [key for key in config.input_features if key not in untrained]
    require_statistics(config, preprocess, postprocess, normalised, str(folder))
    check_processors(config, preprocess, postprocess, folder)
    if rename:
        take_other_names(config, preprocess, rename)
    records = trained_datasets(folder)
    names = trained_joint_names(folder, config)
    if records:
        number = number_of(records, trained_on)
        names = records[number]["joint_names"]
        act_for(records, number, config, preprocess, postprocess)
    elif trained_on is not None:
        raise UserError(f"--trained_on {trained_on}: {folder} was not trained with --pad_datasets. Leave the flag out")
    policy = build_policy(config, None, folder, quiet=False).eval()
    require_finite(policy, folder)
    return LoadedPolicy(
        policy,
        preprocess,
        postprocess,
        task,
        joint_names=names,
        depth=trained_depth(folder),
        trained_rename=trained_rename(folder),
    )


def require_finite(policy, folder: Path) -> None:
    """Refuse weights that are NaN or infinite: so would be the actions.

    Raises:
        UserError: names the first.
    """
    for name, weight in policy.named_parameters():
        if not is_finite(weight.detach()):
            raise UserError(f"{folder}: expected finite weights, got NaN or infinity in {name}. {OTHER_COPY}")


def take_other_names(config, preprocess, rename: list[str]) -> None:
    """Make a preprocessor accept observations under other names; `rename` as for `load_policy`.

    Raises:
        UserError: the policy does not take a new name.
    """
    if AUTO in rename:
        raise UserError("--rename auto pairs the cameras of a dataset or a simulation, and there is none. Pass OLD=NEW")
    expected = expected_observation(config, preprocess)
    names = rename_map_of(preprocess)
    given = parse_rename(rename)
    for old, new in given.items():
        if not old.startswith("observation."):  # LeRobot's pipelines drop other keys
            raise UserError(f"--rename {old}={new}: expected names that begin with observation., got {old}")
        if new not in expected:
            hint = nearest(new, expected) or "."
            raise UserError(f"--rename {old}={new}: the policy takes no {new}{hint} It takes {', '.join(expected)}")
    kept = {old: new for old, new in names.items() if old not in given.values()}
    set_rename(preprocess, kept | {old: names.get(new, new) for old, new in given.items()})


def expected_observation(config, preprocess) -> dict[str, tuple[str, tuple]]:
    """{key: (kind, shape)} that act() takes; kind is uint8 for pictures (H, W, C) and float for the rest.

    None in a shape stands for any size. Cameras that stayed empty in the policy's training are left out.
    """
    expected = {}
    has_any_size = resize_of(preprocess) is not None or resizes_pictures(config)
    copies_state = any(isinstance(step, StateToEnvironmentState) for step in preprocess.steps)
    untrained = untrained_cameras(config, preprocess)
    padding = padding_of(preprocess)
    for key, feature in config.input_features.items():
        if EMPTY_CAMERA in key or key in untrained or (copies_state and key == "observation.environment_state"):
            continue  # made by the policy or its preprocessor
        name = name_before_rename(preprocess, key)
        if padding is not None and name in padding.cameras:
            continue
        if feature.type is not FeatureType.VISUAL:
            shape = tuple(feature.shape)
            if padding is not None and name in padding.own_widths:
                shape = (padding.own_widths[name],)
            if shape != (0,):
                expected[name] = ("float", shape)
            continue
        channels, height, width = feature.shape
        expected[name] = ("uint8", (None, None, channels) if has_any_size else (height, width, channels))
    return expected


def blank_values(expected: dict[str, tuple[str, tuple]], pixels: int = PIXELS) -> dict[str, np.ndarray]:
    """Zeros as `expected_observation` describes them; sizes of pictures that may be any are `pixels`."""
    blank = {}
    for key, (kind, shape) in expected.items():
        dtype = np.uint8 if kind == "uint8" else np.float32
        blank[key] = np.zeros([size or pixels for size in shape], dtype)
    return blank


def check_processors(config, preprocess, postprocess, folder: Path) -> None:
    """Run a saved policy's processors once, on zeros, so that they fail here and not when the arm moves.

    Runs only pipelines of LeRobot's general steps and Armature's. A policy's own steps may pack its inputs, or take actions
    of another width than the robot's.

    Args:
        config: the policy's.
        folder: the policy's, for messages.

    Raises:
        UserError: the policy has no inputs or no action, a step fails, or they are not what they should be afterwards.
    """
    if not config.input_features or "action" not in config.output_features:
        raise UserError(
            f"{folder} holds a policy without observations or without an action in its config.json, to be trained first. Pass it "
            "to train.py as --policy_path"
        )
    general = ("lerobot.processor.", "processors.")
    if not all(type(step).__module__.startswith(general) for step in (*preprocess.steps, *postprocess.steps)):
        return
    expected = expected_observation(config, preprocess)
    blank = blank_values(expected)
    batch = {"task": "a task"}
    for key, (kind, shape) in expected.items():
        batch[key] = to_tensor(blank, key, kind, shape)
    action = torch.zeros(1, *config.output_features["action"].shape)
    try:
        with torch.inference_mode():
            ready = preprocess(batch)
            acted = postprocess(action.to(config.device))
    except (LookupError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"the processors in {folder} fail on an observation of the policy's features: {type(error).__name__}: "
            f"{one_line(error)[:200]}. {OTHER_COPY}"
        ) from error
    finally:
        preprocess.reset()
        postprocess.reset()
    check_preprocessed(config, preprocess, ready, folder)
    is_action = isinstance(acted, torch.Tensor) and acted.shape == action.shape
    if not is_action or not bool(acted.isfinite().all()):
        raise UserError(
            f"the postprocessor in {folder} is not this policy's: expected {action.shape[1]} finite numbers from it. "
            f"{OTHER_COPY}"
        )


def check_preprocessed(config, preprocess, ready: dict, folder: Path) -> None:
    """Check what a saved policy's preprocessor made of an observation; arguments as for `check_processors`.

    Raises:
        UserError: an input of the policy is missing from `ready`, or has another shape or dtype.
    """
    made = {EMPTY_CAMERA, *untrained_cameras(config, preprocess)}
    for key, feature in config.input_features.items():
        if any(name in key for name in made):
            continue
        value = ready.get(key)
        shape = tuple(value.shape[1:]) if isinstance(value, torch.Tensor) else None
        if shape is None or (feature.type is not FeatureType.VISUAL and shape != tuple(feature.shape)):
            raise UserError(
                f"the preprocessor in {folder} is not this policy's: expected {key} of shape {list(feature.shape)} from it, "
                f"got {'none' if shape is None else list(shape)}. {OTHER_COPY}"
            )
        if config.type in (*NEED_STATE, "flow") and value.dtype != torch.float32:  # whose networks convert nothing
            raise UserError(
                f"the preprocessor in {folder} is not this policy's: expected {key} as float32 from it, got {value.dtype}. "
                f"{OTHER_COPY}"
            )


def untrained_cameras(config, preprocess) -> list[str]:
    """Cameras of a policy, under its own names, that stayed empty in its training."""
    trained = trained_cameras(config, preprocess)
    return [] if trained is None else [key for key in cameras_of(config.input_features) if key not in trained]


def optional_cameras(config, preprocess) -> set[str]:
    """Cameras that act() works without: all of a policy that fills them in, if it is unknown which it was trained with."""
    if not does_without_cameras(config) or trained_cameras(config, preprocess) is not None:
        return set()
    return {name_before_rename(preprocess, key) for key in cameras_of(config.input_features)}
