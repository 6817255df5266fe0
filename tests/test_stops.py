"""A stop saves first, whatever the run is doing, and whatever stops it; what it left out is done on the resume."""

import contextlib
import json
import os
import pty
import select
import signal
import sys
import threading
import time

import pytest

import hub
from checkpoints import writer
from checkpoints.folder import find_checkpoints, verify
from data.loader import Loader
from errors import UserError
from helpers.paths import ROOT
from helpers.runs import assert_same_run, at_step, logged, read_metrics, small
from helpers.simulations import still_simulation
from runtime import StopSignals
from train import train
from training import evaluation, open_loop


@pytest.fixture
def settings(made, tmp_path):
    return small("flow", dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"))


@pytest.fixture
def evaluated(settings):
    """A run that validates in six batches of two and simulates, each time that it saves."""
    return {
        **settings,
        "batch_size": 2,
        "val_fraction": 0.4,
        "val_samples": 18,
        "eval_env": "pusht",
        "eval_episodes": 2,
    }


def ask_to_stop(name="SIGTERM"):
    os.kill(os.getpid(), getattr(signal, name))


def simulate(monkeypatch, on_step=lambda: None):
    simulation = still_simulation(on_step)
    monkeypatch.setattr(evaluation.environments, "open_simulation", lambda *args, **kwargs: simulation)
    return simulation.env


def without_times(line: dict) -> dict:
    return {name: value for name, value in line.items() if name not in ("samples_per_s", "step_s", "data_wait")}


def all_metrics(run) -> list[dict]:
    return [without_times(line) for line in read_metrics(run)]


def test_no_validation_and_no_simulation_begins_after_a_stop(evaluated, monkeypatch, tmp_path):
    """Asked for in step 2, which is validated and simulated; the resume does both, and is the same run."""
    env = simulate(monkeypatch)
    whole = train(**{**evaluated, "output_dir": str(tmp_path / "whole")})
    assert [line["step"] for line in whole.history if "val_loss" in line and "eval_success_rate" in line] == [2, 4]
    env.steps = 0
    with monkeypatch.context() as patch:
        at_step(patch, 2, ask_to_stop)
        patch.setattr(evaluation, "measure", lambda *args, **kwargs: pytest.fail("it validates"))
        result = train(**evaluated)
    assert (result.steps, result.stopped_by) == (2, "SIGTERM")
    assert env.steps == 0
    state = json.loads((result.checkpoint / "trainer_state.json").read_text())
    assert state["evaluation_is_missing"] is True
    simulate(monkeypatch)
    again = train(resume_from_checkpoint=str(result.checkpoint), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)
    assert all_metrics(tmp_path / "run") == all_metrics(tmp_path / "whole")
    state = json.loads((again.checkpoint / "trainer_state.json").read_text())
    assert state["evaluation_is_missing"] is False


@pytest.mark.parametrize("moment", ["third batch", "simulation"])
def test_what_is_under_way_ends_at_its_next_batch_or_step(evaluated, monkeypatch, tmp_path, moment):
    simulate(monkeypatch)
    train(**{**evaluated, "output_dir": str(tmp_path / "whole")})
    batches = []
    predict_chunk = open_loop.predict_chunk

    def predict(*args):
        batches.append(1)
        if moment == "third batch" and len(batches) == 3:
            ask_to_stop()
        return predict_chunk(*args)

    with monkeypatch.context() as patch:
        patch.setattr(open_loop, "predict_chunk", predict)
        env = simulate(patch, ask_to_stop if moment == "simulation" else lambda: None)
        result = train(**evaluated)
    assert (result.steps, result.stopped_by) == (2, "SIGTERM")
    assert len(batches) == (3 if moment == "third batch" else 6)
    assert env.steps == (0 if moment == "third batch" else 1)
    assert sum("val_loss" in line for line in result.history) == (moment == "simulation")

    simulate(monkeypatch)
    train(resume_from_checkpoint=str(result.checkpoint), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)
    assert all_metrics(tmp_path / "run") == all_metrics(tmp_path / "whole")


def test_a_stop_after_the_last_batch_repeats_nothing(settings, monkeypatch):
    """All was measured: the resume does not measure it again."""
    measure = evaluation.measure

    def measure_and_stop(*args, **kwargs):
        result = measure(*args, **kwargs)
        ask_to_stop()
        return result

    monkeypatch.setattr(evaluation, "measure", measure_and_stop)
    result = train(**settings, val_fraction=0.4)
    assert (result.steps, result.stopped_by) == (2, "SIGTERM")
    assert sum("val_loss" in line for line in result.history) == 1
    assert not json.loads((result.checkpoint / "trainer_state.json").read_text())["evaluation_is_missing"]


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_terminal_that_is_closed_stops_the_run_unless_nohup_says_otherwise(settings, monkeypatch, is_ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        at_step(monkeypatch, 3, lambda: ask_to_stop("SIGHUP"))
        result = train(**settings)
        assert (result.steps, result.stopped_by) == ((4, None) if is_ignored else (3, "SIGHUP"))
        verify(result.checkpoint)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_is_closed_under_the_command(settings, tmp_path):
    """The window goes: SIGHUP comes, and every print fails from then on. The run saves and says by its status why it ended."""
    flags = []
    for name, value in {**settings, "steps": 100_000, "save_freq": 0, "log_freq": 1, "quiet": False}.items():
        if not isinstance(value, bool):
            flags += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "src/train.py", *flags])
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 1000)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + signal.SIGHUP
    (saved,) = find_checkpoints(tmp_path / "run")
    verify(saved)


