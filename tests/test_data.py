"""Batches are LeRobot's, to the bit, in an order that is a function of (seed, epoch)."""

import shutil
import subprocess
import threading
import time
from fractions import Fraction

import pandas
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import TrainConfig
from data import decode
from data.episodes import parse_episodes
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.order import Order, TrainableRows, list_of_epoch, weighted_order
from data.union import unite
from data.windows import window_rows
from errors import UserError
from helpers.dataset_edits import edit_json
from helpers.paths import REAL
from helpers.recording import record, usual_scheduling
from helpers.runs import assert_same_run, small
from train import train
from training import parts as build

DELTAS = {  # what act, and a policy with history, look at
    "chunk": {"action": [0, 1, 2, 3, 4]},
    "history": {"action": [-1, 0, 1, 2], "observation.state": [-1, 0], "camera": [-1, 0]},
    "one step": {"action": [0, 1], "observation.state": [0], "camera": [0]},
}


def open_both(root, deltas, episodes=None, mode="off"):
    """Our loader and LeRobot's dataset over the same windows."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source = open_source(str(root), episodes=episodes)
    source.require()
    deltas = {key: window for key, window in deltas.items() if key != "camera"} | {
        camera: deltas["camera"] for camera in source.meta.camera_keys if "camera" in deltas
    }
    loader = Loader(source, Frames.open_or_build(source, mode=mode, num_threads=2), deltas, 4, seed=1)
    times = {key: [frame / source.meta.fps for frame in window] for key, window in deltas.items()}
    backend = loader.frames.decoder.library
    lerobot = LeRobotDataset("x", root=root, episodes=source.episodes if episodes else None, delta_timestamps=times,
                             video_backend=backend, return_uint8=True)  # fmt: skip
    return loader, lerobot


def assert_same_batch(ours: dict, theirs: dict, cameras):
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if isinstance(value, list):
            assert value == theirs[key]
            continue
        if key in cameras and theirs[key].is_floating_point():  # LeRobot has no uint8 of PNG features
            value = value.to(torch.float32) / 255
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key


@pytest.fixture(params=["torchcodec", "pyav"])
def decoder(request, monkeypatch):
    """Video decoded by torchcodec, and by PyAV as if torchcodec could not be loaded."""
    if request.param == "pyav":
        monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, "message"))
    elif decode.load_torchcodec()[0] is None:
        pytest.skip(decode.load_torchcodec()[1])


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("windows", DELTAS)
@pytest.mark.parametrize("mode", ["on", "off"])
@pytest.mark.parametrize("name", ["video", "many_files", "images", "no_camera"])
def test_batch_equals_lerobots(made, name, windows, mode):
    loader, lerobot = open_both(made(name), DELTAS[windows], mode=mode)
    try:

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.lists(st.integers(0, len(lerobot) - 1), min_size=1, max_size=6))
        def check(rows):
            theirs = torch.utils.data.default_collate([lerobot[row] for row in rows])
            assert_same_batch(loader.batch_of(torch.tensor(rows)), theirs, lerobot.meta.camera_keys)

        check()
        edges = sorted({*loader.source.starts.tolist(), *(loader.source.ends - 1).tolist()})
        theirs = torch.utils.data.default_collate([lerobot[row] for row in edges])
        assert_same_batch(loader.batch_of(torch.tensor(edges)), theirs, lerobot.meta.camera_keys)
    finally:
        loader.close()


@pytest.mark.usefixtures("decoder")
@pytest.mark.parametrize("root", ["made", "real"])
def test_batch_of_some_episodes_equals_lerobots(made, root, request):
    root, episodes = (made("many_files"), "0,2") if root == "made" else (request.getfixturevalue("cr5"), "3:5,20")
    loader, lerobot = open_both(root, DELTAS["history"], episodes)
    rows = torch.randint(0, len(lerobot), (6,), generator=torch.Generator().manual_seed(0))
    theirs = torch.utils.data.default_collate([lerobot[int(row)] for row in rows])
    assert_same_batch(loader.batch_of(rows), theirs, lerobot.meta.camera_keys)
    loader.close()


def give_videos_the_rate(root, rate: Fraction):
    """Have a dataset's one video, and by its clock the table and the metadata, run at another rate than fps."""
    import av

    video = next((root / "videos").glob("*/*/*.mp4"))
    with av.open(str(video)) as source, av.open(str(video.with_suffix(".new.mp4")), "w") as new:
        stream = new.add_stream("libx264", rate=rate, options={"g": "10"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in source.decode(video=0):
            new.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(format="rgb24"), format="rgb24")))
        new.mux(stream.encode())
    video.with_suffix(".new.mp4").rename(video)

    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    table = pandas.read_parquet(path)
    ends, key = table["length"].cumsum(), "videos/observation.images.top"
    times = {f"{key}/from_timestamp": (ends - table["length"]) / float(rate), f"{key}/to_timestamp": ends / float(rate)}
    table.assign(**times).to_parquet(path, index=False)
    path = next((root / "data").glob("*/*.parquet"))
    table = pandas.read_parquet(path)
    times = (table["frame_index"] / float(rate)).astype("float32")
    table.assign(timestamp=times).to_parquet(path, index=False)


