"""How good a policy is: held-out episodes, recorded episodes, simulation; what is measured changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from checkpoints.folder import find_checkpoints
from config import TrainConfig, merge
from data.opening import open_source
from data.split import split_episodes
from errors import UserError
from helpers.paths import ROOT, SHIPPED
from helpers.runs import assert_same_run, small
from helpers.simulations import QuickRunner, still_simulation
from policy.loaded import load_policy
from processors.statistics import is_still
from runs import main
from sim.environments import check_batch, open_simulation
from sim.rollout import Episode, run_episode, summary, summary_of_tasks, wilson_interval
from sim.suites import difficulty_groups, tasks_of
from sim.workers import InProcess, Job, Workers
from train import train
from training import closed_loop, evaluation
from training.closed_loop import run_tasks
from training.evaluation import Evaluator
from training.open_loop import (
    OpenLoopErrors,
    action_names,
    evenly_spaced_rows,
    measure,
    permutation_importance,
    recorded_observations,
)


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A checkpoint for the shipped task that has learned nothing."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    settings = small("flow", dataset_id=str(SHIPPED), episodes="0", image_size=[48, 48], steps=1, save_freq=0)
    settings["policy_args"] = [*settings["policy_args"], "head=regression"]
    return train(**settings, output_dir=str(folder)).checkpoint


# --- held-out episodes ---


def test_held_out_episodes_are_whole_and_a_function_of_the_seed():
    source = open_source(str(SHIPPED))

    def chosen(**settings):
        split = split_episodes(source, merge({"dataset_id": [str(SHIPPED)], **settings}))
        assert sorted([*split.train.tolist(), *split.held_out.tolist()]) == list(range(40))
        return split.held_out.tolist()

    assert chosen() == []
    assert chosen(val_episodes="3:5,39") == [3, 4, 39]
    assert len(chosen(val_fraction=0.1)) == 4
    assert chosen(val_fraction=0.1) == chosen(val_fraction=0.1)
    assert chosen(val_fraction=0.1) != chosen(val_fraction=0.1, seed=7)
    with pytest.raises(UserError, match="--val_episodes 0:40 holds out all 40 episodes: leave some to train on"):
        chosen(val_episodes="0:40")


def test_rows_are_evenly_spread():
    starts, ends = torch.tensor([0, 20]), torch.tensor([10, 30])
    assert evenly_spaced_rows(starts, ends, 0).tolist() == [*range(10), *range(20, 30)]
    assert evenly_spaced_rows(starts, ends, 3).tolist() == [0, 20, 29]


class Offset:
    """A policy that predicts what was recorded, a known distance off, for chunks longer than the recording has."""

    config = SimpleNamespace(type="offset", n_obs_steps=1)

    def __init__(self, off):
        self.off, self.weight = off, torch.nn.Parameter(torch.zeros(1))

    def eval(self):
        return self

    reset = eval

    def parameters(self):
        return iter([self.weight])

    def forward(self, batch):
        return batch["action"].mean() * 0 + 2.0, {}

    def predict_action_chunk(self, batch):
        wrong = torch.where(batch["action_is_pad"][..., None], 1e6, 0.0)  # what is not there must not count
        return torch.cat([batch["action"] + self.off + wrong, torch.full_like(batch["action"], 1e6)], dim=1)


def without_processors(policy) -> SimpleNamespace:
    """A LoadedPolicy's parts, of a policy that takes batches as they are recorded."""
    return SimpleNamespace(policy=policy, preprocess=lambda batch: batch, postprocess=lambda chunk: chunk, device="cpu")


