"""Streaming: a dataset behind a URL is the one on the disk, to the bit, however the connection behaves."""

import gc
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from data import page_cache, placeholders, remote, remote_videos
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.page_cache import PAGE, PageCache
from errors import UserError
from helpers.batches import assert_same, batches
from helpers.dataset_edits import edit_json
from helpers.hub_server import Hub, connect
from helpers.paths import SHIPPED
from helpers.range_server import RangeServer
from helpers.runs import small
from helpers.v2_dataset import write_v2
from runs import main
from train import train

CAMERA = "observation.images.corner2"


@pytest.fixture
def serve():
    """A folder -> a server of it."""
    servers = []

    def start(folder) -> RangeServer:
        servers.append(RangeServer(Path(folder)))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def impatient(monkeypatch):
    """Requests are tried again at once, and not for long."""
    monkeypatch.setattr(remote, "WAITS", (0.0,) * 8)


@pytest.fixture
def small_pieces(monkeypatch):
    """Small files are streamed too."""
    monkeypatch.setattr(placeholders, "HEAD", 2048)
    monkeypatch.setattr(placeholders, "MIDDLE", 64)
    monkeypatch.setattr(page_cache, "PAGE", 1024)
    monkeypatch.setattr(remote_videos, "PAGE", 1024)


def streamed_pages(source) -> PageCache:
    return next(iter(source.videos[CAMERA].remote.values())).stream.pages.cache


@pytest.mark.parametrize("name", ["video", "many_files", "two_cameras", "images"])
def test_a_url_gives_the_batches_of_the_folder(made, serve, tmp_path, small_pieces, name):
    server = serve(made(name))
    local = open_source(str(made(name)))
    streamed = open_source(server.url, cache_dir=str(tmp_path))
    assert streamed.problems == []
    assert streamed.warnings == local.warnings
    assert streamed.is_streamed == bool(local.videos)
    assert_same(batches(local), batches(streamed))


@pytest.mark.parametrize("version", ["v2.1", "v2.0"])
def test_older_formats(serve, tmp_path, small_pieces, version):
    folder = write_v2(tmp_path / "old", {0: 9, 1: 12}, version=version, cameras=(CAMERA,), by_episode=version == "v2.1")
    server = serve(folder)
    local = open_source(str(folder))
    streamed = open_source(server.url, cache_dir=str(tmp_path / "cache"))
    assert streamed.warnings == local.warnings == []
    assert_same(batches(local), batches(streamed))


def test_older_files_that_are_not_where_info_json_says(serve, tmp_path, small_pieces):
    folder = write_v2(tmp_path / "old", {0: 9, 1: 12}, cameras=(CAMERA,), chunks_size=1)
    for path in sorted(folder.glob("*/**/chunk-001/**/*")):
        if path.is_file():
            os.replace(path, Path(str(path).replace("chunk-001", "chunk-000")))
    local = open_source(str(folder))
    streamed = open_source(serve(folder).url, cache_dir=str(tmp_path / "cache"))
    assert local.problems == streamed.problems == []
    assert streamed.warnings == local.warnings
    assert_same(batches(local), batches(streamed))


def test_metadata_in_several_files_that_info_json_undercounts(serve, tmp_path, copy_of):
    root = copy_of("many_files")
    (file,) = root.glob("meta/episodes/*/*.parquet")
    table = pq.read_table(file)
    for number in range(table.num_rows):
        pq.write_table(table.slice(number, 1), file.with_name(f"file-{number:03d}.parquet"))
    edit_json(root / "meta" / "info.json", lambda info: info.update(total_episodes=1))
    streamed = open_source(serve(root).url, cache_dir=str(tmp_path / "cache"))
    assert len(streamed.episodes) == table.num_rows
    assert_same(batches(open_source(str(root))), batches(streamed))


@pytest.mark.parametrize(
    "content", [b"", b"not parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"]
)
def test_damaged_metadata_is_a_line(serve, tmp_path, copy_of, content):
    root = copy_of("video")
    (file,) = root.glob("meta/episodes/*/*.parquet")
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"episodes/chunk-000/file-000\.parquet"):
        open_source(serve(root).url, cache_dir=str(tmp_path / "cache"))


def test_a_video_that_changes_during_a_run(copy_of, serve, tmp_path, small_pieces):
    root = copy_of("video")
    server = serve(root)
    source = open_source(server.url, cache_dir=str(tmp_path / "cache"))
    for path in root.glob("videos/**/*.mp4"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"file-000\.mp4 has changed on the server since it was opened\. Start again"):
        batches(source)