@pytest.mark.parametrize("episodes", [None, "2:4"])
def test_videos_whose_rate_is_nearly_fps_give_lerobots_frames(tmp_path, episodes):
    with usual_scheduling():
        root = record(tmp_path / "rate", lengths=(40, 40, 40, 13))
    give_videos_the_rate(root, Fraction(248, 25))  # 9.92 for 10: half a frame off after 62
    loader, lerobot = open_both(root, {}, episodes)
    assert len(lerobot) == (133 if episodes is None else 53)
    for row in {*loader.source.starts.tolist(), *(loader.source.ends - 1).tolist()}:
        ours = loader.batch_of(torch.tensor([row]))["observation.images.top"]
        assert torch.equal(ours[0], lerobot[row]["observation.images.top"])
    loader.close()


def test_order_is_lerobots_and_a_function_of_seed_and_epoch():
    from lerobot.datasets.sampler import EpisodeAwareSampler

    starts, ends = torch.tensor([0, 13, 22]), torch.tensor([13, 22, 33])
    sampler = EpisodeAwareSampler(starts.tolist(), ends.tolist(), drop_n_last_frames=2, shuffle=True, seed=7)
    order = Order(TrainableRows(starts, ends, 2), seed=7)
    for epoch in range(3):
        assert order.rows_of(epoch * 27 + torch.arange(27)).tolist() == list(sampler)


def test_batches_cover_each_epoch_once_and_start_anywhere(made):
    source = open_source(str(made("no_camera")))
    first = Loader(source, Frames(source), {}, 4, seed=3).start()
    run = [next(first) for _ in range(20)]
    first.close()
    rows = torch.cat([batch["index"] for batch in run])
    assert sorted(rows[:33].tolist()) == sorted(rows[33:66].tolist()) == list(range(33))
    assert rows[:33].tolist() != rows[33:66].tolist()
    later = Loader(source, Frames(source), {}, 4, seed=3).start(4 * 9)
    assert torch.equal(next(later)["index"], run[9]["index"])
    later.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))]


def test_windows_clamp_to_the_episode():
    rows, pad = window_rows(torch.tensor([3, 5]), torch.tensor([-2, 0, 2]), torch.tensor([2, 2]), torch.tensor([6, 6]))
    assert rows.tolist() == [[2, 3, 5], [3, 5, 5]]
    assert pad.tolist() == [[True, False, False], [False, False, True]]


def test_an_error_while_reading_reaches_the_loop(made):
    source = open_source(str(made("video")))
    videos = source.videos["observation.images.top"]
    videos.files = [source.meta.root / "gone" / path.relative_to(source.meta.root) for path in videos.files]
    loader = Loader(source, Frames(source), {}, 4, seed=3).start()
    with pytest.raises(
        UserError,
        match=r"gone/videos/.*file-000\.mp4: frames \d+ to \d+, from episode \d frame \d+ on, cannot be decoded",
    ):
        next(loader)
    with pytest.raises(UserError):
        next(loader)  # and does not hang
    loader.close()


@pytest.mark.parametrize(
    ("text", "expected"), [("0:3,5", [0, 1, 2, 5]), ("4", [4]), (" 1 , 0:2", [0, 1]), (None, list(range(6)))]
)
def test_episodes(text, expected):
    assert parse_episodes(text, range(6)) == expected


@pytest.mark.parametrize("text", ["6", "0:7", "3:3", "a", "", "1-2", "-1"])
def test_episodes_out_of_range_or_form(text):
    with pytest.raises(UserError, match="--episodes"):
        parse_episodes(text, range(6))


def test_the_loops_buffer_is_not_overwritten_while_in_use(made, tmp_path):
    source = open_source(str(made("video")))
    frames = Frames.open_or_build(source, mode="on", cache_dir=tmp_path)
    loader = Loader(source, frames, {}, 4, seed=3).start()
    for step in range(30):
        batch = next(loader)
        if step % 7 == 0:
            time.sleep(0.05)  # time for the thread to run ahead as far as it can
        assert torch.equal(
            batch["observation.images.top"], loader.frames.read("observation.images.top", batch["index"])
        )
    buffers = {next(loader)["observation.images.top"].data_ptr() for _ in range(12)}
    assert len(buffers) == 3
    loader.close()


