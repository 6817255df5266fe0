"""Checkpoint folders on disk: found only when complete, pruned, put back; final model files."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, SHIPPED, small

from checkpoint import MANIFEST, find_checkpoints, make_ready, prune, publish, sha256, verify
from config import UserError
from train import train


def a_checkpoint(output_dir, step, content=b"weights"):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "policy.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps(files))
    return folder


def a_dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_only_complete_folders_are_found_in_order_of_steps(tmp_path):
    for step in (900, 1000, 20):
        a_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-5000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-20", "checkpoint-900", "checkpoint-1000"]


def test_prune_keeps_the_newest_and_the_one_resumed_from(tmp_path):
    folders = [a_checkpoint(tmp_path, step) for step in (1, 2, 3, 4)]
    prune(tmp_path, None, None)
    assert len(find_checkpoints(tmp_path)) == 4
    prune(tmp_path, 2, never=folders[0])
    assert find_checkpoints(tmp_path) == [folders[0], *folders[2:]]
    prune(tmp_path, 2, None)
    assert find_checkpoints(tmp_path) == folders[2:]


def test_leftovers_of_dead_processes_go_and_what_they_replaced_comes_back(tmp_path):
    dead, alive = a_dead_process(), os.getpid()
    (tmp_path / f".checkpoint-3.{dead}.tmp").mkdir()
    (tmp_path / f".checkpoint-4.{alive}.tmp").mkdir()
    a_checkpoint(tmp_path, 5).rename(tmp_path / f".checkpoint-5.{dead}.old")  # killed between two renames
    a_checkpoint(tmp_path, 6, b"old").rename(tmp_path / f".checkpoint-6.{dead}.old")
    a_checkpoint(tmp_path, 6, b"new")
    (tmp_path / f".model.safetensors.{dead}.tmp").write_text("")
    make_ready(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f".checkpoint-4.{alive}.tmp",
        "checkpoint-5",
        "checkpoint-6",
    ]
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


def test_keep_last_while_training(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path), save_freq=1, keep_last=2)
    train(**{**settings, "steps": 4})
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.slow
def test_recorder_makes_the_shipped_demonstrations_again(tmp_path):
    """The first two episodes, to the bit."""
    import pyarrow.parquet as pq

    command = [sys.executable, "examples/record_metaworld.py", "--episodes", "2", "--output", str(tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "no library for rendering" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    again = pq.read_table(tmp_path / "two" / "data" / "chunk-000" / "file-000.parquet")
    shipped = pq.read_table(SHIPPED / "data" / "chunk-000" / "file-000.parquet").slice(0, again.num_rows)
    assert again.num_rows > 150
    for column in ("observation.state", "action", "episode_index"):
        assert again[column].to_pylist() == shipped[column].to_pylist()
