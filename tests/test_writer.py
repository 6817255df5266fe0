"""Saving: in the background and not, on a full disk, by time and by signal, by one run at a time."""

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_model

from checkpoints import folder as checkpoint_module
from checkpoints import writer
from checkpoints.folder import MANIFEST, find_checkpoints, manifest_text, sha256, verify
from checkpoints.lock import sole_writer
from checkpoints.writer import Snapshot, StagingBuffers, disk_errors, save_weights
from errors import UserError
from helpers.paths import ROOT
from helpers.runs import at_step, small
from reports.pages import read_history
from runs import main
from train import train


@pytest.fixture
def settings(made, tmp_path):
    return small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"))


@pytest.fixture(scope="module")
def checkpoint(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return train(**small(dataset_id=str(made("no_camera")), output_dir=str(folder), steps=2)).checkpoint


def steps(run):
    return [int(path.name.split("-")[1]) for path in find_checkpoints(run)]


def wait_for_the_writer():
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()


@pytest.mark.parametrize("policy", ["act", "flow"])
def test_background_or_not_gives_the_same_bytes(made, tmp_path, policy):
    dataset = made("video" if policy == "flow" else "no_camera")
    for how in ("on", "off"):
        train(**small(policy, dataset_id=str(dataset), output_dir=str(tmp_path / how), save_async=how))
    one, other = ([tmp_path / how / f"checkpoint-{step}" for step in (2, 4)] for how in ("on", "off"))
    # the flag itself, the folder's name, times, the folder's number
    message = {MANIFEST, "train_config.json", "training_info.json", "trainer_state.json"}
    for a, b in zip(one, other, strict=True):
        states = [{**json.loads((folder / "trainer_state.json").read_text()), "folder": None} for folder in (a, b)]
        assert states[0] == states[1]
        names = {path.name for path in a.iterdir()}
        assert names == {path.name for path in b.iterdir()}
        assert all(sha256(a / name) == sha256(b / name) for name in names - message)


def a_snapshot(weights, optimizer):
    return Snapshot(
        step=0,
        weights=weights,
        trained_weights={},
        optimizer=optimizer,
        policy_config=None,
        preprocessor=None,
        postprocessor=None,
        state=None,
    )


def test_copies_are_apart_from_the_original_keep_ties_and_reuse_their_memory():
    staging = StagingBuffers()
    weight = torch.arange(6.0).reshape(2, 3)
    settings = {"groups": [{"lr": 1e-3, "params": [0, 1]}], "n": 3}
    snapshot = a_snapshot({"a": weight, "tied": weight, "transposed": weight.T}, {"momentum": weight, **settings})
    first = staging.copy(snapshot)
    memory = first.weights["a"].data_ptr()
    weight += 1
    assert torch.equal(first.weights["a"], torch.arange(6.0).reshape(2, 3))
    assert first.weights["tied"] is first.weights["a"]
    assert first.optimizer["momentum"] is first.weights["a"]
    assert first.weights["transposed"].shape == (3, 2)
    assert {name: first.optimizer[name] for name in settings} == settings
    again = staging.copy(snapshot).weights["a"]
    assert again.data_ptr() == memory
    assert torch.equal(again, weight)


def test_keep_every_and_keep_last(settings):
    train(**{**settings, "steps": 7, "save_freq": 1, "keep_last": 2, "keep_every": 3})
    assert steps(Path(settings["output_dir"])) == [3, 6, 7]


def test_resumed_from_is_kept_for_one_interval(settings, tmp_path, monkeypatch):
    train(**settings)
    there = []
    at_step(monkeypatch, 6, lambda: there.append(steps(tmp_path / "run")))
    at_step(monkeypatch, 9, lambda: there.append(steps(tmp_path / "run")))
    train(**{**settings, "steps": 9, "save_freq": 3, "save_minutes": 1e-9, "keep_last": 1, "save_async": "off"},
          resume_from_checkpoint="latest")  # fmt: skip
    assert there == [[4, 5], [8]]


def test_save_minutes(settings, tmp_path):
    train(**{**settings, "save_freq": 0, "save_minutes": 1e-9})
    assert steps(tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_signals_finish_the_step_and_save(settings, tmp_path, monkeypatch, capfd, name):
    before = signal.getsignal(getattr(signal, name))
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), getattr(signal, name)))
    result = train(**settings)
    assert (result.steps, result.stopped_by) == (3, name)
    assert result.checkpoint == tmp_path / "run" / "checkpoint-3"
    verify(result.checkpoint)
    assert signal.getsignal(getattr(signal, name)) is before
    shown = capfd.readouterr()
    assert f"stopped by {name} at step 3 of 4. To resume:\n" in shown.out
    assert ("finishing this step and saving; Ctrl-C again quits at once" in shown.err) == (name == "SIGINT")
    assert not (tmp_path / "run" / "model.safetensors").exists()  # it is not the finished policy
    assert train(resume_from_checkpoint=str(result.checkpoint)).stopped_by is None


