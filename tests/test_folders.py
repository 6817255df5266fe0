"""What happens around a run's folder: replaced, moved, read-only, linked, with strange files, on disks that lack something."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import train as train_module
from checkpoints import writer
from checkpoints.folder import (
    MANIFEST,
    POLICY_MANIFEST,
    best_checkpoint,
    find_checkpoints,
    prune,
    recover,
    sort_key,
    verify,
    write_manifest,
)
from checkpoints.lock import LostFolderError, sole_writer
from checkpoints.writer import publish
from errors import UserError
from helpers.runs import assert_same_run, at_step, read_metrics, small
from policy.loaded import load_policy
from runs import main
from train import train
from training import evaluation
from training.open_loop import OpenLoopErrors


@pytest.fixture
def settings(made, tmp_path):
    return small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), save_async="off")


@pytest.fixture(scope="module")
def finished(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(**small(dataset_id=str(made("no_camera")), output_dir=str(folder)))
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, whose files are no links to each other."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


@pytest.fixture
def small_disk(mount):
    return mount("size=64m")


def before_step(monkeypatch, step, act):
    """Call `act` before a step of the run, once what was to be saved is saved."""

    def act_once_saved():
        for thread in threading.enumerate():
            if thread.name == "checkpoint writer":
                thread.join()
        act()

    at_step(monkeypatch, step, act_once_saved)


def failing(monkeypatch, module, name, error, applies=lambda *args: True):
    """Let a function raise `error` where `applies` says so of its arguments; returns those calls."""
    real = getattr(module, name)
    calls = []

    def function(*args, **kwargs):
        if applies(*args):
            calls.append(args)
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, function)
    return calls


def content(folder):
    """{name: (inode, bytes)} of all files below a folder, hidden ones too."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = (path.stat().st_ino, path.read_bytes())
    return files


def warnings_in(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]


def a_checkpoint(output_dir, step, *, branch=0, ancestors=(), val_loss=None):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    state = {"step": step, "samples_seen": 0, "world_size": 1, "loss_count": 0, "loss_sums": [0.0], "branch": branch}
    (folder / "trainer_state.json").write_text(json.dumps({**state, "ancestors": list(ancestors)}))
    (folder / "training_info.json").write_text(json.dumps({"train_seconds": 1.0, "val_loss": val_loss}))
    write_manifest(folder)
    return folder


# --- one run a folder, also when the folder is replaced ---


class Replaced(contextlib.ExitStack):
    """Exchanges a run's folder for that of another run, which begins there and is still running."""

    def __init__(self, run, other, how):
        super().__init__()
        self.run = run
        self.other = other
        self.how = how
        self.before = None

    def __call__(self):
        if self.how == "deleted":
            shutil.rmtree(self.run)
        else:
            self.run.rename(self.run.with_name("moved"))
        shutil.copytree(self.other, self.run)  # the other run has got so far already
        (self.run / "tensorboard").mkdir()
        self.enter_context(sole_writer(self.run))
        self.before = content(self.run)


@pytest.mark.parametrize("how", ["deleted", "moved"])
@pytest.mark.parametrize("moment", ["log", "save", "pruning", "end"])
@pytest.mark.parametrize("save_async", ["on", "off"])
def test_a_run_whose_folder_was_replaced_touches_nothing_there(
    settings, finished, tmp_path, monkeypatch, how, moment, save_async
):
    run = tmp_path / "run"
    settings |= {"save_async": save_async, "keep_last": 1, "save_freq": 3, "steps": 9, "log_freq": 100}
    settings |= {"tracker": "tensorboard"}
    with Replaced(run, finished, how) as replaced:
        if moment == "log":
            before_step(monkeypatch, 5, replaced)
            settings |= {"log_freq": 1}
        elif moment == "save":
            before_step(monkeypatch, 5, replaced)
        elif moment == "end":
            before_step(monkeypatch, 9, replaced)
        else:
            once = iter([replaced])
            real = writer.prune
            monkeypatch.setattr(writer, "prune", lambda *args: next(once, list)() or real(*args))
        with pytest.raises(
            LostFolderError, match=r"run was replaced during this run: expected the \.lock that .* got another"
        ):
            train(**settings)
        assert replaced.before is not None
        assert content(run) == replaced.before
    for path in find_checkpoints(run):
        verify(path)


