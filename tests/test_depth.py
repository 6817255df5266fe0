"""Depth cameras: read as grey pictures, by the codes that LeRobot records."""

import asyncio
import io
import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import msgpack
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import export
import infer
from data import open_dataset
from data.depth import DepthRange
from data.frames import Frames
from data.opening import open_source
from data.union import unite
from errors import UserError
from helpers.dataset_edits import edit_json, rewrite_column
from helpers.depth_dataset import CAMERA, CLOSE, SIDE, depth_of_frame, record_depth
from helpers.lance_dataset import to_lance
from helpers.paths import ROOT
from helpers.range_server import RangeServer
from helpers.recording import usual_scheduling
from helpers.runs import assert_same_run, small
from policy.loaded import load_policy
from processors.statistics import IMAGENET
from serve import PolicyServer
from train import train
from training.open_loop import open_for_policy

KINDS = {
    "video": {},
    "close": {"encoder": CLOSE},
    "channels_first": {"channels_first": True},
    "images": {"video": False},
    "metres": {"video": False, "in_metres": True},
}
DEFAULT = DepthRange(depth_min=0.01, depth_max=10.0, shift=3.5, use_log=True)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """name -> folder of a dataset with a depth camera."""
    folders = {}

    def get(name: str) -> Path:
        if name not in folders:
            with usual_scheduling():
                folders[name] = record_depth(tmp_path_factory.mktemp("depth") / name, **KINDS[name])
        return folders[name]

    return get


@pytest.fixture
def copy_of(recorded, tmp_path):
    return lambda name: Path(shutil.copytree(recorded(name), tmp_path / f"copy_of_{name}"))


@pytest.fixture(scope="module")
def run(recorded, tmp_path_factory):
    """A checkpoint of a policy that was trained on a depth camera."""
    output = tmp_path_factory.mktemp("run") / "run"
    return train(**small(dataset_id=str(recorded("video")), output_dir=str(output), steps=2)).checkpoint


def blocks(page: Path, language: str) -> list[str]:
    """The code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def lerobot_codes(root: Path) -> np.ndarray:
    """(N, H, W) codes of a dataset's depth camera, decoded or quantised by LeRobot."""
    from lerobot.datasets.depth_utils import quantize_depth
    from lerobot.datasets.video_utils import decode_video_frames_pyav

    videos = list(root.glob(f"videos/{CAMERA}/*/*.mp4"))
    if videos:
        times = [frame / 10 for frame in range(11)]
        return decode_video_frames_pyav(videos[0], times, 0.01, is_depth=True).numpy()[:, 0]
    pictures = pq.read_table(next(root.glob("data/*/*.parquet")))[CAMERA].to_pylist()
    frames = [np.array(Image.open(io.BytesIO(picture["bytes"]))) for picture in pictures]
    return np.stack([quantize_depth(frame, video_backend=None) for frame in frames])


@pytest.mark.parametrize("name", KINDS)
def test_pixels_are_lerobots_codes(recorded, name, monkeypatch):
    codes = lerobot_codes(recorded(name))
    assert len(np.unique(codes)) > 200
    expected = torch.from_numpy(np.rint(codes / 4095 * 255).astype(np.uint8))
    dataset = open_dataset(recorded(name))
    assert not dataset.problems
    got = dataset[:][CAMERA]
    assert got.dtype == torch.uint8
    for channel in range(3):
        assert torch.equal(got[:, channel], expected)
    assert dataset.meta.features[CAMERA]["shape"] == (SIDE, SIDE, 3)

    monkeypatch.setattr("data.decode.load_torchcodec", lambda: (None, "hidden by the test"))
    assert torch.equal(open_dataset(recorded(name))[:][CAMERA], got)


