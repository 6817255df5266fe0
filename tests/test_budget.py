"""Minutes instead of steps, and averaged weights: neither bends the run's other promises."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.folder import TRAINED_WEIGHTS
from errors import UserError
from helpers.runs import assert_same_run, logged, small
from train import train
from training import step_time


def read(run, name):
    return json.loads((run / name).read_text())


def test_minutes_fix_the_steps_and_change_nothing_else(made, tmp_path, capsys):
    settings = small("flow", dataset_id=str(made("video")), save_freq=0, lr_schedule="cosine", frame_cache="on")
    del settings["steps"]
    result = train(**{**settings, "quiet": False}, minutes=0.01, output_dir=str(tmp_path / "minutes"))
    steps = read(result.checkpoint, "train_config.json")["steps"]
    assert result.steps == steps
    assert f"0.01 minutes are {steps:,} steps of " in capsys.readouterr().out
    again = train(**settings, steps=steps, output_dir=str(tmp_path / "steps"))
    assert_same_run(tmp_path / "minutes", tmp_path / "steps", steps)
    assert again.steps == steps


def test_minutes_stay_fixed_over_a_resume(made, tmp_path, monkeypatch):
    # Ten steps, on any machine.
    monkeypatch.setattr(step_time, "seconds_of", lambda call, *rest, **more: call() and 0.12)
    settings = small(dataset_id=str(made("no_camera")), save_freq=5, lr_schedule="cosine")
    del settings["steps"]
    whole = train(**settings, minutes=0.02, output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "part" / "checkpoint-5")
    part = train(**settings, minutes=0.02, output_dir=str(tmp_path / "part"), resume_from_checkpoint="auto")
    assert part.steps == whole.steps
    assert_same_run(tmp_path / "whole", tmp_path / "part", whole.steps)
    with pytest.raises(
        UserError,
        match=f"--minutes: checkpoint-5 belongs to a run of {whole.steps} steps, fixed when it began. Pass --steps",
    ):
        train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-5"), minutes=3)


@pytest.fixture(scope="module")
def averaged(made, tmp_path_factory):
    """A run with averaged weights, every step saved, and the same without."""
    folder = tmp_path_factory.mktemp("averaged")
    settings = small(dataset_id=str(made("no_camera")), save_freq=1)
    train(**settings, output_dir=str(folder / "plain"))
    train(**settings, output_dir=str(folder / "on"), ema_decay=0.4, val_fraction=None)
    return settings, folder


def test_average_is_that_of_the_weights_being_trained(averaged):
    """Against the definition, one step at a time; the training itself is that of a run without."""
    _, folder = averaged
    before = None
    for step in range(1, 5):
        place = folder / "on" / f"checkpoint-{step}"
        own, average = load_file(place / TRAINED_WEIGHTS), load_file(place / "policy.safetensors")
        plain = load_file(folder / "plain" / f"checkpoint-{step}" / "policy.safetensors")
        assert all(torch.equal(own[name], plain[name]) for name in plain)
        if before is not None:
            decay = min(0.4, (1 + step) / (10 + step))
            for name, value in average.items():
                wanted = before[name] * decay + own[name] * (1 - decay)
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-7)
        before = average
    assert any(not torch.equal(own[name], average[name]) for name in own)


def test_averaged_run_resumes_to_the_bit(averaged, tmp_path):
    _, folder = averaged
    shutil.copytree(folder / "on" / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copy(folder / "on" / "metrics.jsonl", tmp_path)
    train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"), save_freq=0)
    assert_same_run(folder / "on", tmp_path, 4)
    assert logged(folder / "on") == logged(tmp_path)
    own = [load_file(run / "checkpoint-4" / TRAINED_WEIGHTS) for run in (folder / "on", tmp_path)]
    assert all(torch.equal(own[0][name], own[1][name]) for name in own[0])
    assert not (tmp_path / TRAINED_WEIGHTS).exists()  # the finished policy is the average


def test_result_has_the_averaged_weights(averaged, made, tmp_path):
    settings, folder = averaged
    result = train(**{**settings, "steps": 2, "save_freq": 0}, ema_decay=0.4, output_dir=str(tmp_path))
    saved = load_file(folder / "on" / "checkpoint-2" / "policy.safetensors")
    state = result.policy.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)
