"""What our simulated tasks share: observations in LeRobot's terms, a scripted expert, pixels only while somebody looks."""

import functools
import importlib.util
from dataclasses import dataclass
from typing import ClassVar

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest
from sim.rendering import pick_renderer


class ScriptedTask(gymnasium.Env):
    """One simulated task with a scripted expert: pixels and agent_pos in, (A,) actions out.

    Success or the step limit ends an episode; `info["is_success"]` says which. Stepping on after a success is allowed.
    A subclass implements `start`, `advance`, `state`, `picture` and `expert_action`.

    Attributes:
        robot_type: the robot's name in a dataset.
        task, task_description: the task's name, and the task in words.
        cameras: names of the cameras that are rendered; no other is.
        state_names, action_names: names of the numbers in agent_pos and in an action.
        noise: standard deviation of the noise on executed actions by which demonstrations show how to recover
            (`examples/record.py --noise`), in the action's unit.
        noise_scale: (A,), how much of the noise each number of the action executed now gets; 0 for what noise would spoil,
            such as a gripper that would drop things. A subclass may change it in `expert_action()`.
        noise_smoothness: correlation of the noise with that of the step before: 0 for new noise at each step, near 1 for a
            slow drift.
        renders: while False, reset() and step() return black pictures, which costs nothing, except where an episode ends.
            Set it from outside, before the step after which nobody looks.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    robot_type = "unknown"
    noise = 0.0
    noise_smoothness = 0.0
    render_mode = "rgb_array"
    renders = True

    def __init__(
        self,
        task: str,
        task_description: str,
        cameras: list[str],
        image_size: int,
        state_names: list[str],
        action_space: gymnasium.spaces.Box,
        action_names: list[str],
        noise_scale: np.ndarray,
        max_steps: int,
        image_width: int = 0,
    ):
        self.task = task
        self.task_description = task_description
        self.cameras = cameras
        self.state_names = state_names
        self.action_names = action_names
        self.noise_scale = noise_scale
        self._max_episode_steps = max_steps
        picture = gymnasium.spaces.Box(0, 255, (image_size, image_width or image_size, 3), np.uint8)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (len(state_names),), np.float64)
        self.observation_space = gymnasium.spaces.Dict(
            {"pixels": gymnasium.spaces.Dict(dict.fromkeys(cameras, picture)), "agent_pos": state}
        )
        self.action_space = action_space

    def start(self, seed: int) -> None:
        """Start the episode of a seed: the same one each time."""
        raise NotImplementedError

    def advance(self, action: np.ndarray) -> tuple[float, bool]:
        """Carry out an action within the action space. Returns (reward, whether the task is solved now)."""
        raise NotImplementedError

    def is_lost(self) -> bool:
        """Whether the task cannot be solved any more, which ends the episode too."""
        return False

    def state(self) -> np.ndarray:
        """(S,) float64, named by `state_names`."""
        raise NotImplementedError

    def picture(self, camera: str) -> np.ndarray:
        """(H, W, 3) uint8, of its own memory."""
        raise NotImplementedError

    def expert_action(self) -> np.ndarray:
        """(A,) float32, what the scripted expert wants to do now. Ask once a step: an expert may count."""
        raise NotImplementedError

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.start(seed)
        self.steps = 0
        return self._observation(self.renders), {"is_success": False}

    def step(self, action: np.ndarray):
        reward, success = self.advance(np.clip(action, self.action_space.low, self.action_space.high))
        self.steps += 1
        truncated = self.steps >= self._max_episode_steps
        terminated = success or self.is_lost()
        # The last picture of an episode is always there: after it, the vector environment starts the next one.
        observation = self._observation(self.renders or terminated or truncated)
        return observation, float(reward), terminated, truncated, {"is_success": success}

    def render(self) -> np.ndarray:
        return self.picture(self.cameras[0])

    def _observation(self, renders: bool) -> dict:
        if renders:
            pixels = {camera: self.picture(camera) for camera in self.cameras}
        else:
            pixels = {camera: np.zeros(space.shape, np.uint8) for camera, space in self._pixel_spaces().items()}
        return {"pixels": pixels, "agent_pos": self.state()}

    def _pixel_spaces(self) -> dict:
        return self.observation_space["pixels"].spaces


@dataclass
class ScriptedConfig(EnvConfig):
    """Settings of an environment type of ours. A subclass registers itself and names its ScriptedTask in `task_class`.

    Attributes:
        expert_steps: steps that the expert gets in a demonstration.
        package, install: the package that it needs, and what installs it: pinned, as in pyproject.toml's extra.
    """

    task_class: ClassVar[type[ScriptedTask]]
    expert_steps: ClassVar[int]
    package: ClassVar[str]
    install: ClassVar[str]

    def check_choices(self, **choices: tuple) -> None:
        """Check settings that have to be one of a few words, and sizes.

        Raises:
            UserError: one is not.
        """
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise UserError(f"{name} must be {' or '.join(allowed)}, got {value!r}")
        for name in ("episode_length", "image_size"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")

    def set_features(self, cameras: list[str], image_size: int, state: int, action: int, image_width: int = 0) -> None:
        """Say what LeRobot finds where: sizes of the cameras' images (0: square), of the state and of an action."""
        shape = (image_size, image_width or image_size, 3)
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (action,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (state,)),
        }
        self.features_map = {"action": "action", "agent_pos": "observation.state"}
        for camera in cameras:
            self.features[f"pixels/{camera}"] = PolicyFeature(FeatureType.VISUAL, shape)
            self.features_map[f"pixels/{camera}"] = f"observation.images.{camera}"

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        """{task: {0: vector environment}}, as LeRobot wants it.

        Raises:
            UserError: the simulation's package is not installed, or there is no such task or camera.
        """
        if importlib.util.find_spec(self.package) is None:
            raise UserError(f"{self.package} is not installed. Install it with: uv pip install {self.install}")
        pick_renderer()
        make_vector = gymnasium.vector.SyncVectorEnv
        if use_async_envs and n_envs > 1:  # forkserver, because a fork of a process that has rendered hangs
            make_vector = functools.partial(gymnasium.vector.AsyncVectorEnv, context="forkserver")
        envs = {}
        for task in self.task.split(","):
            task = task.strip()
            make_one = functools.partial(self.task_class, task, **self.gym_kwargs)
            envs[task] = {0: make_vector([make_one] * n_envs, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)}
        return envs


def chosen_cameras(cameras: str, known: list[str], simulation: str) -> list[str]:
    """The names in a setting such as "front,wrist".

    Raises:
        UserError: the simulation has no such camera.
    """
    names = [name.strip() for name in cameras.split(",")]
    for name in names:
        if name not in known:
            remedy = nearest(name, known) or "."
            raise UserError(f"{simulation} has no camera {name!r}{remedy} Pass one or more of {', '.join(known)}")
    return names