def test_errors_of_a_known_policy(made):
    from data.frames import Frames
    from data.loader import Loader

    source = open_source(str(made("no_camera")))
    loader = Loader(source, Frames(source), {"action": [0, 1, 2, 3]}, batch_size=5, seed=0)
    off = torch.tensor([0.5, -1.0, 2.0])
    errors = measure(without_processors(Offset(off)), loader, torch.arange(source.rows), seed=0, batch_size=5)
    loader.close()
    assert errors.loss == 2.0
    np.testing.assert_allclose(errors.error, np.broadcast_to(np.abs(off.numpy()), (4, 3)), rtol=1e-5)
    std = source.columns["action"].double().std(0).numpy()
    line = errors.metrics()
    assert line["val_error_by_joint"] == pytest.approx({"shoulder": 0.5, "elbow": 1.0, "gripper": 2.0}, rel=1e-5)
    assert line["val_action_error"] == pytest.approx(
        np.mean([0.5 / std[0], 1.0 / std[1]]), rel=1e-5
    )  # the gripper never moves


def test_steps_that_no_sample_reaches_are_left_out(made):
    from data.frames import Frames
    from data.loader import Loader

    source = open_source(str(made("no_camera")))
    loader = Loader(
        source, Frames(source), {"action": list(range(20))}, batch_size=5, seed=0
    )  # episodes have 13 at most
    errors = measure(without_processors(Offset(0.5)), loader, torch.arange(source.rows), seed=0)
    loader.close()
    np.testing.assert_allclose(errors.error, np.full((13, 3), 0.5), rtol=1e-5)


class Doubled(Offset):
    """A policy that does not look: twice the state, for a chunk of four."""

    def predict_action_chunk(self, batch):
        return 2 * batch["observation.state"][:, None].expand(-1, 4, -1)


def test_permutation_importance_of_a_policy_that_does_not_look(made):
    from data.frames import Frames
    from data.loader import Loader

    source = open_source(str(made("video")))
    camera, scale = source.meta.camera_keys[0], np.array([0.5, 0.0, 4.0])  # the middle joint is still
    loader = Loader(source, Frames(source), {"action": [0, 1, 2, 3]}, batch_size=5, seed=0)
    policy = without_processors(Doubled(0))
    keys, two = ["observation.state", camera], torch.tensor([3, 8])
    used = permutation_importance(policy, loader, keys, two, scale, seed=0)
    none = [
        permutation_importance(policy, loader, keys, two, 0 * scale, seed=0),
        permutation_importance(policy, loader, keys, torch.arange(1), scale, seed=0),
    ]
    loader.close()
    a, b = source.columns["observation.state"][two].double().numpy()
    assert used == {"observation.state": pytest.approx(np.mean(2 * np.abs(a - b)[[0, 2]] / scale[[0, 2]])), camera: 0.0}
    assert none == [None, None]


def test_a_joint_that_is_still_up_to_rounding_is_still():
    moving, rounded = torch.linspace(0, 1, 9), 0.04 + 1e-9 * torch.arange(9)
    assert is_still(torch.stack([moving, rounded], dim=1).double()).tolist() == [False, True]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a", "b"], ["a", "b"]), (["a", "a"], ["action 0", "action 1"]), ([1, 2], ["action 0", "action 1"])],
)
def test_names_of_joints(names, message):
    meta = SimpleNamespace(features={"action": {"shape": (2,), "names": names}})
    assert action_names(meta) == message


def test_a_simulation_that_does_not_fit_is_refused_before_training(made, tmp_path, renderer):
    settings = small("flow", dataset_id=str(made("video")), eval_env="metaworld", output_dir=str(tmp_path))
    message = (
        r"simulation has no observation.images.top, which the policy takes: got .*corner2.*pass evaluate.py --rename"
    )
    with pytest.raises(UserError, match=message):
        train(**settings)
    with pytest.raises(UserError, match="unknown environment metawrld, did you mean 'metaworld'"):
        train(**{**settings, "eval_env": "metawrld"})
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def simulate(monkeypatch):
    """simulate(on_step) puts a simulation in place of --eval_env, and returns its environment."""

    def install(on_step):
        simulation = still_simulation(on_step)
        monkeypatch.setattr(evaluation.environments, "open_simulation", lambda *args, **kwargs: simulation)
        return simulation.env

    return install


