"""A resumed run is the same run at its trackers; pages and model cards show a run from its files."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import wandb
from matplotlib.figure import Figure

from command_line import parse_command_line
from errors import UserError
from helpers.runs import small
from reports.model_card import as_command, model_card
from runs import main
from runtime import in_notebook
from train import train
from training import progress, step_time, trackers
from training.trackers import Trackers, check_trackers


@pytest.fixture
def settings(made, tmp_path):
    return small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), log_freq=1)


def test_tensorboard_continues_and_replaces_repeated_steps(settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(**settings, val_fraction=0.4, tracker="tensorboard")
    train(**{**settings, "steps": 6}, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in logged if "loss" in line]
    )
    assert "batch_size: 4" in str(events.Tensors("config/text_summary"))
    assert events.Images("curves")
    assert [event.step for event in events.Images("error along the chunk")] == [2, 4, 6]
    names = {event.tensor_proto.string_val[0].decode() for event in events.Tensors("checkpoint/text_summary")}
    assert names == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_tensorboard_writes_nothing_into_another_folder_of_its_name(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    tracker = trackers.TensorBoard(run, "id", {"batch_size": 4}, start_step=0)
    tracker.start()
    run.rename(tmp_path / "moved")
    (run / "tensorboard").mkdir(parents=True)  # another run has begun there
    tracker.log({"loss": 1.5}, step=3)
    tracker.note("checkpoint", "checkpoint-3", step=3)
    tracker.close()
    assert not list((run / "tensorboard").iterdir())
    (events,) = (tmp_path / "moved" / "tensorboard").iterdir()
    assert b"checkpoint-3" in events.read_bytes()


def test_trackers_get_the_steps_that_minutes_have_fixed(settings, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(
        step_time, "seconds_of", lambda call, *rest, **more: call() and 0.12
    )  # five steps, on any machine
    del settings["steps"]
    result = train(**settings, minutes=0.01, tracker="tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    (config,) = events.Tensors("config/text_summary")
    assert f"    steps: {result.steps}\n" in config.tensor_proto.string_val[0].decode()


def test_wandb_continues_the_same_run(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(**settings, tracker="wandb")
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    train(**{**settings, "steps": 6}, resume_from_checkpoint="latest")
    again = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert again["tracker_run_id"] == state["tracker_run_id"]
    runs = list((tmp_path / "run" / "wandb").glob("offline-run-*"))  # offline-run-<time>-<id>, and -1 for a second one
    assert {path.name.split("-")[3] for path in runs} == {state["tracker_run_id"]}
    assert "failed" not in "".join(capsys.readouterr())
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/*.png"))


def test_trackio_gets_numbers_under_one_name(monkeypatch, tmp_path):
    """With a stand-in for the package, which is not among ours."""
    message = []
    fake = SimpleNamespace(
        init=lambda **kwargs: message.append(kwargs),
        log=lambda values, step: message.append((values, step)),
        Image=lambda pixels: pixels.shape,
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    for start in (0, 4):
        tracker = Trackers("trackio", tmp_path / "run", "abc", {"lr": 1}, start, print)
        tracker.start()
        tracker.log({"step": start + 1, "loss": 2.0, "val_error_by_joint": {"elbow": 0.5}, "val_error_by_step": [1.0]})
        tracker.picture("curves", Figure(figsize=(3, 2), dpi=10), start + 1)
        tracker.close()
    assert [call["name"] for call in message if isinstance(call, dict)] == ["run-abc", "run-abc"]
    assert message[1] == ({"loss": 2.0, "val_error_by_joint/elbow": 0.5}, 1)
    assert message[2] == ({"curves": (20, 30, 3)}, 1)


def test_unknown_and_missing_trackers_are_refused_before_the_run_has_a_folder(settings, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--tracker wandbb is no tracker: expected .* or none, did you mean 'wandb'\?"):
        train(**settings, tracker="tensorboard,wandbb")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"--tracker trackio needs a package .*\. Run: uv pip install trackio"):
        train(**settings, tracker="trackio")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """A user whom W&B does not know, without a terminal to ask at."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "home"))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    wandb.teardown()  # W&B reads its settings once
    yield
    wandb.teardown()