def test_a_run_in_a_link_to_a_folder_stops_when_the_link_leads_elsewhere(settings, finished, tmp_path, monkeypatch):
    (tmp_path / "one").mkdir()
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "one")
    before = content(other)

    def turn():
        run.unlink()
        run.symlink_to(other)

    before_step(monkeypatch, 3, turn)
    with pytest.raises(LostFolderError, match=r"was moved or deleted|was replaced"):
        train(**settings)
    assert content(other) == before


@pytest.mark.parametrize("how", ["moved", "deleted"])
@pytest.mark.parametrize("save_async", ["on", "off"])
def test_a_folder_that_is_gone_ends_the_run_in_one_line(settings, tmp_path, monkeypatch, capsys, how, save_async):
    run = tmp_path / "run"

    def go():
        if how == "moved":
            run.rename(tmp_path / "elsewhere")
        else:
            shutil.rmtree(run)

    before_step(monkeypatch, 4, go)
    assert train_module.main({**settings, "save_async": save_async, "steps": 8}) == 2
    shown = capsys.readouterr()
    assert warnings_in(capsys) == []
    assert shown.err.splitlines()[-1:] == shown.err.splitlines()
    assert shown.err.startswith(f"error: --output_dir {run} was moved or deleted during this run: it is gone. ")
    assert not run.exists()
    if how == "moved":
        monkeypatch.undo()
        verify(tmp_path / "elsewhere" / "checkpoint-2")
        again = train(
            resume_from_checkpoint=str(tmp_path / "elsewhere" / "checkpoint-2"), output_dir=str(tmp_path / "elsewhere")
        )
        assert again.steps == 8


@pytest.mark.parametrize("name", ["README.md", "loss.png", "best.json", "metrics.jsonl", "config.json"])
def test_a_run_writes_through_no_link_in_its_folder(settings, tmp_path, name):
    """Nor into a pipe, which would wait for a reader."""
    notes = tmp_path / "notes"
    notes.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()  # a run's folder
    (tmp_path / "run" / name).symlink_to(notes)
    train(**settings)
    assert notes.read_text() == "precious"
    (tmp_path / "run" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / name)
    train(**{**settings, "steps": 6}, resume_from_checkpoint="latest")
    assert not (tmp_path / "run" / name).is_fifo()
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_run_whose_lock_file_was_deleted_stops(settings, tmp_path, monkeypatch):
    before_step(monkeypatch, 3, (tmp_path / "run" / ".lock").unlink)
    with pytest.raises(LostFolderError, match=r"run/\.lock is gone"):
        train(**settings)


def test_a_folder_that_another_run_took_over_is_left_to_it(tmp_path):
    """As on a disk whose locks are each machine's own."""
    with sole_writer(tmp_path / "run") as folder:
        other = {"pid": 7, "host": "elsewhere", "run": "another"}
        (tmp_path / "run" / ".lock.json").write_text(json.dumps(other))
        with pytest.raises(LostFolderError, match="was taken over by process 7 on elsewhere"):
            folder.check()
    assert json.loads((tmp_path / "run" / ".lock.json").read_text()) == other


def test_the_end_of_a_replaced_run_leaves_the_others_name_and_lock(tmp_path):
    run = tmp_path / "run"
    with sole_writer(run):  # is new, and would delete a folder that holds nothing but its lock
        shutil.rmtree(run)
        run.mkdir()
        (run / ".lock").write_text("")
        (run / ".lock.json").write_text("{}")
    assert sorted(os.listdir(run)) == [".lock", ".lock.json"]