@pytest.mark.parametrize("first", ["SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"])
def test_ctrl_c_after_any_stop_leaves_at_once(settings, monkeypatch, first):
    def stop_twice():
        ask_to_stop(first)
        ask_to_stop("SIGTERM")  # nothing: a job that is cancelled is sent it again and again
        ask_to_stop("SIGINT")

    at_step(monkeypatch, 1, stop_twice)
    with pytest.raises(KeyboardInterrupt):
        train(**settings)
    assert not find_checkpoints(settings["output_dir"])


def test_ctrl_c_leaves_no_writer_behind(settings, tmp_path, monkeypatch):
    """Not even a third one: the next run in this process would meet it."""
    write_checkpoint = writer.write_checkpoint

    def write_slowly(*args, **kwargs):
        time.sleep(0.6)
        return write_checkpoint(*args, **kwargs)

    def interrupt():
        ask_to_stop("SIGINT")
        threading.Timer(0.2, ask_to_stop, ["SIGINT"]).start()  # while the writer is waited for
        ask_to_stop("SIGINT")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_checkpoint", write_slowly)
        at_step(patch, 3, interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(**settings)
        time.sleep(0.1)  # a thread that has written needs a moment to end
    assert "checkpoint writer" not in [thread.name for thread in threading.enumerate()]
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert train(**settings, resume_from_checkpoint="auto").steps == 4


def test_in_the_command_ctrl_c_ends_the_process_while_it_writes(settings, tmp_path):
    """A script of its own, with a disk that takes 60 seconds."""
    code = f"""
import os, signal, sys, time
sys.path.insert(0, "src")
import train, runtime
from training.learner import Learner
runtime.StopSignals.interrupt = staticmethod(train.leave_at_once)  # as train.py does when it is run
os.fsync = lambda handle: time.sleep(60)
step = Learner.step
def stop(learner, batch, done):
    for _ in range(2 * (done == 2)):
        os.kill(os.getpid(), signal.SIGINT)
    return step(learner, batch, done)
Learner.step = stop
train.main({settings!r})
"""
    reader, output = os.pipe()
    begun = time.monotonic()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r})\n{code}"],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, output, 2)],
    )
    os.close(output)
    _, status = os.waitpid(pid, 0)
    with open(reader, encoding="utf-8") as errors:
        assert "interrupted. Pass --resume_from_checkpoint auto to continue from the newest checkpoint" in errors.read()
    assert os.waitstatus_to_exitcode(status) == 130
    assert time.monotonic() - begun < 60
    assert not find_checkpoints(tmp_path / "run")


