"""A scripted expert for ALOHA's two simulated tasks. It knows where the objects are.

Both arms follow a list of stages. A stage has a goal for each gripper, computed from where the objects are now, so that an
object which was pushed, or which sits crooked between the fingers, moves the goal. Inverse kinematics (damped least squares,
Wampler 1986) turns goals into joint positions, to which the joints move smoothly. If an object is dropped, the first stage
starts again.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import mujoco
import numpy as np

ARMS = ("left", "right")
STEPS_PER_SECOND = 50
SPEEDS = np.array([0.8, 0.8, 0.8, 1.6, 1.6, 1.6])  # radians a second of each joint, mean of a stage
FINGERTIPS = 0.14  # metres from the gripper's frame, along its x axis: where it holds things
PATIENCE = 25  # steps to wait for a gripper that lags behind
DROPPED = 0.04  # metres from the fingertips to the middle of an object that is no longer held
OPEN = 1.0
CLOSED = 0.0
BENT = [0, -0.6, 0.8, 0, 0.6, 0]  # elbow up and wrist bent: here inverse kinematics starts, and finds one answer


@dataclass
class Pose:
    """Where a body is: position (3,) in metres, rotation matrix (3, 3)."""

    position: np.ndarray
    rotation: np.ndarray

    def __matmul__(self, other: "Pose") -> "Pose":
        return Pose(self.position + self.rotation @ other.position, self.rotation @ other.rotation)

    def inverse(self) -> "Pose":
        return Pose(-self.rotation.T @ self.position, self.rotation.T)

    def shifted(self, x: float = 0, z: float = 0) -> "Pose":
        """The same rotation, moved along the world's axes."""
        return Pose(self.position + np.array([x, 0, z]), self.rotation)


@dataclass
class Stage:
    """One move of both arms.

    Attributes:
        left, right: give the pose of the fingertips at the stage's end; None to stay.
        grips: opening of the left and the right gripper at the stage's end, 0 to 1.
        steps: at least so many.
        tolerance: metres between fingertips and goal at which the stage is over.
        holds: {arm: body that it holds all the time}.
    """

    left: Callable[[], Pose] | None
    right: Callable[[], Pose] | None
    grips: tuple[float, float]
    steps: int = 10
    tolerance: float = 0.02
    holds: dict[str, str] = field(default_factory=dict)


