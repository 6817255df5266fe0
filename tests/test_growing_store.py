"""A raw store that fills while it is read: the pixels are those of decoding, each frame is decoded once, and a crash loses no row
that was written nor believes one that was not."""

import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data import decode, growing_store
from data import frames as frames_module
from data.decode import CHUNK, Decoder
from data.frame_times import FrameTimes
from data.frames import Frames
from data.growing_store import GrowingStore, whole_groups
from data.opening import open_source
from errors import UserError
from helpers.paths import ROOT, SHIPPED
from helpers.runs import small
from train import train

TOP = "observation.images.top"
CAMERA = "observation.images.corner2"


def grow(source, cache_dir, size=None, **options) -> Frames:
    return Frames.open_or_build(source, size, mode="on", cache_dir=cache_dir, grow=True, **options)


@pytest.fixture
def decoded(monkeypatch):
    """The rows that were decoded so far."""
    rows = []
    read = Decoder.read

    def counted(self, key, some):
        rows.extend(some.tolist())
        return read(self, key, some)

    monkeypatch.setattr(Decoder, "read", counted)
    return rows


@pytest.fixture
def direct(monkeypatch):
    """Small frames are written past the page cache too, if their size allows that."""
    monkeypatch.setattr(growing_store, "LEAST_DIRECT", 0)


@pytest.mark.parametrize("name", ["video", "many_files", "two_cameras", "images"])
@pytest.mark.parametrize("size", [None, [32, 128], [30, 40]])  # 32x128 bypasses the page cache
def test_pixels_are_those_of_decoding(made, tmp_path, direct, name, size):
    source = open_source(str(made(name)))
    expected = Frames(source, size)
    growing = grow(source, tmp_path, size, num_threads=2)
    order = torch.randperm(source.rows, generator=torch.Generator().manual_seed(0))
    for rows in (*order.split(5), torch.tensor([3, 3, 0])):
        for key in expected.keys:
            assert torch.equal(growing.read(key, rows), expected.read(key, rows))
    growing.close()
    finished = grow(source, tmp_path, size)
    assert set(finished.stored) == set(expected.keys)
    assert finished.growing == {}
    for key in expected.keys:
        assert torch.equal(finished.stored[key], expected.read(key, torch.arange(source.rows)))


