"""Meta-Distributed's tasks as a LeRobot environment type, `armature_metaworld`, that renders fast at any size.

Scene, viewpoint, image orientation, state (gripper x, y, z, opening), actions and words are those of LeRobot's own type
(lerobot/envs/metaworld.py). What differs: the camera goes by its name (observation.images.corner2), pictures are as small as
asked, without shadows, reflections and antialiasing (look="lerobot" has them), the first observation of an episode shows
that episode, and there is a cap on steps.
"""

import functools
from dataclasses import dataclass, field

import gymnasium
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest

LONGEST = 500  # steps after which Meta-Distributed refuses to go on


def make_task(task: str, camera: str, image_size: int, look: str):
    """Meta-Distributed's environment of a task, set up to render. One a process: under EGL, closing one blacks out the others.

    Raises:
        UserError: there is no such task or camera.
    """
    import metaworld
    import mujoco

    if task not in metaworld.ALL_V3_ENVIRONMENTS:
        raise UserError(f"Meta-Distributed has no task {task!r}{nearest(task, metaworld.ALL_V3_ENVIRONMENTS)}")
    benchmark = metaworld.MT1(task, seed=42)
    make = benchmark.train_classes[task]
    env = make(render_mode="rgb_array", camera_name=camera, width=image_size, height=image_size)
    cameras = [env.model.camera(i).name for i in range(env.model.ncam)]
    if camera not in cameras:
        raise UserError(f"Meta-Distributed has no camera {camera!r}{nearest(camera, cameras)}: {', '.join(cameras)}")
    env.set_task(benchmark.train_tasks[0])
    env._freeze_rand_vec, env.seeded_rand_vec = False, True  # new positions at each reset, drawn from the seed
    if camera == "corner2":
        env.model.cam_pos[2] = [0.75, 0.075, 0.7]  # LeRobot's viewpoint, closer than Meta-Distributed's
    if look == "plain":  # these before the first render, which allocates the buffers; the flags need it done
        env.model.vis.quality.offsamples = env.model.vis.quality.shadowsize = 0
        env.model.mat_reflectance[:] = 0
        env.render()
        flags = env.mujoco_renderer.viewer.scn.flags
        flags[mujoco.mjtRndFlag.mjRND_SHADOW] = flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    return env


def begin(env, seed: int) -> np.ndarray:
    """Start the episode of a seed; returns Meta-Distributed's own observation, (39,) float64."""
    import mujoco

    env.seed(seed)
    env.reset()
    mujoco.mj_forward(env.model, env.data)  # reset() moves the object but still shows it where it was before
    return env._get_obs()


def picture(env, camera: str) -> np.ndarray:
    """(H, W, 3) uint8, the right way up.

    Raises:
        UserError: the renderer gives black images.
    """
    image = env.render()
    if image.mean() < 1:
        raise UserError("the renderer gives black images: try again with MUJOCO_GL=osmesa")
    return np.flip(image, (0, 1)).copy() if camera == "corner2" else image.copy()  # corner2 hangs upside down


class MetaworldTask(gymnasium.Env):
    """One task, in LeRobot's terms: pixels and agent_pos in, (4,) actions in [-1, 1] out, ended by success or the cap."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012

    def __init__(self, task: str, camera: str, image_size: int, look: str, max_steps: int):
        from lerobot.envs.metaworld import TASK_DESCRIPTIONS, TASK_POLICY_MAPPING

        self.env = make_task(task, camera, image_size, look)
        self.render_mode, self.camera, self._max_episode_steps = "rgb_array", camera, max_steps
        self.task, self.task_description, self.make_expert = task, TASK_DESCRIPTIONS[task], TASK_POLICY_MAPPING[task]
        pixels = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        state = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.observation_space = gymnasium.spaces.Dict(
            {"pixels": gymnasium.spaces.Dict({camera: pixels}), "agent_pos": state}
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        drawn = int(self.np_random.integers(2**31)) if seed is None else seed
        self.raw, self.steps, self.expert = begin(self.env, drawn), 0, self.make_expert()
        return self._observation(), {"is_success": False}

    def step(self, action: np.ndarray):
        self.raw, reward, _, _, info = self.env.step(np.clip(action, -1, 1))
        self.steps += 1
        success, capped = bool(info["success"]), self.steps >= self._max_episode_steps
        return self._observation(), float(reward), success, capped, {"is_success": success}

    def expert_action(self) -> np.ndarray:
        """What Meta-Distributed's scripted expert does now, (4,)."""
        return np.clip(self.expert.get_action(self.raw), -1, 1).astype(np.float32)

    def render(self) -> np.ndarray:
        return picture(self.env, self.camera)

    def close(self):
        self.env.close()

    def _observation(self) -> dict:
        return {"pixels": {self.camera: self.render()}, "agent_pos": self.raw[:4].copy()}


@EnvConfig.register_subclass("armature_metaworld")
@dataclass
class ArmatureMetaworld(EnvConfig):
    """Settings of `lerobot-eval --env.type=armature_metaworld` and `evaluate.py --env metaworld`.

    Attributes:
        task: any Meta-Distributed task, or several with commas between.
        episode_length: steps after which an episode has failed, 500 at most.
        camera: its name in the scene.
        image_size: width and height of its pictures.
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
        names = {"action": "action", "agent_pos": "observation.state", pixels: f"observation.images.{self.camera}"}
        self.features_map = names

    @property
    def gym_kwargs(self) -> dict:
        return {
            "camera": self.camera,
            "image_size": self.image_size,
            "look": self.look,
            "max_steps": self.episode_length,
        }

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict:
        from sim.environments import pick_renderer

        pick_renderer()
        make = gymnasium.vector.SyncVectorEnv
        if use_async_envs and n_envs > 1:  # a fork of a process that has rendered hangs
            make = functools.partial(gymnasium.vector.AsyncVectorEnv, context="forkserver")
        mode = gymnasium.vector.AutoresetMode.SAME_STEP
        tasks = [task.strip() for task in self.task.split(",")]
        return {
            task: {0: make([lambda task=task: MetaworldTask(task, **self.gym_kwargs)] * n_envs, autoreset_mode=mode)}
            for task in tasks
        }
