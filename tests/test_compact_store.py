"""Compressed frame stores: the same pixels without loss, nearly the same as JPEG, partial where the disk has no room for all."""

import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from data import frames as module
from data.compact_store import COMPACT, LOSSLESS, CompactStore
from data.decode import Decoder
from data.frames import Frames
from data.opening import open_source
from errors import UserError
from helpers.paths import SHIPPED
from helpers.runs import small
from runs import main
from train import train

TOP = "observation.images.top"


@pytest.fixture
def free(monkeypatch):
    """A number of bytes -> the disk has that many free for `auto`."""

    def set_free(count: int) -> None:
        usage = shutil.disk_usage("/")
        monkeypatch.setattr(module, "SPARE", 0)
        fake = usage._replace(total=0, free=count)
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: fake)

    return set_free


def open_or_build(source, cache_dir, mode="lossless", size=None, **options) -> Frames:
    return Frames.open_or_build(source, size, mode=mode, cache_dir=cache_dir, **options)


def all_frames(frames: Frames, key=TOP) -> torch.Tensor:
    return frames.read(key, torch.arange(frames.source.rows))


def share(frames: Frames) -> float:
    """How many of all frames are in the compressed store, 0 to 1."""
    return frames.packed[TOP].holds(torch.arange(frames.source.rows)).double().mean().item()


def folders(cache_dir) -> list[str]:
    return sorted(path.name for path in cache_dir.iterdir() if path.is_dir())


def size_of(source, key=TOP) -> int:
    return source.rows * 3 * 64 * 96


@pytest.mark.parametrize("name", ["many_files", "images", "two_cameras"])
@pytest.mark.parametrize("size", [None, [30, 40]])
def test_lossless_holds_what_decoding_gives(made, tmp_path, name, size):
    source = open_source(str(made(name)))
    decoded = Frames(source, size)
    built = open_or_build(source, tmp_path, size=size, num_threads=2)
    opened = open_or_build(source, tmp_path, size=size)
    for key in decoded.keys:
        assert set(built.packed) == set(decoded.keys)
        assert built.stored == {}
        assert torch.equal(all_frames(built, key), all_frames(decoded, key))
        assert torch.equal(all_frames(opened, key), all_frames(decoded, key))
    rows = torch.tensor([5, 0, 12, 12, 3])
    assert torch.equal(opened.read(TOP, rows), decoded.read(TOP, rows))


def test_compact_is_smaller_and_looks_the_same(tmp_path):
    source = open_source(str(SHIPPED), episodes="0:2")
    key = next(iter(source.videos))
    decoded = all_frames(Frames(source), key).double()
    compact = all_frames(open_or_build(source, tmp_path, "compact"), key).double()
    noise = (decoded - compact).pow(2).mean()
    assert 10 * torch.log10(255**2 / noise) > 38  # dB of signal to noise
    packed = next(tmp_path.glob("*-jpeg92-*/frames.bin"))
    assert packed.stat().st_size < decoded.numel() / 6


def test_a_mode_reads_only_its_own_pixels(made, tmp_path):
    source = open_source(str(made("video")))
    for mode in ("compact", "lossless", "on"):
        open_or_build(source, tmp_path, mode)
    assert len(folders(tmp_path)) == 3
    assert open_or_build(source, tmp_path, "compact").packed[TOP].codec is COMPACT
    assert open_or_build(source, tmp_path, "lossless").packed[TOP].codec is LOSSLESS
    assert TOP in open_or_build(source, tmp_path, "on").stored
    assert TOP in open_or_build(source, tmp_path, "auto").stored  # the fastest
    off = open_or_build(source, tmp_path, "off")
    assert off.stored == {}
    assert off.packed == {}
    identities = {
        mode: open_or_build(source, tmp_path, mode).identity(TOP, tmp_path) for mode in ("on", "off", "lossless")
    }
    assert len(set(identities.values())) == 1
    assert open_or_build(source, tmp_path, "compact").identity(TOP, tmp_path) not in identities.values()


