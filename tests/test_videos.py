"""Every row finds its own picture, whatever a video's clock is like."""

import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import decode, frame_times
from data.frame_times import frame_times_of
from data.frames import Frames
from data.source import Source
from data.video_checks import video_faults, video_warnings
from data.videos import Videos
from helpers.videos import HEIGHT, WIDTH, set_display_matrix, shown_number, write_video

CAMERA = "observation.images.top"


@pytest.fixture(params=["torchcodec", "pyav"])
def library(request, monkeypatch):
    """Each library that decodes video."""
    if request.param == "pyav":
        monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, "hidden by the test"))
    elif decode.load_torchcodec()[0] is None:
        pytest.skip(decode.load_torchcodec()[1])
    return request.param


def source_of(path: Path, lengths: list[int], fps: float, cache_dir: Path, size=(HEIGHT, WIDTH)) -> Source:
    """A dataset of one video that holds episodes of the given lengths."""
    ends = torch.tensor(lengths).cumsum(0)
    starts = ends - torch.tensor(lengths)
    meta = SimpleNamespace(
        root=path.parent, fps=fps, repo_id="test/made", features={CAMERA: {"dtype": "video", "shape": (*size, 3)}}
    )
    episodes = list(range(len(lengths)))
    source = Source("made", meta, episodes, starts, ends, tables=[])
    videos = Videos([path], [int(ends[-1])], torch.zeros(len(lengths), dtype=torch.int64), starts)
    videos.times = frame_times_of(videos.files, meta.root, CAMERA, cache_dir, quiet=True)
    source.videos = {CAMERA: videos}
    return source


def numbers_of(source: Source, rows: list[int], mode: str, cache_dir: Path) -> list[int]:
    """The numbers that the pictures of some rows show."""
    frames = Frames.open_or_build(source, mode=mode, cache_dir=cache_dir, num_threads=2)
    try:
        return [shown_number(pixels) for pixels in frames.read(CAMERA, torch.tensor(rows))]
    finally:
        frames.close()


CLOCKS = st.fixed_dictionaries(
    {
        "fps": st.sampled_from([5, 10, 15, 24, 29.97, 30, 50, 60]),
        "offset": st.sampled_from([0.0, 0.2, 1.4, 97.3]),
        "jitter": st.sampled_from([0.0, 0.05, 0.3]),  # of a frame
        "rounding": st.sampled_from([0.0, 0.001]),  # seconds
        "dropped": st.sets(st.integers(1, 40), max_size=8),  # frames whose times are skipped
        "lengths": st.lists(st.integers(1, 12), min_size=1, max_size=4),
        "gop": st.integers(1, 20),
        "b_frames": st.integers(0, 3),
        "hidden": st.integers(0, 6),
        "codec": st.sampled_from(["libx264", "libx264", "mpeg4"]),
        "time_base": st.sampled_from([Fraction(1, 16000), Fraction(1, 30000), Fraction(1, 1000)]),
        "container": st.sampled_from([".mp4", ".mp4", ".mkv"]),
        "seed": st.integers(0, 1000),
    }
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(clock=CLOCKS)
def test_every_row_has_its_own_picture(library, tmp_path, clock):
    folder = tmp_path / "one"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    count = sum(clock["lengths"])
    rng = np.random.default_rng(clock["seed"])
    slots = [slot for slot in range(count + len(clock["dropped"])) if slot not in clock["dropped"]][:count]
    times = (np.array(slots) + clock["jitter"] * rng.uniform(-1, 1, count)) / clock["fps"]
    if clock["rounding"]:
        times = times.round(3)
    hidden = clock["hidden"]
    if clock["container"] != ".mp4" or clock["offset"]:
        hidden = 0  # only an edit list of .mp4 hides frames, those before time 0
    offset = clock["offset"] if not hidden else -min(times.min(), 0.0)
    path = folder / f"file{clock['container']}"
    write_video(
        path,
        list(range(count)),
        (times - min(times.min(), 0.0) + offset).tolist(),
        codec=clock["codec"],
        gop=clock["gop"],
        b_frames=clock["b_frames"] if clock["codec"] == "libx264" else 0,  # mpeg4's may end after the file's edit list
        hidden=hidden,
        time_base=clock["time_base"],
    )
    source = source_of(path, clock["lengths"], clock["fps"], folder)
    faults = video_faults(source)[CAMERA].values()
    assert [
        fault for fault in faults if " fps" not in fault
    ] == []  # the rate of a few frames, some dropped, may be off
    rows = list(range(count))
    some = sorted(rng.choice(count, size=min(count, 5), replace=False).tolist())
    assert numbers_of(source, some, "off", folder) == some
    assert numbers_of(source, rows, "off", folder) == rows
    assert numbers_of(source, rows, "on", folder) == rows


def numbered_video(path: Path, count: int = 20, fps: float = 10, **settings) -> Path:
    """A regular video of `count` numbered pictures."""
    write_video(path, list(range(count)), [number / fps for number in range(count)], **settings)
    return path


def fault(source: Source) -> str:
    """What is wrong with the source's only video."""
    (text,) = video_faults(source)[CAMERA].values()
    return text


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("file.webm", {"codec": "libvpx", "time_base": Fraction(1, 1000)}),  # with hidden frames among its packets
        ("file.webm", {"codec": "libvpx-vp9", "time_base": Fraction(1, 1000)}),
        ("file.avi", {"codec": "mpeg4", "time_base": Fraction(1, 10)}),  # which stores no presentation times
        ("file.mp4", {"codec": "libx264", "hidden": 3, "b_frames": 2, "gop": 2}),
    ],
)
def test_other_containers_and_codecs(library, tmp_path, name, settings):
    source = source_of(numbered_video(tmp_path / name, **settings), [12, 8], 10, tmp_path)
    assert not video_faults(source)[CAMERA]
    rows = [19, 3, 12, 0]
    assert numbers_of(source, rows, "off", tmp_path) == rows


