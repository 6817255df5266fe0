"""A resumed run is the same run, bit for bit."""

import gc
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from checkpoints.folder import write_manifest
from config import merge
from data.split import split_episodes
from errors import UserError
from helpers.dataset_edits import edit_json, rewrite_column
from helpers.recording import record
from helpers.runs import assert_same_run, logged, small
from policy.flow import FlowPolicy
from policy.loaded import load_policy
from train import train
from training.chosen_run import merge_lengths
from training.learner import Learner
from training.plan import plan_run
from training.progress import Report, training_info

STEPS, SAVE_FREQ = 12, 3  # 33 frames in batches of 4: the first epoch ends inside step 9


@pytest.fixture(scope="module", params=["act", "diffusion", pytest.param("vqbet", marks=pytest.mark.slow)])
def whole(request, made, tmp_path_factory):
    """Settings and folder of a run that was never interrupted, with dropout, noise and augmentation; vqbet's first phase has 7 steps."""
    settings = small(
        request.param,
        dataset_id=str(made("two_cameras" if request.param == "act" else "video")),
        augment=True,
        image_size=[48, 64],
        frame_cache="on",
        steps=STEPS,
        log_freq=5,
        save_freq=SAVE_FREQ,
    )
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(**settings, output_dir=str(folder))
    return settings, folder


@pytest.mark.parametrize(
    ("stopped", "asked"), [(3, "folder"), (9, "latest"), pytest.param(9, "auto", marks=pytest.mark.slow)]
)
def test_interrupted_and_resumed(whole, tmp_path, stopped, asked):
    settings, folder = whole
    shutil.copytree(folder / f"checkpoint-{stopped}", tmp_path / f"checkpoint-{stopped}")
    shutil.copy(folder / "metrics.jsonl", tmp_path)  # a killed run logged on after its last checkpoint
    asked = str(tmp_path / f"checkpoint-{stopped}") if asked == "folder" else asked
    result = train(**{**settings, "save_freq": 0}, output_dir=str(tmp_path), resume_from_checkpoint=asked)
    assert result.steps == STEPS
    assert_same_run(folder, tmp_path, STEPS)
    assert logged(folder) == logged(tmp_path)


def test_other_log_and_save_frequencies_threads_and_cache_change_no_bit(whole, tmp_path):
    settings, folder = whole
    shutil.copytree(folder / "checkpoint-9", tmp_path / "checkpoint-9")
    settings = {**settings, "log_freq": 1, "save_freq": 0, "num_threads": 1, "frame_cache": "off"}
    train(**settings, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert_same_run(folder, tmp_path, STEPS)


def test_settings_come_from_the_checkpoint_and_more_steps_extend_the_run(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")))
    train(**{**settings, "steps": 6}, output_dir=str(tmp_path / "whole"))
    train(**settings, output_dir=str(tmp_path / "part"))
    train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-4"), steps=6)
    assert_same_run(tmp_path / "whole", tmp_path / "part", 6)


def test_more_steps_log_what_the_longer_run_would(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), log_freq=3)
    whole = train(**{**settings, "steps": 6}, output_dir=str(tmp_path / "whole"))
    train(**settings, output_dir=str(tmp_path / "part"))
    part = train(resume_from_checkpoint="latest", output_dir=str(tmp_path / "part"), steps=6, quiet=True)
    assert [line["step"] for line in part.history] == [1, 3, 4, 6]
    assert part.history[-1]["loss"] == whole.history[-1]["loss"]


def test_minutes_and_steps_do_not_override_each_other_unsaid():
    assert merge_lengths({"steps": 400, "lr": 1}, {"minutes": 5}) == {"lr": 1, "minutes": 5}
    assert merge_lengths({"minutes": 5}, {"steps": 3}) == {"steps": 3}
    assert merge_lengths({"steps": 2}, {"minutes": None}) == {"steps": 2, "minutes": None}
    for both in ({"minutes": 5, "steps": 3}, {}), ({}, {"minutes": 5, "steps": 3}):  # as train_config.json has them
        assert merge_lengths(*both) == {"minutes": 5}


def test_what_a_preset_filled_in_stays(made, tmp_path, capsys):
    """None is the preset's value in a run that goes on as in a fresh one."""
    preset = dict.fromkeys(("batch_size", "ema_decay", "augment", "image_size"))
    settings = {**small("flow", dataset_id=str(made("no_camera")), steps=1), **preset, "output_dir": str(tmp_path)}
    train(**settings)
    capsys.readouterr()
    train(**{**settings, "steps": 2}, resume_from_checkpoint="auto")
    assert warnings_of(capsys) == []
    config = json.loads((tmp_path / "checkpoint-2" / "train_config.json").read_text())
    assert (config["batch_size"], config["ema_decay"], config["augment"]) == (64, 0.995, True)


def test_home_is_written_with_a_tilde(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "steps.yaml").write_text("steps: 1\noutput_dir: ~/run")
    settings = small(dataset_id=str(made("no_camera")), config_path="~/steps.yaml")
    del settings["steps"]
    assert train(**settings).checkpoint == tmp_path / "run" / "checkpoint-1"


def test_the_logged_loss_is_the_runs_whatever_the_policy_calls_loss(made, tmp_path, monkeypatch):
    forward = FlowPolicy.forward

    def with_parts(self, batch):
        loss, parts = forward(self, batch)
        return loss, {**parts, "loss": 99.0, "l1": 7.0}

    monkeypatch.setattr(FlowPolicy, "forward", with_parts)
    line = train(**small("flow", dataset_id=str(made("no_camera"))), output_dir=str(tmp_path)).history[-1]
    assert line["loss"] < 50
    assert line["l1"] == 7.0


def test_what_a_run_held_is_free_when_the_next_begins(made, tmp_path):
    def learners() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if type(thing) is Learner}

    before = learners()  # of failed runs, which pytest keeps
    train(**small(dataset_id=str(made("no_camera")), steps=1), output_dir=str(tmp_path))
    new = learners() - before  # it is in cycles
    with pytest.raises(UserError, match="dataset_id"):
        plan_run({})
    assert not new & learners()


