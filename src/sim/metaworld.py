"""Meta-World's tasks as a LeRobot environment type, `armature_metaworld`, that renders fast at any size.

Scene, viewpoint, image orientation, state (gripper x, y, z, opening), actions and task texts are those of LeRobot's own type
(lerobot/envs/metaworld.py). What differs: the camera keeps its name (observation.images.corner2), images have any size,
no shadows or reflections, and meshes without their finest details (look="lerobot" renders LeRobot's pictures), the first
observation of an episode shows that episode, and episodes end after a number of steps.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium
import numpy as np
from lerobot.configs import PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest
from sim.rendering import Renderer
from sim.scripted import ScriptedConfig, ScriptedTask

LONGEST = 500  # steps after which Meta-World itself ends an episode


def make_task(task: str, camera: str):
    """Meta-World's environment of a task.

    Raises:
        UserError: there is no such task or camera.
    """
    import metaworld

    tasks = metaworld.ALL_V3_ENVIRONMENTS
    if task not in tasks:
        raise UserError(f"Meta-World has no task {task!r}{nearest(task, tasks) or '.'} Pass one like drawer-open-v3")
    benchmark = metaworld.MT1(task, seed=42)
    make = benchmark.train_classes[task]
    env = make()
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
    return env


def start_episode(env, seed: int) -> np.ndarray:
    """Start the episode of a seed. Returns Meta-World's own observation, (39,) float64."""
    import mujoco

    env.seed(seed)
    env.reset()
    mujoco.mj_forward(env.model, env.data)  # reset() moves the object, but renders it where it was before
    return env._get_obs()


class MetaworldTask(ScriptedTask):
    """One task of Meta-World, (4,) actions in [-1, 1]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012
    robot_type = "sawyer"
    noise = 0.2

    def __init__(self, task: str, camera: str, image_size: int, look: str, max_steps: int):
        from lerobot.envs.metaworld import TASK_DESCRIPTIONS, TASK_POLICY_MAPPING

        self.env = make_task(task, camera)
        half_a_pixel = 0.5 / image_size  # the scene is about a metre high
        self.renderer = Renderer(self.env.model, image_size, look, detail=half_a_pixel)
        self.make_expert = TASK_POLICY_MAPPING[task]
        super().__init__(
            task=task,
            task_description=TASK_DESCRIPTIONS[task],
            cameras=[camera],
            image_size=image_size,
            state_names=["x", "y", "z", "gripper"],
            action_space=gymnasium.spaces.Box(-1, 1, (4,), np.float32),
            action_names=["dx", "dy", "dz", "gripper"],
            noise_scale=np.array([1, 1, 1, 0]),
            max_steps=max_steps,
        )

    def start(self, seed: int) -> None:
        self.raw = start_episode(self.env, seed)
        self.expert = self.make_expert()

    def advance(self, action: np.ndarray) -> tuple[float, bool]:
        self.raw, reward, _, _, info = self.env.step(action)
        return float(reward), bool(info["success"])

    def state(self) -> np.ndarray:
        return self.raw[:4].copy()

    def picture(self, camera: str) -> np.ndarray:
        image = self.renderer.picture(self.env.data, camera)
        if camera == "corner2":  # this camera is mounted upside down
            image = np.flip(image, (0, 1))
        return image.copy()

    def expert_action(self) -> np.ndarray:
        return np.clip(self.expert.get_action(self.raw), -1, 1).astype(np.float32)

    def close(self):
        self.renderer.close()
        self.env.close()


@EnvConfig.register_subclass("armature_metaworld")
@dataclass
class ArmatureMetaworld(ScriptedConfig):
    """Settings of `lerobot-eval --env.type=armature_metaworld` and `evaluate.py --env metaworld`.

    Attributes:
        task: any Meta-World task, or several separated by commas.
        episode_length: steps after which an episode has failed, at most 500.
        camera: its name in the scene.
        image_size: width and height of its images.
        look: plain, or lerobot (as LeRobot's own type renders).
    """

    task_class: ClassVar = MetaworldTask
    expert_steps: ClassVar = LONGEST
    package: ClassVar = "metaworld"
    install: ClassVar = "metaworld==3.1.1 mujoco==3.3.0"

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
        self.check_choices(look=("plain", "lerobot"))
        self.set_features([self.camera], self.image_size, state=4, action=4)

    @property
    def gym_kwargs(self) -> dict:
        return {
            "camera": self.camera,
            "image_size": self.image_size,
            "look": self.look,
            "max_steps": self.episode_length,
        }