def test_a_clock_that_differs_from_the_table_is_told(tmp_path):
    times = [0.1 * (number + (number >= 15)) for number in range(20)]  # one frame was dropped
    write_video(tmp_path / "file.mp4", list(range(20)), times)
    source = source_of(tmp_path / "file.mp4", [12, 8], 10, tmp_path)
    assert not video_faults(source)[CAMERA]
    (warning,) = video_warnings(source)
    assert "up to 0.1 s off the table's timestamps in 5 of 20 frames, first in episode 1 frame 3" in warning


@pytest.mark.parametrize(("matrix", "rotation"), [((-1, 0, 0, -1), 180), ((0, 1, -1, 0), 270), ((0, -1, 1, 0), 90)])
def test_a_rotation_flag_turns_the_frames(library, tmp_path, matrix, rotation):
    path = numbered_video(tmp_path / "file.mp4")
    upright = Frames(source_of(path, [20], 10, tmp_path)).read(CAMERA, torch.tensor([5, 9]))
    set_display_matrix(path, *matrix)
    size = (HEIGHT, WIDTH) if rotation == 180 else (WIDTH, HEIGHT)
    source = source_of(path, [20], 10, tmp_path, size)
    assert not video_faults(source)[CAMERA]
    assert f"turns their frames by {rotation} degrees" in video_warnings(source)[0]
    turned = Frames(source).read(CAMERA, torch.tensor([5, 9]))
    assert torch.equal(turned, upright.rot90(rotation // 90, dims=(2, 3)))


def test_a_rotation_flag_against_info_json(tmp_path):
    path = numbered_video(tmp_path / "file.mp4")
    set_display_matrix(path, 0, 1, -1, 0)
    expected = "is shown at 96x64, turned by 270 degrees by its rotation flag, but info.json says 64x96: correct its shape there"
    assert fault(source_of(path, [20], 10, tmp_path)) == expected


def test_a_mirrored_video_is_refused(tmp_path):
    path = numbered_video(tmp_path / "file.mp4")
    set_display_matrix(path, -1, 0, 0, 1)
    assert "mirrors the frames" in fault(source_of(path, [20], 10, tmp_path))


def test_a_file_that_was_cut_short(tmp_path):
    path = numbered_video(tmp_path / "file.mkv", time_base=Fraction(1, 1000))
    path.write_bytes(path.read_bytes()[:-500])
    assert "frames, but its episodes have 20 rows" in fault(source_of(path, [20], 10, tmp_path))


def test_a_file_whose_end_was_never_downloaded(tmp_path):
    path = numbered_video(tmp_path / "file.mp4")
    data = bytearray(path.read_bytes())
    end = data.index(b"moov") - 4  # the frames are before it
    data[end - 600 : end] = bytes(600)
    path.write_bytes(data)
    assert "is cut short" in fault(source_of(path, [20], 10, tmp_path))


def test_what_is_no_video(tmp_path):
    (tmp_path / "file.mp4").write_text("not a video")
    assert "cannot be read as a video" in fault(source_of(tmp_path / "file.mp4", [20], 10, tmp_path))


def test_another_number_of_frames_or_rate(tmp_path):
    path = numbered_video(tmp_path / "file.mp4")
    assert fault(source_of(path, [21], 10, tmp_path)) == "has 20 frames, but its episodes have 21 rows"
    assert fault(source_of(path, [20], 30, tmp_path)) == "runs at 10 fps, but info.json says 30"


def test_a_frame_of_another_size_is_not_written(library, tmp_path):
    from errors import UserError

    source = source_of(numbered_video(tmp_path / "file.mp4"), [20], 10, tmp_path)
    times = source.videos[CAMERA].times
    times[0] = replace(times[0], height=HEIGHT + 2)
    with pytest.raises(UserError, match="have another size"):
        Frames.open_or_build(source, mode="on", cache_dir=tmp_path)


def test_times_are_read_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    paths = [numbered_video(tmp_path / f"{name}.mp4") for name in "ab"]
    read = []
    original = frame_times.read_frame_times

    def counted(path):
        read.append(path.name)
        return original(path)

    monkeypatch.setattr(frame_times, "read_frame_times", counted)
    first = frame_times_of(paths, tmp_path, CAMERA, tmp_path)
    again = frame_times_of(paths[::-1], tmp_path, CAMERA, tmp_path)[::-1]
    assert sorted(read) == ["a.mp4", "b.mp4"]
    for one, other in zip(first, again, strict=True):
        assert one.mappings() == other.mappings()
        assert one.starts(7) == other.starts(7)
        assert (one.time_base, one.height, one.width) == (other.time_base, other.height, other.width)

    numbered_video(paths[0], count=9)
    assert [len(times.pts) for times in frame_times_of(paths, tmp_path, CAMERA, tmp_path)] == [9, 20]
    assert read[2:] == ["a.mp4"]


def test_a_damaged_or_read_only_cache_is_done_without(tmp_path):
    path = numbered_video(tmp_path / "file.mp4")
    frame_times_of([path], tmp_path, CAMERA, tmp_path)
    (stored,) = (tmp_path / "times").iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    assert len(frame_times_of([path], tmp_path, CAMERA, tmp_path)[0].pts) == 20
    (tmp_path / "file").write_text("")
    assert len(frame_times_of([path], tmp_path, CAMERA, tmp_path / "file")[0].pts) == 20


def forget_episode(dataset: Path, root: Path, lost: int) -> Path:
    """A copy of a v3.0 dataset whose metadata and table have lost one episode."""
    shutil.copytree(dataset, root)
    for pattern in ("data/*/*.parquet", "meta/episodes/*/*.parquet"):
        for path in root.glob(pattern):
            table = pq.read_table(path)
            pq.write_table(table.filter(pc.field("episode_index") != lost), path)
    return root


def test_other_frames_than_rows_are_refused(made, tmp_path):
    """An episode was deleted by hand, but the gap that it leaves is not that of the video's frames."""
    from data.opening import open_source

    for name, numbers, times in (
        ("doubled", range(34), [number / 10 for number in range(34)]),
        ("irregular", range(33), [(number + 3 * (number > 15)) / 10 for number in range(33)]),
    ):
        root = forget_episode(made("video"), tmp_path / name, 1)
        (path,) = root.glob("videos/*/*/*.mp4")
        write_video(path, list(numbers), times)
        (problem,) = open_source(str(root)).problems
        assert f"has {len(times)} frames, but its episodes have 24 rows" in problem


def test_an_episode_that_was_deleted_by_hand_leaves_its_frames(made, tmp_path):
    """A video of several episodes, of which meta/episodes and the table have lost one."""
    from data.opening import open_source

    whole = open_source(str(made("video")))
    for lost in whole.episodes:
        source = open_source(str(forget_episode(made("video"), tmp_path / f"without-{lost}", lost)))
        assert not source.problems
        assert f"{(13, 9, 11)[lost]} of its 33 frames are of an episode that meta/episodes does not" in str(
            source.warnings
        )
        kept = torch.cat([torch.arange(whole.starts[i], whole.ends[i]) for i in source.episodes])
        rows = torch.arange(source.rows)
        assert torch.equal(Frames(source).read(CAMERA, rows), Frames(whole).read(CAMERA, kept))


@pytest.mark.parametrize("colours", ["bt709", "smpte240m", "bt2020nc", "smpte170m"])
@pytest.mark.parametrize("full_range", [False, True])
def test_both_libraries_give_the_colours_that_a_file_names(tmp_path, monkeypatch, colours, full_range):
    if decode.load_torchcodec()[0] is None:
        pytest.skip(decode.load_torchcodec()[1])
    import av

    path = tmp_path / "file.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"x264-params": f"colormatrix={colours}"})
        stream.height = HEIGHT
        stream.width = WIDTH
        stream.pix_fmt = "yuv420p"
        stream.color_range = 2 if full_range else 1
        picture = np.random.default_rng(0).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3), np.uint8)
        picture = picture.repeat(8, 0).repeat(8, 1)
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    source = source_of(path, [5], 10, tmp_path)
    rows = torch.arange(5)
    one = Frames(source).read(CAMERA, rows)
    monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, "hidden by the test"))
    assert torch.equal(Frames(source).read(CAMERA, rows), one)


@pytest.mark.parametrize("name", ["file.mp4", "file.mkv"])
def test_open_groups_and_short_ones(library, tmp_path, name):
    """torchcodec does not find the last frames of some of these: PyAV does."""
    for count in (12, 13, 20):
        for gop in (2, 3, 5):
            folder = tmp_path / f"{count}-{gop}"
            folder.mkdir()
            path = folder / name
            options = {"x264-params": f"open-gop=1:scenecut=0:keyint={gop}:min-keyint=1", "crf": "18"}
            write_video(path, list(range(count)), [n / 10 for n in range(count)], gop=gop, b_frames=3, options=options)
            source = source_of(path, [count], 10, folder)
            assert not video_faults(source)[CAMERA]
            rows = list(range(count))
            assert numbers_of(source, rows, "off", folder) == rows
            assert numbers_of(source, [count - 1], "off", folder) == [count - 1]
