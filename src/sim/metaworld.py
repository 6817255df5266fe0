"""Meta-World's tasks as a LeRobot environment type, `armature_metaworld`, that renders fast at any size.

Scene, viewpoint, image orientation, state (gripper x, y, z, opening), actions and task texts are those of LeRobot's own type
(lerobot/envs/metaworld.py). What differs: the camera keeps its name (observation.images.corner2), images have any size
and no shadows, reflections or antialiasing (look="lerobot" renders them), the first observation of an episode shows that
episode, and episodes end after a number of steps.
"""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass, field

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest

LONGEST = 500  # steps after which Meta-World itself ends an episode


def pick_renderer() -> str:
    """Set MUJOCO_GL, which has to happen before mujoco is imported: EGL where it works, else OSMesa.

    Raises:
        UserError: neither works.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return os.environ.get("MUJOCO_GL", "the system's own")
    probe = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    for backend in ("egl", "osmesa"):
        # In another process: a failed attempt cannot be undone in this one.
        environment = {**os.environ, "MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise UserError("no library renders without a screen. Install one: apt-get install -y libegl1 libgl1 libosmesa6")


def make_task(task: str, camera: str, image_size: int, look: str):
    """Meta-World's environment of a task, set up to render.

    Use one per process: with EGL, closing one blacks out the others.

    Raises:
        UserError: there is no such task or camera.
    """
    import metaworld
    import mujoco

    tasks = metaworld.ALL_V3_ENVIRONMENTS
    if task not in tasks:
        raise UserError(f"Meta-World has no task {task!r}{nearest(task, tasks) or '.'} Pass one like drawer-open-v3")
    benchmark = metaworld.MT1(task, seed=42)
    make = benchmark.train_classes[task]
    env = make(render_mode="rgb_array", camera_name=camera, width=image_size, height=image_size)
    cameras = [env.model.camera(i).name for i in range(env.model.ncam)]
    if camera not in cameras:
        close = nearest(camera, cameras) or "."
        raise UserError(f"Meta-World has no camera {camera!r}{close} Pass one of {', '.join(cameras)}")
    env.set_task(benchmark.train_tasks[0])
    # New object positions at each reset, drawn from the seed.
    env._freeze_rand_vec = False
    env.seeded_rand_vec = True
    if camera == "corner2":
        env.model.cam_pos[2] = [0.75, 0.075, 0.7]  # LeRobot's viewpoint, closer than Meta-World's
    if look == "plain":
        # The first render allocates the buffers by these settings; the scene, with its flags, exists only after it.
        env.model.vis.quality.offsamples = 0
        env.model.vis.quality.shadowsize = 0
        env.model.mat_reflectance[:] = 0
        env.render()
        flags = env.mujoco_renderer.viewer.scn.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return env


def start_episode(env, seed: int) -> np.ndarray:
    """Start the episode of a seed. Returns Meta-World's own observation, (39,) float64."""
    import mujoco

    env.seed(seed)
    env.reset()
    mujoco.mj_forward(env.model, env.data)  # reset() moves the object, but renders it where it was before
    return env._get_obs()


def render_upright(env, camera: str) -> np.ndarray:
    """(H, W, 3) uint8.

    Raises:
        UserError: the renderer gives black images.
    """
    image = env.render()
    if image.mean() < 1:
        raise UserError("the renderer gives black images. Set MUJOCO_GL=osmesa and try again")
    if camera == "corner2":  # this camera is mounted upside down
        image = np.flip(image, (0, 1))
    return image.copy()


class MetaworldTask(gymnasium.Env):
    """One task in LeRobot's terms: pixels and agent_pos in, (4,) actions in [-1, 1] out. Success or the step limit ends it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012

    def __init__(self, task: str, camera: str, image_size: int, look: str, max_steps: int):
        from lerobot.envs.metaworld import TASK_DESCRIPTIONS, TASK_POLICY_MAPPING

        self.env = make_task(task, camera, image_size, look)
        self.render_mode = "rgb_array"
        self.camera = camera
        self._max_episode_steps = max_steps
        self.task = task
        self.task_description = TASK_DESCRIPTIONS[task]
        self.make_expert = TASK_POLICY_MAPPING[task]
        pixels = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(
            {"pixels": gymnasium.spaces.Dict({camera: pixels}), "agent_pos": state}
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.raw = start_episode(self.env, seed)
        self.steps = 0
        self.expert = self.make_expert()
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray):
        self.raw, reward, _, _, info = self.env.step(np.clip(action, -1, 1))
        self.steps += 1
        success = bool(info["success"])
        truncated = self.steps >= self._max_episode_steps
        return self._observation(), float(reward), success, truncated, {"is_success": success}

    def expert_action(self) -> np.ndarray:
        """(4,) action of Meta-World's scripted expert now."""
        return np.clip(self.expert.get_action(self.raw), -1, 1).astype(np.float32)

    def render(self) -> np.ndarray:
        return render_upright(self.env, self.camera)

    def close(self):
        self.env.close()

    def _observation(self) -> dict:
        return {"pixels": {self.camera: self.render()}, "agent_pos": self.raw[:4].copy()}


@EnvConfig.register_subclass("armature_metaworld")
@dataclass
class ArmatureMetaworld(EnvConfig):
    """Settings of `lerobot-eval --env.type=armature_metaworld` and `evaluate.py --env metaworld`.

    Attributes:
        task: any Meta-World task, or several separated by commas.
        episode_length: steps after which an episode has failed, at most 500.
        camera: its name in the scene.
        image_size: width and height of its images.
        look: plain, or lerobot (as LeRobot's own type renders).
    """

    task: str = "drawer-open-v3"
    fps: int = 80
    episode_length: int = 300
    camera: str = "corner2"
    image_size: int = 128
    look: str = "plain"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not 1 <= self.episode_length <= LONGEST:
            raise UserError(f"episode_length must be 1 to {LONGEST}, got {self.episode_length}")
        if self.look not in ("plain", "lerobot"):
            raise UserError(f"look must be plain or lerobot, got {self.look!r}")
        pixels = f"pixels/{self.camera}"
        self.features = {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
            pixels: PolicyFeature(FeatureType.VISUAL, (self.image_size, self.image_size, 3)),
        }
        image = f"observation.images.{self.camera}"
        self.features_map = {"action": "action", "agent_pos": "observation.state", pixels: image}

    @property
    def gym_kwargs(self) -> dict:
        return {
            "camera": self.camera,
            "image_size": self.image_size,
            "look": self.look,
            "max_steps": self.episode_length,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        """{task: {0: vector environment}}, as LeRobot wants it."""
        pick_renderer()
        make_vector = gymnasium.vector.SyncVectorEnv
        if use_async_envs and n_envs > 1:  # forkserver, because a fork of a process that has rendered hangs
            make_vector = functools.partial(gymnasium.vector.AsyncVectorEnv, context="forkserver")
        envs = {}
        for task in self.task.split(","):
            task = task.strip()
            make_one = functools.partial(MetaworldTask, task, **self.gym_kwargs)
            envs[task] = {0: make_vector([make_one] * n_envs, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)}
        return envs