def test_batches_come_in_order_whichever_is_ready_first(made, monkeypatch):
    source = open_source(str(made("video")))
    loader = Loader(source, Frames(source), {}, 4, seed=3)
    batch_at = loader.batch_at
    second_is_ready = threading.Event()

    def first_comes_last(samples_seen, buffers):
        if samples_seen == 0:
            assert second_is_ready.wait(60)
        batch = batch_at(samples_seen, buffers)
        if samples_seen == 4:
            second_is_ready.set()
        return batch

    monkeypatch.setattr(loader, "batch_at", first_comes_last)
    loader.start()
    for step in range(6):
        assert next(loader)["sample"].tolist() == list(range(4 * step, 4 * step + 4))
    loader.close()


@pytest.fixture(scope="module")
def v2(cr5):
    return REAL / "cr5_banana_v21"


def test_v21_is_what_lerobot_makes_of_it(v2, tmp_path):
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.scripts.convert_dataset_v21_to_v30 import convert_dataset

    shutil.copytree(v2, tmp_path / "converted", copy_function=shutil.copyfile)
    subprocess.run(["chmod", "-R", "u+w", tmp_path / "converted"], check=True)
    convert_dataset("x", root=tmp_path / "converted", push_to_hub=False)
    theirs = LeRobotDatasetMetadata("x", root=tmp_path / "converted")
    old, new = open_source(str(v2)), open_source(str(tmp_path / "converted"))
    assert old.meta.stats.keys() == theirs.stats.keys()
    for key, stats in theirs.stats.items():
        assert all((old.meta.stats[key][name] == value).all() for name, value in stats.items())
    assert old.meta.features == new.meta.features
    assert old.tasks == new.tasks
    assert all(torch.equal(values, new.columns[key]) for key, values in old.columns.items())
    rows = torch.tensor([0, 196, 197, 640, 1331])
    assert torch.equal(
        Frames(old).read("observation.images.top", rows), Frames(new).read("observation.images.top", rows)
    )


def test_v21_with_clock_jitter_warns_in_one_line_and_trains(v2, tmp_path, capsys):
    result = train(**small(dataset_id=str(v2), episodes="0:2", image_size=[32, 48], output_dir=str(tmp_path), steps=2))
    assert result.steps == 2
    lines = capsys.readouterr().out.splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    line = "warning: timestamps are up to 0.92 s off frame_index / fps: frames are read by row, not by timestamp"
    assert warnings[0] == line


@pytest.mark.parametrize("frames", ["fewer", "more"])
def test_v21_video_with_other_frames_than_rows_is_refused_by_name(v2, tmp_path, frames):
    root = tmp_path / "v2"
    shutil.copytree(v2, root, copy_function=shutil.copyfile)
    videos = root / "videos" / "chunk-000" / "observation.images.top"
    subprocess.run(["chmod", "-R", "u+w", root], check=True)
    shutil.copyfile(
        videos / ("episode_000000.mp4" if frames == "fewer" else "episode_000002.mp4"), videos / "episode_000001.mp4"
    )
    source = open_source(str(root))
    count = 197 if frames == "fewer" else 275
    assert source.problems == [
        f"videos/chunk-000/observation.images.top/episode_000001.mp4 has {count} frames, but its episodes have 215 rows "
        "(episode 1)"
    ]


def test_several_datasets_are_one(made):
    sources = [open_source(str(made(name))) for name in ("two_cameras", "many_files")]
    both = unite(sources)
    loaders = [Loader(source, Frames(source), {"action": [0, 1, 2]}, 4, seed=1) for source in (*sources, both)]
    rows = torch.tensor([0, 12, 13, 32])
    for offset, loader in ((0, loaders[0]), (33, loaders[1])):
        one, other = loader.batch_of(rows), loaders[2].batch_of(rows + offset)
        assert all(
            value == other[key] if isinstance(value, list) else torch.equal(value, other[key])
            for key, value in one.items()
        )
    for loader in loaders:
        loader.close()
    assert both.meta.stats["action"]["count"] == 66
    assert both.tasks == {0: "lift", 1: "push"}


def test_datasets_that_differ_are_refused(made):
    with pytest.raises(UserError, match=r"datasets differ in observation\.state: .*, or train on each by itself"):
        unite([open_source(str(made(name))) for name in ("video", "wide")])