# --- disks that lack something ---


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK])
def test_a_disk_without_locks_is_told_and_the_run_goes_on(settings, tmp_path, monkeypatch, capsys, number):
    failing(monkeypatch, fcntl, "flock", OSError(number, os.strerror(number)))
    assert train(**settings).steps == 4
    (line,) = warnings_in(capsys)
    assert line.startswith(f"warning: the disk of {tmp_path}/run has no locks ({os.strerror(number)})")
    assert not (tmp_path / "run" / ".lock.json").exists()


def test_without_locks_a_run_on_this_machine_is_refused_and_a_dead_one_is_not(tmp_path, monkeypatch):
    failing(monkeypatch, fcntl, "flock", OSError(errno.ENOLCK, "No locks available"))
    (tmp_path / "run").mkdir()
    owner = tmp_path / "run" / ".lock.json"
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        owner.write_text(json.dumps({"pid": other.pid, "host": socket.gethostname()}))
        with (
            pytest.raises(UserError, match=f"is being written by process {other.pid} on"),
            sole_writer(tmp_path / "run"),
        ):
            pass
        other.kill()
    with sole_writer(tmp_path / "run") as folder:
        assert "stops at its next save if it still runs" in folder.warnings[0]
        with sole_writer(tmp_path / "run"), pytest.raises(LostFolderError):  # this very process, which it cannot tell
            folder.check()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_flushes_no_folders_is_told_once(settings, tmp_path, monkeypatch, capsys, number):
    error = OSError(number, os.strerror(number))
    calls = failing(monkeypatch, os, "fsync", error, lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode))
    assert train(**settings).steps == 4
    assert len(calls) == 4
    (line,) = warnings_in(capsys)
    assert line.startswith(f"warning: the disk of {tmp_path}/run cannot flush every file and folder ({error.strerror})")
    for path in find_checkpoints(tmp_path / "run"):
        verify(path)


def test_a_flush_that_fails_otherwise_is_a_failed_save(settings, tmp_path, monkeypatch, capsys):
    failing(monkeypatch, os, "fsync", OSError(errno.EIO, "Input/output error"))
    with pytest.raises(
        UserError, match=r"Input/output error.* second time in a row: make it writable again and resume"
    ):
        train(**settings)
    assert find_checkpoints(tmp_path / "run") == []


def test_a_folder_that_becomes_read_only_ends_the_run_in_one_line(settings, small_disk, monkeypatch, capsys):
    run = small_disk / "run"

    def remount():
        # A mount on top: a disk with a file that is open to be written cannot be made read-only from outside.
        subprocess.run(["mount", "--bind", small_disk, small_disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", small_disk], check=True)

    before_step(monkeypatch, 3, remount)
    assert train_module.main({**settings, "output_dir": str(run), "steps": 8, "log_freq": 1}) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        f"error: checkpoint-6 could not be written to {run}: [Errno 30] Read-only file system: "
        f"'{shown.err.split(chr(39))[1]}'. This was the second time in a row: make it writable again and resume\n"
    )
    told = [line for line in shown.out.splitlines() if line.startswith("warning: ")]
    assert [line.split(": ")[1].split(" could")[0] for line in told] == [
        f"cannot write {run}/metrics.jsonl",
        "checkpoint-4",
    ]
    verify(run / "checkpoint-2")
    subprocess.run(["umount", small_disk], check=True)
    monkeypatch.undo()
    assert train(resume_from_checkpoint=str(run / "checkpoint-2")).steps == 8
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 9))


@pytest.mark.parametrize("error", [OSError(), OSError("no number"), PermissionError(errno.EACCES, "Permission denied")])
def test_no_message_says_none(tmp_path, monkeypatch, error):
    failing(monkeypatch, os, "mkdir", error)
    with pytest.raises(UserError, match="cannot be written: ") as refused, sole_writer(tmp_path / "run"):
        pass
    assert "None" not in str(refused.value)


