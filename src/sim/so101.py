"""An SO-101 arm that picks up a block and places it on a mark, as a LeRobot environment type, `armature_so101`.

Robot, physics, task, its success and its scripted expert are those of the package lerobot-env-so101. What differs: state and
actions have the names and units of a dataset recorded on a real SO-101 (degrees, the gripper from 0 to 100), the goal is a
green mark that cameras can see, cameras on the desk and at the wrist were added, block and goal are always drawn from the
seed, and frames cost a hundredth (look=full renders as the package does).
"""

from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium
import numpy as np
from lerobot.configs import PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest
from sim.rendering import Mount, Renderer
from sim.scripted import ScriptedConfig, ScriptedTask, chosen_cameras

TASKS = {"SO101PickPlace-v0": "Pick up the block and place it on the green mark."}
JOINTS = ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper"]
METRES = 0.025  # of one unit of the package's own actions, to which its expert is tuned
CAMERAS = {
    "front": "front",  # the package's own, far away
    "desk": Mount("world", position=(0.52, 0, 0.42), forward=(-0.6, 0, -0.8), up=(-0.8, 0, 0.6), fovy=46),
    "top": Mount("world", position=(0.22, 0, 0.62), forward=(0, 0, -1), up=(1, 0, 0), fovy=42),
    "wrist": Mount("gripper", position=(0, 0.07, -0.02), forward=(0, -0.52, -0.85), up=(0, 0.85, -0.52), fovy=70),
}


class So101Task(ScriptedTask):
    """(6,) joints out, (6,) target joints in; with control="tip" the package's own (4,) moves of the gripper's tip in."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012
    robot_type = "so101_follower"

    def __init__(self, task: str, cameras: list[str], image_size: int, look: str, control: str, max_steps: int):
        if task not in TASKS:
            known = ", ".join(TASKS)
            raise UserError(f"so101 has no task {task!r}{nearest(task, TASKS) or '.'} Pass one of {known}")
        self.env = make_arm(control)
        limits = self.env.model.actuator_ctrlrange
        self.low, self.high = limits[:, 0], limits[:, 1]  # radians
        self.joints = [self.env.model.joint(name).qposadr[0] for name in JOINTS]
        self.renderer = Renderer(self.env.model, image_size, look, detail=0.003)
        self.control = control
        self.noise = 1.5 if control == "joints" else 0.3  # degrees, or units of 25 mm
        names = [f"{name}.pos" for name in JOINTS]
        if control == "joints":
            action_names = names
            action_space = gymnasium.spaces.Box(
                self.to_dataset(self.low).astype(np.float32), self.to_dataset(self.high).astype(np.float32)
            )
        else:
            action_names = ["dx", "dy", "dz", "gripper"]
            action_space = self.env.action_space
        super().__init__(
            task=task,
            task_description=TASKS[task],
            cameras=cameras,
            image_size=image_size,
            state_names=names,
            action_space=action_space,
            action_names=action_names,
            noise_scale=np.zeros(len(action_names)),
            max_steps=max_steps,
        )

    def to_dataset(self, joints: np.ndarray) -> np.ndarray:
        """(6,) radians to degrees, the gripper to 0 (closed) to 100 (open)."""
        values = np.degrees(joints)
        values[-1] = 100 * (joints[-1] - self.low[-1]) / (self.high[-1] - self.low[-1])
        return values

    def from_dataset(self, values: np.ndarray) -> np.ndarray:
        """The inverse of `to_dataset`."""
        joints = np.radians(values, dtype=np.float64)
        joints[-1] = self.low[-1] + values[-1] / 100 * (self.high[-1] - self.low[-1])
        return joints

    def start(self, seed: int) -> None:
        from lerobot_env_so101.scripted import PickPlaceController

        self.env.reset(seed=seed)
        self.expert = PickPlaceController(METRES)
        self.terminated = False

    def advance(self, action: np.ndarray) -> tuple[float, bool]:
        if self.control == "joints":
            action = self.from_dataset(action)
        _, reward, self.terminated, _, info = self.env.step(action)
        return float(reward), info["succeed"]

    def is_lost(self) -> bool:
        return self.terminated  # the block has left the table

    def state(self) -> np.ndarray:
        return self.to_dataset(self.env.data.qpos[self.joints])

    def picture(self, camera: str) -> np.ndarray:
        return self.renderer.picture(self.env.data, CAMERAS[camera], self.draw_goal)

    def draw_goal(self, scene) -> None:
        import mujoco

        place = self.env.goal_pos * [1, 1, 0]
        mark = scene.geoms[scene.ngeom]
        green = np.array([0.1, 0.8, 0.2, 1], np.float32)
        mujoco.mjv_initGeom(mark, mujoco.mjtGeom.mjGEOM_BOX, [0.02, 0.02, 0.0005], place, np.eye(3).reshape(-1), green)
        scene.ngeom += 1

    def expert_action(self) -> np.ndarray:
        block = self.env.data.sensor("block_pos").data.copy()
        action = self.expert.act(self.env.ik_point_pos, block, self.env.goal_pos)
        # In proportion to the speed: while the jaws close and open, and where a few mm count, the arm has to be still.
        self.noise_scale = np.full(len(self.action_names), np.abs(action[:3]).max())
        self.noise_scale[-1] = 0
        if self.control == "joints":
            action = self.to_dataset(self.env.targets_of(action)).astype(np.float32)
        return action

    def close(self):
        self.renderer.close()


def make_arm(control: str):
    """The package's environment, without pixels. With control="joints", `step` takes the joints' targets in radians."""
    import mujoco
    from lerobot_env_so101 import SO101PickPlaceGymEnv

    class JointArm(SO101PickPlaceGymEnv):
        def apply_action(self, targets: np.ndarray) -> None:
            self._data.ctrl[:] = targets
            mujoco.mj_step(self._model, self._data, self._n_substeps)

        def targets_of(self, action: np.ndarray) -> np.ndarray:
            """(6,) radians: where the package's inverse kinematics wants the joints for one of its own actions."""
            substeps = self._n_substeps
            self._n_substeps = 0  # the kinematics alone
            super().apply_action(action)
            self._n_substeps = substeps
            return self._data.ctrl.copy()

    make = JointArm if control == "joints" else SO101PickPlaceGymEnv
    return make(random_block_position=True, action_scale=METRES)