@pytest.mark.parametrize("name", ["video", "images"])
def test_the_same_through_every_store(recorded, tmp_path, name):
    source = open_source(str(recorded(name)))
    rows = torch.tensor([0, 3, 10])
    for size in (None, [16, 24]):
        expected = Frames(source, size).read(CAMERA, rows)
        for mode in ("off", "on", "lossless"):
            for grow in (False, True):
                frames = Frames.open_or_build(source, size, mode=mode, cache_dir=tmp_path / f"{mode}{grow}", grow=grow)
                assert torch.equal(frames.read(CAMERA, rows), expected), mode
                frames.close()


@pytest.mark.parametrize("name", ["video", "images"])
def test_streamed_and_in_lance_tables(recorded, tmp_path, name):
    rows = torch.arange(11)
    expected = Frames(open_source(str(recorded(name)))).read(CAMERA, rows)
    server = RangeServer(recorded(name))
    try:
        source = open_source(server.url, cache_dir=str(tmp_path / "cache"))
        assert source.is_streamed == (name == "video")
        assert torch.equal(Frames(source).read(CAMERA, rows), expected)
    finally:
        server.close()
    pytest.importorskip("lance", reason="needs pylance")
    source = open_source(str(to_lance(recorded(name), tmp_path / "tables")), cache_dir=str(tmp_path / "cache"))
    assert torch.equal(Frames(source).read(CAMERA, rows), expected)


def test_a_store_is_that_of_its_range(copy_of, tmp_path):
    root = copy_of("images")
    before = Frames.open_or_build(open_source(str(root)), mode="on", cache_dir=tmp_path / "cache")
    edit_json(
        root / "meta" / "info.json", lambda info: info["features"][CAMERA]["info"].update({"video.depth_max": 5.0})
    )
    after = Frames.open_or_build(open_source(str(root)), mode="on", cache_dir=tmp_path / "cache")
    first = torch.tensor([0])
    assert after.read(CAMERA, first).float().mean() > before.read(CAMERA, first).float().mean() + 10


@pytest.mark.parametrize("name", ["video", "images"])
def test_a_resumed_run_is_the_same(recorded, tmp_path, name, capsys):
    settings = small("flow", dataset_id=str(recorded(name)), cache_dir=str(tmp_path / "cache"), quiet=False)
    train(**settings, output_dir=str(tmp_path / "whole"))
    said = capsys.readouterr()
    assert f"{CAMERA}: depth from 0.01 m to 10 m as a grey picture" in said.out
    assert "warning" not in said.err
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(
        **settings,
        output_dir=str(tmp_path / "resumed"),
        resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"),
        frame_cache="off",
    )
    assert_same_run(tmp_path / "whole", tmp_path / "resumed", 4)
    assert "another run" not in capsys.readouterr().out


def observations_of(root: Path, row: int) -> dict:
    """The recorded observation of a row, whose depth is the grey picture."""
    batch = open_dataset(root)[[row]]
    observation = {key: value[0].numpy() for key, value in batch.items() if key.startswith("observation.state")}
    for key in ("observation.images.top", CAMERA):
        observation[key] = batch[key][0].permute(1, 2, 0).numpy()
    return observation


