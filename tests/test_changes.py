"""What a resume reports: settings that mean another run, and a machine that computes otherwise."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from lerobot.policies.act.configuration_act import ACTConfig

from checkpoints.folder import TrainState, write_manifest
from command_line import parse_overrides
from config import TrainConfig
from data.opening import open_source
from errors import UserError
from helpers.dataset_edits import rewrite_column
from helpers.runs import assert_same_run, small
from policy.factory import policy_config
from processors.features import parse_rename
from train import train
from training.changes import (
    compare_data,
    compare_learning_rates,
    compare_machine,
    compare_settings,
    describe_data,
    meaning,
)

MACHINE = {"device": "cpu", "device_name": "x86_64", "versions": {"torch": "2.1", "lerobot": "0.6.1", "numpy": "2"}}


def changes(before: dict, now: dict, data=None) -> list[str]:
    """The lines of a resume with the settings `now` of a run that had those of `before`."""
    state = TrainState(
        trainer_state={"step": 1, "world_size": 1, "data": data},
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
    ("policy_args", ["dim_model = 32"], ["dim_model=32"]), ("policy_args", ["chunk_size=100"], None),
    ("policy_args", ["chunk_size=4", "n_action_steps=4"], ["chunk_size=4"]), ("rename", ["observation.a=observation.a"], None),
    ("rename", [" observation.a = observation.b "], ["observation.a=observation.b"]), ("policy_path", ".", os.getcwd()),
])  # fmt: skip
def test_another_way_to_write_a_setting_is_no_change(name, one, other):
    assert changes({name: one}, {name: other}) == []
    assert changes({name: other}, {name: one}) == []


@pytest.mark.parametrize(("name", "one", "other"), [
    ("rename", ["observation.a=observation.b"], ["observation.a=observation.c"]), ("observations", ["top"], None),
    ("episodes", "0,1", "0:3"), ("episodes", "0,1", None), ("episodes", "0,2", "0:2"), ("seed", 1, 2),
    ("dataset_weights", [1.0], None)])  # fmt: skip
def test_another_run_is_reported(name, one, other):
    (line,) = changes({name: one}, {name: other})
    assert line == f"--{name}: {one} -> {other}; from here on this is not the run that wrote the checkpoint"
    assert (name in ("episodes", "observations")) == (
        changes({name: one}, {name: other}, data={}) == []
    )  # goes by the data


def test_weights_in_the_same_proportions_are_no_change():
    assert meaning("dataset_weights", [3, 1, 1]) == meaning("dataset_weights", [6.0, 2.0, 2.0])


@pytest.mark.parametrize(("one", "other"), [
    (["chunk_size=4"], ["chunk_size=5"]), (["chunk_size=4"], None), (["a=1", "a=2"], ["a=1"]), (["a=none"], ["a=0"])])  # fmt: skip
def test_another_policy_is_refused(one, other):
    with pytest.raises(
        UserError, match=r"--policy_args: checkpoint-1 was trained with .* A resumed run keeps its policy"
    ):
        changes({"policy_args": one}, {"policy_args": other})


def test_spaces_around_the_equals_sign_are_left_out():
    spaced = ["dim_model = 32", " chunk_size= 4 ", "pretrained_backbone_weights =none"]
    assert parse_overrides("--policy_args", ACTConfig, spaced) == {
        "dim_model": 32,
        "chunk_size": 4,
        "pretrained_backbone_weights": None,
    }
    assert parse_rename(["observation.a = observation.b"]) == {"observation.a": "observation.b"}
    with pytest.raises(UserError, match="--policy_args dim_model: expected dim_model=VALUE"):
        parse_overrides("--policy_args", ACTConfig, ["dim_model", "=", "32"])


def test_settings_of_a_later_version_are_named():
    (line,) = changes({"lookahead": 5, "amuse": "on"}, {})
    assert "settings of another version of Armature, which are ignored here: amuse='on', lookahead=5" in line


def test_episodes_of_another_form_are_left_to_the_dataset():
    assert meaning("episodes", "first") == "first"
    assert meaning("episodes", "0:x") == "0:x"


@pytest.mark.parametrize(("steps", "more", "is_other"), [
    (1000, 1001, True), (20_000, 20_050, True), (20_000, 30_000, True), (30_000, 40_000, False)])  # fmt: skip
def test_a_learning_rate_that_does_not_end_at_0_follows_the_steps_too(steps, more, is_other):
    """SmolVLA's falls to a fortieth within the run, or within 30,000 steps, and hardly at its end."""
    state = TrainState({"step": steps // 2}, {"steps": steps}, {})
    config = TrainConfig(dataset_id=["x"], policy="smolvla", steps=more)
    lines = compare_learning_rates(state, policy_config("smolvla", None, "cpu"), config)
    assert [line.partition(", at step")[0] for line in lines] == [
        f"--steps: {steps} -> {more}: the learning rate ends with the run"
    ] * is_other


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
    config = TrainConfig(dataset_id=["x"])
    state = TrainState(trainer_state={"data": before}, train_config=config.asdict(), training_info={})
    assert compare_data(state, now, config) == [
        "dataset: its videos changed places or sizes; from here on this is another run"
    ]
    del before["videos_sha256"], before["pictures_sha256"]  # of an older version
    assert compare_data(state, now, config) == []


def test_another_library_that_decodes_the_videos_is_reported(made, monkeypatch):
    """As after the `apt install ffmpeg` that a warning recommends."""
    source = open_source(str(made("video")))
    config = TrainConfig(dataset_id=["x"])
    monkeypatch.setattr("data.decode.load_torchcodec", lambda: (None, "torchcodec finds no FFmpeg libraries"))
    before = describe_data(source, torch.tensor([0]))
    monkeypatch.setattr("data.decode.load_torchcodec", lambda: (object, None))
    now = describe_data(source, torch.tensor([0]))
    (line,) = compare_data(TrainState({"data": before}, config.asdict(), {}), now, config)
    assert line.startswith("video decoder pyav -> torchcodec: they may round a pixel differently")
    del before["video_decoder"]  # of an older version
    assert compare_data(TrainState({"data": before}, config.asdict(), {}), now, config) == []


def exchange_files(one: Path, other: Path) -> None:
    """Exchange two files, after making both as long as the longer one."""
    contents = [path.read_bytes() for path in (one, other)]
    length = max(map(len, contents)) + 8
    one.write_bytes(contents[1].ljust(length, b"\0"))
    other.write_bytes(contents[0].ljust(length, b"\0"))


def pad_files(*paths: Path) -> None:
    length = max(path.stat().st_size for path in paths) + 8
    for path in paths:
        path.write_bytes(path.read_bytes().ljust(length, b"\0"))


def videos_of_two_cameras(root: Path):
    videos = [next(root.glob(f"videos/*{camera}/*/*.mp4")) for camera in ("top", "wrist")]
    pad_files(*videos)
    return lambda: exchange_files(*videos)


def pictures_in_the_table(root: Path):
    return lambda: rewrite_column(root, "observation.images.top", lambda pictures: pictures[::-1])


def pictures_in_files(root: Path):
    paths = []

    def move_out(pictures):
        for i, picture in enumerate(pictures):
            paths.append(root / f"{i}.png")
            paths[-1].write_bytes(picture["bytes"])
        return [{"bytes": None, "path": path.name} for path in paths]

    rewrite_column(root, "observation.images.top", move_out)
    pad_files(*paths)
    return lambda: exchange_files(paths[0], paths[20])


@pytest.mark.parametrize(("name", "prepare"), [
    ("two_cameras", videos_of_two_cameras), ("images", pictures_in_the_table), ("images", pictures_in_files)])  # fmt: skip
def test_pictures_that_changed_places_are_reported(copy_of, name, prepare):
    """Together they have as many bytes as before, and so has each file."""
    root = copy_of(name)
    exchange = prepare(root)
    before = describe_data(open_source(str(root)), torch.tensor([0]))
    exchange()
    now = describe_data(open_source(str(root)), torch.tensor([0]))
    config = TrainConfig(dataset_id=["x"])
    state = TrainState(trainer_state={"data": before}, train_config=config.asdict(), training_info={})
    (line,) = compare_data(state, now, config)
    assert line.startswith("dataset: its videos or pictures changed")
    assert compare_data(TrainState({"data": now}, config.asdict(), {}), now, config) == []


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """A finished run on all three episodes, one of them held out."""
    folder = tmp_path_factory.mktemp("changes") / "run"
    settings = small(dataset_id=[str(made("no_camera"))], val_fraction=0.3, steps=2, save_freq=1)
    del settings["lr"]
    train(**settings, output_dir=str(folder))
    return folder


def warnings_of(capsys) -> list[str]:
    shown = capsys.readouterr()
    return [line for line in (shown.out + shown.err).splitlines() if line.startswith("warning: ")]


SAME = {
    "all episodes": {"episodes": "0:3"},
    "all episodes, one by one": {"episodes": "2,1,0"},
    "every observation": {"observations": ["state"]},
    "every observation by a pattern": {"observations": ["observation.*"]},
    "the same held-out fraction": {"val_fraction": 0.34},
    "the presets of the optimizer": {"lr": 1e-5, "weight_decay": 1e-4, "grad_clip_norm": 10},
    "the schedule of the preset": {"lr_schedule": "constant", "warmup_steps": 0},
    "a default of the policy": {"policy_args": ["dim_model = 32", "use_vae=true", "chunk_size=4", "dim_feedforward=32",
                                "n_heads=2", "n_encoder_layers=1", "n_vae_encoder_layers=1", "latent_dim=4",
                                "pretrained_backbone_weights=none"]},
}  # fmt: skip


@pytest.mark.parametrize("given", SAME.values(), ids=SAME)
def test_a_setting_that_comes_to_the_same_is_no_change(run, tmp_path, capsys, given):
    """It trains to the same bits, and resuming from that without the setting is no change either."""
    settings = {"quiet": True, "output_dir": str(tmp_path / "again")}
    train(resume_from_checkpoint=str(run / "checkpoint-1"), **settings, **given)
    assert warnings_of(capsys) == []
    assert_same_run(run, tmp_path / "again", 2)
    unset = {name: None for name in given if name not in ("policy_args", "val_fraction")}
    train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"), quiet=True, **unset)
    assert warnings_of(capsys) == []


OTHERS = {
    "fewer episodes": ({"episodes": "0:2"}, "--episodes: None -> 0:2"),
    "other held-out episodes": ({"val_fraction": 0.6}, "--val_fraction: 0.3 -> 0.6"),
    "a rate": ({"lr": 2e-5}, "--lr: None -> 2e-05"),
    "no clipping": ({"grad_clip_norm": 0}, "--grad_clip_norm: None -> 0.0"),
    "a schedule": ({"lr_schedule": "cosine"}, "--lr_schedule: None -> cosine"),
    "a warm-up": ({"warmup_steps": 2}, "--warmup_steps: None -> 2"),
}


@pytest.mark.parametrize(("given", "line"), OTHERS.values(), ids=OTHERS)
def test_a_setting_that_comes_to_another_run_is_reported(run, tmp_path, capsys, given, line):
    settings = {"quiet": True, "output_dir": str(tmp_path / "again")}
    train(resume_from_checkpoint=str(run / "checkpoint-1"), **settings, **given)
    assert any(line in warning for warning in warnings_of(capsys))


@pytest.fixture
def recorder(made, tmp_path):
    """A run whose settings write a tracker's files, and decoded frames to a folder of its own."""
    settings = small(dataset_id=[str(made("front"))], tracker="tensorboard", cache_dir=str(tmp_path / "cache"), steps=1)
    train(**settings, output_dir=str(tmp_path / "run"))
    return tmp_path / "run"


def test_a_run_in_its_own_folder_keeps_its_tracker_also_when_the_folder_was_moved(recorder, capsys):
    moved = recorder.rename(recorder.with_name("moved"))
    shutil.rmtree(moved / "tensorboard")
    train(resume_from_checkpoint=str(moved / "checkpoint-1"), steps=2, quiet=True)
    assert (moved / "tensorboard").is_dir()
    assert not any("taken over" in warning for warning in warnings_of(capsys))


@pytest.mark.parametrize("from_elsewhere", ["copied", "of an older version", "of another run"])
def test_a_checkpoint_from_elsewhere_does_not_choose_where_a_run_reports_and_writes(
    recorder, tmp_path, capsys, monkeypatch, from_elsewhere
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("hub.check_login", lambda repo: pytest.fail("it asks the Hub"))
    foreign = Path(shutil.copytree(recorder, tmp_path / "foreign"))
    shutil.rmtree(foreign / "tensorboard")
    shutil.rmtree(tmp_path / "cache")
    checkpoint = foreign / "checkpoint-1"
    edit_json(checkpoint / "train_config.json", push_to_hub="me/mine", push_checkpoints=True)
    if from_elsewhere == "of an older version":
        edit_json(checkpoint / "trainer_state.json", folder=None)
    elif from_elsewhere == "of another run":
        edit_json(checkpoint / "trainer_state.json", folder=str(recorder.stat().st_ino))
    write_manifest(checkpoint)
    train(resume_from_checkpoint=str(checkpoint), steps=2, quiet=True)
    (line,) = [warning for warning in warnings_of(capsys) if "taken over" in warning]
    assert "checkpoint-1 was not written by a run in" in line
    flags = f"--push_to_hub me/mine --push_checkpoints on --tracker tensorboard --cache_dir {tmp_path / 'cache'}"
    assert "".join(sorted(flags)) == "".join(sorted(line.partition("pass ")[2]))
    assert not (foreign / "tensorboard").exists()
    assert not (tmp_path / "cache").exists()
    settings = json.loads((foreign / "checkpoint-2" / "train_config.json").read_text())
    assert (settings["push_to_hub"], settings["tracker"], settings["cache_dir"]) == (None, "none", None)


def test_what_is_given_again_is_taken_over(recorder, tmp_path, capsys):
    foreign = Path(shutil.copytree(recorder, tmp_path / "foreign"))
    shutil.rmtree(foreign / "tensorboard")
    given = {"tracker": "tensorboard", "cache_dir": str(tmp_path / "cache")}
    train(resume_from_checkpoint=str(foreign / "checkpoint-1"), steps=2, quiet=True, **given)
    assert (foreign / "tensorboard").is_dir()
    assert not any("taken over" in warning for warning in warnings_of(capsys))


def edit_json(path: Path, **values) -> None:
    """Write values into a JSON file; None takes a name out."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(
        json.dumps({name: value for name, value in content.items() if value is not None or name not in values})
    )