# --- housekeeping ---


def test_old_checkpoints_that_cannot_be_deleted_are_told_and_the_run_goes_on(settings, tmp_path, monkeypatch, capsys):
    busy = OSError(errno.EBUSY, "Device or resource busy")
    failing(monkeypatch, shutil, "rmtree", busy, lambda path, *rest: ".checkpoint-" in str(path))
    settings |= {"save_freq": 1, "keep_last": 1}
    assert train(**settings).steps == 4
    run = tmp_path / "run"
    assert [path.name for path in find_checkpoints(run)] == ["checkpoint-4"]
    assert warnings_in(capsys) == [
        f"warning: {run}/checkpoint-{step} could not be deleted (Device or resource busy). Training continues"
        for step in (1, 2, 3)
    ]
    assert train(**{**settings, "steps": 5}, resume_from_checkpoint="latest").steps == 5
    told = warnings_in(capsys)
    assert sum("which a killed run left, could not be deleted (Device or resource busy)" in line for line in told) == 3
    monkeypatch.undo()
    assert recover(run) == []
    assert not list(run.glob(".checkpoint*"))


def test_best_that_cannot_be_named_is_told_and_old_checkpoints_are_pruned(settings, tmp_path, monkeypatch, capsys):
    refused = PermissionError(errno.EPERM, "Operation not permitted")
    failing(monkeypatch, os, "replace", refused, lambda source, target: Path(target).name == "best.json")
    train(**settings, val_fraction=0.3, keep_last=1)
    (line,) = warnings_in(capsys)
    assert line.startswith(f"warning: best.json could not be written to {tmp_path}/run (Operation not permitted)")
    assert len(find_checkpoints(tmp_path / "run")) in (1, 2)  # the newest, and the best if that is another


def test_a_replaced_checkpoint_that_cannot_be_deleted_is_no_failed_save(settings, tmp_path, monkeypatch, capsys):
    train(**settings)
    busy = OSError(errno.EBUSY, "Device or resource busy")
    run = tmp_path / "run"
    for _ in range(2):  # the second time, what the first one left is still there
        with monkeypatch.context() as patch:
            failing(patch, shutil, "rmtree", busy, lambda path, *rest: ".checkpoint-" in str(path))
            train(**settings, resume_from_checkpoint=str(run / "checkpoint-2"))
        told = warnings_in(capsys)
        assert any("checkpoint-4.old, which checkpoint-4 replaced, could not be deleted" in line for line in told)
        assert not any("could not be written" in line for line in told)
        verify(run / "checkpoint-4")
    assert sort_key(run / "checkpoint-4")[0] == 2


def test_linked_checkpoints_are_unlinked_and_what_they_lead_to_stays(tmp_path):
    run = tmp_path / "run"
    elsewhere = [a_checkpoint(tmp_path / "disk", step) for step in (1, 2)]
    run.mkdir()
    for path in elsewhere:
        (run / path.name).symlink_to(path)
    a_checkpoint(run, 3)
    assert prune(run, 3, 1, None) == []
    assert os.listdir(run) == ["checkpoint-3"]
    (run / ".checkpoint-3.old").symlink_to(elsewhere[0])  # killed between replacing and deleting a link
    (run / ".checkpoint-9.tmp").symlink_to(elsewhere[1])
    (run / ".checkpoint-8.tmp").symlink_to(tmp_path / "nothing")
    assert recover(run) == []
    assert os.listdir(run) == ["checkpoint-3"]
    for path in elsewhere:
        verify(path)


