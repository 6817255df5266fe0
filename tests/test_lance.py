"""Datasets in Lance tables: the same batches, weights and resumes as from LeRobot's usual files, to the bit."""

import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from data.decode import load_torchcodec
from data.frames import Frames
from data.opening import open_source
from errors import UserError
from helpers.batches import assert_same, batches
from helpers.dataset_edits import edit_json
from helpers.hub_server import Hub, connect
from helpers.lance_dataset import to_lance
from helpers.paths import SHIPPED
from helpers.runs import small
from train import train

lance = pytest.importorskip("lance", reason="needs pylance")


@pytest.fixture
def shipped(tmp_path):
    return to_lance(SHIPPED, tmp_path / "drawer")


@pytest.mark.parametrize("name", ["video", "many_files", "two_cameras", "images", "no_camera"])
def test_the_batches_of_the_folder(made, tmp_path, name):
    source = open_source(str(to_lance(made(name), tmp_path / "tables")), cache_dir=str(tmp_path / "cache"))
    assert not source.problems
    assert source.warnings == open_source(str(made(name))).warnings
    assert not source.is_streamed
    assert_same(batches(open_source(str(made(name)))), batches(source))
    assert not list(tmp_path.glob("cache/*/pages-*"))  # videos are read where they are


def test_the_converters_tables_and_its_own_readers_values(made, tmp_path):
    convert = pytest.importorskip("lerobot_lancedb.convert", reason="needs lerobot-lancedb")
    torchcodec, reason = load_torchcodec()
    if torchcodec is None:  # without it LeRobot's reader does not start
        pytest.skip(reason)
    from lerobot_lancedb import LanceDBDataset

    out = tmp_path / "tables"
    convert.convert(out, root=made("many_files"))
    source = open_source(str(out), cache_dir=str(tmp_path / "cache"))
    frames = Frames(source)
    peer = LanceDBDataset(root=str(out), return_uint8=True)
    for row in (0, 5, source.rows - 1):
        item = peer[row]
        for key, column in source.columns.items():
            if isinstance(column, torch.Tensor):
                assert torch.equal(item[key].squeeze(), column[row].squeeze()), key
        for key in source.videos:
            assert torch.equal(item[key], frames.read(key, torch.tensor([row]))[0])


def test_the_weights_of_the_folder_and_a_resume_on_the_other_side(shipped, tmp_path, capsys):
    settings = small(
        cache_dir=str(tmp_path / "cache"), steps=4, save_freq=2, episodes="0:3", quiet=False, image_size=[32, 32]
    )
    whole = train(**settings, dataset_id=str(SHIPPED), output_dir=str(tmp_path / "files"))
    expected = load_file(whole.checkpoint / "policy.safetensors")
    for mode in ("off", "on", "lossless"):
        capsys.readouterr()
        result = train(
            **settings,
            dataset_id=str(shipped),
            frame_cache=mode,
            output_dir=str(tmp_path / mode),
            resume_from_checkpoint=str(tmp_path / "files" / "checkpoint-2") if mode == "off" else None,
        )
        got = load_file(result.checkpoint / "policy.safetensors")
        assert all(torch.equal(value, got[key]) for key, value in expected.items()), mode
        assert "another run" not in capsys.readouterr().out


def test_tables_are_copied_once_and_again_when_they_change(made, tmp_path):
    root = to_lance(made("many_files"), tmp_path / "tables")
    cache = tmp_path / "cache"
    source = open_source(str(root), episodes="0", cache_dir=str(cache))
    assert len(source.tables) == 1
    assert len(list(cache.glob("*/data/*/*.parquet"))) == 1  # only those that hold the episodes
    before = source.tables[0].stat()
    source = open_source(str(root), cache_dir=str(cache))
    assert source.tables[0].stat().st_ino == before.st_ino
    assert len(source.tables) > 1

    table = lance.dataset(str(root / "frames.lance"))
    table.update({"next_success": "true"} if "next_success" in table.schema.names else {"task_index": "task_index"})
    source = open_source(str(root), cache_dir=str(cache))
    assert source.tables[0].stat().st_ino != before.st_ino
    assert_same(batches(open_source(str(made("many_files")))), batches(source))

    # Made again, the tables have the same version number.
    other = made("two_cameras")
    shutil.rmtree(root)
    to_lance(other, root)
    assert_same(batches(open_source(str(other))), batches(open_source(str(root), cache_dir=str(cache))))