def test_auto_takes_the_lossless_store_where_raw_frames_do_not_fit(made, tmp_path, free):
    source = open_source(str(made("video")))
    free(size_of(source) - 1)
    said = []
    auto = open_or_build(source, tmp_path, "auto", say=said.append)
    assert auto.packed[TOP].codec is LOSSLESS
    assert auto.stored == {}
    assert "GB of losslessly compressed frames in" in said[-1]
    assert said[-1].endswith(", since 0.0 GB of decoded frames do not fit")
    assert torch.equal(all_frames(auto), all_frames(Frames(source)))
    said.clear()
    free(10 * size_of(source))  # room for raw frames by now: what is there is used
    assert open_or_build(source, tmp_path, "auto", say=said.append).packed
    assert said == []


def test_auto_keeps_what_fits_and_decodes_the_rest(made, tmp_path, free):
    source = open_source(str(made("video")))
    decoder = Decoder(source, None)
    whole = CompactStore.find(decoder, TOP, tmp_path, LOSSLESS).num_bytes
    free(int(whole * 0.6))
    said = []
    auto = open_or_build(source, tmp_path, "auto", num_threads=2, say=said.append)
    assert "of the frames are kept, the others are decoded as they are needed (--cache_dir, --image_size)" in said[-1]
    assert 0.2 < share(auto) < 0.8
    assert torch.equal(all_frames(auto), all_frames(Frames(source)))
    assert all(name.startswith(".") for name in folders(tmp_path)), "a partial store is not a finished one"

    free(0)  # nothing more fits: what is there is used
    again = open_or_build(source, tmp_path, "auto", say=said.append)
    assert share(again) == share(auto)
    assert torch.equal(all_frames(again), all_frames(Frames(source)))

    free(whole)  # room for the rest
    finished = open_or_build(source, tmp_path, "auto")
    assert share(finished) == 1
    assert torch.equal(all_frames(finished), all_frames(Frames(source)))
    assert not any(name.startswith(".") for name in folders(tmp_path))


@pytest.mark.parametrize("mode", ["lossless", "compact"])
def test_a_mode_that_was_asked_for_needs_room_for_all(made, tmp_path, free, mode):
    source = open_source(str(made("video")))
    free(1000)
    with pytest.raises(
        UserError, match=rf"--frame_cache {mode}: no room for 0\.0 GB of .*compressed frames in .*Pass "
    ):
        open_or_build(source, tmp_path, mode)


def test_a_stopped_build_continues(made, tmp_path, monkeypatch):
    source = open_source(str(made("video")))
    decode_episode = CompactStore._decode_episode
    decoded = []

    def stopped(store, episode, bar):
        if episode == 2:
            store._reserve(5)  # of an episode that is not finished
            raise KeyboardInterrupt
        return decode_episode(store, episode, bar)

    def counted(store, episode, bar):
        decoded.append(episode)
        return decode_episode(store, episode, bar)

    monkeypatch.setattr(CompactStore, "_decode_episode", stopped)
    with pytest.raises(KeyboardInterrupt):
        open_or_build(source, tmp_path / "cache")
    monkeypatch.setattr(CompactStore, "_decode_episode", counted)
    expected = all_frames(Frames(source))

    def cut(build):
        os.truncate(build / "frames.bin", 100)

    def zeros(build):
        (build / "frames.bin").write_bytes(bytes((build / "frames.bin").stat().st_size))

    def no_index(build):
        (build / "index.i64").unlink()

    def odd_index(build):
        (build / "index.i64").write_bytes(os.urandom(24 * source.rows))

    def odd_journal(build):
        (build / "journal.txt").write_bytes(b"\xff0 1\n7 00000000\n-1 x\n1\n")

    for spoil, episodes in ((None, 1), (cut, 3), (zeros, 3), (no_index, 3), (odd_index, 3), (odd_journal, 3)):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path / "cache", copy)
        if spoil is not None:
            spoil(next(copy.glob(".*/")))
        decoded.clear()
        assert torch.equal(all_frames(open_or_build(source, copy)), expected)
        assert len(decoded) == episodes
        shutil.rmtree(copy)


def test_a_full_disk_leaves_nothing_behind(made, mount, monkeypatch):
    small_disk = mount("size=40k")
    monkeypatch.setattr(module, "room_for", lambda *args: module.Room(0, 0, ""))
    with pytest.raises(UserError, match=r"cannot be written to .*: No space left on device\. Nothing is left behind"):
        open_or_build(open_source(str(made("video"))), small_disk)
    assert folders(small_disk) == []