@pytest.mark.parametrize("leads_to", ["checkpoint", "nothing", "file"])
def test_a_link_in_the_place_of_a_new_checkpoint_gives_way(settings, finished, tmp_path, leads_to):
    run = tmp_path / "run"
    train(**{**settings, "steps": 2})
    target = tmp_path / "target"
    if leads_to == "checkpoint":
        shutil.copytree(finished / "checkpoint-4", target)
    elif leads_to == "file":
        target.write_text("mine")
    before = content(tmp_path / "target") if target.is_dir() else None
    (run / "checkpoint-4").symlink_to(target)
    train(**settings, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert not (run / "checkpoint-4").is_symlink()
    verify(run / "checkpoint-4")
    assert before is None or content(target) == before
    assert [path.name for path in run.glob(".*")] == [".lock"]


@pytest.mark.parametrize("how", ["checkpoint", "folder", "last", "outside"])
def test_latest_through_a_link_is_the_same_run(settings, finished, copied, tmp_path, how):
    """A checkpoint that is a link to another disk, a run's folder that is one, and links to a checkpoint by another name."""
    settings = {**settings, "output_dir": str(copied), "steps": 6}
    asked = "latest"
    if how == "checkpoint":
        shutil.move(copied / "checkpoint-4", tmp_path / "disk" / "checkpoint-4")
        (copied / "checkpoint-4").symlink_to(tmp_path / "disk" / "checkpoint-4")
    elif how == "folder":
        (tmp_path / "link").symlink_to(copied)
        settings["output_dir"] = str(tmp_path / "link")
    else:
        link = (copied if how == "last" else tmp_path) / "last"
        link.symlink_to(copied / "checkpoint-4")
        asked = str(link)
        del settings["output_dir"]
    assert train(**settings, resume_from_checkpoint=asked).checkpoint.resolve() == (copied / "checkpoint-6").resolve()
    train(**{**settings, "output_dir": str(tmp_path / "whole"), "steps": 6})
    assert_same_run(tmp_path / "whole", copied, 6)
    assert [line["step"] for line in read_metrics(copied)] == [
        line["step"] for line in read_metrics(tmp_path / "whole")
    ]


def test_best_is_on_the_newest_branch_and_never_nan(tmp_path):
    a_checkpoint(tmp_path, 1, val_loss=float("nan"))
    a_checkpoint(tmp_path, 2, val_loss=3.0)
    a_checkpoint(tmp_path, 4, val_loss=0.1)
    assert best_checkpoint(tmp_path) == (tmp_path / "checkpoint-4", 0.1)
    a_checkpoint(tmp_path, 3, branch=1, ancestors=[[0, 2]], val_loss=5.0)  # went back to 2
    assert best_checkpoint(tmp_path) == (tmp_path / "checkpoint-2", 3.0)
    a_checkpoint(tmp_path, 5, branch=2, ancestors=[[0, 1]], val_loss=float("inf"))  # and then to 1
    assert best_checkpoint(tmp_path) == (None, None)
    a_checkpoint(tmp_path, 6, branch=2, ancestors=[[0, 1]], val_loss="0.01")
    a_checkpoint(tmp_path, 7, branch=2, ancestors=[[0, 1]], val_loss=True)
    a_checkpoint(tmp_path, 8, branch=2, ancestors=[[0, 1]], val_loss=7)
    assert best_checkpoint(tmp_path) == (tmp_path / "checkpoint-8", 7)
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text("{")  # damaged
    best_checkpoint(tmp_path)


def test_best_json_follows_a_run_that_goes_back(settings, tmp_path, monkeypatch):
    losses = iter([2.0, 1.0, 9.0, 9.5])

    def measured(*args, **kwargs):
        return OpenLoopErrors(loss=next(losses), error=None, std=np.ones(3), names=["a", "b", "c"], fps=10)

    monkeypatch.setattr(evaluation, "measure", measured)
    settings |= {"val_fraction": 0.3}
    run = tmp_path / "run"
    best = []
    train(**settings)
    best.append(json.loads((run / "best.json").read_text())["checkpoint"])
    train(**{**settings, "steps": 3, "save_freq": 1}, resume_from_checkpoint=str(run / "checkpoint-2"))
    best.append(json.loads((run / "best.json").read_text())["checkpoint"])
    assert best == ["checkpoint-4", "checkpoint-2"]
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["branch"], state["ancestors"]) == (1, [[0, 2]])
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.rmtree(run / name)
    train(**{**settings, "steps": 4, "save_freq": 1}, resume_from_checkpoint="latest")
    assert json.loads((run / "best.json").read_text())["checkpoint"] == "checkpoint-3"  # of 9.0 and 9.5


