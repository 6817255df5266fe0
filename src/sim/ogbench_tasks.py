"""OGBench's manipulation as a LeRobot environment type, `armature_ogbench`: a UR5e arm moves cubes, a drawer, a window, buttons.

Robot, physics, start, goal and success of an episode are those of the package ogbench (in the mode in which its authors
record data: one random goal an episode), experts its Markov oracles. What differs from its visual tasks: the goal cube is
drawn, as a transparent cube, and the rest of the goal is in words, where OGBench shows a picture of the goal; the state has what
the arm's own sensors tell; a camera at the gripper was added, and no shadows are drawn (look=full draws them).
"""

import contextlib
from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium
import numpy as np
from lerobot.configs import PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest
from sim.rendering import Mount, Renderer
from sim.scripted import ScriptedConfig, ScriptedTask, chosen_cameras

# The environment, its variant, and what the goal is about (None: of any kind, drawn from the seed).
TASKS = {
    "cube-single": ("cube", "single", None),
    "cube-double": ("cube", "double", None),
    "scene": ("scene", "scene", None),
    "scene-cube": ("scene", "scene", "cube"),
    "scene-drawer": ("scene", "scene", "drawer"),
    "scene-window": ("scene", "scene", "window"),
    "scene-button": ("scene", "scene", "button"),
}
STATE_NAMES = ["x", "y", "z", "cos_yaw", "sin_yaw", "gripper", "contact"]
CAMERAS = {
    "front": "front_pixels",  # the one of OGBench's visual tasks
    "wrist": Mount(
        "ur5e/robotiq/base_mount", position=(0, -0.09, 0.02), forward=(0, 0.34, 0.94), up=(0, -0.94, 0.34), fovy=70
    ),
}
COLOURS = ["red", "blue"]  # of OGBench's first two cubes
GOAL_ALPHA = 0.4


class OgbenchTask(ScriptedTask):
    """(7,) state; (5,) moves in [-1, 1] of the gripper: x, y, z (5 cm a unit), yaw (0.3 rad), opening."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012
    robot_type = "ur5e"
    noise = 0.3

    def __init__(self, task: str, cameras: list[str], image_size: int, look: str, max_steps: int):
        if task not in TASKS:
            known = ", ".join(TASKS)
            raise UserError(f"ogbench has no task {task!r}{nearest(task, TASKS) or '.'} Pass one of {known}")
        self.scene, _, self.kind = TASKS[task]
        self.env = make_arena(task)
        self.env.reset(seed=0)  # compiles the scene, which the renderer needs
        self.renderer = Renderer(self.env.model, image_size, look, detail=0.003)
        super().__init__(
            task=task,
            task_description="",  # of the episode, see `start`
            cameras=cameras,
            image_size=image_size,
            state_names=STATE_NAMES,
            action_space=gymnasium.spaces.Box(-1, 1, (5,), np.float32),
            action_names=["dx", "dy", "dz", "dyaw", "gripper"],
            noise_scale=np.array([1, 1, 1, 1, 0]),
            max_steps=max_steps,
        )

    def start(self, seed: int) -> None:
        self.env.reset(seed=seed)
        if self.scene == "scene":
            self.draw_goal()
        self.info = self.env.compute_ob_info()
        self.task_description = goal_in_words(self.info)
        self.seed = seed
        self.expert = None

    def draw_goal(self) -> None:
        """Unlock the drawer and the window, so that every goal can be reached, and draw goals until one is of our kind."""
        self.env._cur_button_states[:] = 1
        self.env._apply_button_states()
        self.env.set_new_target(return_info=False)
        while self.kind not in (None, self.env._target_task):
            self.env.set_new_target(return_info=False)

    def advance(self, action: np.ndarray) -> tuple[float, bool]:
        _, reward, _, _, self.info = self.env.step(action)
        return float(reward), bool(self.info["success"])

    def state(self) -> np.ndarray:
        yaw = self.info["proprio/effector_yaw"]
        gripper = self.info["proprio/gripper_opening"]
        contact = self.info["proprio/gripper_contact"]
        return np.concatenate([self.info["proprio/effector_pos"], np.cos(yaw), np.sin(yaw), gripper, contact])

    def picture(self, camera: str) -> np.ndarray:
        # The renderer draws a copy of the model: bring it up to date with what OGBench changes in an episode.
        drawn = self.renderer.model
        drawn.geom_rgba[:] = self.env.model.geom_rgba
        drawn.mat_rgba[:] = self.env.model.mat_rgba
        if self.info["privileged/target_task"] == "cube":
            drawn.geom_rgba[self.env._cube_target_geom_ids_list[self.env._target_block], 3] = GOAL_ALPHA
        return self.renderer.picture(self.env.data, CAMERAS[camera])

    def expert_action(self) -> np.ndarray:
        with numpy_seed(self.seed):  # the oracles draw where they rest in the end
            if self.expert is None:
                self.expert = oracle_of(self.info["privileged/target_task"])(env=self.env)
                self.expert.reset(None, self.info)
            return self.expert.select_action(None, self.info).astype(np.float32)

    def close(self):
        self.renderer.close()


def make_arena(task: str):
    """OGBench's environment of a task. It renders nothing itself."""
    from ogbench.manipspace.envs.cube_env import CubeEnv
    from ogbench.manipspace.envs.scene_env import SceneEnv

    scene, variant, _ = TASKS[task]
    make = {"cube": CubeEnv, "scene": SceneEnv}[scene]
    # ob_type="pixels" makes the arm transparent, as in OGBench's visual tasks, so that it hides nothing.
    env = make(
        env_type=variant, ob_type="pixels", mode="data_collection", visualize_info=False, terminate_at_goal=False
    )
    env.get_pixel_observation = lambda: None
    return env


