"""Large tables with pictures: read from copies on the disk, with the same values, never stale, never half-written."""

import gc
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import table_copies, tables
from data.frames import Frames
from data.opening import open_source
from data.union import unite
from helpers.recording import record
from helpers.runs import small
from runs import main
from train import train
from training.changes import data_change, describe_data

TOP = "observation.images.top"


@pytest.fixture
def copied(monkeypatch):
    """Copy tables however small they are."""
    monkeypatch.setattr(table_copies, "LARGE", 1)
    monkeypatch.setattr(table_copies, "BATCH", 4000)  # a few rows


def open_copied(root, cache, **options):
    return open_source(str(root), cache_dir=str(cache), copy_tables=True, quiet=True, **options)


def pixels(source) -> torch.Tensor:
    frames = Frames(source)
    read = frames.read(TOP, torch.arange(source.rows))
    frames.close()
    return read


def metadata_of(root):
    """What the copies need of LeRobot's metadata."""
    return SimpleNamespace(root=root, repo_id="test/made", image_keys=["picture"], total_frames=40)


def copies(folder):
    return sorted(folder.glob("*-tables-*/*.arrow"))


def same_columns(source, other) -> bool:
    return all(torch.equal(values, other.columns[key]) for key, values in source.columns.items())


@pytest.mark.parametrize("episodes", [None, "2,0"])
def test_values_are_those_of_the_table(made, tmp_path, monkeypatch, episodes):
    root = made("images")
    held = open_copied(root, tmp_path / "held", episodes=episodes)  # too small to copy
    assert copies(tmp_path / "held") == []
    monkeypatch.setattr(table_copies, "LARGE", 1)
    for _ in range(2):  # copied, and read from the copy
        mapped = open_copied(root, tmp_path, episodes=episodes)
        assert len(copies(tmp_path)) == 1
        assert mapped.warnings == held.warnings
        assert mapped.episodes == held.episodes
        assert same_columns(mapped, held)
        assert torch.equal(pixels(mapped), pixels(held))
        nobody = torch.tensor([], dtype=torch.int64)
        assert data_change(describe_data(held, nobody), describe_data(mapped, nobody)) is None


def test_pictures_take_no_memory(copied, tmp_path):
    table = pa.table({"episode_index": np.zeros(40, np.int64), "picture": [os.urandom(1_000_000) for _ in range(40)]})
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "file.parquet"
    pq.write_table(table, file, row_group_size=10)

    del table
    gc.collect()
    before = pa.total_allocated_bytes()
    mapped = table_copies.open_or_copy(metadata_of(tmp_path), [file], tmp_path / "cache", quiet=True)
    rows = tables.rows_of(mapped.tables[file], [0])
    assert rows.nbytes > 40_000_000
    assert pa.total_allocated_bytes() - before < 4_000_000
    assert rows["picture"][39].as_py() == pq.read_table(file)["picture"][39].as_py()


def test_a_copy_is_made_once_and_again_when_its_file_changes(copied, copy_of, tmp_path):
    root = copy_of("images")
    cache = tmp_path / "cache"
    first = pixels(open_copied(root, cache))
    (copy,) = copies(cache)
    written = copy.stat().st_mtime_ns
    open_copied(root, cache)
    assert copy.stat().st_mtime_ns == written

    (file,) = (root / "data").glob("*/*.parquet")
    table = pq.read_table(file)
    pictures = table[TOP].combine_chunks()
    swapped = pictures.take(pa.array([1, 0, *range(2, len(pictures))]))
    pq.write_table(table.set_column(table.schema.get_field_index(TOP), TOP, swapped), file)
    changed = pixels(open_copied(root, cache))
    assert torch.equal(changed[0], first[1])
    assert not torch.equal(first[0], first[1])
    assert len(copies(cache)) == 1


@pytest.mark.parametrize("lost", ["half", "last_batch", "rest_is_zero"])
def test_a_copy_that_is_not_whole_is_made_again(copied, made, tmp_path, lost):
    expected = pixels(open_copied(made("images"), tmp_path))
    (copy,) = copies(tmp_path)
    whole = copy.read_bytes()
    ends = []
    with pa.OSFile(str(copy)) as file:
        reader = pa.ipc.MessageReader.open_stream(file)
        for _ in reader:
            ends.append(file.tell())
    end = len(whole) // 2 if lost == "half" else ends[-2]
    zeros = bytes(len(whole) - end) if lost == "rest_is_zero" else b""
    copy.write_bytes(whole[:end] + zeros)
    assert torch.equal(pixels(open_copied(made("images"), tmp_path)), expected)
    assert copy.read_bytes() == whole


def test_where_a_file_is_missing_no_others_are_copied(copied, tmp_path):
    root = record(tmp_path / "files", video=False, files_mb=0.001)
    files = sorted((root / "data").glob("*/*.parquet"))
    assert len(files) == 3
    source = open_copied(root, tmp_path / "all")
    assert source.problems == []
    assert len(copies(tmp_path / "all")) == 3
    files[1].unlink()
    source = open_copied(root, tmp_path / "some", episodes="0,1")
    assert any(files[1].name in problem for problem in source.problems)
    assert len(copies(tmp_path / "some")) == 1