def spoil_frames(root: Path) -> None:
    (path,) = root.glob("frames.lance/data/*.lance")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_videos(root: Path) -> None:
    for path in root.glob("videos.lance/data/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_versions(root: Path) -> None:
    for path in root.glob("frames.lance/_versions/*.manifest"):
        path.write_bytes(b"x" * 100)


def forget_a_video(root: Path) -> None:
    lance.dataset(str(root / "videos.lance")).delete("file_index = 0")


def null_video(root: Path) -> None:
    table = lance.dataset(str(root / "videos.lance")).to_table(columns=["video_key", "chunk_index", "file_index"])
    nothing = lance.blob_array([None] * table.num_rows)
    lance.write_dataset(
        table.append_column("video_bytes", nothing),
        str(root / "videos.lance"),
        mode="overwrite",
        data_storage_version="2.2",
    )


def same_video_twice(root: Path) -> None:
    table = lance.dataset(str(root / "videos.lance")).to_table(columns=["video_key", "chunk_index", "file_index"])
    row = table.slice(0, 1).append_column("video_bytes", lance.blob_array([b"x"]))
    lance.write_dataset(row, str(root / "videos.lance"), mode="append")


def older_format(root: Path) -> None:
    edit_json(root / "meta" / "info.json", lambda info: info.update(codebase_version="v2.1"))


def two_names_of_one_column(root: Path) -> None:
    edit_json(
        root / "meta" / "info.json",
        lambda info: info["features"].update({"observation_state": info["features"]["action"]}),
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_frames, r"frames\.lance cannot be read: .*Copy or convert the dataset again"),
        (spoil_videos, r"videos\.lance cannot be read: .*Copy or convert the dataset again"),
        (spoil_versions, r"frames\.lance cannot be read: "),
        (lambda root: shutil.rmtree(root / "frames.lance"), r"has no frames\.lance"),
        (lambda root: shutil.rmtree(root / "videos.lance"), r"has no videos\.lance"),
        (null_video, r"videos/.*file-000\.mp4 is missing"),
        (same_video_twice, r"videos\.lance has more than one row of camera .*, chunk 0, file 0\. Delete"),
        (
            lambda root: lance.dataset(str(root / "frames.lance")).delete("true"),
            r"^/[^:]*frames\.lance has no row of episodes 0:3",
        ),
        (forget_a_video, r"videos/.*file-000\.mp4 is missing"),
        (older_format, r"expected codebase_version v3\.0 of a dataset in Lance tables, got 'v2\.1'"),
        (two_names_of_one_column, r"the features observation\.state and observation_state have one column"),
    ],
)
def test_what_is_wrong_is_a_line(made, tmp_path, spoil, message):
    root = to_lance(made("video"), tmp_path / "tables")
    spoil(root)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(root), cache_dir=str(tmp_path / "cache")).require()
    assert ".rs:" not in str(caught.value)


def test_a_cache_without_room(made, mount, tmp_path):
    cache = mount("size=12k")
    with pytest.raises(UserError, match=r"cannot be written: .*Free some space, or pass another --cache_dir"):
        open_source(str(to_lance(made("wide"), tmp_path / "tables")), cache_dir=str(cache))