def test_success_is_told_of_the_step_it_was_measured_at():
    history = [{"step": 2, "eval_success_rate": 0.9, "val_loss": 1.0}, {"step": 4, "loss": 2.0}]
    policy = SimpleNamespace(name="flow", parameters=list)
    of = {step: training_info(policy, ["x"], history, torch.device("cpu"), step) for step in (2, 4)}
    assert [(of[step]["success_rate"], of[step]["val_loss"]) for step in of] == [(0.9, 1.0), (None, None)]


def test_lines_of_metrics_that_were_left_go_when_a_checkpoint_is_made(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder, loss in ((ours, 1), (theirs, 2)):
        folder.mkdir()
        lines = [json.dumps({"step": step, "loss": loss}) for step in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "link").symlink_to(theirs / "checkpoint-2")
    for resumed, losses in (
        (ours / "checkpoint-2", [1, 1]),
        (tmp_path / "hub" / "checkpoint-2", [1, 1]),
        (theirs / "checkpoint-2", [2, 2]),
        (tmp_path / "link", [2, 2]),
        (None, []),
    ):
        report = Report(ours, resumed_from=resumed, start_step=2, config=merge({"dataset_id": "x"}), run_id=None)
        with report:
            assert [line["loss"] for line in report.history] == losses
            report.rewrite_metrics()
        assert len((ours / "metrics.jsonl").read_text().splitlines()) == len(report.history)


def test_the_base_of_a_fine_tuned_policy_is_not_needed_again(made, tmp_path):
    data = {"dataset_id": str(made("no_camera"))}
    base = train(**small(**data, steps=1), output_dir=str(tmp_path / "base")).checkpoint
    settings = small(**data, policy_path=str(base), policy_args=None, output_dir=str(tmp_path / "run"))
    del settings["policy"]
    train(**settings)
    shutil.rmtree(tmp_path / "base")
    assert train(**{**settings, "steps": 5}, resume_from_checkpoint="auto").steps == 5


def test_a_checkpoint_that_was_being_replaced_is_found_by_its_name(made, tmp_path):
    train(**small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path)))
    (tmp_path / "checkpoint-2").rename(tmp_path / ".checkpoint-2.old")
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"), quiet=True).steps == 4


def test_changed_settings_are_told_and_a_finished_run_is_left_alone(made, tmp_path, capsys):
    settings = small(dataset_id=str(made("no_camera")), precision="auto")  # which the checkpoint has as what it came to
    train(**settings, output_dir=str(tmp_path))
    before = (tmp_path / "checkpoint-4" / "manifest.json").read_bytes()
    result = train(**settings, output_dir=str(tmp_path), resume_from_checkpoint="auto")
    assert result.steps == 4
    shown = capsys.readouterr().out
    assert "already at step 4" in shown
    assert "warning" not in shown
    assert (tmp_path / "checkpoint-4" / "manifest.json").read_bytes() == before
    train(**{**settings, "lr": 2e-3, "steps": 5}, output_dir=str(tmp_path), resume_from_checkpoint="latest")
    assert "warning: --lr: 0.001 -> 0.002" in capsys.readouterr().out
    state = torch.load(tmp_path / "checkpoint-5" / "optimizer_state.pth", weights_only=True)
    assert state["param_groups"][0]["lr"] == 2e-3