def test_a_second_sigint_leaves_at_once(settings, tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        train(**settings)
    wait_for_the_writer()  # it may have been left behind with checkpoint-2, in a script that goes on
    assert steps(tmp_path / "run") in ([], [2])
    for path in find_checkpoints(tmp_path / "run"):
        verify(path)
    monkeypatch.undo()
    assert train(**settings, resume_from_checkpoint="auto").steps == 4  # it does not meet that writer


def test_a_second_run_in_the_folder_is_refused(settings, tmp_path):
    with sole_writer(tmp_path / "run"), pytest.raises(UserError) as refused:
        train(**settings)
    assert str(refused.value) == (
        f"--output_dir {tmp_path}/run is being written by process {os.getpid()} on {socket.gethostname()}. "
        "Stop that run first, or pass another --output_dir"
    )
    assert not (tmp_path / "run").exists()  # nothing was begun there
    train(**settings)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    hold = "import sys, time; sys.path.insert(0, 'src'); from pathlib import Path; from checkpoints.lock import sole_writer\n"
    hold += "with sole_writer(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} on"), sole_writer(tmp_path / "run"):
            pass
        other.kill()
    with sole_writer(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".lock.json").read_text())["pid"] == os.getpid()


@pytest.fixture
def small_disk(mount):
    """A file system of its own with room for two checkpoints."""
    return mount("size=4m")


@pytest.mark.parametrize("how", ["on", "off"])
def test_a_full_disk_harms_nothing_and_the_next_save_succeeds(settings, small_disk, monkeypatch, capsys, how):
    run, filling = small_disk / "run", small_disk / "filling"
    settings |= {"output_dir": str(run), "save_freq": 1, "keep_last": 1, "save_async": how}

    def fill():
        wait_for_the_writer()
        with open(filling, "wb", buffering=0) as file:
            while shutil.disk_usage(small_disk).free:
                file.write(b"0" * 4096)

    def look_and_free():
        wait_for_the_writer()
        assert steps(run) == [1]
        verify(run / "checkpoint-1")
        filling.unlink()

    at_step(monkeypatch, 2, fill)
    at_step(monkeypatch, 3, look_and_free)
    assert train(**settings).checkpoint == run / "checkpoint-4"
    message = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(message) == 1
    assert message[0].startswith(f"warning: checkpoint-2 could not be written to {run}: ")
    assert "No space left on device" in message[0]
    assert message[0].endswith(". Training continues, and the next save tries again")
    assert steps(run) == [4]


SAVE = {"safetensors": save_weights, "torch": torch.save}


@pytest.mark.parametrize("library", SAVE)
def test_a_full_disk_is_an_os_error(small_disk, library):
    """Which the libraries hide: safetensors in an error of its own, torch.save in a RuntimeError."""
    weights = {"w": torch.zeros(2_000_000)}
    with pytest.raises(OSError, match="No space left on device"), disk_errors(small_disk, a_snapshot(weights, {})):
        SAVE[library](weights, small_disk / "file")


