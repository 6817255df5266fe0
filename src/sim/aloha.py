"""ALOHA's two simulated tasks as a LeRobot environment type, `armature_aloha`, whose steps cost little.

Scenes, physics, start positions, state, actions (14 joint positions) and success are those of the package gym-aloha, which
LeRobot's type `aloha` runs, to the bit; task texts are those of LeRobot's datasets of these tasks. What differs: only the
cameras that are asked for are rendered, at any size, and without shadows, reflections and the finest details of the arms'
meshes (look=lerobot image_size=480 image_width=640 renders what LeRobot's type shows): 3 ms of a CPU for a step with one picture of
128x128, where gym-aloha takes 230. There is a scripted expert.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import gymnasium
import numpy as np
from lerobot.configs import PolicyFeature
from lerobot.envs import EnvConfig

from errors import UserError, nearest
from sim.rendering import Renderer
from sim.scripted import ScriptedConfig, ScriptedTask, chosen_cameras

TASKS = {
    "AlohaTransferCube-v0": (
        "transfer_cube",
        "Pick up the cube with the right arm and transfer it to the left arm.",
    ),
    "AlohaInsertion-v0": ("insertion", "Insert the peg into the socket."),
}
CAMERAS = ["top", "angle", "front_close", "left_pillar", "right_pillar", "left_wrist", "right_wrist"]
JOINTS = ["waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper"]
ARMS = ("left", "right")
SUBSTEPS = 10  # physics steps of 2 ms in an action
SOLVED = 4  # the reward of a solved task


class AlohaTask(ScriptedTask):
    """(14,) joint positions in and out: six in radians and the gripper from 0 (closed) to 1 (open), of each arm."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}  # noqa: RUF012
    robot_type = "aloha"
    noise = 0.01
    noise_smoothness = 0.97  # what changes at each step shakes the objects out of the grippers

    def __init__(self, task: str, cameras: list[str], image_size: int, image_width: int, look: str, max_steps: int):
        if task not in TASKS:
            known = " or ".join(TASKS)
            raise UserError(f"aloha has no task {task!r}{nearest(task, TASKS) or '.'} Pass {known}")
        import mujoco
        from gym_aloha.constants import ASSETS_DIR

        self.scene, description = TASKS[task]
        self.model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / f"bimanual_viperx_{self.scene}.xml"))
        self.data = mujoco.MjData(self.model)
        half_a_pixel = 0.5 / image_size  # the scene is about a metre high
        self.renderer = Renderer(self.model, image_size, look, detail=half_a_pixel, width=image_width)
        names = [f"{arm}_{joint}" for arm in ARMS for joint in JOINTS]
        low, high = action_limits(self.model)
        super().__init__(
            task=task,
            task_description=description,
            cameras=cameras,
            image_size=image_size,
            image_width=image_width,
            state_names=names,
            action_space=gymnasium.spaces.Box(low, high),
            action_names=names,
            noise_scale=np.zeros(14),
            max_steps=max_steps,
        )

    def start(self, seed: int) -> None:
        import mujoco
        from gym_aloha.constants import START_ARM_POSE
        from gym_aloha.utils import sample_box_pose, sample_insertion_pose

        from sim.aloha_expert import Expert

        poses = [sample_box_pose(seed)] if self.scene == "transfer_cube" else sample_insertion_pose(seed)
        # As dm_control, on which gym-aloha runs, begins an episode: its solver starts from what it found before.
        mujoco.mj_resetData(self.model, self.data)
        flags = self.model.opt.disableflags
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
        mujoco.mj_forward(self.model, self.data)
        self.data.qpos[:] = np.concatenate([START_ARM_POSE, *poses])
        self.data.ctrl[:] = START_ARM_POSE
        mujoco.mj_forward(self.model, self.data)
        mujoco.mj_forward(self.model, self.data)
        self.model.opt.disableflags = flags
        self.expert = Expert(self.model, self.data, self.scene)

    def advance(self, action: np.ndarray) -> tuple[float, bool]:
        import mujoco
        from gym_aloha.constants import unnormalize_puppet_gripper_position

        targets = []
        for joints in np.split(np.asarray(action), 2):
            finger = unnormalize_puppet_gripper_position(joints[6])
            targets += [*joints[:6], finger, -finger]
        self.data.ctrl[:] = targets
        # Ends with positions, contacts and pictures of the same moment, in dm_control's order
        mujoco.mj_step2(self.model, self.data)
        mujoco.mj_step(self.model, self.data, SUBSTEPS - 1)
        mujoco.mj_step1(self.model, self.data)
        reward = self.reward()
        return float(reward), reward == SOLVED

    def is_lost(self) -> bool:
        """Whether the physics has come apart, after which MuJoCo starts again from nowhere."""
        return any(warning.number for warning in self.data.warning)

    def reward(self) -> int:
        """gym-aloha's, by which contacts there are."""
        touching = {
            frozenset((self.model.geom(contact.geom1).name, self.model.geom(contact.geom2).name))
            for contact in self.data.contact
        }

        def touch(parts: list[str], other: str) -> bool:
            return any(frozenset((part, other)) in touching for part in parts)

        left_finger = "vx300s_left/10_left_gripper_finger"
        right_finger = "vx300s_right/10_right_gripper_finger"
        if self.scene == "transfer_cube":
            return transfer_reward(
                in_right=touch(["red_box"], right_finger),
                in_left=touch(["red_box"], left_finger),
                on_table=touch(["red_box"], "table"),
            )
        socket = [f"socket-{wall}" for wall in (1, 2, 3, 4)]
        return insertion_reward(
            both_held=touch(socket, left_finger) and touch(["red_peg"], right_finger),
            on_table=touch([*socket, "red_peg"], "table"),
            peg_in_socket=touch(socket, "red_peg"),
            pin_touched=touch(["pin"], "red_peg"),
        )

    def state(self) -> np.ndarray:
        from gym_aloha.constants import normalize_puppet_gripper_position

        values = self.data.qpos[[0, 1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14]]
        values[[6, 13]] = normalize_puppet_gripper_position(values[[6, 13]])
        return values

    def picture(self, camera: str) -> np.ndarray:
        return self.renderer.picture(self.data, camera)

    def expert_action(self) -> np.ndarray:
        action = self.expert.action()
        self.noise_scale = np.full(14, 0.4 if self.expert.is_delicate() else 1.0)
        self.noise_scale[[6, 13]] = 0
        return action

    def close(self):
        self.renderer.close()