class Expert:
    """Plays a task's stages, one action at a time.

    Args:
        model, data: MuJoCo's, of the simulation at an episode's start; only read.
        task: transfer_cube or insertion.
    """

    def __init__(self, model, data, task: str):
        self.model = model
        self.data = data
        self.scratch = mujoco.MjData(model)
        self.bodies = {arm: model.body(f"vx300s_{arm}/gripper_link").id for arm in ARMS}
        # Each arm has six joints, then two fingers. A joint has the same index in qpos, qvel and ctrl.
        self.joints = {"left": slice(0, 6), "right": slice(8, 14)}
        self.reference = {arm: data.ctrl[self.joints[arm]].copy() for arm in ARMS}
        self.grip = dict.fromkeys(ARMS, 0.1)
        self.solution = {arm: np.array(BENT) for arm in ARMS}
        self.stages = {"transfer_cube": self.transfer_cube, "insertion": self.insertion}[task]()
        self._begin(0)

    def action(self) -> np.ndarray:
        """(14,) target positions now: the left arm's six joints and opening, then the right arm's."""
        stage = self.stages[self.stage]
        if any(self._is_dropped(arm, name) for arm, name in stage.holds.items()):
            self._begin(0)
        elif self.step >= self.steps and self.stage + 1 < len(self.stages) and self._has_arrived():
            self._begin(self.stage + 1)
        self.step += 1
        stage = self.stages[self.stage]
        progress = min(1, self.step / self.steps)
        smooth = progress**3 * (10 - 15 * progress + 6 * progress**2)  # minimum jerk
        action = []
        for arm, grip in zip(ARMS, stage.grips, strict=True):
            target = self._target(arm)
            self.reference[arm] = self.start[arm] + smooth * (target - self.start[arm])
            self.grip[arm] = self.start_grip[arm] + smooth * (grip - self.start_grip[arm])
            action += [*self.reference[arm], self.grip[arm]]
        return np.array(action, np.float32)

    def is_delicate(self) -> bool:
        """Whether the arms hold something or are about to."""
        return self.stage > 0

    def _begin(self, number: int) -> None:
        """Start a stage, which lasts as long as its longest way needs."""
        self.stage = number
        self.step = 0
        self.start = dict(self.reference)
        self.start_grip = dict(self.grip)
        self.grasp = {}
        for arm, name in self.stages[number].holds.items():
            self.grasp[arm] = self.body(name).inverse() @ self.fingertips(arm)
        seconds = max((np.abs(self._target(arm) - self.start[arm]) / SPEEDS).max() for arm in ARMS)
        self.steps = max(self.stages[number].steps, int(np.ceil(STEPS_PER_SECOND * seconds)))

    def _goal(self, arm: str) -> Pose | None:
        goal = getattr(self.stages[self.stage], arm)
        return goal and goal()

    def _target(self, arm: str) -> np.ndarray:
        """(6,) joint positions at the stage's end, as far as is known now."""
        goal = self._goal(arm)
        if goal is None:
            return self.start[arm]
        self.solution[arm] = self.solve(arm, goal, self.solution[arm])
        # The joints are springs: aim above the goal by as much as gravity bends them.
        joints = self.joints[arm]
        return self.solution[arm] + self.gravity(arm) / self.model.actuator_gainprm[joints, 0]

    def _has_arrived(self) -> bool:
        """Whether both grippers are at their goals, or have been given enough time."""
        if self.step >= self.steps + PATIENCE:
            return True
        tolerance = self.stages[self.stage].tolerance
        for arm in ARMS:
            goal = self._goal(arm)
            if goal and np.linalg.norm(goal.position - self.fingertips(arm).position) > tolerance:
                return False
        return True

    def _is_dropped(self, arm: str, name: str) -> bool:
        return np.linalg.norm(self.fingertips(arm).position - self.body(name).position) > DROPPED

    def body(self, name: str) -> Pose:
        """Where a body is now."""
        body = self.data.body(name)
        return Pose(body.xpos.copy(), body.xmat.reshape(3, 3).copy())

    def fingertips(self, arm: str, data=None) -> Pose:
        """Where the fingertips are now, or are in `data`."""
        data = data or self.data
        body = self.bodies[arm]
        rotation = data.xmat[body].reshape(3, 3).copy()
        return Pose(data.xpos[body] + FINGERTIPS * rotation[:, 0], rotation)

    def carry(self, arm: str, goal: Pose) -> Pose:
        """Where the fingertips have to be for what they hold to be at its goal."""
        held = self.body(self.stages[self.stage].holds[arm])
        return goal @ held.inverse() @ self.fingertips(arm)

    def solve(self, arm: str, goal: Pose, start: np.ndarray) -> np.ndarray:
        """Inverse kinematics: (6,) joint positions near `start`. Leaves them in `scratch`."""
        joints = self.joints[arm]
        limits = self.model.actuator_ctrlrange[joints]
        scratch = self.scratch
        solution = start.copy()
        for _ in range(20):
            scratch.qpos[joints] = solution
            mujoco.mj_kinematics(self.model, scratch)
            mujoco.mj_comPos(self.model, scratch)
            now = self.fingertips(arm, scratch)
            turn = rotation_vector(goal.rotation @ now.rotation.T)
            error = np.concatenate([goal.position - now.position, 0.2 * turn])  # a radian weighs as much as 0.2 m
            if np.abs(error).max() < 1e-4:
                break
            moves = np.zeros((3, self.model.nv))
            turns = np.zeros((3, self.model.nv))
            mujoco.mj_jac(self.model, scratch, moves, turns, now.position, self.bodies[arm])
            jacobian = np.concatenate([moves[:, joints], 0.2 * turns[:, joints]])
            change = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
            solution = np.clip(solution + np.clip(change, -0.3, 0.3), limits[:, 0], limits[:, 1])
        return solution

    def gravity(self, arm: str) -> np.ndarray:
        """(6,) torques that hold the arm up as it is in `scratch`."""
        torques = np.zeros(self.model.nv)
        mujoco.mj_comVel(self.model, self.scratch)  # of no velocity
        mujoco.mj_rne(self.model, self.scratch, 0, torques)
        return torques[self.joints[arm]]

    def transfer_cube(self) -> list[Stage]:
        """The right arm picks up the cube, and the left one takes it out of its fingers."""
        down = facing("right", pitch=1.05)
        sideways = facing("left", roll=np.pi / 2)  # one finger above the cube, one below
        meeting = np.array([0.0, 0.5, 0.2])
        held = {"right": "box"}
        self.solution["left"][5] = np.pi / 2  # else the forearm turns to get there

        def wait() -> Pose:
            return Pose(meeting, sideways).shifted(x=-0.13)

        def around() -> Pose:
            return Pose(self.body("box").position, down)

        def above() -> Pose:
            return around().shifted(z=0.08)

        def lift() -> Pose:
            return self.carry("right", Pose(meeting, np.eye(3)))

        def take() -> Pose:
            return Pose(self.body("box").position, sideways)

        def retreat() -> Pose:
            return Pose(meeting, down).shifted(x=0.1, z=0.05)

        return [
            Stage(wait, above, (OPEN, OPEN)),
            Stage(wait, around, (OPEN, OPEN), tolerance=0.006),
            Stage(wait, None, (OPEN, CLOSED), steps=25),
            Stage(wait, lift, (OPEN, CLOSED), holds=held),
            Stage(take, None, (OPEN, CLOSED), holds=held, tolerance=0.008),
            Stage(None, None, (CLOSED, CLOSED), steps=20, holds=held),
            Stage(None, None, (CLOSED, OPEN), steps=20),
            Stage(None, retreat, (CLOSED, OPEN), holds={"left": "box"}),
        ]

    def insertion(self) -> list[Stage]:
        """Each arm picks up its part, and the right one pushes the peg into the socket in the air."""
        left_down = facing("left", pitch=1.05)
        right_down = facing("right", pitch=1.05)
        meeting = Pose(np.array([-0.05, 0.5, 0.15]), np.eye(3))  # of the socket's middle
        held = {"left": "socket", "right": "peg"}

        def around_socket() -> Pose:
            return Pose(self.body("socket").position, left_down)

        def around_peg() -> Pose:
            # Between the tips, so that these stay above the table
            return Pose(self.body("peg").position, right_down).shifted(z=0.008)

        def above_socket() -> Pose:
            return around_socket().shifted(z=0.08)

        def above_peg() -> Pose:
            return around_peg().shifted(z=0.08)

        def lift_socket() -> Pose:
            return self.carry("left", meeting)

        def align_peg() -> Pose:
            return self.carry("right", self.body("socket") @ Pose(np.array([0.13, 0, 0]), np.eye(3)))

        def lift_peg() -> Pose:
            return self.carry("right", meeting.shifted(x=0.15))

        def push_peg() -> Pose:
            # The pin inside ends 0.04 m from the socket's middle, and the peg is 0.12 m long: they touch at 0.1 m.
            # It slips back between the fingers as they touch; were it measured again, they would follow it.
            return self.body("socket") @ Pose(np.array([0.09, 0, 0]), np.eye(3)) @ self.grasp["right"]

        return [
            Stage(above_socket, above_peg, (OPEN, OPEN)),
            Stage(around_socket, around_peg, (OPEN, OPEN), tolerance=0.006),
            Stage(None, None, (CLOSED, CLOSED), steps=25),
            Stage(lift_socket, lift_peg, (CLOSED, CLOSED), holds=held),
            Stage(None, align_peg, (CLOSED, CLOSED), tolerance=0.004, holds=held),
            Stage(None, push_peg, (CLOSED, CLOSED), steps=50, tolerance=0, holds=held),
        ]


def facing(arm: str, pitch: float = 0, roll: float = 0) -> np.ndarray:
    """(3, 3) rotation of a gripper that points away from its base, `pitch` radians down, turned by `roll`."""
    yaw = {"left": 0, "right": np.pi}[arm]
    quaternion = np.zeros(4)
    rotation = np.zeros(9)
    mujoco.mju_euler2Quat(quaternion, np.array([yaw, pitch, roll]), "zyx")
    mujoco.mju_quat2Mat(rotation, quaternion)
    return rotation.reshape(3, 3)


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """(3,) axis times angle in radians of a rotation matrix."""
    quaternion = np.zeros(4)
    vector = np.zeros(3)
    mujoco.mju_mat2Quat(quaternion, rotation.ravel())
    mujoco.mju_quat2Vel(vector, quaternion, 1)
    return vector