def test_a_table_that_cannot_be_read_in_batches_is_read_whole(copied, tmp_path):
    words = pa.array(["a", "b", "a", "b"]).dictionary_encode()
    column = pa.StructArray.from_arrays([pa.array([b"1", b"2", b"3", b"4"]), words], names=["bytes", "path"])
    file = tmp_path / "file.parquet"
    pq.write_table(pa.table({"episode_index": [0, 0, 1, 1], "picture": column}), file, row_group_size=2)

    mapped = table_copies.open_or_copy(metadata_of(tmp_path), [file], tmp_path / "cache", quiet=True)
    assert mapped.reason is None
    found, faults = tables.read_files([file], [1], mapped.tables)
    assert faults == {}
    assert found[file]["picture"].to_pylist() == [{"bytes": b"3", "path": "a"}, {"bytes": b"4", "path": "b"}]


def test_what_a_stopped_copy_leaves_is_pruned(copied, made, tmp_path, monkeypatch):
    def stopped(file, output):
        output.write_bytes(b"some")
        raise KeyboardInterrupt

    monkeypatch.setattr(table_copies, "write_copy", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_copied(made("images"), tmp_path)
    assert main(["cache", "prune", "--cache_dir", str(tmp_path)]) == 0
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


def test_without_room_pictures_stay_in_memory_and_it_says_so(copied, made, tmp_path, mount):
    root = str(made("images"))
    folder = mount("size=8k")
    source = open_copied(root, folder)
    assert torch.equal(pixels(source), pixels(open_source(root)))
    (warning,) = [line for line in source.warnings if "held in memory" in line]
    assert warning == (
        "the pictures in its table are held in memory: 0.0 GB of pictures are more than a quarter of the 0.0 GB that are "
        f"free in {next(folder.iterdir())}. Free some space, or pass another --cache_dir"
    )
    assert copies(folder) == []


def test_a_full_disk_while_copying_leaves_nothing(copied, made, mount, monkeypatch):
    folder = mount("size=12k")
    free = SimpleNamespace(free=10**9)  # when it is looked at
    monkeypatch.setattr(table_copies, "shutil", SimpleNamespace(disk_usage=lambda path: free))
    source = open_copied(made("images"), folder)
    assert [line for line in source.warnings if "No space left on device. Free some space" in line]
    assert [path.name for path in folder.glob("*-tables-*/*")] == ["about.json"]
    assert len(pixels(source)) == source.rows


def test_a_finished_copy_is_used_where_nothing_can_be_written(copied, made, mount):
    folder = mount("size=10m")
    expected = pixels(open_copied(made("images"), folder))
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    source = open_copied(made("images"), folder)
    assert not [line for line in source.warnings if "held in memory" in line]
    assert torch.equal(pixels(source), expected)


def test_a_damaged_table_is_reported_as_before(copied, copy_of, tmp_path):
    root = copy_of("images")
    (file,) = (root / "data").glob("*/*.parquet")
    file.write_bytes(file.read_bytes()[:1000])
    source = open_copied(root, tmp_path / "cache")
    assert any("cannot be read" in problem for problem in source.problems)
    assert copies(tmp_path / "cache") == []


def test_several_datasets(copied, made, tmp_path):
    source = open_copied(made("images"), tmp_path)
    both = unite([source, open_copied(made("images"), tmp_path)])
    assert torch.equal(pixels(both), torch.cat([pixels(source), pixels(source)]))


def test_list_and_prune(copied, made, tmp_path, capsys):
    open_copied(made("images"), tmp_path)
    assert main(["cache", "list", "--cache_dir", str(tmp_path)]) == 0
    assert f"33 frames of PNG/JPEG     used 0.0 days ago: {TOP} of images" in capsys.readouterr().out
    assert main(["cache", "prune", "--cache_dir", str(tmp_path)]) == 0
    assert copies(tmp_path) == []


def test_a_run_resumed_with_its_tables_copied_is_the_same_run(made, tmp_path, monkeypatch, capsys):
    settings = small(dataset_id=str(made("images")), steps=4, save_freq=2, image_size=[48, 48], frame_cache="off")
    settings["cache_dir"] = str(tmp_path / "cache")
    whole = train(**settings, output_dir=str(tmp_path / "whole")).checkpoint
    monkeypatch.setattr(table_copies, "LARGE", 1)
    start = str(tmp_path / "whole" / "checkpoint-2")
    capsys.readouterr()
    resumed = train(**settings, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=start).checkpoint
    assert "another run" not in "".join(capsys.readouterr())
    assert copies(tmp_path / "cache")
    assert (resumed / "policy.safetensors").read_bytes() == (whole / "policy.safetensors").read_bytes()