def break_loader(monkeypatch, error: Exception, after: int):
    """Let the loader fail at the batch that comes after so many steps."""
    batch_at = Loader.batch_at

    def broken(loader, samples_seen, buffers=None):
        if samples_seen == after * loader.batch_size:
            raise error
        return batch_at(loader, samples_seen, buffers)

    monkeypatch.setattr(Loader, "batch_at", broken)


@pytest.mark.parametrize(
    "error", [UserError("frame 7 cannot be decoded"), OSError(5, "Input/output error"), KeyError("b")]
)
def test_an_error_of_the_loader_saves_the_good_steps_first(settings, tmp_path, monkeypatch, capsys, error):
    settings |= {"save_freq": 0, "log_freq": 3}
    train(**{**settings, "output_dir": str(tmp_path / "whole")})
    with monkeypatch.context() as patch:
        break_loader(patch, error, after=2)
        with pytest.raises(type(error)) as raised:
            train(**settings)
    assert raised.value is error
    assert "warning: step 3 fails: the steps before it are saved in checkpoint-2" in capsys.readouterr().out
    (saved,) = find_checkpoints(tmp_path / "run")
    train(resume_from_checkpoint=str(saved), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")


def test_an_error_of_the_loader_is_told_also_where_nothing_can_be_saved(settings, tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise UserError("checkpoint-2 could not be written: no space")

    break_loader(monkeypatch, UserError("frame 7 cannot be decoded"), after=2)
    monkeypatch.setattr(writer, "write_checkpoint", fail)
    with pytest.raises(UserError, match="frame 7 cannot be decoded"):
        train(**{**settings, "save_freq": 0})
    assert "warning: step 3 fails, and the steps before it are not saved: checkpoint-2" in capsys.readouterr().out


@pytest.mark.parametrize(("after", "expected"), [(0, []), (2, ["checkpoint-2"])])
def test_an_error_of_the_loader_saves_nothing_twice(settings, tmp_path, monkeypatch, capsys, after, expected):
    """Nothing before the first step, and nothing that the step before it has saved."""
    break_loader(monkeypatch, UserError("frame 7 cannot be decoded"), after)
    with pytest.raises(UserError, match="frame 7"):
        train(**settings)
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == expected
    assert "fails" not in capsys.readouterr().out


def test_signals_that_a_run_keeps_are_given_back():
    before = {name: signal.getsignal(getattr(signal, name)) for name in StopSignals.NAMES}
    with StopSignals() as signals:
        ask_to_stop("SIGHUP" if before["SIGHUP"] is not signal.SIG_IGN else "SIGTERM")
        assert signals.asked is not None
    assert {name: signal.getsignal(getattr(signal, name)) for name in StopSignals.NAMES} == before


def test_an_upload_that_has_not_ended_is_told(monkeypatch, tmp_path):
    blocked = threading.Event()
    monkeypatch.setattr(hub, "upload_checkpoint", lambda repo, checkpoint: blocked.wait(10))
    warnings = []
    uploader = hub.Uploader("me/run", warnings.append)
    uploader.put(tmp_path / "checkpoint-2")
    while uploader.waiting is not None:
        time.sleep(0.01)
    uploader.put(tmp_path / "checkpoint-4")
    uploader.close(0.05)
    assert [warning.split(" has not ended")[0] for warning in warnings] == [
        "--push_checkpoints: the upload of checkpoint-4",
        "--push_checkpoints: the upload of checkpoint-2",
    ]
    assert f"hf upload me/run {tmp_path}/checkpoint-2 checkpoint-2" in warnings[1]
    warnings.clear()
    blocked.set()
    with contextlib.suppress(AttributeError):
        uploader.thread.join(5)
    uploader.close(5)
    assert not warnings