def test_best_json_of_a_branch_that_was_left_goes(tmp_path):
    a_checkpoint(tmp_path, 2, val_loss=None)
    (tmp_path / "best.json").write_text('{"checkpoint": "checkpoint-9", "val_loss": 1}')
    writer.mark_best(tmp_path, *best_checkpoint(tmp_path), check=lambda: None)
    assert not (tmp_path / "best.json").exists()


# --- only what the manifest lists is read ---

STRAY = [
    "training_weights.safetensors", "adapter_model.safetensors", "adapter_config.json", "adapter_model.bin",
    "model.safetensors.index.json", "policy_preprocessor_step_9_normalizer_processor.safetensors", "old.pth",
    "pretrained_model/", "pretrained_model_ema/", "training_state/",
]  # fmt: skip


def plant(folder, name, finished):
    if name.endswith("/"):
        shutil.copytree(finished / "checkpoint-2", folder / name, dirs_exist_ok=True)
    else:
        known = "config.json" if name.endswith(".json") else "policy.safetensors"
        shutil.copyfile(finished / "checkpoint-2" / known, folder / name)


@pytest.mark.parametrize("name", STRAY)
def test_what_the_manifest_does_not_list_is_damage(finished, copied, tmp_path, name):
    checkpoint = copied / "checkpoint-4"
    plant(checkpoint, name, finished)
    shown = name.rstrip("/")
    with pytest.raises(UserError, match=rf"checkpoint-4 is damaged: {shown} is not listed in manifest\.json"):
        train(resume_from_checkpoint=str(checkpoint), steps=6)
    with pytest.raises(UserError, match=f"{shown} is not listed"):
        load_policy(checkpoint, "cpu")
    assert main(["verify", str(checkpoint)]) == 2


def test_latest_passes_over_a_checkpoint_with_what_its_manifest_does_not_list(settings, finished, copied, capsys):
    plant(copied / "checkpoint-4", "training_weights.safetensors", finished)
    train(**{**settings, "output_dir": str(copied)}, resume_from_checkpoint="latest")
    assert "training_weights.safetensors is not listed in manifest.json; it is skipped" in capsys.readouterr().out
    verify(copied / "checkpoint-4")
    assert_same_run(finished, copied, 4)


def test_files_that_nothing_reads_are_no_damage(copied, settings):
    for name in ("notes.txt", ".DS_Store", "scores.json", "video.mp4"):
        (copied / "checkpoint-4" / name).write_text("mine")
    assert train(**{**settings, "output_dir": str(copied), "steps": 5}, resume_from_checkpoint="latest").steps == 5


def test_folders_of_another_trainer_beside_a_checkpoint_are_not_taken_for_it(finished, copied, settings):
    for folder in (copied, copied / "checkpoints" / "last"):
        for name in ("pretrained_model/", "training_state/"):
            (folder / name).mkdir(parents=True)
    asked = str(copied / "checkpoint-2")
    train(**{**settings, "output_dir": str(copied), "steps": 4}, resume_from_checkpoint=asked)
    assert_same_run(finished, copied, 4)


# --- the finished policy in the run's own folder ---


def test_publishing_again_leaves_nothing_behind_and_harms_no_checkpoint(finished, copied, settings):
    for _ in range(2):
        train(**{**settings, "output_dir": str(copied)}, resume_from_checkpoint="latest")
        assert [path.name for path in copied.glob(".*")] == [".lock"]
    verify(copied / "checkpoint-4")
    load_policy(copied, "cpu")