@pytest.mark.parametrize("library", SAVE)
def test_a_file_that_may_not_be_so_large_is_an_os_error(tmp_path, library):
    weights = {"w": torch.zeros(2_000_000)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"), disk_errors(tmp_path, a_snapshot(weights, {})):
            SAVE[library](weights, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_error_that_is_not_the_disks_is_left_as_it_is(tmp_path):
    error = RuntimeError("could not write: this text is no evidence")
    with pytest.raises(RuntimeError) as caught, disk_errors(tmp_path, a_snapshot({"w": torch.zeros(3)}, {})):
        raise error
    assert caught.value is error


def test_weights_are_the_bytes_of_safetensors_save_model(tmp_path):
    model = torch.nn.ModuleDict({"one": torch.nn.Linear(3, 2), "other": torch.nn.Linear(3, 2)})
    model["other"].weight = model["one"].weight
    save_model(model, tmp_path / "theirs")
    save_weights(model.state_dict(), tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_metrics_on_a_full_disk_are_kept_until_there_is_room(settings, small_disk, monkeypatch, capsys):
    run, filling = small_disk / "run", small_disk / "filling"

    def fill():
        with open(filling, "wb", buffering=0) as file:
            while shutil.disk_usage(small_disk).free:
                file.write(b"0" * 4096)

    at_step(monkeypatch, 5, fill)
    at_step(monkeypatch, 55, filling.unlink)
    result = train(**{**settings, "output_dir": str(run), "steps": 60, "save_freq": 0, "log_freq": 1})
    message = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    there = f"warning: cannot write {run}/metrics.jsonl: No space left on device"
    assert message == [f"{there}. Its lines are added once there is room"]
    assert [line["step"] for line in read_history(run)] == list(range(1, 61))
    assert result.checkpoint.name == "checkpoint-60"


@pytest.mark.parametrize(("number", "remedy"), [
    (errno.ENOSPC, "free some space and resume"), (errno.EFBIG, "allow larger files .ulimit -f unlimited. and resume")])  # fmt: skip
def test_a_second_failure_in_a_row_stops_the_run(settings, tmp_path, monkeypatch, number, remedy):
    flush = writer.flush

    def full(path):
        if ".checkpoint-2" not in str(path) and "checkpoint" in str(path):
            raise OSError(number, os.strerror(number))
        flush(path)

    monkeypatch.setattr(writer, "flush", full)
    with pytest.raises(UserError, match=rf"checkpoint-6 could not be .* second time in a row: {remedy}"):
        train(**{**settings, "steps": 20})
    assert steps(tmp_path / "run") == [2]
    assert not list((tmp_path / "run").glob(".checkpoint*"))


def test_a_failed_last_save_is_tried_again(settings, tmp_path, monkeypatch, capsys):
    flush, failed = writer.flush, []

    def full_once(path):
        if ".checkpoint-4" in str(path) and not failed:
            failed.append(path)
            raise OSError(28, "No space left on device")
        flush(path)

    monkeypatch.setattr(writer, "flush", full_once)
    assert train(**settings).checkpoint == tmp_path / "run" / "checkpoint-4"
    assert "warning: checkpoint-4 could not be written" in capsys.readouterr().out


def test_our_own_mistake_in_the_thread_is_no_warning(settings, monkeypatch):
    monkeypatch.setattr(writer, "write_manifest", lambda folder: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        train(**settings)


def test_every_flip_and_truncation_is_found_by_name(checkpoint, tmp_path):
    for name in sorted(path.name for path in checkpoint.iterdir()):
        folder = tmp_path / name / checkpoint.name
        shutil.copytree(checkpoint, folder)  # which parts hard links
        content = (folder / name).read_bytes()
        places = sorted({0, len(content) - 1, *(len(content) * i // 23 for i in range(23))})
        for bit, place in enumerate(places):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit % 8
            for damaged in (bytes(flipped), content[:place]):
                (folder / name).write_bytes(damaged)
                with pytest.raises(
                    UserError, match=rf"{name}( cannot be read| does not match| has \d+ bytes, expected)"
                ):
                    verify(folder)
        (folder / name).write_bytes(content)
        verify(folder)


def test_latest_and_auto_pass_over_what_is_damaged(settings, tmp_path, capsys):
    train(**settings)
    run = tmp_path / "run"
    weights = run / "checkpoint-4" / "trainer_state.json"
    weights.write_bytes(weights.read_bytes()[:-3])
    assert train(**settings, resume_from_checkpoint="auto").checkpoint == run / "checkpoint-4"
    message = capsys.readouterr().out
    assert f"warning: {run}/checkpoint-4 is damaged: trainer_state.json has " in message
    assert "it is skipped" in message
    verify(run / "checkpoint-4")
    for path in find_checkpoints(run):
        (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json is missing.*has no other. Delete it to start afresh"):
        train(**settings, resume_from_checkpoint="auto")


def test_a_manifest_of_other_content_is_refused(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    for text in ("{}", manifest_text({}) + " "):
        (folder / MANIFEST).write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json does not match its sha256"):
            verify(folder)
    (folder / MANIFEST).write_text("[]")
    with pytest.raises(UserError, match=r"manifest\.json is damaged: expected a JSON object, got list"):
        verify(folder)
    for entries in (
        {"config.json": 5},
        {"config.json": {"size": 1}},
        {"../other/config.json": {"size": 1, "sha256": ""}},
    ):
        (folder / MANIFEST).write_text(manifest_text(entries))
        with pytest.raises(UserError, match=r"manifest\.json: expected a file's name with its size and sha256"):
            verify(folder)


def test_command_line(checkpoint, tmp_path, capsys):
    run = shutil.copytree(checkpoint.parent, tmp_path / "run")
    assert main(["list", str(run)]) == 0
    assert "checkpoint-2 " in capsys.readouterr().out
    assert main(["show", str(run / "checkpoint-2")]) == 0
    shown = capsys.readouterr().out
    assert "policy.safetensors" in shown
    assert "--batch_size 4" in shown
    assert main(["verify", str(run)]) == 0
    (run / "checkpoint-2" / "config.json").write_text("{}")
    assert main(["verify", str(run)]) == 2
    assert "config.json has 2 bytes, expected" in capsys.readouterr().err
    assert main(["list", str(run)]) == 0
    assert "damaged: config.json has 2 bytes" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 2
    error = f"error: {tmp_path} is not a checkpoint and holds none. Pass a run's folder or a checkpoint-<step> folder\n"
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("what", ["data", "inode"])
def test_latest_passes_over_one_that_the_disk_does_not_give_back(settings, tmp_path, monkeypatch, capsys, what):
    train(**settings)
    read = {"data": sha256, "inode": Path.is_file}[what]

    def worn(path):
        if path.parent.name == "checkpoint-4" and path.name == "config.json":
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(*{"data": (checkpoint_module, "sha256"), "inode": (Path, "is_file")}[what], worn)
    assert train(**{**settings, "steps": 3}, resume_from_checkpoint="latest").steps == 3
    assert "cannot be read ([Errno 5] Input/output error)" in capsys.readouterr().out


def test_a_full_disk_at_the_end_is_a_line_and_the_checkpoint_is_whole(settings, tmp_path, monkeypatch):
    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.shutil, "copyfile", full)
    with pytest.raises(
        UserError, match=r"checkpoint-4 is complete, but the finished policy cannot be written to .*Errno 28"
    ):
        train(**settings)
    verify(tmp_path / "run" / "checkpoint-4")


@pytest.mark.parametrize(("status", "requeued"), [(138, "requeue 7\n"), (0, ""), (2, "")])
def test_slurm_job_queues_itself_again_when_it_was_stopped(tmp_path, status, requeued):
    """With stand-ins for SLURM's two commands."""
    for name, text in (
        ("srun", f'echo "$@" > {tmp_path}/ran; exit {status}'),
        ("scontrol", f'echo "$@" >> {tmp_path}/message'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "examples/slurm.sh", "--output_dir", "a b"], cwd=ROOT, env=env, check=False)
    assert done.returncode == (0 if requeued else status)
    assert (
        tmp_path / "ran"
    ).read_text() == ".venv/bin/python src/train.py --output_dir a b --resume_from_checkpoint auto\n"
    assert ((tmp_path / "message").read_text() if requeued else "") == requeued
    assert (tmp_path / "message").exists() == bool(requeued)