def test_act_takes_what_a_robot_gives(recorded, run):
    policy = load_policy(run, device="cpu", n_action_steps=1)
    assert policy.depth == {CAMERA: DEFAULT}
    for row in (0, 7):
        observation = observations_of(recorded("video"), row)
        expected = policy.act(observation)
        millimetres = depth_of_frame(row, in_metres=False)
        metres = depth_of_frame(row, in_metres=True)
        policy.reset()
        for given in (millimetres, millimetres[..., 0], millimetres.astype(np.int32)):
            assert (policy.act({**observation, CAMERA: given}) == expected).all()
            policy.reset()
        for given in (metres, metres.astype(np.float64)):  # a code may be rounded the other way
            off = np.abs(DEFAULT.picture(given).astype(int) - observation[CAMERA])
            assert off.max() <= 1
            assert off.mean() < 0.005
            assert policy.act({**observation, CAMERA: given}) == pytest.approx(expected, abs=1e-3)
            policy.reset()
        assert (policy.act({**observation, CAMERA: millimetres // 2}) != expected).any()
        policy.reset()
    policy.act({**policy.blank_observation(), CAMERA: np.zeros((SIDE, SIDE), np.uint16)})
    for wrong in (np.zeros((SIDE, SIDE, 3), np.uint16), np.zeros((1, SIDE, SIDE), np.uint16), np.zeros(0), ["a"]):
        with pytest.raises(UserError, match=r"top_depth: expected depth of shape \(32, 32, 1\), integers in"):
            policy.act({**observation, CAMERA: wrong})
    for wrong in (np.zeros((SIDE, SIDE), np.uint8), np.zeros((4, 4), np.uint16), np.zeros((4, 4, 1), np.uint8)):
        given = re.escape(f"got {wrong.dtype} of {wrong.shape}")
        with pytest.raises(UserError, match=rf"or its uint8 picture of shape \(32, 32, 3\), {given}"):
            policy.act({**observation, CAMERA: wrong})
    with pytest.raises(
        UserError, match=r"expected metres, since the numbers are floats, got a median of .* divide them"
    ):
        policy.act({**observation, CAMERA: millimetres.astype(np.float32)})


def test_act_takes_tensors(recorded, run):
    policy = load_policy(run, device="cpu", n_action_steps=1)
    observation = observations_of(recorded("video"), 3)
    depth = depth_of_frame(3, in_metres=True)
    expected = policy.act({**observation, CAMERA: depth})
    policy.reset()
    tensor = torch.from_numpy(depth).requires_grad_()
    assert (policy.act({**observation, CAMERA: tensor}) == expected).all()
    policy.reset()
    state = torch.from_numpy(observation["observation.state"]).bfloat16()
    assert (policy.act({**observation, "observation.state": state}) != expected).any()


def test_serve_says_that_distances_are_taken(run):
    policy = load_policy(run, device="cpu")
    for served in (policy, policy.ahead(fps=10)):
        health = asyncio.run(PolicyServer(served, max_bytes=1_000_000).health(None))
        assert msgpack.unpackb(health.body)["expects"][CAMERA]["depth"] == asdict(DEFAULT)


def test_the_picture_of_the_docs():
    block = next(text for text in blocks(ROOT / "docs" / "data.md", "python") if "quantize_depth" in text)
    names = {}
    exec(block, names)
    for in_metres in (False, True):
        depth = depth_of_frame(2, in_metres)
        assert (names["grey_picture"](depth) == DEFAULT.picture(depth)).all()


def test_a_run_that_lerobot_cannot_resume(run, tmp_path, capsys):
    assert export.main([str(run), str(tmp_path / "out"), "--format", "lerobot"]) == 2
    assert (
        "was trained with depth cameras as grey pictures, which LeRobot reads as millimetres" in capsys.readouterr().err
    )


def test_a_policy_under_other_names(recorded, tmp_path):
    new = "observation.images.camera1"
    result = train(
        **small("flow", dataset_id=str(recorded("close")), output_dir=str(tmp_path / "run"), steps=1),
        rename=[f"{CAMERA}={new}"],
        image_size=[24, 24],
    )
    info = json.loads((result.checkpoint / "training_info.json").read_text())
    assert info["depth"] == {new: {"shift": 3.5, **CLOSE}}
    policy = load_policy(result.checkpoint, device="cpu", rename=[f"observation.mine={CAMERA}"])
    observation = observations_of(recorded("close"), 3)
    observation["observation.mine"] = observation.pop(CAMERA)
    expected = policy.batch_of(observation)["observation.mine"]
    frame = {**observation, "observation.mine": depth_of_frame(3, in_metres=False)}
    assert torch.equal(policy.batch_of(frame)["observation.mine"], expected)
    assert np.isfinite(policy.act(frame)).all()


def test_a_checkpoint_without_a_range(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "old"))
    (folder / "manifest.json").unlink()
    edit_json(folder / "training_info.json", lambda info: info.pop("depth"))
    policy = load_policy(folder, device="cpu")
    policy.act(policy.blank_observation())
    with pytest.raises(UserError, match=r"top_depth: expected uint8 of shape"):
        policy.act({**policy.blank_observation(), CAMERA: np.zeros((SIDE, SIDE), np.uint16)})

    edit_json(folder / "training_info.json", lambda info: info.update(depth={CAMERA: {"depth_min": 0.1}}))
    with pytest.raises(
        UserError, match=r"training_info.json: depth: expected a number of metres as depth_max, 1000 at most, got None"
    ):
        load_policy(folder, device="cpu")


def test_infer_on_a_recording(recorded, run, capsys):
    assert infer.main([str(run), "--dataset_id", str(recorded("video")), "--device", "cpu"]) == 0
    assert "another range" not in capsys.readouterr().err


def test_another_range_than_in_training(recorded, run):
    source = open_for_policy(load_policy(run, device="cpu"), str(recorded("close")), "0")
    (line,) = [line for line in source.warnings if "another range" in line]
    assert "0.01 m to 10 m, logarithmic with a shift of 3.5 m" in line
    assert "0.2 m to 1.4 m, linear" in line
    with pytest.raises(UserError, match=r"datasets differ in .*top_depth: .* depth from 0\.01 m .* depth from 0\.2 m"):
        unite([open_source(str(recorded(name))) for name in ("video", "close")])


def test_depth_in_place_of_colour_and_the_reverse(recorded, run, copy_of, tmp_path):
    colour = copy_of("video")
    edit_json(
        colour / "meta" / "info.json",
        lambda info: info["features"][CAMERA].update(shape=[SIDE, SIDE, 3], info={}),
    )
    line = f"{CAMERA}: {{}} was trained with pictures of depth, {colour} has colour"
    source = open_for_policy(load_policy(run, device="cpu"), str(colour), "0")
    assert line.format("the policy") in source.warnings
    settings = small(output_dir=str(tmp_path / "run"), steps=1)
    trained = train(**settings, dataset_id=str(colour)).checkpoint
    source = open_for_policy(load_policy(trained, device="cpu"), str(recorded("video")), "0")
    line = f"{CAMERA}: the policy was trained with pictures of colour, {recorded('video')} has depth"
    assert line in source.warnings


@pytest.mark.parametrize("changes", [{"depth_unit": "m"}, {"video.depth_max": 5.0}])
def test_a_resume_with_other_distances_is_another_run(copy_of, tmp_path, capsys, changes):
    root = copy_of("images")
    settings = small(dataset_id=str(root), output_dir=str(tmp_path / "run"), quiet=False)
    train(**settings | {"steps": 2})
    capsys.readouterr()
    edit_json(root / "meta" / "info.json", lambda info: info["features"][CAMERA]["info"].update(changes))
    train(**settings, resume_from_checkpoint="latest")
    said = capsys.readouterr()
    assert "the range or the unit of its depth changed; from here on this is another run" in said.out + said.err


def test_stored_depth_in_another_unit_is_told(copy_of):
    root = copy_of("images")
    assert not open_dataset(root).warnings
    set_info(depth_unit="m")(root)
    (line,) = open_dataset(root).warnings
    assert f"{CAMERA}: nearly all distances in its first picture are outside 0.01 m to 10 m" in line
    set_info(depth_unit="mm")(root)
    assert not open_dataset(root).warnings


def test_a_video_with_too_few_bits_is_told(copy_of):
    root = copy_of("video")
    set_info(pix_fmt="gray10le")(root)
    (line,) = open_dataset(root).warnings
    assert f"{CAMERA}: its video has 10 bits a pixel, LeRobot's codes of depth have 12" in line


def test_the_range_of_an_exported_network_goes_by_its_inputs(recorded, tmp_path):
    result = train(
        **small("flow", dataset_id=str(recorded("close")), output_dir=str(tmp_path / "run"), steps=1),
        rename=[f"{CAMERA}=observation.images.top", f"observation.images.top={CAMERA}"],
    )
    path = tmp_path / "policy.pt2"
    assert export.main([str(result.checkpoint), str(path), "--format", "torch-export"]) == 0
    description = json.loads((tmp_path / "policy.pt2.json").read_text())
    assert description["depth"] == {"observation.images.top": {"shift": 3.5, **CLOSE}}


@pytest.mark.parametrize("name", ["video", "images"])
def test_statistics_are_those_of_the_picture(recorded, tmp_path, name):
    root = recorded(name)
    assert json.loads((root / "meta" / "stats.json").read_text())[CAMERA]["max"] == [[[12500.0]]]
    assert CAMERA not in open_dataset(root).stats
    pictures = open_dataset(root)[:][CAMERA].double() / 255
    for imagenet in ("off", "on"):
        result = train(
            **small(dataset_id=str(root), output_dir=str(tmp_path / imagenet), steps=1), imagenet_stats=imagenet
        )
        (path,) = result.checkpoint.glob("policy_preprocessor_step_*normalizer*.safetensors")
        stats = load_file(path)
        expected = [pictures.mean().item()] * 3 if imagenet == "off" else IMAGENET["mean"].flatten().tolist()
        assert stats[f"{CAMERA}.mean"].flatten().tolist() == pytest.approx(expected, abs=1e-4)


def test_left_out_by_observations(copy_of):
    root = copy_of("video")
    shutil.rmtree(root / "videos" / CAMERA)
    dataset = open_dataset(root, observations=["top", "observation.state"])
    assert not dataset.problems
    assert not dataset.warnings
    assert CAMERA not in dataset[[0]]


def set_info(**values):
    def edit(root: Path) -> None:
        named = {name if name == "depth_unit" else f"video.{name}": value for name, value in values.items()}
        edit_json(root / "meta" / "info.json", lambda info: info["features"][CAMERA]["info"].update(named))

    return edit


def set_feature(**values):
    return lambda root: edit_json(root / "meta" / "info.json", lambda info: info["features"][CAMERA].update(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_info(depth_min=10.0), r"expected depth_min below depth_max, got 10 and 10\. Write"),
        (
            set_info(depth_min=-4.0),
            r"expected depth_min \+ shift of 1e-06 or more to take its logarithm, got -4 \+ 3\.5\. Write",
        ),
        (set_info(depth_max="far"), r"expected a number of metres as depth_max, 1000 at most, got 'far'\. Write"),
        (set_info(depth_max=float("nan")), r"expected a number of metres as depth_max, 1000 at most, got nan\. Write"),
        (set_info(depth_max=10**400), r"expected a number of metres as depth_max, 1000 at most, got 1000"),
        (set_info(depth_max=1e36), r"expected a number of metres as depth_max, 1000 at most, got 1e\+36\. Write"),
        (set_info(depth_min=1.0, depth_max=1.000001), r"expected depth_min farther below depth_max, got 1\.0 and 1\.0"),
        (set_info(depth_min=0.0, shift=1e-45), r"expected depth_min \+ shift of 1e-06 or more"),
        (set_info(use_log=1), r"expected true or false as use_log, got 1\. Write"),
        (set_info(depth_unit="inch"), r"expected depth_unit m or mm, got 'inch'\. Correct it"),
        (
            set_feature(shape=[SIDE, SIDE, 3]),
            r"expected shape \(height, width, 1\), got \(32, 32, 3\)\. If it holds no depth",
        ),
        (
            set_feature(shape=[SIDE, SIDE]),
            r"expected shape \(height, width, 1\), got \(32, 32\)\. If it holds no depth",
        ),
        (set_feature(dtype="float32"), r"expected dtype video or image, got 'float32'\. If it holds no depth"),
    ],
)
def test_what_cannot_be_read_is_refused(copy_of, edit, message):
    root = copy_of("video")
    edit(root)
    with pytest.raises(
        UserError, match=f"depth camera {CAMERA}: {message}.* Or leave it out: --observations "
    ) as caught:
        open_dataset(root)
    flag = str(caught.value).split("--observations ")[1].split()
    assert flag == ["observation.images.top", "observation.state"]
    assert not open_dataset(root, observations=flag).problems


def test_the_remedy_for_a_picture_that_is_no_depth(copy_of):
    root = copy_of("video")
    edit_json(
        root / "meta" / "info.json",
        lambda info: info["features"][CAMERA].update(shape=[SIDE, SIDE, 3], info={}),
    )
    assert not open_dataset(root).problems


def test_the_remedy_for_depth_that_is_not_marked(copy_of):
    root = copy_of("video")
    edit_json(root / "meta" / "info.json", lambda info: info["features"][CAMERA].update(info={}))
    remedy = '"info": {"is_depth_map": true}'
    with pytest.raises(UserError, match=f"If it holds depth, write {remedy} beside its shape"):
        open_dataset(root).require()
    edit_json(root / "meta" / "info.json", lambda info: info["features"][CAMERA].update(json.loads(f"{{{remedy}}}")))
    assert not open_dataset(root).problems


def test_pictures_of_8_bits_are_no_depth(copy_of):
    root = copy_of("images")
    encoded = io.BytesIO()
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(encoded, "PNG")
    rewrite_column(root, CAMERA, lambda values: [{"bytes": encoded.getvalue(), "path": None} for _ in values])
    with pytest.raises(UserError, match=r"expected depth in 16 bits or floats, got a L picture\. Record it as LeRobot"):
        open_dataset(root).require()


def test_a_damaged_video_is_a_line(copy_of):
    root = copy_of("video")
    (path,) = root.glob(f"videos/{CAMERA}/*/*.mp4")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{CAMERA}/chunk-000/{path.name} is cut short: \d of its 11 frames"):
        open_dataset(root).require()


@pytest.mark.parametrize(
    "marks",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
        {"video_info": {"is_depth_map": True}},
    ],
)
def test_the_marks_of_older_versions(copy_of, marks):
    root = copy_of("images")
    expected = open_dataset(root)[[0]][CAMERA]

    def mark(info: dict) -> None:
        info["features"][CAMERA].pop("info")
        info["features"][CAMERA].update(marks)

    edit_json(root / "meta" / "info.json", mark)
    dataset = open_dataset(root)
    assert torch.equal(dataset[[0]][CAMERA], expected)
    assert dataset.meta.depth_keys == [CAMERA]  # --augment does not change the values of these


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("recorded_range", [DEFAULT, DepthRange(0.2, 1.4, 3.5, False), DepthRange(0.1, 2.0, 0.0, True)])
def test_numbers_that_are_no_distance(recorded_range):
    values = np.array(
        [[np.nan, -1.0, 0.0, recorded_range.depth_min, recorded_range.depth_max, 1e9, np.inf]], np.float32
    )
    assert recorded_range.picture(values)[0, :, 0].tolist() == [0, 0, 0, 0, 255, 255, 255]
    assert recorded_range.picture(np.array([[1e300, -1e300]]))[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("recorded_range", [DEFAULT, DepthRange(0.2, 1.4, 3.5, False)])
@pytest.mark.parametrize("distance", [0.3, 1.0])
def test_the_step_is_that_of_the_greys(recorded_range, distance):
    around = distance + np.linspace(-0.2 * distance, 0.2 * distance, 4001, dtype=np.float32)
    greys = recorded_range.picture(around[None])[0, :, 0].astype(int)
    changes = around[1:][np.diff(greys) == 1]
    assert np.diff(changes).mean() == pytest.approx(recorded_range.step(distance), rel=0.05)