def action_limits(model) -> tuple[np.ndarray, np.ndarray]:
    """(14,) float32 each, lowest and highest target of a joint; a gripper's are 0 and 1, the ends of its own scale."""
    limits = []
    for arm in (model.actuator_ctrlrange[0:6], model.actuator_ctrlrange[8:14]):
        limits += [*arm, (0, 1)]
    low, high = np.array(limits, np.float32).T
    return low, high


def transfer_reward(in_right: bool, in_left: bool, on_table: bool) -> int:
    """gym_aloha.tasks.sim.TransferCubeTask.get_reward: the left gripper takes the cube in the air."""
    if in_left:
        return 3 if on_table else SOLVED
    if in_right:
        return 1 if on_table else 2
    return 0


def insertion_reward(both_held: bool, on_table: bool, peg_in_socket: bool, pin_touched: bool) -> int:
    """gym_aloha.tasks.sim.InsertionTask.get_reward: the peg touches the pin inside the socket."""
    if pin_touched:
        return SOLVED
    if peg_in_socket and not on_table:
        return 3
    if both_held:
        return 1 if on_table else 2
    return 0


@EnvConfig.register_subclass("armature_aloha")
@dataclass
class ArmatureAloha(ScriptedConfig):
    """Settings of `lerobot-eval --env.type=armature_aloha` and `evaluate.py --env aloha`.

    Attributes:
        task: AlohaTransferCube-v0 or AlohaInsertion-v0.
        episode_length: steps after which an episode has failed.
        cameras: top, angle, front_close, left_pillar, right_pillar, left_wrist, right_wrist, or several of them,
            separated by commas.
        image_size: height of their images.
        image_width: 0 for square ones, which show the middle of what wider ones show.
        look: plain, or lerobot (shadows, reflections, whole meshes: what LeRobot's own type shows).
    """

    task_class: ClassVar = AlohaTask
    expert_steps: ClassVar = 400
    package: ClassVar = "gym_aloha"
    install: ClassVar = "gym-aloha==0.1.5 dm-control==1.0.28 mujoco==3.3.0"

    task: str = "AlohaTransferCube-v0"
    fps: int = 50
    episode_length: int = 400
    cameras: str = "top"
    image_size: int = 128
    image_width: int = 0
    look: str = "plain"
    features: dict[str, PolicyFeature] = field(default_factory=dict)
    features_map: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.check_choices(look=("plain", "lerobot"))
        if self.image_width < 0:
            raise UserError(f"image_width must be at least 0, got {self.image_width}")
        cameras = chosen_cameras(self.cameras, CAMERAS, "aloha")
        self.set_features(cameras, self.image_size, state=14, action=14, image_width=self.image_width)

    @property
    def gym_kwargs(self) -> dict:
        return {
            "cameras": chosen_cameras(self.cameras, CAMERAS, "aloha"),
            "image_size": self.image_size,
            "image_width": self.image_width,
            "look": self.look,
            "max_steps": self.episode_length,
        }