def test_without_its_library(shipped, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    with pytest.raises(UserError, match=r"needs pylance. Install it with: uv pip install pylance"):
        open_source(str(shipped), cache_dir=str(tmp_path / "cache"))


def test_metadata_in_its_table(made, tmp_path):
    root = to_lance(made("video"), tmp_path / "tables")
    shutil.rmtree(root / "meta")
    source = open_source(str(root), cache_dir=str(tmp_path / "cache"))
    assert_same(batches(open_source(str(made("video")))), batches(source))


def test_metadata_is_never_older_than_the_dataset(made, copy_of, tmp_path):
    root = to_lance(made("video"), tmp_path / "tables")
    cache = str(tmp_path / "cache")
    open_source(str(root), cache_dir=cache)
    edit_json(
        root / "meta" / "stats.json", lambda stats: stats["action"].update(std=[99.0] * len(stats["action"]["std"]))
    )
    assert open_source(str(root), cache_dir=cache).meta.stats["action"]["std"][0] == 99
    (root / "meta" / "stats.json").unlink()
    computed = open_source(str(root), cache_dir=cache).meta.stats["action"]["std"][0]
    assert computed < 50

    # Without the folder, as its table says.
    shutil.rmtree(root)
    shutil.rmtree(to_lance(made("video"), root) / "meta")
    assert len(open_source(str(root), cache_dir=cache).episodes) == 3
    shutil.rmtree(root)
    other = copy_of("video")
    edit_json(
        other / "meta" / "stats.json", lambda stats: stats["action"].update(std=[77.0] * len(stats["action"]["std"]))
    )
    shutil.rmtree(to_lance(other, root) / "meta")
    assert open_source(str(root), cache_dir=cache).meta.stats["action"]["std"][0] == 77


def test_a_dataset_from_before_the_field(made, tmp_path):
    root = to_lance(made("video"), tmp_path / "tables")
    edit_json(root / "meta" / "info.json", lambda info: info.pop("storage_format"))
    assert not open_source(str(root), cache_dir=str(tmp_path / "cache")).problems


def test_a_cache_that_became_read_only(made, mount, tmp_path):
    root = to_lance(made("video"), tmp_path / "tables")
    cache = mount("size=20m")
    open_source(str(root), cache_dir=str(cache))
    subprocess.run(["mount", "-o", "remount,ro", cache], check=True)
    assert not open_source(str(root), cache_dir=str(cache)).problems


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside"])
def test_a_metadata_file_outside_of_its_folder(made, tmp_path, name):
    root = to_lance(made("video"), tmp_path / "tables")
    shutil.rmtree(root / "meta")
    lance.write_dataset(
        pa.table({"path": [name, "info.json"], "data": pa.array([b"x", b"{}"], pa.large_binary())}),
        str(root / "meta.lance"),
        mode="overwrite",
    )
    with pytest.raises(UserError, match="outside of meta"):
        open_source(str(root), cache_dir=str(tmp_path / "cache"))
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("has_meta", [True, False])
def test_from_s3(bucket, made, tmp_path, has_meta):
    root = to_lance(made("many_files"), tmp_path / "tables")
    if not has_meta:
        shutil.rmtree(root / "meta")
    source = open_source(bucket.upload(root), cache_dir=str(tmp_path / "cache"))
    assert_same(batches(open_source(str(made("many_files")))), batches(source))


@pytest.mark.parametrize("is_lance", [True, False])
def test_the_weights_over_a_connection_that_is_cut(bucket, tmp_path, is_lance):
    root = SHIPPED
    if is_lance:
        root = to_lance(SHIPPED, tmp_path / "drawer")
    url = bucket.upload(root, bytes_between_cuts=300_000)
    settings = small(cache_dir=str(tmp_path / "cache"), steps=4, save_freq=2, episodes="0:3", image_size=[32, 32])
    whole = train(**settings, dataset_id=str(SHIPPED), output_dir=str(tmp_path / "files"))
    first = train(**settings, dataset_id=url, output_dir=str(tmp_path / "streamed"))
    resumed = train(
        **settings,
        dataset_id=url,
        output_dir=str(tmp_path / "streamed"),
        resume_from_checkpoint=str(tmp_path / "streamed" / "checkpoint-2"),
    )
    expected = load_file(whole.checkpoint / "policy.safetensors")
    for result in (first, resumed):
        got = load_file(result.checkpoint / "policy.safetensors")
        assert all(torch.equal(value, got[key]) for key, value in expected.items())
    assert list(tmp_path.glob("cache/*/pages-*"))
    assert bucket.proxy.cuts


def test_over_http(shipped):
    from helpers.range_server import RangeServer

    server = RangeServer(shipped)
    try:
        with pytest.raises(UserError, match=r"a Lance dataset cannot be read over http://\. Download it, or use s3://"):
            open_source(server.url)
    finally:
        server.close()


@pytest.mark.parametrize("is_streamed", [False, True])
def test_from_the_hub(made, tmp_path, monkeypatch, is_streamed):
    hub = Hub()
    connect(monkeypatch, hub)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)  # for Lance's own library
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HUB_CACHE", tmp_path / "hub")
    monkeypatch.setattr("lerobot.utils.constants.HF_LEROBOT_HOME", tmp_path / "home")
    hub.add_dataset("me/tables", to_lance(made("many_files"), tmp_path / "tables"))
    source = open_source("me/tables", cache_dir=str(tmp_path / "cache"), stream=is_streamed)
    assert source.is_streamed == is_streamed
    assert_same(batches(open_source(str(made("many_files")))), batches(source))