def test_a_learning_rate_that_ends_with_the_run_is_told(made, tmp_path, capsys):
    for policy, message in (("flow", "warning: --steps: 4 -> 8: the learning rate ends with the run, "), ("act", "")):
        run = tmp_path / policy
        train(**small(policy, dataset_id=str(made("no_camera")), output_dir=str(run)))
        train(resume_from_checkpoint=str(run / "checkpoint-4"), steps=8)
        shown = capsys.readouterr().out
        assert message in shown
        assert ("warning" in shown) == bool(message)
        train(resume_from_checkpoint=str(run / "checkpoint-2"), output_dir=str(tmp_path / f"{policy}-early"), steps=8)
        assert message in capsys.readouterr().out


def test_more_steps_with_a_warmup_longer_than_the_old_ones(made, tmp_path, capsys):
    train(**small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path)))
    assert train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"), steps=8, warmup_steps=6).steps == 8
    assert "warning: --warmup_steps: None -> 6" in capsys.readouterr().out


def test_a_dataset_that_was_moved_is_the_same_and_quiet_is_not_kept(made, copy_of, tmp_path, capsys):
    train(**small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run")))
    moved = str(copy_of("no_camera"))
    train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"),
        dataset_id=moved,
        steps=3,
        output_dir=str(tmp_path / "on"),
    )
    shown = capsys.readouterr().out
    assert "another run" not in shown
    assert f"dataset   {moved}" in shown


def test_going_back_to_an_earlier_checkpoint_is_told(made, tmp_path, capsys):
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path))
    train(**settings)
    train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    message = (
        "warning: checkpoint-4 is newer than checkpoint-2: the run goes back, and replaces the checkpoints of later steps "
        "as it reaches them"
    )
    assert message in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]


def warnings_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def test_a_dataset_that_changed_in_its_place_is_told_and_what_was_held_out_stays(tmp_path, capsys):
    root, run = tmp_path / "dataset", tmp_path / "run"
    lengths = (13, 9, 11, 6, 7)

    def resume(steps: int) -> tuple[list[str], list[int]]:
        last = train(resume_from_checkpoint="latest", output_dir=str(run), steps=steps).checkpoint
        return warnings_of(capsys), json.loads((last / "trainer_state.json").read_text())["data"]["held_out"]

    def draws(count: int) -> list[int]:
        source = SimpleNamespace(episodes=range(count), episodes_per_dataset=None)
        return split_episodes(source, merge({"dataset_id": str(root), "val_fraction": 0.4})).held_out.tolist()

    record(root, cameras=(), lengths=lengths[:3])
    train(**small(dataset_id=str(root), val_fraction=0.4), output_dir=str(run))
    assert warnings_of(capsys) == []
    assert resume(5) == ([], draws(3))
    shutil.rmtree(root)
    record(root, cameras=(), lengths=lengths)
    assert draws(5) != draws(3)
    message = "warning: dataset: 3 episodes of 33 frames -> 5 episodes of 46 frames; from here on this is another run"
    assert resume(6) == ([message], draws(3))
    rewrite_column(root, "action", lambda actions: actions[::-1])  # their statistics stay
    message = "warning: dataset: 5 episodes of 46 frames, but with other values; from here on this is another run"
    assert resume(7) == ([message], draws(3))


def test_several_datasets_that_were_moved_hold_out_the_same_episodes(copy_of, tmp_path, capsys):
    here, there = [[str(tmp_path / where / name) for name in ("no_camera", "other")] for where in ("", "moved")]
    for folder in here[1], *there:
        shutil.copytree(copy_of("no_camera") if folder == here[1] else here[0], folder)
    settings = small(val_fraction=0.4, dataset_id=here)
    train(**settings, output_dir=str(tmp_path / "run"))
    held = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())["data"]["held_out"]
    assert {place[:2] for place in held} <= {"0#", "1#"}
    train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), dataset_id=there, output_dir=str(tmp_path / "on")
    )
    assert warnings_of(capsys) == []
    assert_same_run(tmp_path / "run", tmp_path / "on", 4)


