"""The frame store: decoded once, never half-built, never stale."""

import gc
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import decode, read_ahead
from data import frames as module
from data.frame_store import FrameStore, store_name
from data.frames import Frames, Room
from data.opening import open_source
from data.pixels import contiguous_pictures, copy_picture
from errors import UserError
from helpers.dataset_edits import edit_json
from helpers.paths import ROOT, SHIPPED
from helpers.runs import small
from runs import main
from train import train

TOP = "observation.images.top"


def all_frames(store: Frames, key=TOP):
    return store.read(key, torch.arange(store.source.rows))


def open_or_build(source, cache_dir, mode="on", size=None, **options) -> Frames:
    return Frames.open_or_build(source, size, mode=mode, cache_dir=cache_dir, **options)


def stores(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize("name", ["many_files", "images"])
@pytest.mark.parametrize("size", [None, [30, 40]])
def test_store_holds_what_decoding_on_the_fly_gives(made, tmp_path, name, size):
    source = open_source(str(made(name)))
    first, second = [], []
    fly = Frames(source, size)
    built = open_or_build(source, tmp_path, size=size, num_threads=2, say=first.append)
    opened = open_or_build(source, tmp_path, size=size, say=second.append)
    assert fly.stored == {}
    assert all_frames(fly).shape[1:] == (3, *(size or (64, 96)))
    assert torch.equal(all_frames(fly), all_frames(built))
    assert torch.equal(all_frames(fly), all_frames(opened))
    assert [line for line in first if line.startswith("frame cache: 0.0 GB of decoded frames in")]
    assert second == []


def test_resized_as_the_saved_pipeline_does_to_a_rounding(made):
    from lerobot.processor import ImageCropResizeProcessorStep

    source = open_source(str(made("video")))
    full = all_frames(Frames(source)) / 255.0
    step = ImageCropResizeProcessorStep(resize_size=(30, 40))
    theirs = step.observation({TOP: full})[TOP]
    ours = all_frames(Frames(source, [30, 40])) / 255.0
    assert (ours - theirs).abs().max() <= 0.5001 / 255


def test_some_episodes_and_several_rows_in_any_order(made, tmp_path):
    source = open_source(str(made("two_cameras")), episodes="0,2")
    fly = Frames(source)
    built = open_or_build(source, tmp_path)
    rows = torch.tensor([23, 0, 12, 13, 13, 5])
    for key in source.videos:
        assert torch.equal(fly.read(key, rows), built.read(key, rows))


@pytest.mark.parametrize("change", ["time", "size", "image_size", "episodes"])
def test_what_changes_the_content_makes_another_store(copy_of, tmp_path, change):
    root = copy_of("video")
    video = next((root / "videos").glob("*/*/*.mp4"))
    open_or_build(open_source(str(root)), tmp_path / "cache")
    size, episodes = None, None
    if change == "time":
        os.utime(video, ns=(0, video.stat().st_mtime_ns + 1))
    if change == "size":
        when = video.stat().st_mtime_ns
        video.write_bytes(video.read_bytes() + b"\0\0\0\x08free")  # an empty atom
        os.utime(video, ns=(when, when))
    if change == "image_size":
        size = [32, 48]
    if change == "episodes":
        episodes = "1"
    open_or_build(open_source(str(root), episodes=episodes), tmp_path / "cache", size=size)
    assert len(stores(tmp_path / "cache")) == 2
    open_or_build(open_source(str(root), episodes=episodes), tmp_path / "cache", size=size)
    assert len(stores(tmp_path / "cache")) == 2


def test_auto_falls_back_with_one_line_and_on_refuses(made, tmp_path, monkeypatch):
    source = open_source(str(made("video")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    said = []
    auto = open_or_build(source, tmp_path, "auto", say=said.append)
    assert auto.stored == {}
    (line,) = (line for line in said if line.startswith("frame cache off, no room for 0.0 GB of decoded frames in"))
    assert "--frame_cache on" not in line
    assert torch.equal(all_frames(auto), all_frames(Frames(source)))
    with pytest.raises(
        UserError,
        match=r"--frame_cache on: no room for .*\. Pass --frame_cache off, --image_size or another --cache_dir",
    ):
        open_or_build(source, tmp_path)


def test_auto_keeps_room_that_on_takes(made, tmp_path, monkeypatch):
    source = open_source(str(made("video")))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=usage.total // 10))
    said = []
    assert open_or_build(source, tmp_path, "auto", say=said.append).stored == {}
    assert [line for line in said if "GB free, --frame_cache on does not): frames are decoded" in line]
    assert open_or_build(source, tmp_path).stored


BUILD = """
import sys, time
from data import frames
from data.opening import open_source
decode = frames.Decoder.read
def slow(self, key, rows):
    time.sleep(float(sys.argv[3]))
    return decode(self, key, rows)
frames.Decoder.read = slow
frames.Frames.open_or_build(open_source(sys.argv[1]), mode="on", cache_dir=sys.argv[2])
print("built")
"""


def start_building(root, cache, pause="0.3"):
    command = [sys.executable, "-c", BUILD, str(root), str(cache), pause]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process=None, seconds=60):
    for _ in range(seconds * 20):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("nothing happened")


@pytest.mark.slow
def test_killed_while_building_goes_on_where_it_stopped(made, tmp_path, monkeypatch):
    process = start_building(made("video"), tmp_path)
    wait_for(lambda: [path for path in tmp_path.glob(".*/journal.txt") if path.read_text().count("\n") >= 1], process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert stores(tmp_path)[0].startswith("."), "no finished store after a kill"
    done = len(next(tmp_path.glob(".*/journal.txt")).read_text().splitlines())
    decoded = []
    decode_episode = FrameStore._decode_episode

    def counted(store, episode, bar):
        decoded.append(episode)
        return decode_episode(store, episode, bar)

    monkeypatch.setattr(FrameStore, "_decode_episode", counted)
    source = open_source(str(made("video")))
    built = open_or_build(source, tmp_path)
    assert len(decoded) == 3 - done
    assert torch.equal(all_frames(built), all_frames(Frames(source)))
    assert len(stores(tmp_path)) == 1


@pytest.mark.slow
def test_two_builders_at_once_decode_once(made, tmp_path):
    first = start_building(made("video"), tmp_path, pause="4")
    wait_for(lambda: list(tmp_path.glob(".*/journal.txt")), first)
    first.send_signal(signal.SIGSTOP)  # with the lock, however long the second one takes to start
    second = start_building(made("video"), tmp_path)
    line = second.stderr.readline()
    first.send_signal(signal.SIGCONT)
    outs = [process.communicate(timeout=120) for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    assert line.strip() == f"another process is decoding {TOP} into {tmp_path}: waiting for it"
    assert outs[0][1] == ""
    assert len(stores(tmp_path)) == 1


def test_full_disk_while_building(made, mount, monkeypatch):
    small_disk = mount("size=300k")
    monkeypatch.setattr(
        module, "room_for", lambda *args: Room(0, 0, "")
    )  # it was free when looked at, and is not when written
    with pytest.raises(UserError) as caught:
        open_or_build(open_source(str(made("video"))), small_disk)
    assert str(caught.value) == (
        f"the frames of {TOP} cannot be written to {small_disk}: No space left on device. Nothing is left behind. "
        "Free some space, or pass --frame_cache off"
    )
    assert stores(small_disk) == []


def test_a_cache_folder_that_cannot_be_written(made, mount, monkeypatch):
    folder = mount("ro,size=10m")
    said = []
    monkeypatch.setattr(module, "SPARE", 0)
    source = open_source(str(made("video")))
    auto = open_or_build(source, folder, "auto", say=said.append)
    assert auto.stored == {}
    assert [line for line in said if line.startswith("frame cache")] == [  # another line names the decoder
        f"frame cache off, no room for decoded frames in {folder} (Read-only file system): "
        "frames are decoded as they are needed (--cache_dir, --image_size)"
    ]
    with pytest.raises(UserError, match=r"--frame_cache on: no room for .* \(Read-only file system\)"):
        open_or_build(source, folder)
    monkeypatch.setattr(module, "room_for", lambda *args: Room(0, 0, ""))
    with pytest.raises(UserError, match=r"cannot be written to .*: Read-only file system"):
        open_or_build(source, folder)


def test_a_finished_store_is_used_where_nothing_can_be_written(made, mount):
    folder, source = mount("size=10m"), open_source(str(made("video")))
    open_or_build(source, folder)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    assert torch.equal(all_frames(open_or_build(source, folder, "auto")), all_frames(Frames(source)))
    assert TOP in open_or_build(source, folder).stored


@pytest.fixture
def unfinished(made, tmp_path, monkeypatch):
    """(source, cache folder) of a store whose building was stopped before its last episode."""
    source = open_source(str(made("images")))
    decode_episode = FrameStore._decode_episode

    def stopped(store, episode, bar):
        if episode == 2:
            raise KeyboardInterrupt
        return decode_episode(store, episode, bar)

    monkeypatch.setattr(FrameStore, "_decode_episode", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_or_build(source, tmp_path / "cache")
    monkeypatch.undo()
    return source, tmp_path / "cache"


def test_what_is_written_already_needs_no_room(unfinished, monkeypatch):
    source, folder = unfinished
    written = next(folder.glob("*/frames.u8")).stat().st_blocks * 512
    needed = source.rows * 3 * 64 * 96 - written
    assert written > source.rows * 3 * 64 * 96 / 2
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(UserError, match="no room for"):
        open_or_build(source, folder)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert torch.equal(all_frames(open_or_build(source, folder)), all_frames(Frames(source)))


def test_video_cut_short_after_it_was_checked(copy_of, tmp_path):
    root = copy_of("video")
    source = open_source(str(root))
    video = next((root / "videos").glob("*/*/*.mp4"))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(
        UserError, match=r"file-000\.mp4: frames \d+ to \d+, from episode \d frame \d+ on, cannot be decoded"
    ):
        open_or_build(source, tmp_path / "cache")
    assert all(name.startswith(".") for name in stores(tmp_path / "cache"))


@pytest.mark.parametrize("shape", [[96, 64, 3], [128, 192, 3], [64, 48, 3]])
@pytest.mark.parametrize("mode", ["on", "off"])
def test_pictures_of_another_size_than_info_says(copy_of, tmp_path, shape, mode):
    root = copy_of("images")
    edit_json(root / "meta" / "info.json", lambda info: info["features"][TOP].update(shape=shape))
    says = "x".join(map(str, shape))
    message = (
        rf"{TOP}: the picture of row \d+ does not have the size in info\.json: expected {says}, got 64x96x3 as RGB"
    )
    with pytest.raises(UserError, match=message):
        all_frames(open_or_build(open_source(str(root)), tmp_path / "cache", mode))


def test_cache_modes_train_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    weights = []
    for mode in ("off", "on", "device"):
        settings = small(
            dataset_id=str(SHIPPED),
            episodes="0:2",
            image_size=[48, 48],
            frame_cache=mode,
            cache_dir=str(tmp_path / "cache"),
        )
        weights.append(load_file(train(**settings, output_dir=str(tmp_path / mode)).checkpoint / "policy.safetensors"))
    assert all(torch.equal(value, other[key]) for other in weights[1:] for key, value in weights[0].items())


def test_a_cache_folder_that_cannot_be_made(made, tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    source = open_source(str(made("video")))
    assert open_or_build(source, tmp_path / "file" / "cache", "auto", say=said.append).stored == {}
    assert "no room for decoded frames in" in said[-1]
    with pytest.raises(UserError, match="Not a directory"):
        open_or_build(source, tmp_path / "file" / "cache")


def test_a_store_of_another_size_than_it_should_have_is_not_read(made, tmp_path):
    source = open_source(str(made("video")))
    open_or_build(source, tmp_path)
    with open(next(tmp_path.glob("*/frames.u8")), "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"frames\.u8 is damaged: expected 608256 bytes, got 1000\. Delete "):
        open_or_build(source, tmp_path)


def test_list_and_prune(made, tmp_path, capsys):
    source = open_source(str(made("two_cameras")))
    open_or_build(source, tmp_path)
    shown = subprocess.run([sys.executable, "-m", "data.frames", "list", "--cache_dir", str(tmp_path)], cwd=ROOT / "src",
                           capture_output=True, text=True, check=True).stdout  # fmt: skip
    assert shown.count("33 frames of 3x64x96") == 2
    assert f"observation.images.wrist of {made('two_cameras')}" in shown
    assert main(["cache", "prune", "--cache_dir", str(tmp_path), "--days", "1"]) == 0
    assert len(stores(tmp_path)) == 2
    capsys.readouterr()
    assert main(["cache", "prune", "--cache_dir", str(tmp_path)]) == 0
    assert "0.00 GB freed" in capsys.readouterr().out
    assert stores(tmp_path) == []


def test_list_and_prune_an_unfinished_store(unfinished, capsys):
    source, folder = unfinished
    open_or_build(source, folder, size=[30, 40])
    for command in ("list", "prune"):
        assert main(["cache", command, "--cache_dir", str(folder)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split(": ")[0].split()[-1] for line in lines[:-1]] == ["unfinished", "ago"]
    assert stores(folder) == []
    assert main(["cache", "list", "--cache_dir", str(folder)]) == 0
    assert capsys.readouterr().out == f"    0.00 GB in {folder}\n"


def test_list_and_prune_what_is_left_of_a_store_and_nothing_else(tmp_path, capsys):
    left, other = tmp_path / f"cup-top-{'0' * 16}", tmp_path / "pictures"
    for folder in (left, other):
        folder.mkdir()
        (folder / "frames.u8").write_bytes(bytes(9000))
    assert main(["cache", "list", "--cache_dir", str(tmp_path)]) == 0
    assert f"of {left.name}, interrupted" in capsys.readouterr().out
    assert main(["cache", "prune", "--cache_dir", str(tmp_path)]) == 0
    assert stores(tmp_path) == ["pictures"]


def test_a_store_without_its_frames_is_told(made, tmp_path):
    source = open_source(str(made("video")))
    open_or_build(source, tmp_path)
    next(tmp_path.glob("*/frames.u8")).unlink()
    with pytest.raises(UserError, match=r"frames\.u8 is damaged: expected 608256 bytes, got 0\. Delete "):
        open_or_build(source, tmp_path)


def test_videos_that_pyav_has_read_are_closed(made, monkeypatch):
    """At once: a run's first part goes without the garbage collector, and a dataset may have thousands of files."""
    monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, None))
    monkeypatch.setattr(decode, "OPEN_READERS", 1)
    source = open_source(str(made("many_files")))
    reader, row = decode.Decoder(source, None), torch.zeros(1, dtype=torch.int64)
    gc.disable()
    before = len(os.listdir("/proc/self/fd"))
    for key in source.videos:
        for start in source.starts:
            reader.read(key, row + start)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before
    gc.enable()


def test_two_cameras_whose_names_end_alike_have_stores_of_their_own(made):
    """Pictures lie in one table, so that their files do not tell them apart; the dataset's name may be long."""
    source = open_source(str(made("images")))
    source.meta.repo_id = "+".join(["alice/so101_pick_cube_kitchen"] * 3)
    decoder = decode.Decoder(source, None)
    decoder.shape = lambda key: (3, 64, 96)
    keys = ("observation.images.left.rgb", "observation.images.right.rgb", "observation.images.top")
    source.images = dict.fromkeys(keys, source.images["observation.images.top"])
    assert len({store_name(decoder, key, "pyav") for key in keys}) == 3


def put_pictures_in_files(root: Path) -> list[Path]:
    """Move the pictures of a dataset from its table into files that the table names."""
    table_path = next((root / "data").glob("*/*.parquet"))
    table = pq.read_table(table_path)
    files = []
    pictures = []
    for row, picture in enumerate(table[TOP].to_pylist()):
        path = root / "images" / f"frame-{row:06d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(picture["bytes"])
        files.append(path)
        pictures.append({"bytes": None, "path": str(path.relative_to(root))})
    column = pa.array(pictures, table.schema.field(TOP).type)
    pq.write_table(table.set_column(table.schema.get_field_index(TOP), TOP, column), table_path)
    return files


def test_the_store_notices_that_picture_files_changed(made, copy_of, tmp_path):
    root = copy_of("images")
    inside = all_frames(Frames(open_source(str(made("images")))))
    files = put_pictures_in_files(root)
    source = open_source(str(root))
    assert torch.equal(all_frames(open_or_build(source, tmp_path / "cache")), inside)
    shutil.copy(files[0], files[5])
    changed = all_frames(open_or_build(open_source(str(root)), tmp_path / "cache"))
    assert torch.equal(changed[5], inside[0])
    assert len(stores(tmp_path / "cache")) == 2


def test_an_unfinished_store_is_believed_only_where_its_bytes_are_right(unfinished):
    source, folder = unfinished
    expected = all_frames(Frames(source))
    (build,) = folder.glob(".*/")
    assert len((build / "journal.txt").read_text().splitlines()) == 2
    for spoil in (
        lambda build: os.truncate(build / "frames.u8", 1000),
        lambda build: (build / "frames.u8").write_bytes(bytes(expected.numel())),
        lambda build: (build / "journal.txt").write_bytes(b"\xff0 1\n7 00000000\n-1 x\n1\n"),
        lambda build: (build / "frames.u8").unlink(),
    ):
        copy = Path(shutil.copytree(folder, folder.with_name("copy")))
        spoil(next(copy.glob(".*/")))
        assert torch.equal(all_frames(open_or_build(source, copy)), expected)
        shutil.rmtree(copy)


def test_copies_of_pictures():
    side_by_side = torch.randint(0, 255, (3, 5, 7, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # as decoders give them
    copies = contiguous_pictures(side_by_side)
    assert copies.is_contiguous()
    assert torch.equal(copies, side_by_side)
    for pixels in (side_by_side[0], copies[0], side_by_side[0, :, :, ::2]):
        out = torch.zeros(pixels.shape, dtype=torch.uint8)
        copy_picture(pixels, out)
        assert torch.equal(out, pixels)


def test_large_rows_are_asked_for_before_they_are_read(tmp_path, monkeypatch):
    asked = []

    class Recorder:
        def madvise(self, start, size, advice):
            asked.append((start.value, size.value))

    monkeypatch.setattr(read_ahead, "LIBC", Recorder())
    large = torch.from_numpy(np.memmap(tmp_path / "large", np.uint8, "w+", shape=(5, read_ahead.PIECE + 1)))
    read_ahead.read_ahead(large, torch.tensor([3, 1, 3]))
    for row, (start, size) in zip((1, 3), asked, strict=True):
        first = large[row].data_ptr()
        assert start % mmap.PAGESIZE == 0
        assert first - mmap.PAGESIZE < start <= first
        assert start + size == first + large.shape[1]
    small = torch.from_numpy(np.memmap(tmp_path / "small", np.uint8, "w+", shape=(5, 100)))
    read_ahead.read_ahead(small, torch.tensor([3, 1]))
    assert len(asked) == 2
