"""Checkpoint folders on disk: found only when complete, pruned, put back; final model files."""

import json
import os
import signal
import subprocess
import sys

import pytest

import runtime
from checkpoints.folder import MANIFEST, find_checkpoints, listed_files, prune, recover, verify, write_manifest
from checkpoints.writer import publish
from errors import UserError, read_json
from helpers.paths import ROOT, SHIPPED
from helpers.runs import assert_same_run, at_step, small
from policy.loaded import load_policy
from train import train


def a_checkpoint(output_dir, step, content=b"weights"):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "policy.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    write_manifest(folder)
    return folder


def test_only_complete_folders_are_found_in_order_of_steps(tmp_path):
    for step in (900, 1000, 20):
        a_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-5000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]


def test_stopped_while_nobody_reads_what_is_said(monkeypatch):
    def broken(*args):
        raise BrokenPipeError

    with runtime.StopSignals() as signals:
        monkeypatch.setattr(os, "write", broken)  # `train.py ... | tee log`: tee has gone by the same Ctrl-C
        signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()
    assert signals.asked == signal.SIGINT


def test_prune_keeps_the_newest_the_multiples_and_those_named(tmp_path):
    folders = [a_checkpoint(tmp_path, step) for step in (1, 2, 3, 4, 5, 6)]
    prune(tmp_path, 6, None, None)
    assert len(find_checkpoints(tmp_path)) == 6
    prune(tmp_path, 6, 2, 3, protected=[folders[0]])
    assert find_checkpoints(tmp_path) == [folders[0], folders[2], *folders[4:]]
    prune(tmp_path, 6, 2, None)
    assert find_checkpoints(tmp_path) == folders[4:]
    assert not list(tmp_path.glob(".*"))


def test_prune_leaves_later_steps_of_an_earlier_branch(tmp_path):
    folders = [a_checkpoint(tmp_path, step) for step in (1, 2, 8, 9)]
    prune(tmp_path, 2, 1, None)
    assert find_checkpoints(tmp_path) == folders[1:]


@pytest.mark.parametrize("key", ["branch", "course"])  # older checkpoints call it a course
def test_prune_keeps_the_newest_of_the_latest_branch(tmp_path, key):
    folders = [a_checkpoint(tmp_path, step) for step in (4, 5, 8, 10)]
    for folder, branch in zip(folders, (0, 5, 0, 5), strict=True):  # back to 4, and on by other steps
        (folder / "trainer_state.json").write_text(json.dumps({key: branch}))
    prune(tmp_path, 10, 2, None)
    assert find_checkpoints(tmp_path) == [folders[1], folders[3]]


def test_recover_deletes_what_a_killed_process_left_and_puts_back_what_it_was_replacing(tmp_path):
    (tmp_path / ".checkpoint-3.tmp").mkdir()
    a_checkpoint(tmp_path, 5).rename(tmp_path / ".checkpoint-5.old")  # killed between two renames
    a_checkpoint(tmp_path, 6, b"old").rename(tmp_path / ".checkpoint-6.old")
    a_checkpoint(tmp_path, 6, b"new")
    (tmp_path / ".model.safetensors.tmp").write_text("")
    (tmp_path / ".notes.tmp").write_text("the user's own")
    (tmp_path / ".mine.tmp").mkdir()
    recover(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".mine.tmp", ".notes.tmp", "checkpoint-5", "checkpoint-6"]
    assert (tmp_path / "checkpoint-6" / "policy.safetensors").read_bytes() == b"new"


def test_final_files_are_replaced_and_the_checkpoint_does_not_change_with_them(tmp_path):
    for step in (1, 2):
        publish(a_checkpoint(tmp_path, step, f"weights {step}".encode()), tmp_path)
    assert (tmp_path / "policy.safetensors").read_bytes() == b"weights 2"
    (tmp_path / "config.json").write_text("edited by hand")
    verify(tmp_path / "checkpoint-2")
    assert not (tmp_path / MANIFEST).exists()


def test_no_hard_links_no_difference(made, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    result = train(**small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path), steps=1))
    assert (result.checkpoint / "model.safetensors").read_bytes() == (
        result.checkpoint / "policy.safetensors"
    ).read_bytes()
    verify(result.checkpoint)
    assert (tmp_path / "model.safetensors").exists()


def test_a_damaged_manifest_is_named(tmp_path):
    (a_checkpoint(tmp_path, 1) / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"checkpoint-1/manifest\.json cannot be read"):
        verify(tmp_path / "checkpoint-1")


def test_damaged_tensors_do_not_act(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), steps=1)
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    damaged = next(checkpoint.glob("policy_postprocessor_step_*.safetensors"))
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="does not match its sha256"):
        load_policy(checkpoint)
    with pytest.raises(UserError, match="does not match its sha256"):
        train(**{**settings, "policy_args": None}, policy_path=str(checkpoint), output_dir=str(tmp_path / "tuned"))


def test_keep_last_while_training(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path), save_freq=1, keep_last=2)
    train(**{**settings, "steps": 4})
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


def test_a_validation_that_a_stop_prevented_is_made_up_for_in_its_checkpoint(made, tmp_path, monkeypatch):
    """The checkpoint is written again with the validation loss, so that it can be the best one."""
    settings = small(dataset_id=str(made("no_camera")), val_fraction=0.4, steps=6)
    train(**settings, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: signal.raise_signal(signal.SIGTERM))
        stopped = train(**settings, output_dir=str(tmp_path / "run"))
    assert (stopped.steps, stopped.stopped_by) == (4, "SIGTERM")
    assert read_json(stopped.checkpoint / "training_info.json")["val_loss"] is None
    before = {name: entry["sha256"] for name, entry in listed_files(stopped.checkpoint).items()}

    train(resume_from_checkpoint=str(stopped.checkpoint), quiet=True)
    verify(stopped.checkpoint)
    after = {name: entry["sha256"] for name, entry in listed_files(stopped.checkpoint).items()}
    assert all(before[name] == after[name] for name in before if name.endswith((".safetensors", ".pth")))
    for step in (2, 4, 6):
        losses = [
            read_json(tmp_path / run / f"checkpoint-{step}" / "training_info.json")["val_loss"]
            for run in ("whole", "run")
        ]
        assert losses[0] == losses[1] is not None
    assert read_json(tmp_path / "run" / "best.json") == read_json(tmp_path / "whole" / "best.json")
    assert_same_run(tmp_path / "whole", tmp_path / "run", 6)


@pytest.mark.slow
def test_recorder_makes_the_shipped_demonstrations_again(tmp_path):
    """The first two episodes, to the bit."""
    import pyarrow.parquet as pq

    command = [sys.executable, "examples/record.py", "--episodes", "2", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "no library for rendering" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    again = pq.read_table(tmp_path / "two" / "data" / "chunk-000" / "file-000.parquet")
    shipped = pq.read_table(SHIPPED / "data" / "chunk-000" / "file-000.parquet").slice(0, again.num_rows)
    assert again.num_rows > 150
    for column in ("observation.state", "action", "episode_index"):
        assert again[column].to_pylist() == shipped[column].to_pylist()