@EnvConfig.register_subclass("armature_so101")
@dataclass
class ArmatureSo101(ScriptedConfig):
    """Settings of `lerobot-eval --env.type=armature_so101` and `evaluate.py --env so101`.

    Attributes:
        task: SO101PickPlace-v0.
        episode_length: steps after which an episode has failed.
        cameras: front, desk, top and wrist, or some of them, separated by commas.
        image_size: width and height of their images.
        look: plain, or full (shadows, reflections, whole meshes).
        control: joints (target angles, as a real arm takes them) or tip (the package's own moves of the gripper).
    """

    task_class: ClassVar = So101Task
    expert_steps: ClassVar = 300
    package: ClassVar = "lerobot_env_so101"
    install: ClassVar = "lerobot-env-so101==0.4.0 mujoco==3.3.0"

    task: str = "SO101PickPlace-v0"
    fps: int = 10
    episode_length: int = 300
    cameras: str = "desk,wrist"
    image_size: int = 96
    look: str = "plain"
    control: str = "joints"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.check_choices(look=("plain", "full"), control=("joints", "tip"))
        action = 6 if self.control == "joints" else 4
        self.set_features(chosen_cameras(self.cameras, list(CAMERAS), "so101"), self.image_size, len(JOINTS), action)

    @property
    def gym_kwargs(self) -> dict:
        return {
            "cameras": chosen_cameras(self.cameras, list(CAMERAS), "so101"),
            "image_size": self.image_size,
            "look": self.look,
            "control": self.control,
            "max_steps": self.episode_length,
        }