def test_wandb_without_a_login_is_refused_before_the_run_has_a_folder(settings, tmp_path, no_login, monkeypatch):
    with pytest.raises(UserError, match=r"--tracker wandb cannot log in: .*Run wandb login, or set WANDB_MODE=offline"):
        train(**settings, tracker="wandb")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    check_trackers("wandb")


def test_a_tracker_that_does_not_start_ends_the_others(settings, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")

    def refuse(**settings):
        raise wandb.errors.CommError("the server\nrefuses")

    closed = []
    close = trackers.TensorBoard.close
    monkeypatch.setattr(wandb, "init", refuse)
    monkeypatch.setattr(trackers.TensorBoard, "close", lambda self: closed.append("tensorboard") or close(self))
    with pytest.raises(UserError, match=r"--tracker wandb does not start: the server refuses. Set WANDB_MODE=offline"):
        train(**settings, tracker="tensorboard,wandb")
    assert closed == ["tensorboard"]


def test_a_tracker_that_fails_is_closed_and_the_run_continues(settings, monkeypatch, capsys):
    closed = []
    close = trackers.TensorBoard.close

    def broken(*args):
        raise ConnectionError("the network\nis gone")

    def noted(tracker):
        closed.append(tracker)
        close(tracker)

    monkeypatch.setattr(trackers.TensorBoard, "log", broken)
    monkeypatch.setattr(trackers.TensorBoard, "close", noted)
    assert train(**settings, tracker="tensorboard").steps == 4
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: --tracker tensorboard failed, the run continues without it: the network is gone"]
    assert len(closed) == 1  # its file is not left open


def test_pages_of_runs(settings, tmp_path, capsys):
    result = train(**settings, val_fraction=0.4)
    assert result.plot().axes[1].get_ylabel() == "validation loss"
    page = result.report()
    assert "data:image/png;base64," in page
    assert page._repr_html_().startswith("<iframe srcdoc=")
    assert main(["compare", str(tmp_path / "run"), str(tmp_path / "run"), "--output", str(tmp_path / "both")]) == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "both.html").read_text()
    assert f"{result.final_loss:.4g}" in table
    assert main(["compare", str(tmp_path)]) == 2
    assert "is not a run's folder: its metrics.jsonl cannot be read" in capsys.readouterr().err


def test_model_card_tells_what_the_checkpoint_recorded(settings, tmp_path):
    result = train(**settings, val_fraction=0.4)
    card = (tmp_path / "run" / "README.md").read_text()
    assert card == model_card(result.checkpoint)
    info = json.loads((result.checkpoint / "training_info.json").read_text())
    assert f"| validation loss | {info['val_loss']:.4g} |" in card
    assert f"| policy | act, {info['parameters']:,} parameters |" in card
    assert "success rate" not in card  # it was not measured


def test_the_command_of_a_card_gives_the_same_settings(settings):
    from config import merge

    config = merge(
        {**settings, "augment": True, "policy_args": ["chunk_size=4", "pretrained_backbone_weights=none"]}
    ).asdict()
    for changed in ({}, {"augment": False}, {"minutes": 3.0, "steps": 50}):
        config |= changed
        words = as_command(config).replace("\\\n", "").split()[2:]
        again = merge(parse_command_line(words)).asdict()
        assert {**again, "output_dir": None, "quiet": True} == {**config, "output_dir": None, "minutes": None}


def test_a_script_that_has_imported_a_kernel_is_no_notebook(settings, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    train(**{**settings, "quiet": False})
    assert "step 4/4" in capsys.readouterr().out


def test_notebook_draws_in_one_place(settings, monkeypatch):
    shown = []
    handle = SimpleNamespace(update=shown.append)
    ipython = SimpleNamespace(display=lambda display_id: handle)
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: "the kernel"))
    monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    monkeypatch.setattr(progress, "DRAW_EVERY", 0.0)
    train(**{**settings, "quiet": False})
    assert len(shown) == 4
    assert all(figure._repr_png_().startswith(b"\x89PNG") for figure in shown)
