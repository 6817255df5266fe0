"""What a resume reports: settings that mean another run, and a machine that computes otherwise."""

from pathlib import Path

import pytest
import torch

from checkpoints.folder import TrainState
from config import TrainConfig
from data.opening import open_source
from errors import UserError
from helpers.runs import small
from train import train
from training.changes import compare_data, compare_machine, compare_settings, describe_data, meaning

MACHINE = {"device": "cpu", "device_name": "x86_64", "versions": {"torch": "2.1", "lerobot": "0.6.1", "numpy": "2"}}


def changes(before: dict, now: dict) -> list[str]:
    """The lines of a resume with the settings `now` of a run that had those of `before`."""
    state = TrainState(
        trainer_state={"step": 1, "world_size": 1, "data": {}},
        train_config={**TrainConfig(dataset_id=["x"]).asdict(), "precision": "fp32", **before},
        training_info={},
    )
    config = TrainConfig(**{"dataset_id": ["x"], "precision": "fp32", **now})
    return compare_settings(config, state, Path("checkpoint-1"), 1)


@pytest.mark.parametrize(("name", "one", "other"), [
    ("policy_args", ["chunk_size=4", "dim_model=32"], ["dim_model=32", "chunk_size=4"]),
    ("policy_args", ["a=none", "b=1.0"], ["b=1.00", "a=null"]),
    ("policy_args", ["a=1", "a=2"], ["a=2"]), ("policy_args", ["a=[8,16]"], ["a=[8, 16]"]),
    ("freeze", ["backbone", "encoder"], ["encoder", "backbone"]),
    ("rename", ["observation.a=observation.b", "observation.c=observation.d"],
     ["observation.c=observation.d", "observation.a=observation.b"]),
    ("observations", ["state", "top"], ["top", "state"]),
    ("episodes", "0,1", "0:2"), ("episodes", "1:3,0", " 0 : 3"), ("val_episodes", "4,5,6,9", "9,4:7"),
])  # fmt: skip
def test_another_way_to_write_a_setting_is_no_change(name, one, other):
    assert changes({name: one}, {name: other}) == []
    assert changes({name: other}, {name: one}) == []


@pytest.mark.parametrize(("name", "one", "other"), [
    ("rename", ["observation.a=observation.b"], ["observation.a=observation.c"]), ("observations", ["top"], None),
    ("episodes", "0,1", "0:3"), ("episodes", "0,1", None), ("episodes", "0,2", "0:2"), ("lr", 1e-3, 2e-3)])  # fmt: skip
def test_another_run_is_reported(name, one, other):
    (line,) = changes({name: one}, {name: other})
    assert line.startswith(f"--{name}: {one} -> {other}; from here on this is not the run that wrote checkpoint-1")


@pytest.mark.parametrize(("one", "other"), [
    (["chunk_size=4"], ["chunk_size=5"]), (["chunk_size=4"], None), (["a=1", "a=2"], ["a=1"]), (["a=none"], ["a=0"])])  # fmt: skip
def test_another_policy_is_refused(one, other):
    with pytest.raises(
        UserError, match=r"--policy_args: checkpoint-1 was trained with .* A resumed run keeps its policy"
    ):
        changes({"policy_args": one}, {"policy_args": other})


def test_settings_of_a_later_version_are_named():
    (line,) = changes({"lookahead": 5, "amuse": "on"}, {})
    assert "settings of another version of Armature, which are ignored here: amuse='on', lookahead=5" in line


def test_episodes_of_another_form_are_left_to_the_dataset():
    assert meaning("episodes", "first") == "first"
    assert meaning("episodes", "0:x") == "0:x"


def test_another_machine_is_reported():
    def lines(**now):
        return compare_machine(TrainState({}, {}, MACHINE), {**MACHINE, **now})

    assert lines() == []
    assert compare_machine(TrainState({}, {}, {}), MACHINE) == []  # a checkpoint of an older version
    versions = {**MACHINE["versions"], "torch": "2.2", "lerobot": "0.7", "numpy": "3"}
    (line,) = lines(device="cuda:1", device_name="H200", versions=versions)
    assert line == (
        "device cpu -> cuda:1, device_name x86_64 -> H200, torch 2.1 -> 2.2, lerobot 0.6.1 -> 0.7: "
        "the batches stay the same, rounding and noise may not"
    )
    assert compare_machine(TrainState({}, {}, {**MACHINE, "device": "cuda:0"}), {**MACHINE, "device": "cuda:3"}) == []


def test_a_resume_prints_what_changed(made, tmp_path, monkeypatch, capsys):
    """The settings in another order are none, another torch is a warning."""
    settings = small("flow", dataset_id=[str(made("no_camera"))], episodes="0,1", steps=2, save_freq=1)
    train(**settings, output_dir=str(tmp_path / "run"))
    capsys.readouterr()
    again = {"episodes": "0:2", "policy_args": settings["policy_args"][::-1], "quiet": True}
    first = str(tmp_path / "run" / "checkpoint-1")
    train(resume_from_checkpoint=first, output_dir=str(tmp_path / "same"), **again)
    said = capsys.readouterr()
    assert "->" not in said.out + said.err
    from importlib.metadata import version

    monkeypatch.setattr("runtime.version", lambda package: "9.9" if package == "torch" else version(package))
    train(resume_from_checkpoint=first, output_dir=str(tmp_path / "other"), **again)
    said = capsys.readouterr()
    assert f"warning: torch {version('torch')} -> 9.9: the batches stay the same" in said.out + said.err


def test_videos_that_changed_places_are_reported(copy_of):
    """Two cameras' videos are exchanged between stop and resume: together they have the size that they had."""
    root = copy_of("two_cameras")
    before = describe_data(open_source(str(root)), torch.tensor([0]))
    (top,) = root.glob("videos/*top/*/*.mp4")
    (wrist,) = root.glob("videos/*wrist/*/*.mp4")
    pixels = [path.read_bytes() for path in (top, wrist)]
    assert len(pixels[0]) != len(pixels[1])
    top.write_bytes(pixels[1])
    wrist.write_bytes(pixels[0])
    now = describe_data(open_source(str(root)), torch.tensor([0]))
    state = TrainState(trainer_state={"data": before}, train_config={}, training_info={})
    assert compare_data(state, now) == ["dataset: its videos changed places or sizes; from here on this is another run"]
    del before["videos_sha256"]  # of an older version
    assert compare_data(state, now) == []
