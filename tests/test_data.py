"""Batches are LeRobot's, to the bit, in an order that is a function of (seed, epoch)."""

import threading

import pytest
import torch
from conftest import REAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import UserError
from data import decode
from data.frames import Frames
from data.loader import Loader
from data.source import open_dataset, parse_episodes
from data.windows import epoch_order, trainable_rows, window_rows

DELTAS = {  # what act, and a policy with history, look at
    "chunk": {"action": [0, 1, 2, 3, 4]},
    "history": {"action": [-1, 0, 1, 2], "observation.state": [-1, 0], "camera": [-1, 0]},
    "one step": {"action": [0, 1], "observation.state": [0], "camera": [0]},
}


def open_both(root, deltas, episodes=None, mode="off"):
    """Our loader and LeRobot's dataset over the same windows."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source = open_dataset(str(root), episodes=episodes)
    source.require()
    deltas = {key: window for key, window in deltas.items() if key != "camera"} | {
        camera: deltas["camera"] for camera in source.meta.camera_keys if "camera" in deltas
    }
    loader = Loader(source, Frames(source, mode=mode, num_threads=2), deltas, 4, seed=1)
    times = {key: [frame / source.meta.fps for frame in window] for key, window in deltas.items()}
    backend = loader.frames.decoder.name
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
        monkeypatch.setattr(decode, "load_torchcodec", lambda: (None, ["told"]))
    elif decode.load_torchcodec()[0] is None:
        pytest.skip(decode.load_torchcodec()[1][0])


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


def test_order_is_lerobots_and_a_function_of_seed_and_epoch():
    from lerobot.datasets.sampler import EpisodeAwareSampler

    starts, ends = torch.tensor([0, 13, 22]), torch.tensor([13, 22, 33])
    sampler = EpisodeAwareSampler(starts.tolist(), ends.tolist(), drop_n_last_frames=2, shuffle=True, seed=7)
    rows = trainable_rows(starts, ends, 2)
    for epoch in range(3):
        assert rows[epoch_order(len(rows), 7, epoch)].tolist() == list(sampler)


def test_batches_cover_each_epoch_once_and_start_anywhere(made):
    source = open_dataset(str(made("no_camera")))
    first = Loader(source, Frames(source), {}, 4, seed=3)
    run = [next(first) for _ in range(20)]
    first.close()
    rows = torch.cat([batch["index"] for batch in run])
    assert sorted(rows[:33].tolist()) == sorted(rows[33:66].tolist()) == list(range(33))
    assert rows[:33].tolist() != rows[33:66].tolist()
    later = Loader(source, Frames(source), {}, 4, seed=3, samples_seen=4 * 9)
    assert torch.equal(next(later)["index"], run[9]["index"])
    later.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("loader", "decode"))]


def test_windows_clamp_to_the_episode():
    rows, pad = window_rows(torch.tensor([3, 5]), torch.tensor([-2, 0, 2]), torch.tensor([2, 2]), torch.tensor([6, 6]))
    assert rows.tolist() == [[2, 3, 5], [3, 5, 5]]
    assert pad.tolist() == [[True, False, False], [False, False, True]]


def test_an_error_while_reading_reaches_the_loop(made):
    source = open_dataset(str(made("video")))
    videos = source.videos["observation.images.top"]
    videos.files = [source.root / "gone" / path.relative_to(source.root) for path in videos.files]
    loader = Loader(source, Frames(source), {}, 4, seed=3)
    with pytest.raises(UserError, match=r"gone/videos/.*file-000\.mp4: frames \d+ to \d+ cannot be decoded"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    ("text", "expected"), [("0:3,5", [0, 1, 2, 5]), ("4", [4]), (" 1 , 0:2", [0, 1]), (None, list(range(6)))]
)
def test_episodes(text, expected):
    assert parse_episodes(text, 6) == expected


@pytest.mark.parametrize("text", ["6", "0:7", "3:3", "a", "", "1-2", "-1"])
def test_episodes_out_of_range_or_form(text):
    with pytest.raises(UserError, match="--episodes"):
        parse_episodes(text, 6)


def test_v21_is_refused_with_the_remedy(cr5):
    with pytest.raises(UserError, match=r"format v2\.1, expected v3\.0: convert it with"):
        open_dataset(str(REAL / "cr5_banana_v21"))