def test_a_leftover_link_is_not_written_through(finished, tmp_path):
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    os.link(run / "checkpoint-2" / "policy.safetensors", run / ".policy.safetensors.tmp")
    os.link(run / "checkpoint-2" / "config.json", run / ".config.json.tmp")
    publish(run / "checkpoint-4", run)
    for step in (2, 4):
        verify(run / f"checkpoint-{step}")
    assert sorted(path.name for path in run.glob(".*")) == [".lock"]


@pytest.mark.parametrize("what", ["changed", "truncated", "missing", "swapped", *STRAY[:3], "pretrained_model/"])
def test_the_policy_in_a_runs_folder_is_verified_before_it_acts(finished, copied, settings, tmp_path, what):
    weights = copied / "model.safetensors"
    good = weights.read_bytes()
    if what == "changed":
        weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif what == "truncated":
        weights.write_bytes(good[:-8])
    elif what == "missing":
        weights.unlink()
    elif what == "swapped":
        shutil.copyfile(copied / "checkpoint-2" / "model.safetensors", weights)
    else:
        plant(copied, what, finished)
    with pytest.raises(
        UserError, match=rf"is damaged.*Load a checkpoint-<step> of that run instead.*{POLICY_MANIFEST}"
    ):
        load_policy(copied, "cpu")
    tuned = {**settings, "policy_args": None, "policy_path": str(copied), "output_dir": str(tmp_path / "tuned")}
    with pytest.raises(UserError, match=r"is damaged|adapter_config\.json: expected"):
        train(**tuned)
    if what in ("changed", "truncated", "missing", "swapped"):
        train(**{**settings, "output_dir": str(copied)}, resume_from_checkpoint="latest")  # publishes again
    else:
        (copied / POLICY_MANIFEST).unlink()  # as the message says, if it was changed on purpose
    if what not in ("pretrained_model/", "adapter_config.json"):  # which are read where they lie
        load_policy(copied, "cpu")


def test_settings_of_a_finished_policy_may_be_edited_and_an_older_one_has_no_manifest(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({**config, "n_action_steps": 1}))
    assert load_policy(copied, "cpu").policy.config.n_action_steps == 1
    (copied / POLICY_MANIFEST).unlink()
    load_policy(copied, "cpu")
    assert not (copied / MANIFEST).exists()


def test_files_that_an_earlier_publication_had_and_this_one_has_not_go(copied):
    extra = copied / "checkpoint-2" / "policy_preprocessor_step_7_extra.safetensors"
    shutil.copyfile(copied / "checkpoint-2" / "policy.safetensors", extra)
    write_manifest(copied / "checkpoint-2")
    publish(copied / "checkpoint-2", copied)
    assert (copied / extra.name).exists()
    (copied / "mine.txt").write_text("mine")
    publish(copied / "checkpoint-4", copied)
    assert not (copied / extra.name).exists()
    assert (copied / "mine.txt").exists()
    load_policy(copied, "cpu")


# --- permissions ---


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_weights_have_the_permissions_of_the_other_files(settings, tmp_path, mask):
    before = os.umask(mask)
    try:
        train(**settings, ema_decay=0.9)
    finally:
        os.umask(before)
    modes = {}
    for path in [*(tmp_path / "run").iterdir(), *(tmp_path / "run" / "checkpoint-4").iterdir()]:
        if path.is_file() and not path.name.startswith("."):
            modes[path.name] = stat.S_IMODE(path.stat().st_mode)
    assert {
        "policy.safetensors",
        "training_weights.safetensors",
        "metrics.jsonl",
        "optimizer_state.pth",
    } <= modes.keys()
    assert set(modes.values()) == {0o666 & ~mask}


def test_a_disk_without_permissions_takes_weights_too(settings, monkeypatch):
    failing(monkeypatch, os, "chmod", PermissionError(errno.EPERM, "Operation not permitted"))
    assert train(**settings).steps == 4