def test_a_damaged_piece_is_fetched_again(serve, tmp_path):
    server = serve(SHIPPED)
    rows = torch.arange(0, 4000, 100)
    source = open_source(server.url, cache_dir=str(tmp_path))
    expected = Frames(source).read(CAMERA, rows)
    pages = next(iter(source.videos[CAMERA].remote.values())).stream
    pages.stop()
    for path in tmp_path.glob("*/pages-0/*.data"):
        path.write_bytes(bytes(path.stat().st_size))
    assert torch.equal(Frames(source).read(CAMERA, rows), expected)


def test_a_server_that_never_answers_does_not_keep_the_loader(serve, tmp_path):
    server = serve(SHIPPED)
    source = open_source(server.url, cache_dir=str(tmp_path))
    loader = Loader(source, Frames(source), {}, 16, seed=3).start()
    next(loader)
    server.hangs = True
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    closing.join(timeout=20)
    assert not closing.is_alive()
    server.hangs = False


def test_a_full_or_read_only_cache_is_a_line(serve, mount, tmp_path):
    server = serve(SHIPPED)
    disk = mount("size=600k")
    with pytest.raises(
        UserError, match=r"cannot be written: No space left on device\. Free some space, or pass another --cache_dir"
    ):
        batches(open_source(server.url, cache_dir=str(disk)))
    subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
    expected = batches(open_source(server.url, cache_dir=str(disk)))
    read_only = tmp_path / "read_only"
    read_only.mkdir()
    subprocess.run(["mount", "--bind", disk, read_only], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", read_only], check=True)
        source = open_source(server.url, cache_dir=str(read_only))  # all that it needs is there
        with pytest.raises(UserError, match=r"cannot be written: Read-only file system"):
            batches(source)
        subprocess.run(["mount", "-o", "remount,bind,rw", read_only], check=True)
        assert_same(batches(source), expected)
    finally:
        subprocess.run(["umount", "--lazy", read_only], check=True)


def test_pieces_of_processes_that_have_ended_are_deleted(serve, tmp_path):
    server = serve(SHIPPED)
    first = open_source(server.url, cache_dir=str(tmp_path))
    second = open_source(server.url, cache_dir=str(tmp_path))
    assert_same(batches(first), batches(second))
    for source in (first, second):
        Frames(source).read(CAMERA, torch.tensor([3000]))
    assert len(list(tmp_path.glob("*/pages-*"))) == 2
    for source in (first, second):
        next(iter(source.videos[CAMERA].remote.values())).stream.stop()
    Frames(second).read(CAMERA, torch.tensor([1000]))
    assert len(list(tmp_path.glob("*/pages-*"))) == 1


def test_only_what_is_needed_is_fetched(serve, tmp_path):
    video = next((SHIPPED / "videos").glob("*/*/*.mp4")).stat().st_size
    server = serve(SHIPPED)
    source = open_source(server.url, cache_dir=str(tmp_path))
    tables = sum(
        path.stat().st_size for path in [*SHIPPED.glob("meta/**/*"), *SHIPPED.glob("data/**/*")] if path.is_file()
    )
    assert server.served < tables + 4 * placeholders.HEAD
    assert video > 8 * placeholders.HEAD, "else this test shows nothing"
    before = server.served
    Frames(source).read(CAMERA, torch.tensor([source.rows // 3]))
    assert server.served - before < 8 * PAGE

    before = server.served
    del source
    gc.collect()  # its pieces are now another's to use
    again = open_source(server.url, cache_dir=str(tmp_path))
    assert server.served == before + 1, "what is on the disk is not fetched again; one byte shows that there are ranges"
    Frames(again).read(CAMERA, torch.tensor([again.rows // 3]))
    assert server.served == before + 1, "nor pieces of videos"


def test_what_has_changed_on_the_server_is_fetched_again(copy_of, serve, tmp_path, small_pieces):
    root = copy_of("video")
    other = shutil.copytree(root, tmp_path / "other")
    server = serve(root)
    batches(open_source(server.url, cache_dir=str(tmp_path / "cache")))
    for path in root.glob("videos/**/*.mp4"):  # the same frames, in another file
        content = path.read_bytes() + b"\0\0\0\x08free"
        path.write_bytes(content)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["robot_type"] = "another"
    (root / "meta" / "info.json").write_text(json.dumps(info))
    source = open_source(server.url, cache_dir=str(tmp_path / "cache"))
    assert source.meta.info.robot_type == "another"
    assert_same(batches(source), batches(open_source(str(other))))


@pytest.mark.parametrize("decoder", ["torchcodec", "pyav"])
def test_the_weights_are_the_same_with_a_connection_that_is_cut(serve, tmp_path, impatient, monkeypatch, decoder):
    from data import decode

    if decoder == "pyav":
        monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, None))
    elif decode.load_torchcodec()[0] is None:
        pytest.skip(decode.load_torchcodec()[1])
    server = serve(SHIPPED)
    server.cut = 5
    settings = small(
        cache_dir=str(tmp_path / "cache"), steps=6, save_freq=3, frame_cache="off", episodes="0:9", image_size=[32, 32]
    )
    local = train(**settings, dataset_id=str(SHIPPED), output_dir=str(tmp_path / "local"))
    streamed = train(**settings, dataset_id=server.url, output_dir=str(tmp_path / "streamed"))
    expected = load_file(local.checkpoint / "policy.safetensors")
    assert expected.keys() == load_file(streamed.checkpoint / "policy.safetensors").keys()

    # Resumed from the middle: streamed where it was local, and the other way.
    runs = [streamed]
    for name, data, other in (("a", server.url, "local"), ("b", str(SHIPPED), "streamed")):
        checkpoint = tmp_path / other / "checkpoint-3"
        runs.append(
            train(**settings, dataset_id=data, output_dir=str(tmp_path / name), resume_from_checkpoint=str(checkpoint))
        )
    for run in runs:
        got = load_file(run.checkpoint / "policy.safetensors")
        assert all(torch.equal(value, got[key]) for key, value in expected.items())


def test_a_resume_on_the_other_side_is_no_other_run(serve, tmp_path, capsys):
    server = serve(SHIPPED)
    settings = small(
        cache_dir=str(tmp_path / "cache"), steps=4, save_freq=2, episodes="0:3", quiet=False, image_size=[32, 32]
    )
    train(**settings, dataset_id=str(SHIPPED), output_dir=str(tmp_path / "run"))
    capsys.readouterr()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    train(**settings, dataset_id=server.url, output_dir=str(tmp_path / "again"), resume_from_checkpoint=checkpoint)
    out = capsys.readouterr().out
    assert "another run" not in out
    assert "streaming: frames are decoded as they are needed" in out


def test_a_server_that_goes_away_ends_the_run_with_a_checkpoint(serve, tmp_path, impatient, monkeypatch):
    server = serve(SHIPPED)
    settings = small(
        dataset_id=server.url,
        cache_dir=str(tmp_path / "cache"),
        steps=12,
        save_freq=0,
        episodes="0:9",
        image_size=[32, 32],
    )
    whole = train(**settings, output_dir=str(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "cache")

    monkeypatch.setattr("data.loader.LOOK_AHEAD", 1)
    next_batch = Loader.__next__
    batches_given = []

    def counted(loader):
        batches_given.append(1)
        server.is_down = len(batches_given) > 3
        return next_batch(loader)

    monkeypatch.setattr(Loader, "__next__", counted)
    with pytest.raises(UserError, match=r"no answer for \d+ s .*--resume_from_checkpoint auto"):
        train(**settings, output_dir=str(tmp_path / "run"))
    monkeypatch.undo()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    server.is_down = False
    resumed = train(**settings, output_dir=str(tmp_path / "run"), resume_from_checkpoint="auto")
    expected = load_file(whole.checkpoint / "policy.safetensors")
    got = load_file(resumed.checkpoint / "policy.safetensors")
    assert 3 <= int(checkpoint.name.partition("-")[2]) < 12
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


def test_a_dataset_of_ten_times_the_cache(serve, tmp_path):
    server = serve(SHIPPED)
    video = next((SHIPPED / "videos").glob("*/*/*.mp4")).stat().st_size
    source = open_source(server.url, cache_dir=str(tmp_path), cache_gb=video / 10 / 1e9)
    files = open_source(str(SHIPPED))
    loader = Loader(source, Frames(source), {}, 16, seed=3).start()
    local = Loader(files, Frames(files), {}, 16, seed=3).start()
    for _ in range(source.rows // 16 // 4):
        assert torch.equal(next(loader)[CAMERA], next(local)[CAMERA])
        with streamed_pages(source).lock:  # no other thread writes
            kept = sum(path.stat().st_size for path in tmp_path.glob("*/pages-*/*.data"))
        assert kept <= video / 10
    loader.close()
    local.close()


def test_frame_stores_of_a_stream(serve, tmp_path):
    server = serve(SHIPPED)
    source = open_source(server.url, cache_dir=str(tmp_path), episodes="0:2")
    frames = Frames.open_or_build(source, [48, 48], mode="lossless", cache_dir=tmp_path)
    assert frames.packed[CAMERA].holds(torch.arange(source.rows)).all()
    expected = Frames(open_source(str(SHIPPED), episodes="0:2"), [48, 48])
    rows = torch.arange(source.rows)
    assert torch.equal(frames.read(CAMERA, rows), expected.read(CAMERA, rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda server: None, None),
        (
            lambda server: setattr(server, "folder", server.folder / "nothing"),
            r"no dataset at http://.*: it has no meta/info\.json",
        ),
        (lambda server: setattr(server, "is_down", True), r"info\.json: no answer for \d+ s"),
        (
            lambda server: setattr(server, "status", 403),
            r"no meta/info\.json, or you may not read it\. Check the URL and your login",
        ),
        (lambda server: setattr(server, "status", 503), r"info\.json: no answer for \d+ s \(503, .*start again"),
        (
            lambda server: setattr(server, "serves_ranges", False),
            r"expected \d+ bytes, got \d+: the server does not serve ranges",
        ),
    ],
)
def test_what_is_wrong_is_a_line(serve, tmp_path, impatient, change, message):
    server = serve(SHIPPED)
    change(server)
    if message is None:
        open_source(server.url, cache_dir=str(tmp_path)).require()
        return
    with pytest.raises(UserError, match=message):
        open_source(server.url, cache_dir=str(tmp_path))


def test_flags_that_mean_nothing(tmp_path):
    for options, message in (
        ({"revision": "main"}, "--revision main: it is for datasets of the Hub"),
        ({"dataset_root": "x"}, "--dataset_root x: it is for datasets of the Hub"),
    ):
        with pytest.raises(UserError, match=message):
            open_source("http://localhost:1/x", cache_dir=str(tmp_path), **options)
    for url, message in (
        ("ftp://host/x", r"expected a URL of s3, gs, .*, got ftp://"),
        ("http://", r"expected a URL with a host and a folder"),
        ("http://host/a\0b", r"expected a URL with a host and a folder"),
        ("http://host/x?token=1", r"expected the URL of a folder, got one with a query"),
        ("http://me:secret@host/x", r"dataset host/x: expected a URL without a password"),
    ):
        with pytest.raises(UserError, match=message):
            open_source(url, cache_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"--stream: expected a Hub id written user/name, or a URL, got no/such/folder"):
        open_source("no/such/folder", stream=True, cache_dir=str(tmp_path))


def test_an_upper_case_scheme(serve, tmp_path):
    server = serve(SHIPPED)
    assert len(open_source(server.url.replace("http", "HTTP"), cache_dir=str(tmp_path)).episodes) == 40


def test_errors_of_the_hubs_library_are_tried_again(impatient):
    import httpcore
    import httpx

    folder = remote.RemoteFolder("hf://datasets/a/b@main")
    tries = []

    def request():
        tries.append(1)
        raise httpx.ConnectError("no route") from httpcore.ConnectError("no route")

    with pytest.raises(UserError, match="no answer for"):
        folder.retried("meta/info.json", request)
    assert len(tries) == 9


def test_missing_credentials_are_not_tried_again(impatient):
    class NoCredentialsError(Exception):
        pass

    NoCredentialsError.__module__ = "botocore.exceptions"

    def request():
        raise NoCredentialsError("Unable to locate credentials")

    with pytest.raises(UserError, match=r"Unable to locate credentials\. Check the URL and your login"):
        remote.RemoteFolder("s3://bucket/x").retried("meta/info.json", request)


def test_a_protocol_whose_package_is_missing(tmp_path, monkeypatch):
    import fsspec

    def missing(*args, **options):
        raise ImportError("Install s3fs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"reading s3:// needs s3fs\. Install it with: uv pip install s3fs"):
        open_source("s3://bucket/x", cache_dir=str(tmp_path))


def test_from_s3(bucket, tmp_path, made, small_pieces):
    root = made("many_files")
    source = open_source(bucket.upload(root), cache_dir=str(tmp_path))
    assert source.is_streamed
    assert_same(batches(open_source(str(root))), batches(source))
    with pytest.raises(UserError, match=r"no dataset at s3://arms/none"):
        open_source("s3://arms/none", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    "options", [["-f", "matroska"], ["-movflags", "frag_keyframe+empty_moov"], ["-movflags", "+faststart"]]
)
def test_other_containers(serve, tmp_path, copy_of, small_pieces, options):
    """Where the list of frames is not in one place, the video is downloaded; it may be before or behind the frames."""
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        pytest.skip("needs the command ffmpeg")
    root = copy_of("video")
    for path in root.glob("videos/**/*.mp4"):
        output = path.with_name("other.mp4")
        subprocess.run([ffmpeg, "-loglevel", "error", "-i", path, "-c", "copy", *options, output], check=True)
        os.replace(output, path)
    source = open_source(serve(root).url, cache_dir=str(tmp_path / "cache"))
    assert source.is_streamed == (options[-1] == "+faststart")
    assert_same(batches(source), batches(open_source(str(root))))


def test_list_and_prune(serve, tmp_path, capsys):
    server = serve(SHIPPED)
    batches(open_source(server.url, cache_dir=str(tmp_path)))
    assert main(["cache", "list", "--cache_dir", str(tmp_path)]) == 0
    assert f"pieces of its videos of {server.url}" in capsys.readouterr().out
    assert main(["cache", "prune", "--cache_dir", str(tmp_path)]) == 0
    assert not [path for path in tmp_path.glob("*-stream-*") if path.is_dir()]


# The cache of pages.


def filled(folder, max_bytes, count) -> PageCache:
    cache = PageCache(folder, max_bytes).open()
    for page in range(count):
        cache.put(b"a" * 16, page, content_of(page))
    return cache


def content_of(page: int) -> bytes:
    return np.random.default_rng(page).bytes(PAGE if page % 7 else 1000)


def test_pages_are_kept_up_to_the_bound_and_over_restarts(tmp_path):
    first = filled(tmp_path, 40 * PAGE, 100)
    for cache in (first, PageCache(tmp_path, 40 * PAGE).open()):
        kept = [page for page in range(100) if cache.has(b"a" * 16, page)]
        assert kept == list(range(kept[0], 100)), "the newest"
        assert 30 <= len(kept) <= 40
        assert all(cache.get(b"a" * 16, page) == content_of(page) for page in kept)
        assert cache.get(b"b" * 16, 99) is None
        assert cache.get(b"a" * 16, 0) is None
        assert sum(path.stat().st_size for path in tmp_path.glob("*.data")) <= 40 * PAGE
    smaller = PageCache(tmp_path, 10 * PAGE).open()
    assert sum(path.stat().st_size for path in tmp_path.glob("*.data")) <= 10 * PAGE
    assert smaller.get(b"a" * 16, 99) in (None, content_of(99))


@pytest.mark.parametrize("spoil", ["cut", "cut_index", "zeros", "swapped", "huge"])
def test_damaged_pages_are_not_believed(tmp_path, spoil):
    filled(tmp_path, 1000 * PAGE, 20)
    data = sorted(tmp_path.glob("*.data"))[0]
    index = data.with_suffix(".index")
    if spoil == "cut":
        os.truncate(data, 3 * PAGE + 5)
    if spoil == "cut_index":
        os.truncate(index, 50)
    if spoil == "zeros":
        data.write_bytes(bytes(data.stat().st_size))
    if spoil == "huge":
        content = bytearray(index.read_bytes())
        content[16:20] = b"\xff" * 4  # the number of the first page
        index.write_bytes(content)
    if spoil == "swapped":
        content = data.read_bytes()
        data.write_bytes(content[PAGE:] + content[:PAGE])
    cache = PageCache(tmp_path, 1000 * PAGE).open()
    found = [cache.get(b"a" * 16, page) for page in range(20)]
    assert all(content in (None, content_of(page)) for page, content in enumerate(found))
    assert None in found
    for page in range(20):
        cache.put(b"a" * 16, page, content_of(page))
    assert all(cache.get(b"a" * 16, page) == content_of(page) for page in range(20))


def test_from_the_hub(made, tmp_path, monkeypatch):
    hub = Hub()
    connect(monkeypatch, hub)
    hub.add_dataset("me/cup", made("many_files"))
    source = open_source("me/cup", cache_dir=str(tmp_path), stream=True)
    assert source.is_streamed
    assert_same(batches(open_source(str(made("many_files")))), batches(source))
    assert hub.ranges