def test_a_simulation_that_fails_does_not_end_the_run(made, tmp_path, simulate, capsys):
    def fail():
        raise RuntimeError("the simulator has gone")

    simulate(fail)
    result = train(**small("flow", dataset_id=str(made("no_camera")), eval_env="pusht", output_dir=str(tmp_path)))
    assert result.steps == 4
    message = "warning: --eval_env pusht failed, training continues: RuntimeError: the simulator has gone"
    assert capsys.readouterr().out.count(message) == 2


def test_a_validation_that_fails_does_not_end_the_run(made, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise ValueError("a chunk of another shape")

    monkeypatch.setattr(evaluation, "measure", fail)
    settings = small("flow", dataset_id=str(made("no_camera")), val_fraction=0.4, output_dir=str(tmp_path))
    assert train(**settings).steps == 4
    message = "warning: validation failed, training continues: ValueError: a chunk of another shape"
    assert capsys.readouterr().out.count(message) == 2


def test_a_stop_signal_ends_a_simulation(made, tmp_path, simulate, capsys):
    env = simulate(lambda: os.kill(os.getpid(), signal.SIGTERM))
    result = train(**small("flow", dataset_id=str(made("no_camera")), eval_env="pusht", output_dir=str(tmp_path)))
    assert (result.steps, result.stopped_by, result.checkpoint.name) == (2, "SIGTERM", "checkpoint-2")
    assert "warning: the run was stopped during a simulation, which gives no success rate" in capsys.readouterr().out
    assert env.steps == 1


def test_measuring_changes_no_weight(made, tmp_path, renderer):
    """Held-out episodes, simulation and tracker on and off."""
    settings = small("flow", dataset_id=str(SHIPPED), image_size=[48, 48], episodes="0:2", steps=2, save_freq=1)
    train(**settings, output_dir=str(tmp_path / "off"))
    watched = {"val_episodes": "3,7", "val_freq": 1, "eval_env": "metaworld", "eval_task": "drawer-open-v3", "eval_episodes": 1,
               "eval_args": ["episode_length=5"], "eval_freq": 1, "tracker": "tensorboard"}  # fmt: skip
    train(**settings, **watched, output_dir=str(tmp_path / "on"))
    for step in (1, 2):
        assert_same_run(tmp_path / "off", tmp_path / "on", step)
    lines = [json.loads(line) for line in (tmp_path / "on" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "val_loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "eval_success_rate" in line] == [1, 2]
    assert list((tmp_path / "on" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "policy", ["flow", *(pytest.param(name, marks=pytest.mark.slow) for name in ("act", "diffusion"))]
)
def test_validation_goes_on_over_a_resume(made, tmp_path, policy):
    settings = small(policy, dataset_id=str(made("video")), val_fraction=0.3, val_samples=6, frame_cache="off")
    settings["lr_schedule"] = "constant"  # of the presets some end with the run, and so depend on --steps
    whole = train(**{**settings, "steps": 4}, output_dir=str(tmp_path / "whole"))
    train(**{**settings, "steps": 2}, output_dir=str(tmp_path / "part"))
    part = train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"), steps=4)
    measured = [[line for line in result.history if "val_loss" in line] for result in (whole, part)]
    assert measured[0] == measured[1]
    assert [line["step"] for line in measured[0]] == [2, 4]
    assert set(measured[0][0]["val_error_by_joint"]) == {"shoulder", "elbow", "gripper"}


def test_best_checkpoint_is_marked_and_kept(made, tmp_path, monkeypatch, capsys):
    losses = iter([3.0, 1.0, 2.0, 4.0])

    def measured(*args, **kwargs):
        return OpenLoopErrors(loss=next(losses), error=None, std=np.ones(3), names=["a", "b", "c"], fps=10)

    monkeypatch.setattr(evaluation, "measure", measured)
    settings = small(dataset_id=str(made("no_camera")), val_fraction=0.3, save_freq=1, keep_last=1)
    train(**settings, output_dir=str(tmp_path / "run"))
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-4"]
    assert json.loads((tmp_path / "run" / "best.json").read_text()) == {"checkpoint": "checkpoint-2", "val_loss": 1.0}
    main(["list", str(tmp_path / "run")])
    listed = capsys.readouterr().out.splitlines()[-2:]
    assert ["best by validation" in line for line in listed] == [True, False]


# --- recorded episodes ---


def test_open_loop_report(trained, tmp_path, capsys):
    command = [
        str(trained),
        "--dataset_id",
        str(SHIPPED),
        "--episodes",
        "1,4",
        "--device",
        "cpu",
        "--output_dir",
        str(tmp_path),
    ]
    assert evaluate.main(command) == 0
    assert "mean |action error| in robot units: dx " in capsys.readouterr().out
    numbers = json.loads((tmp_path / "open_loop" / "numbers.json").read_text())
    policy, source = load_policy(trained, "cpu"), open_source(str(SHIPPED), episodes="1,4")
    errors = []
    for episode in (1, 4):
        policy.reset()
        for observation, action in recorded_observations(source, episode, policy.expected):
            errors.append(np.abs(policy.act(observation) - action))
    assert numbers["frames"] == len(errors) == source.rows
    np.testing.assert_allclose(list(numbers["error_by_joint"].values()), np.mean(errors, 0), rtol=1e-4)
    assert len(numbers["error_by_step"]) == 6
    assert [episode["episode"] for episode in numbers["episodes"]] == [1, 4]
    assert set(numbers["permutation_importance"]) == set(policy.expected)
    assert numbers["latency_ms"]["p50"] <= numbers["latency_ms"]["p99"]
    report = (tmp_path / "open_loop" / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 4  # error along the chunk, worst moments, two episodes
    assert "://" not in report  # nothing to load


def test_results_lie_beside_the_checkpoint_not_in_it(trained):
    from checkpoints.folder import verify

    folder = evaluate.report_folder(str(trained), None, "open_loop")
    assert folder == trained.parent / "evaluation" / trained.name / "open_loop"
    assert evaluate.report_folder(str(trained.parent), None, "x") == trained.parent / "evaluation" / "final" / "x"
    verify(trained)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--env", "metawrld"], "unknown environment metawrld, did you mean 'metaworld'? Pass one of aloha, armature_aloha"),
        (["--env", "metaworld", "--task", "drawer-opn-v3"], "Meta-World has no task 'drawer-opn-v3', did you mean 'drawer-open-v3'?"),
        (["--env", "metaworld", "--env_args", "lok=plain"], "--env_args lok: armature_metaworld has no such setting, did you mean"),
        (["--env", "metaworld", "--env_args", "camera=corner9"], "Meta-World has no camera 'corner9', did you mean 'corner'"),
        (["--env", "metaworld", "--max_steps", "501"], "episode_length must be 1 to 500, got 501"),
        (["--env", "metaworld", "--env_args", "camera=corner"],
         "the simulation has no observation.images.corner2, which the policy takes: got observation.images.corner, observation.state. "
         "If that is the same, pass evaluate.py --rename observation.images.corner=observation.images.corner2 (train.py renames none)"),
        (["--env", "pusht"], "environment pusht: a package is missing. Package 'gym_pusht' required for env 'pusht' not found"),
        (["--dataset_id", "DATA"], "has no observation.images.corner2, which the policy takes: got observation.images.top, "
         "observation.state. Pass the dataset that the policy was trained on"),
        (["--dataset_id", str(SHIPPED), "--episodes", "99"], "--episodes 99: 99 is out of range, the dataset has"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(trained, made, tmp_path, capsys, renderer, flags, message):
    flags = [str(made("video")) if flag == "DATA" else flag for flag in flags]
    assert (
        evaluate.main([str(trained), *flags, "--device", "cpu", "--num_episodes", "1", "--output_dir", str(tmp_path)])
        == 2
    )
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("x", "nothing to evaluate on. Pass --dataset_id with --episodes, or --env with --task"),
        ("x --env metaworld --rename a", "--rename a: expected OLD=NEW"),
        ("x --env metaworld --num_episodes 0", "--num_episodes must be at least 1, got 0"),
        ("x --env metaworld --num_workers 0", "--num_workers must be at least 1, got 0"),
        (
            "expert --env pusht",
            "expert is a simulation's scripted expert: expected --env aloha or metaworld or ",
        ),
        ("expert --dataset_id x", "expert is a simulation's scripted expert: expected --env aloha"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_loaded(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments.split())
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.parametrize("command", ["evaluate", "infer"])
def test_help_imports_nothing_slow(command):
    arguments = ["-X", "importtime", f"src/{command}.py", "--help"]
    shown = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert shown.stdout.startswith(f"usage: {command}.py")
    imported = {line.rpartition("|")[2].strip() for line in shown.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"numpy", "torch", "lerobot"}


# --- simulation ---


def test_wilson_interval():
    """Against the values in Wilson's own terms: Brown, Cai and DasGupta (2001), and the closed form by hand."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(6, 12) == pytest.approx((0.2538, 0.7462), abs=1e-3)
    assert wilson_interval(50, 50) == pytest.approx((0.9287, 1.0), abs=1e-3)


def test_summary_counts():
    episodes = [Episode(seed, seed % 2 == 0, 10 + seed, 1.0, []) for seed in range(5)]
    message = summary(episodes)
    assert (message["successes"], message["num_episodes"], message["success_rate"]) == (3, 5, 0.6)
    assert message["median_steps_of_successes"] == 12.0
    assert [episode["seed"] for episode in message["episodes"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("episodes", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_expert_succeeds_through_the_same_path(tmp_path, renderer, capsys, episodes):
    command = ["expert", "--env", "metaworld", "--task", "drawer-open-v3", "--output_dir", str(tmp_path)]
    assert evaluate.main([*command, "--num_episodes", str(episodes), "--num_videos", "1"]) == 0
    folder = tmp_path / "metaworld_drawer-open-v3"
    numbers = json.loads((folder / "numbers.json").read_text())
    assert numbers["success_rate"] >= 0.95
    assert [e["seed"] for e in numbers["episodes"]] == list(range(1000, 1000 + episodes))
    import av

    with av.open(str(folder / "success_1000.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == numbers["episodes"][0]["steps"] + 1
    report = (folder / "report.html").read_text()
    assert report.count("data:video/mp4;base64,") == 1
    assert "://" not in report  # nothing to load


def test_simulation_is_a_function_of_the_seed_and_shows_its_own_beginning(trained, renderer):
    """In whatever order the episodes come; the first picture is of this episode, not of the one before."""
    policy = load_policy(trained, "cpu")
    simulation = open_simulation("metaworld", "drawer-open-v3", max_steps=20, policy_config=policy.policy.config)
    there = [run_episode(simulation, policy, seed, film=True) for seed in (1, 2, 3)]
    back = [run_episode(simulation, policy, seed, film=True) for seed in (3, 2, 1)][::-1]
    assert [len(episode.frames) for episode in there] == [21, 21, 21]
    simulation.close()
    for one, other in zip(there, back, strict=True):
        assert (one.seed, *one.outcome) == (other.seed, *other.outcome)
        assert np.array_equal(one.frames[0], other.frames[0])
        assert np.array_equal(one.frames[-1], other.frames[-1])
    assert not np.array_equal(there[0].frames[0], there[1].frames[0])


class Watchful:
    """A policy that looks at every picture."""

    looks = True

    def __init__(self, policy):
        self.policy = policy

    def __getattr__(self, name):
        return getattr(self.policy, name)


@pytest.mark.parametrize("name", ["flow", "flow with history", "act", "diffusion"])
def test_pictures_that_nobody_sees_change_nothing(tmp_path, renderer, name):
    """Same outcomes whether every picture is rendered or only those that the policy uses; and the last one is there."""
    kind, _, with_history = name.partition(" ")
    settings = small(kind, dataset_id=str(SHIPPED), episodes="0", steps=1, save_freq=0)
    if kind != "diffusion":
        settings["image_size"] = [48, 48]
    if with_history:
        settings["policy_args"] = [*settings["policy_args"], "n_obs_steps=2"]
    policy = load_policy(train(**settings, output_dir=str(tmp_path)).checkpoint, "cpu", n_action_steps=3)
    simulation = open_simulation("metaworld", "drawer-open-v3", max_steps=21, policy_config=policy.policy.config)
    task = simulation.env.envs[0]
    render = task.picture
    shown = []

    def counted(camera):
        shown.append(task.steps)
        return render(camera)

    task.picture = counted
    seldom = run_episode(simulation, policy, seed=5)
    rendered = len(shown)
    always = run_episode(simulation, Watchful(policy), seed=5)
    filmed = run_episode(simulation, policy, seed=5, film=True)
    simulation.close()
    assert seldom.outcome == always.outcome == filmed.outcome
    history = policy.policy.config.n_obs_steps
    # One picture at the start, those before the predictions at steps 3, 6, ... 21, and the first of the next episode.
    assert rendered <= 1 + 7 * history + 1
    assert len(shown) - rendered >= 2 * 22
    assert seldom.steps == 21
    for other in (always, filmed):
        assert np.array_equal(seldom.frames[-1], other.frames[-1])
    assert [len(episode.frames) for episode in (seldom, always, filmed)] == [1, 1, 22]


def test_a_policy_that_is_not_known_looks_at_everything(trained):
    policy = load_policy(trained, "cpu")
    assert policy.looks
    policy.act({**policy.blank_observation(), "observation.images.corner2": np.zeros((128, 128, 3), np.uint8)})
    assert not policy.looks
    policy.policy.config = SimpleNamespace(type="somebody's", observation_delta_indices=None)
    assert policy.looks


# --- several tasks, several processes ---


def test_suites_of_metaworld():
    metaworld = pytest.importorskip("metaworld", reason="needs metaworld")
    assert set(tasks_of("metaworld", "mt50")) == set(metaworld.ALL_V3_ENVIRONMENTS)
    assert set(tasks_of("metaworld", "mt10")) == set(metaworld.MT10().train_classes)
    assert len(tasks_of("metaworld", "very_hard")) == 5
    assert tasks_of("metaworld", "reach-v3, easy")[0] == "reach-v3"
    assert len(tasks_of("metaworld", "reach-v3, easy")) == 28
    assert tasks_of("pusht", "a,b") == ["a", "b"]
    assert tasks_of("metaworld", None) == [None]
    with pytest.raises(UserError, match="Meta-World has no task 'mt5', did you mean 'mt50'"):
        tasks_of("metaworld", "reach-v3,mt5")


def quick_results(count: int, num_videos: int = 0) -> dict:
    pool = InProcess(QuickRunner) if count == 1 else Workers(QuickRunner, count)
    try:
        return {result.task: result for result in run_tasks(pool, ["a", "b", "c"], range(5), num_videos)}
    finally:
        pool.close()


def test_films_are_the_first_successes_and_failures():
    for result in quick_results(1, num_videos=2).values():
        assert [len(episode.frames) for episode in result.episodes] == [4, 4, 4, 4, 1]


class Fickle(QuickRunner):
    """Ends differently when an episode is run again."""

    def run(self, job, is_stopped=lambda: False):
        result = super().run(job, is_stopped)
        if job.film:
            result.episode.reward = 99.0
        return result


def test_a_film_of_another_ending_is_not_kept():
    (result,) = run_tasks(InProcess(Fickle), ["a"], range(4), num_videos=1)
    assert result.changed == [1]  # the first success is filmed at once, the first failure afterwards
    assert [len(episode.frames) for episode in result.episodes] == [4, 1, 1, 1]


def test_workers_give_the_same_as_one_process():
    alone, together = quick_results(1, num_videos=2), quick_results(3, num_videos=2)
    for task, result in alone.items():
        assert [episode.outcome for episode in together[task].episodes] == [e.outcome for e in result.episodes]
        assert [len(episode.frames) for episode in together[task].episodes] == [len(e.frames) for e in result.episodes]


def test_a_worker_stays_at_its_task():
    pool = Workers(QuickRunner, 2)
    for task in ("a", "b"):
        for seed in range(6):
            pool.add(Job(task, seed, film=False))
    done = [pool.next() for _ in range(12)]
    pool.close()
    begun = {job.task: result.process for job, result in done if job.seed == 0}
    assert begun["a"] != begun["b"]
    for task, process in begun.items():  # however fast one is, it leaves its task only when no episode of it waits
        tasks = [job.task for job, result in done if result.process == process]
        assert tasks == sorted(tasks, key=lambda other: other != task)
    assert not any(worker.process.is_alive() for worker in pool.idle)


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (
            "kill",
            UserError,
            "a worker process ended with exit code -9 in the episode of seed 3: -9 is .* smaller --num_w",
        ),
        ("refuse", UserError, "^the arm is asleep\nwake it$"),
        ("fail", RuntimeError, "a worker process failed:\n(.|\n)*ZeroDivisionError: a bug"),
    ],
)
def test_a_worker_that_fails(task, error, message):
    pool = Workers(QuickRunner, 2)
    with pytest.raises(error, match=message):
        list(run_tasks(pool, [task], range(4)))
    pool.close()


def test_closing_stops_an_episode():
    pool = Workers(QuickRunner, 1)
    pool.add(Job("long", 0, film=False))
    pool.add(Job("a", 0, film=False))
    worker = pool.idle[0]
    worker.pipe.send(pool.waiting.pop(0))
    pool.close()
    assert worker.process.exitcode == 0


def test_workers_are_as_many_as_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(closed_loop, "available_cores", lambda: 8)
    monkeypatch.setattr(closed_loop, "available_memory", lambda: 4e9)
    assert closed_loop.count_workers(None, 100, None, "cpu") == 4  # of 0.7 GB each, in 80 % of the memory
    assert closed_loop.count_workers(None, 3, None, "cpu") == 3
    assert closed_loop.count_workers(6, 100, None, "cpu") == 6
    with open(tmp_path / "policy.safetensors", "wb") as file:
        file.truncate(10**9)
    assert closed_loop.count_workers(None, 100, tmp_path, "cpu") == 1


def test_summary_of_tasks():
    numbers = [
        {"task": task, "max_steps": 5, **summary([Episode(seed, seed < wins, 5, 1.0, []) for seed in range(10)])}
        for task, wins in (("reach-v3", 10), ("door-open-v3", 6), ("push-v3", 2))
    ]
    result = summary_of_tasks(numbers, difficulty_groups("metaworld"))
    assert list(result["tasks"]) == ["reach-v3", "door-open-v3", "push-v3"]
    assert list(result["groups"]) == ["easy", "hard"]
    assert (result["groups"]["easy"]["successes"], result["groups"]["easy"]["num_episodes"]) == (16, 20)
    assert result["all"]["success_rate"] == pytest.approx(18 / 30)
    assert (result["all"]["success_low"], result["all"]["success_high"]) == wilson_interval(18, 30)
    assert result["mean_of_groups"] == pytest.approx((0.8 + 0.2) / 2)
    assert summary_of_tasks(numbers, {})["mean_of_groups"] is None


def test_several_tasks_in_any_number_of_processes(trained, tmp_path, renderer, capsys):
    command = [str(trained), "--env", "metaworld", "--task", "drawer-open-v3,reach-v3", "--device", "cpu"]
    command += ["--num_episodes", "2", "--max_steps", "15", "--num_videos", "1"]
    for count in (1, 2):
        folder = tmp_path / str(count)
        assert evaluate.main([*command, "--num_workers", str(count), "--output_dir", str(folder)]) == 0
    alone, together = ((tmp_path / count / "metaworld_2_tasks.json").read_text() for count in "12")
    assert alone == together
    assert (tmp_path / "1" / "metaworld_2_tasks.png").stat().st_size > 10_000
    tasks = json.loads(alone)["tasks"]
    assert [episode["seed"] for episode in tasks["reach-v3"]["episodes"]] == [1000, 1001]
    assert (tmp_path / "2" / "metaworld_reach-v3" / "failure_1000.mp4").exists()
    shown = capsys.readouterr().out
    assert shown.count("all (2 tasks)") == 2
    assert "easy (2 tasks)" in shown


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_in_one_line(trained, tmp_path, renderer):
    """As in a terminal, where it reaches all of them, at any time."""
    command = [sys.executable, "src/evaluate.py", str(trained), "--env", "metaworld", "--num_workers", "2"]
    command += ["--num_episodes", "500", "--output_dir", str(tmp_path)]
    for seconds in (6, 25):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in errors
        time.sleep(2)
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def test_policy_sees_what_it_was_trained_on(renderer):
    """The first observation of seed 0 is the first frame of the shipped demonstration that was recorded from it."""
    from sim.metaworld import MetaworldTask

    env = MetaworldTask("drawer-open-v3", "corner2", 128, "plain", 300)
    keys = ["observation.state", "observation.images.corner2"]
    recorded, _ = next(recorded_observations(open_source(str(SHIPPED), episodes="0"), 0, keys))
    seen = [env.reset(seed=seed)[0] for seed in range(4)]
    env.close()
    np.testing.assert_allclose(seen[0]["agent_pos"], recorded["observation.state"], atol=1e-6)
    off = [np.abs(s["pixels"]["corner2"].astype(int) - recorded["observation.images.corner2"]).mean() for s in seen]
    assert min(off) == off[0] < 6  # the recording went through a video codec


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        (("uint8", (128, 128, 3)), r"expected \(128, 128, 3\), got \(96, 96, 3\). Set the environment's size"),
        (("uint8", (None, None, 1)), r"expected \(None, None, 1\), got \(96, 96, 3\)"),
        (("float", (7,)), r"expected \(7,\), got \(3, 96, 96\). Evaluate in the task that the policy was trained for"),
    ],
)
def test_other_observation_than_trained_on_is_refused(expected, message):
    key = "observation.images.top"
    batch = {key: torch.zeros(1, 3, 96, 96)}
    check_batch(batch, {key: ("uint8", (None, None, 3))})
    check_batch(batch, {key: ("uint8", (96, 96, 3))})
    with pytest.raises(UserError, match=f"{key} of the simulation does not fit the policy: {message}"):
        check_batch(batch, {key: expected})


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])  # 2: as it has by itself on more cores, in processes of their own
def test_lerobot_eval_runs_our_environment_type(trained, tmp_path, renderer, batch_size):
    command = [str(Path(sys.executable).with_name("lerobot-eval")), f"--policy.path={trained}", "--env.type=armature_metaworld",
               "--env.task=drawer-open-v3", "--env.episode_length=20", "--eval.n_episodes=2", f"--eval.batch_size={batch_size}",
               "--policy.device=cpu", f"--output_dir={tmp_path}"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    info = json.loads((tmp_path / "eval_info.json").read_text())
    assert info["overall"]["n_episodes"] == 2


@pytest.mark.parametrize(
    ("val_freq", "due"), [(None, [False, True, False, True, True]), (5, [False, False, True, False, True])]
)
def test_evaluated_at_every_save_unless_val_freq_is_given(val_freq, due):
    config = TrainConfig(dataset_id=["x"], steps=10, val_fraction=0.5, val_freq=val_freq)
    evaluator = Evaluator(
        config=config,
        source=None,
        held_out=torch.arange(3),
        policy=None,
        preprocess=None,
        postprocess=None,
        simulation=None,
        warn=print,
    )
    assert [evaluator.is_due(step, saving=step in (3, 7)) for step in (1, 3, 5, 7, 10)] == due