def test_each_frame_is_decoded_once_with_those_around_it(tmp_path, decoded):
    source = open_source(str(SHIPPED), episodes="0:3")
    frames = grow(source, tmp_path, [32, 32])
    frames.read(CAMERA, torch.tensor([source.rows // 2]))
    assert source.rows // 2 in decoded
    assert len(decoded) <= CHUNK
    for rows in torch.randperm(source.rows).split(16):
        frames.read(CAMERA, rows)
    assert sorted(decoded) == list(range(source.rows))
    frames.close()


def test_far_key_frames_make_larger_pieces():
    times = FrameTimes(np.arange(100) * 2, np.array([0, 80, 84]), np.array([0, 80, 84]), Fraction(1, 20), 8, 8)
    assert whole_groups(times, 16, 32) == (0, 40), "from key frame 0 to key frame 40"
    assert whole_groups(times, 32, 48) == (32, 48), "there is a key frame inside"
    assert whole_groups(times, 48, 64) == (42, 100)
    assert whole_groups(times, 96, 112) == (42, 100)


def test_another_run_continues(tmp_path, decoded, direct):
    source = open_source(str(SHIPPED), episodes="0:2")
    first = grow(source, tmp_path, [32, 32])
    some = torch.arange(0, source.rows // 2, 7)
    first.read(CAMERA, some)
    before = set(decoded)
    first.close()
    decoded.clear()
    second = grow(source, tmp_path, [32, 32])
    expected = Frames(source, [32, 32]).read(CAMERA, torch.arange(source.rows))
    decoded.clear()
    assert torch.equal(second.read(CAMERA, some), expected[some])
    assert decoded == []
    assert torch.equal(second.read(CAMERA, torch.arange(source.rows)), expected)
    assert not before & set(decoded)
    second.close()
    assert [path.name for path in next(tmp_path.glob("[!.]*-corner2-*")).iterdir() if path.suffix == ".u64"] == []


@pytest.mark.parametrize("lost", ["some", "all", "rows", "odd"])
def test_what_a_power_cut_lost_is_decoded_again(tmp_path, lost):
    source = open_source(str(SHIPPED), episodes="0:2")
    first = grow(source, tmp_path, [32, 32])
    first.read(CAMERA, torch.arange(0, source.rows // 2, 5))
    first.close()
    (build,) = (path for path in tmp_path.glob(".*-corner2-*") if path.is_dir())
    if lost == "some":
        with open(build / "frames.u8", "r+b") as file:
            file.seek(3 * 32 * 32 * 3)
            file.write(bytes(20 * 32 * 32 * 3))
    if lost == "all":
        os.truncate(build / "frames.u8", 1000)
    if lost == "rows":
        os.truncate(build / "rows.u64", 8)
    if lost == "odd":
        (build / "rows.u64").write_bytes(os.urandom(8 * source.rows))
    second = grow(source, tmp_path, [32, 32])
    rows = torch.arange(source.rows)
    assert torch.equal(second.read(CAMERA, rows), Frames(source, [32, 32]).read(CAMERA, rows))
    second.close()


def test_a_disk_that_fills_ends_the_keeping_and_not_the_run(made, mount, capfd):
    disk = mount("size=200k")
    source = open_source(str(made("video")))
    frames = Frames.open_or_build(source, mode="off", cache_dir=disk)
    expected = frames.read(TOP, torch.arange(source.rows))
    from data import frames as module

    with pytest.MonkeyPatch.context() as patch:  # there was room when the run looked
        patch.setattr(module, "room_for", lambda *args: module.Room(0, 0, ""))
        growing = grow(source, disk)
    for rows in torch.arange(source.rows).split(4):
        assert torch.equal(growing.read(TOP, rows), expected[rows])
    assert torch.equal(growing.read(TOP, torch.arange(source.rows)), expected)
    growing.close()
    assert capfd.readouterr().err.count("cannot be kept in") == 1


def test_a_row_that_another_thread_has_just_written(made, tmp_path, monkeypatch):
    source = open_source(str(made("video")))
    frames = grow(source, tmp_path)
    expected = Frames(source).read(TOP, torch.arange(source.rows))
    request = GrowingStore.request

    def late(store, rows, use, pool):
        for done in request(store, rows, lambda row, pixels: None, pool):
            done.result()
        return request(store, rows, use, pool)

    monkeypatch.setattr(GrowingStore, "request", late)
    rows = torch.tensor([20, 3])
    out = torch.full((2, *frames.shape(TOP)), 7, dtype=torch.uint8)
    assert torch.equal(frames.read(TOP, rows, out), expected[rows])
    frames.close()


@pytest.mark.parametrize("slow", ["decode", "write"])
def test_two_batches_that_need_the_same_frames_decode_them_once(made, tmp_path, monkeypatch, decoded, direct, slow):
    source = open_source(str(made("video")))
    rows = torch.tensor([20, 3])
    expected = Frames(source).read(TOP, torch.arange(source.rows))
    decoded.clear()
    frames = grow(source, tmp_path, [32, 128] if slow == "write" else None, num_threads=2)
    if slow == "write":
        expected = decode.resize(expected, [32, 128])
    asked = threading.Semaphore(0)  # by the second batch
    request = GrowingStore.request
    slow_part = {"decode": (decode.Decoder, "read"), "write": (GrowingStore, "_write_runs")}[slow]
    original = getattr(*slow_part)

    def wait_for_both(*args):
        assert asked.acquire(timeout=60)
        asked.release()
        return original(*args)

    def counted(store, rows, use, pool):
        waits = request(store, rows, use, pool)
        if threading.current_thread() is not first:
            asked.release()
        return waits

    monkeypatch.setattr(*slow_part, wait_for_both)
    monkeypatch.setattr(GrowingStore, "request", counted)
    results = {}
    first = threading.Thread(target=lambda: results.update(first=frames.read(TOP, rows)))
    first.start()
    if slow == "write":
        first.join()
    else:
        while not frames.growing[TOP].pending:
            time.sleep(0.001)
    results["second"] = frames.read(TOP, rows)
    first.join()
    frames.close()
    assert torch.equal(results["first"], expected[rows])
    assert torch.equal(results["second"], expected[rows])
    assert sorted(decoded) == sorted(set(decoded))


def test_a_frame_that_does_not_decode_is_asked_for_again(made, tmp_path, monkeypatch):
    source = open_source(str(made("video")))
    frames = grow(source, tmp_path)

    def fail(*args):
        raise UserError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(Decoder, "read", fail)
        with pytest.raises(UserError, match="broken"):
            frames.read(TOP, torch.tensor([3]))
    assert not frames.growing[TOP].pending
    assert torch.equal(frames.read(TOP, torch.tensor([3])), Frames(source).read(TOP, torch.tensor([3])))
    frames.close()


@pytest.mark.parametrize("part", ["contiguous_pictures", "copy_picture", "submit"])
def test_a_job_that_fails_late_leaves_nothing_behind(made, tmp_path, monkeypatch, direct, part):
    source = open_source(str(made("video")))
    frames = grow(source, tmp_path, [32, 128])
    store = frames.growing[TOP]
    buffers = store.buffers.qsize()
    place = {"contiguous_pictures": growing_store, "copy_picture": frames_module, "submit": frames.pool}[part]

    def fail(*args):
        raise RuntimeError("late")

    with monkeypatch.context() as broken:
        broken.setattr(place, part, fail)
        for _ in range(1 + buffers):
            with pytest.raises(RuntimeError, match="late"):
                frames.read(TOP, torch.tensor([3]))
    assert not store.pending
    assert store.buffers.qsize() == buffers
    expected = Frames(source, [32, 128]).read(TOP, torch.tensor([3]))
    assert torch.equal(frames.read(TOP, torch.tensor([3])), expected)
    frames.close()


def test_two_runs_and_several_threads_at_once(made, tmp_path, direct):
    source = open_source(str(made("two_cameras")))
    expected = Frames(source)
    runs = [grow(source, tmp_path, num_threads=2) for _ in range(2)]
    wrong = []

    def read(frames, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            rows = torch.randint(source.rows, (6,), generator=generator)
            for key in source.videos:
                if not torch.equal(frames.read(key, rows), expected.read(key, rows)):
                    wrong.append(rows)

    threads = [threading.Thread(target=read, args=(frames, seed)) for seed in range(2) for frames in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for frames in runs:
        frames.close()
    assert wrong == []
    assert set(grow(source, tmp_path).stored) == set(source.videos)


def test_files_made_after_another_process_has_finished_are_deleted(made, tmp_path):
    source = open_source(str(made("video")))
    first = grow(source, tmp_path)
    store = first.growing[TOP].store
    first.read(TOP, torch.arange(source.rows))
    first.close()
    assert store.is_finished
    late = GrowingStore(store).start()
    assert store.build_folder.is_dir()
    late.close()
    assert not store.build_folder.exists()
    assert TOP in grow(source, tmp_path).stored


FILL = """
import sys, torch
from data.frame_times import FrameTimes
from data.frames import Frames
from data.growing_store import GrowingStore, whole_groups
from data.opening import open_source
source = open_source(sys.argv[1], quiet=True)
frames = Frames.open_or_build(source, [32, 128], mode="on", cache_dir=sys.argv[2], grow=True)
for rows in torch.randperm(source.rows).split(4):
    frames.read(sys.argv[3], rows)
    print("read", flush=True)
"""


@pytest.mark.slow
def test_killed_while_it_fills(tmp_path):
    source = open_source(str(SHIPPED))
    expected = Frames(source, [32, 128]).read(CAMERA, torch.arange(source.rows))
    for after in (1, 10, 30):
        command = [sys.executable, "-c", FILL, str(SHIPPED), str(tmp_path), CAMERA]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")}
        )
        for _ in range(after):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.wait()
        frames = grow(source, tmp_path, [32, 128])
        assert frames.growing, "not finished"
        assert frames.growing[CAMERA].holds(torch.arange(source.rows)).any()
        rows = torch.arange(0, source.rows, 3)
        assert torch.equal(frames.read(CAMERA, rows), expected[rows])
        frames.growing[CAMERA].is_full = True  # leave it as it is
        frames.close()


def test_weights_and_a_resume_are_the_same_while_the_store_fills(tmp_path, direct):
    settings = small(dataset_id=str(SHIPPED), episodes="0:4", image_size=[32, 128], steps=6, save_freq=3)
    expected = train(**settings, frame_cache="off", output_dir=str(tmp_path / "off")).checkpoint
    settings |= {"frame_cache": "on", "cache_dir": str(tmp_path / "cache")}
    filling = train(**settings, output_dir=str(tmp_path / "filling"))
    assert list((tmp_path / "cache").glob(".*-corner2-*/rows.u64")), "still filling"
    resumed = train(**settings, output_dir=str(tmp_path / "resumed"),
                    resume_from_checkpoint=str(tmp_path / "off" / "checkpoint-3"))  # fmt: skip
    first = load_file(expected / "policy.safetensors")
    for run in (filling, resumed):
        other = load_file(run.checkpoint / "policy.safetensors")
        assert all(torch.equal(value, other[key]) for key, value in first.items())


def test_without_direct_writes(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    source = open_source(str(SHIPPED), episodes="0:1")
    frames = grow(source, tmp_path, [32, 128])
    rows = torch.arange(source.rows)
    assert torch.equal(frames.read(CAMERA, rows), Frames(source, [32, 128]).read(CAMERA, rows))
    assert frames.growing[CAMERA].direct is None
    frames.close()


def test_both_decoders_fill_the_same_store_where_their_pixels_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, None))
    source = open_source(str(SHIPPED), episodes="0:1")
    frames = grow(source, tmp_path, [32, 32])
    rows = torch.arange(source.rows)
    assert torch.equal(frames.read(CAMERA, rows), Frames(source, [32, 32]).read(CAMERA, rows))
    frames.close()
