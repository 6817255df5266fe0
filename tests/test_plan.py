"""A run is planned before anything of it is built: what can refuse it does so then, and the plan is final."""

import dataclasses
from types import SimpleNamespace

import pytest

import train as train_module
from errors import UserError
from helpers.runs import small
from train import train
from training import room
from training.plan import plan_run


@pytest.fixture
def nothing_is_built(monkeypatch):
    """Fails a test in which a run passes its planning."""

    def build_run(plan):
        pytest.fail("the run was built")

    monkeypatch.setattr(train_module, "build_run", build_run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 3, "grad_accumulation_steps": 2}, "expected a multiple of 2, got 3"),
        ({"tracker": "nonsense"}, "--tracker"),
        ({"eval_env": "nonsense"}, "unknown environment nonsense"),
        ({"push_to_hub": "no repo id"}, "--push_to_hub no repo id"),
        ({"policy_args": ["n_heads=3"]}, "--policy_args n_heads"),
        ({"rename": ["observation.nothing=observation.state"]}, "--rename observation.nothing"),
        ({"val_episodes": "0:3"}, "--val_episodes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_is_refused_before_it_is_built(made, tmp_path, nothing_is_built, settings, message):
    with pytest.raises(UserError, match=message):
        train(**{**small(dataset_id=str(made("video")), output_dir=str(tmp_path / "run")), **settings})
    assert not (tmp_path / "run").exists()


def free_bytes(monkeypatch, free: int) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))


def test_a_disk_without_room_for_a_checkpoint(made, tmp_path, nothing_is_built, monkeypatch):
    free_bytes(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"a checkpoint takes about .* GB, 0\.0 GB are free"):
        train(**small(dataset_id=str(made("video")), output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_all_checkpoints_is_a_warning(made, tmp_path, monkeypatch):
    settings = small(dataset_id=str(made("video")), output_dir=str(tmp_path / "run"), steps=100, save_freq=1)
    free_bytes(monkeypatch, 10**15)
    with plan_run(settings) as plan:
        size = plan.memory.checkpoint
        assert not plan.warnings
    free_bytes(monkeypatch, 50 * size)
    with plan_run(settings) as plan:
        assert any("the checkpoints to keep take about 100 x" in warning for warning in plan.warnings)
    with plan_run({**settings, "keep_last": 3}) as plan:
        assert not plan.warnings


@pytest.mark.parametrize("policy", ["act", "flow"])
def test_the_size_of_a_checkpoint_is_estimated_without_building_the_policy(made, tmp_path, policy):
    settings = small(policy, dataset_id=str(made("video")), output_dir=str(tmp_path / "run"), steps=1, ema_decay=0.9)
    with plan_run(settings) as plan:
        estimate = plan.memory.checkpoint
    result = train(**settings)
    files = {path.stat().st_ino: path.stat().st_size for path in result.checkpoint.iterdir()}  # links count once
    assert 0.8 < sum(files.values()) / estimate < 1.6  # of a policy of some 100 kB, the JSON files are a part


def test_minutes_are_steps_when_the_room_is_compared(made, tmp_path):
    settings = small(dataset_id=str(made("video")), output_dir=str(tmp_path / "run"), minutes=0.01, save_freq=1)
    del settings["steps"]  # else 100,000 steps of a checkpoint each
    with plan_run(settings) as plan:
        assert not plan.warnings


def test_a_plan_is_final(made, tmp_path):
    settings = small("flow", dataset_id=str(made("video")), output_dir=str(tmp_path / "run"), minutes=0.01)
    for name in ("steps", "batch_size"):
        del settings[name]
    with plan_run(settings) as plan:
        assert plan.config.batch_size == 64  # flow's preset
        assert plan.notes[0].startswith(f"0.01 minutes are {plan.config.steps:,} steps of ")
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.config = None


def test_a_plan_holds_its_folder_until_it_is_left(made, tmp_path):
    settings = small(dataset_id=str(made("video")), output_dir=str(tmp_path / "run"))
    with plan_run(settings), pytest.raises(UserError, match="is being written"):
        plan_run(settings)
    with plan_run(settings):
        pass
    assert not (tmp_path / "run").exists()  # nothing was written, nothing stays


@pytest.mark.parametrize("setting", [{"precision": "bf16"}, {"precision": "fp16"}, {"weights_dtype": "bf16"}])
def test_a_policy_that_computes_in_fp32_only(made, tmp_path, nothing_is_built, setting):
    settings = small("vqbet", dataset_id=str(made("video")), output_dir=str(tmp_path / "run"), **setting)
    with pytest.raises(UserError, match="policy vqbet computes in fp32 only"):
        train(**settings)