def oracle_of(kind: str):
    """The class of the oracle that reaches a kind of goal."""
    from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
    from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
    from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
    from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle

    return {
        "cube": CubeMarkovOracle,
        "button": ButtonMarkovOracle,
        "drawer": DrawerMarkovOracle,
        "window": WindowMarkovOracle,
    }[kind]


def goal_in_words(info: dict) -> str:
    kind = info["privileged/target_task"]
    if kind == "cube":
        colour = COLOURS[info["privileged/target_block"]]
        return f"Move the {colour} cube to the transparent {colour} cube."
    if kind == "button":
        side = ["left", "right"][info["privileged/target_button"]]
        return f"Press the {side} button."
    if kind == "drawer":
        verb = "Open" if info["privileged/target_drawer_pos"][0] < 0 else "Close"
        return f"{verb} the drawer."
    verb = "Open" if info["privileged/target_window_pos"][0] > 0 else "Close"
    return f"{verb} the window."


@contextlib.contextmanager
def numpy_seed(seed: int):
    """Numpy's global generator, which OGBench's oracles draw from, seeded for a while; what it was before comes back."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


@EnvConfig.register_subclass("armature_ogbench")
@dataclass
class ArmatureOgbench(ScriptedConfig):
    """Settings of `lerobot-eval --env.type=armature_ogbench` and `evaluate.py --env ogbench`.

    Attributes:
        task: cube-single, cube-double, scene-drawer, ... or scene, whose goals are of all kinds.
        episode_length: steps after which an episode has failed.
        cameras: front and wrist, or one of them, separated by a comma.
        image_size: width and height of their images.
        look: plain, or full (shadows, reflections, whole meshes).
    """

    task_class: ClassVar = OgbenchTask
    expert_steps: ClassVar = 200
    package: ClassVar = "ogbench"
    install: ClassVar = "ogbench==1.2.2 dm-control==1.0.28 mujoco==3.3.0"

    task: str = "cube-single"
    fps: int = 20
    episode_length: int = 200
    cameras: str = "front,wrist"
    image_size: int = 96
    look: str = "plain"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.check_choices(look=("plain", "full"))
        cameras = chosen_cameras(self.cameras, list(CAMERAS), "ogbench")
        self.set_features(cameras, self.image_size, state=len(STATE_NAMES), action=5)

    @property
    def gym_kwargs(self) -> dict:
        return {
            "cameras": chosen_cameras(self.cameras, list(CAMERAS), "ogbench"),
            "image_size": self.image_size,
            "look": self.look,
            "max_steps": self.episode_length,
        }