def flip_a_bit(path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_partial_store_survives_a_disk_that_fills(made, mount, monkeypatch):
    source = open_source(str(made("video")))
    disk = mount("size=10m")
    whole = CompactStore.find(Decoder(source, None), TOP, disk, LOSSLESS).num_bytes
    monkeypatch.setattr(module, "SPARE", 0)
    usage = shutil.disk_usage(disk)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(total=0, free=int(whole * 0.6)))
        before = share(open_or_build(source, disk, "auto"))
        assert 0 < before < 1
        (disk / "other").write_bytes(bytes(shutil.os.statvfs(disk).f_bavail * shutil.os.statvfs(disk).f_bsize))
        patch.setattr(
            module.shutil, "disk_usage", lambda path: usage._replace(total=0, free=int(whole * 0.3))
        )  # no longer so
        again = open_or_build(source, disk, "auto")
    assert share(again) == before
    assert torch.equal(all_frames(again), all_frames(Frames(source)))


def test_damaged_stores_are_refused_by_name(made, tmp_path):
    source = open_source(str(made("video")))
    open_or_build(source, tmp_path / "cache")

    def spoil(name, change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tmp_path / "cache", copy)
        path = next(copy.glob(f"*/{name}"))
        change(path)
        with pytest.raises(UserError, match=rf"{name} is damaged.* Delete {copy}"):
            all_frames(open_or_build(source, copy))

    spoil("frames.bin", lambda path: os.truncate(path, 100))
    spoil("frames.bin", lambda path: path.write_bytes(bytes(path.stat().st_size)))
    spoil("frames.bin", lambda path: path.unlink())
    spoil("frames.bin", flip_a_bit)
    spoil("index.i64", lambda path: os.truncate(path, 100))
    spoil("index.i64", lambda path: path.write_bytes(bytes(path.stat().st_size)))
    spoil("index.i64", lambda path: path.unlink())


def test_the_weights_are_the_same_and_compact_is_another_run(tmp_path, capsys):
    settings = small(
        dataset_id=str(SHIPPED),
        episodes="0:2",
        image_size=[48, 48],
        cache_dir=str(tmp_path / "cache"),
        steps=4,
        save_freq=2,
    )
    weights = {}
    for mode in ("off", "lossless", "compact"):
        run = train(**settings, frame_cache=mode, output_dir=str(tmp_path / mode))
        weights[mode] = load_file(run.checkpoint / "policy.safetensors")
    for key, value in weights["off"].items():
        assert torch.equal(value, weights["lossless"][key])
    assert any(not torch.equal(value, weights["compact"][key]) for key, value in weights["off"].items())
    capsys.readouterr()

    # Resumed in the middle, with the lossless store in place of decoding, it is the same run; as JPEG it is another.
    for mode, is_same in (("lossless", True), ("compact", False)):
        checkpoint = tmp_path / "off" / "checkpoint-2"
        run = train(**settings, frame_cache=mode, output_dir=str(tmp_path / f"resumed_{mode}"),
                    resume_from_checkpoint=str(checkpoint))  # fmt: skip
        resumed = load_file(run.checkpoint / "policy.safetensors")
        assert all(torch.equal(value, resumed[key]) for key, value in weights["off"].items()) == is_same
        line = f"--frame_cache: off -> {mode}; from here on this is not the run that wrote the checkpoint"
        assert (line in capsys.readouterr().out) != is_same


def test_list_and_prune(made, tmp_path, capsys):
    source = open_source(str(made("video")))
    open_or_build(source, tmp_path, "compact")
    assert main(["cache", "list", "--cache_dir", str(tmp_path)]) == 0
    assert "33 frames of 3x64x96" in capsys.readouterr().out
    before = next(tmp_path.glob("[!.]*-jpeg92-*")).stat().st_mtime
    time.sleep(0.01)
    open_or_build(source, tmp_path, "compact")
    assert next(tmp_path.glob("[!.]*-jpeg92-*")).stat().st_mtime > before, "used just now"
    assert main(["cache", "prune", "--cache_dir", str(tmp_path)]) == 0
    assert folders(tmp_path) == []