def test_videos_that_were_encoded_anew_are_told(copy_of, tmp_path, capsys):
    root, run = copy_of("video"), tmp_path / "run"
    train(**small("flow", dataset_id=str(root), lr_schedule="constant"), output_dir=str(run))
    train(resume_from_checkpoint="latest", output_dir=str(run), steps=5)
    assert warnings_of(capsys) == []
    video = next(root.glob("videos/**/*.mp4"))
    size = video.stat().st_size
    video.write_bytes(video.read_bytes() + b"\0\0\0\x10free12345678")  # a box that players skip
    train(resume_from_checkpoint="latest", output_dir=str(run), steps=6)
    message = f"dataset: its videos or pictures changed ({size} -> {size + 16} bytes); from here on this is another run"
    assert warnings_of(capsys) == [f"warning: {message}"]


def test_a_checkpoint_that_does_not_know_its_data_resumes_as_ever(made, tmp_path, capsys):
    settings = small(dataset_id=str(made("no_camera")), val_fraction=0.4, output_dir=str(tmp_path / "run"))
    train(**settings)
    shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    edit_json(tmp_path / "old" / "checkpoint-2" / "trainer_state.json", lambda state: state.pop("data"))
    write_manifest(tmp_path / "old" / "checkpoint-2")
    train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-2"))
    assert warnings_of(capsys) == []
    assert_same_run(tmp_path / "run", tmp_path / "old", 4)


def test_renamed_folder_needs_resume_step(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")))
    train(**settings, output_dir=str(tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "best")
    result = train(
        **settings, resume_from_checkpoint=str(tmp_path / "best"), resume_step=2, output_dir=str(tmp_path / "on")
    )
    assert result.checkpoint == tmp_path / "on" / "checkpoint-4"
    assert_same_run(tmp_path / "run", tmp_path / "on", 4)


@pytest.fixture(scope="module")
def real(cr5, tmp_path_factory):
    """Settings and folder of 36 steps on one episode of a real arm: 233 frames in batches of 8, so an epoch ends inside step 30."""
    settings = small(
        dataset_id=str(cr5),
        episodes="0",
        image_size=[48, 64],  # as in test_policies.py, so that the frames are decoded once a session
        steps=36,
        batch_size=8,
        log_freq=6,
        save_freq=12,
        lr=1e-4,
    )
    folder = tmp_path_factory.mktemp("real") / "run"
    train(**settings, output_dir=str(folder))
    return settings, folder


def test_real_arm_lowers_the_loss(real):
    losses = [line["loss"] for line in logged(real[1])]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("stopped", "asked"),
    [
        (24, "latest"),
        *(
            pytest.param(step, how, marks=pytest.mark.slow)
            for step, how in ((12, "folder"), (12, "auto"), (24, "auto"))
        ),
    ],
)
def test_real_arm_resumes(real, tmp_path, stopped, asked):
    settings, folder = real
    shutil.copytree(folder / f"checkpoint-{stopped}", tmp_path / f"checkpoint-{stopped}")
    asked = str(tmp_path / f"checkpoint-{stopped}") if asked == "folder" else asked
    train(**{**settings, "save_freq": 0}, output_dir=str(tmp_path), resume_from_checkpoint=asked)
    assert_same_run(folder, tmp_path, 36)


def test_the_newest_is_of_the_course_taken_last(made, tmp_path):
    """A run that went back to an earlier checkpoint goes on from there, not from where it had been before."""
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), save_freq=1)
    train(**settings)
    back = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-1"), "lr": 1e-5, "steps": 3, "quiet": True}
    train(**back)
    again = {"resume_from_checkpoint": "latest", "output_dir": str(tmp_path / "run"), "quiet": True}
    assert train(**again).steps == 3  # checkpoint-4 is there, of the course before
    end = train(**again, steps=5)
    assert json.loads((end.checkpoint / "train_config.json").read_text())["lr"] == 1e-5
    straight = train(**{**back, "steps": 5, "output_dir": str(tmp_path / "other"),
                        "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-3")})  # fmt: skip
    assert_same_run(tmp_path / "run", straight.output_dir, 5)


def test_another_dataset_whose_camera_has_another_name(made, tmp_path):
    first = train(**small("flow", dataset_id=str(made("video")), output_dir=str(tmp_path / "run")))
    settings = {"resume_from_checkpoint": str(first.checkpoint), "dataset_id": str(made("front")), "steps": 5}
    renamed = train(**settings, rename=["observation.images.front=observation.images.top"], quiet=True)
    policy = load_policy(renamed.checkpoint, device="cpu")
    assert policy.expected.keys() == {"observation.images.front", "observation.state"}
    with pytest.raises(UserError, match="--imagenet_stats: checkpoint-4 was trained with on, got off"):
        train(resume_from_checkpoint=str(first.checkpoint), imagenet_stats="off", quiet=True)