def test_datasets_whose_videos_are_encoded_otherwise_are_one(made, copy_of):
    first, root = open_source(str(made("video"))), copy_of("video")
    give_videos_the_rate(root, Fraction(10))  # as H.264, and the other AV1

    def encoded(info):
        camera = info["features"]["observation.images.top"]
        camera.pop("info")  # of a recording of two years ago
        camera["video_info"] = {"video.codec": "h264", "video.fps": 10, "video.is_depth_map": False, "has_audio": False}

    edit_json(root / "meta" / "info.json", encoded)
    both = Frames(unite([first, open_source(str(root))]))
    one, other = (both.read("observation.images.top", torch.tensor([row])) for row in (14, 33 + 14))
    assert 0 < (one.float() - other.float()).abs().mean() < 3
    both.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: drop(root, "observation.state"), "its table has no column observation.state, which info.json lists"),
        (lambda root: edit_json(root / "meta" / "stats.json", lambda stats: stats["action"].update(std=[1, -2, 1])), "got -2"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_one_of_several_datasets_is_told(made, copy_of, tmp_path, change, message):
    root = copy_of("no_camera")
    change(root)
    for names in ([str(made("no_camera")), str(root)], [str(root), str(made("no_camera"))]):
        with pytest.raises(UserError) as caught:
            train(**small(dataset_id=names, output_dir=str(tmp_path / "run")))
        assert message in str(caught.value)
        assert str(root) in str(caught.value)


def drop(root, column):
    path = next((root / "data").glob("*/*.parquet"))
    pandas.read_parquet(path).drop(columns=column).to_parquet(path, index=False)


def test_one_dataset_may_have_a_weight(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), dataset_weights=[2.0], steps=1)
    assert train(**settings, output_dir=str(tmp_path)).steps == 1


def test_weights_share_out_the_samples_and_repeat_rows_equally():
    order = [weighted_order([10, 20, 5], [3, 1, 1], seed=7, epoch=epoch) for epoch in range(10)]
    assert all(len(epoch) == 35 for epoch in order)
    assert [int((order[3] < 10).sum()), int((order[3] >= 30).sum())] == [21, 7]
    counts = torch.bincount(torch.cat(order), minlength=35)
    assert counts[:10].tolist() == [21] * 10
    assert counts[30:].tolist() == [14] * 5
    assert int(counts[10:30].min()) >= 3
    assert torch.equal(order[4], weighted_order([10, 20, 5], [3, 1, 1], seed=7, epoch=4))
    assert not torch.equal(order[4], order[5])


def test_weighted_run_resumes_exactly(made, tmp_path):
    names = [str(made("two_cameras")), str(made("many_files"))]
    settings = small(dataset_id=names, dataset_weights=[3, 1], steps=6, save_freq=3)
    train(**settings, output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    train(resume_from_checkpoint="latest", output_dir=str(tmp_path / "part"), dataset_id=names)
    assert_same_run(tmp_path / "whole", tmp_path / "part", 6)


def test_several_datasets_are_kept_apart_in_dataset_root(monkeypatch):
    asked = []
    monkeypatch.setattr(build, "open_source", lambda name, root, *rest, **more: asked.append((name, root)))
    monkeypatch.setattr(build, "unite", lambda sources, rename: sources)
    for names in (["a/x", "b/y"], ["a/x"]):
        build.build_source(TrainConfig(dataset_id=names, dataset_root="here"))
    assert asked == [("a/x", "here/a/x"), ("b/y", "here/b/y"), ("a/x", "here")]


def test_dataset_root_of_a_folder_is_refused(made, tmp_path):
    with pytest.raises(
        UserError,
        match=f"--dataset_root {tmp_path} is a folder to download Hub datasets to, .* Leave --dataset_root out",
    ):
        build.build_source(TrainConfig(dataset_id=[str(made("video"))], dataset_root=str(tmp_path)))


def test_a_batch_larger_than_the_dataset_is_told(made, tmp_path, capsys):
    train(**small(dataset_id=str(made("no_camera")), batch_size=40, quiet=False), output_dir=str(tmp_path))
    message = "a batch of 40 is larger than the 33 frames to train on: it holds some of them twice"
    assert message in capsys.readouterr().out


def test_rows_may_be_asked_for_by_two_threads(made):
    """A batch of several epochs: the loop measures --minutes while the loader's thread prepares its first batch."""
    source = open_source(str(made("no_camera")))
    loader = Loader(source, Frames(source), {}, 200, seed=0).start()
    expected = [loader.rows_at(start) for start in range(0, 20_000, 200)]
    seen = [[], []]

    def ask(into):
        list_of_epoch.cache_clear()
        into += [loader.rows_at(start) for start in range(0, 20_000, 200)]

    threads = [threading.Thread(target=ask, args=(into,)) for into in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    loader.close()
    assert all(torch.equal(a, b) for into in seen for a, b in zip(into, expected, strict=True))
