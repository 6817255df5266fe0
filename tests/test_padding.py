"""--pad_datasets: datasets of several robots as one, each by its own statistics, and a policy that acts for each of them."""

import shutil

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from safetensors.torch import load_file

from config import TrainConfig
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.padding import pad_sources
from data.split import split_episodes
from data.union import unite
from errors import UserError
from evaluate import main as evaluate
from helpers.dataset_edits import edit_json
from helpers.runs import small
from infer import load_policy
from infer import main as infer
from processors.padding import preprocess_batch
from processors.pipelines import to_float_batch
from runtime import MASK
from train import train
from training.distributed import Distributed
from training.parts import build_processors, build_source
from training.policy_plan import plan_policy

TOP = "observation.images.top"
WRIST = "observation.images.wrist"


def record_arm(
    root,
    joints: int,
    cameras: tuple[str, ...],
    scale: float,
    *,
    offset: float = 5,
    has_state: bool = True,
    more: dict | None = None,
    dtype: str = "float32",
    video: bool = True,
    fps: int = 10,
    seed: int = 0,
):
    """An arm whose action is its state a frame later, in units of `scale`."""
    names = [f"joint_{number}" for number in range(joints)]
    features = {"action": {"dtype": dtype, "shape": (joints,), "names": names}}
    if has_state:
        features["observation.state"] = dict(features["action"])
    more = more or {}
    for key, shape in more.items():
        features[key] = {"dtype": "float32", "shape": shape, "names": None}
    for camera in cameras:
        shape = {"shape": (32, 32, 3), "names": ["height", "width", "channels"]}
        features[camera] = {"dtype": "video" if video else "image", **shape}
    dataset = LeRobotDataset.create("me/arm", fps, features, root=root, use_videos=video)
    random = np.random.default_rng(seed)
    for _ in range(4):
        for frame in range(12):
            state = (scale * (np.sin(frame / 3 + np.arange(joints)) + offset)).astype(dtype)
            pictures = {camera: random.integers(1, 255, (32, 32, 3), dtype=np.uint8) for camera in cameras}
            values = {"action": state, "task": "lift", **pictures}
            if has_state:
                values["observation.state"] = state
            for key, shape in more.items():
                values[key] = random.random(shape).astype(np.float32)
            dataset.add_frame(values)
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """An arm of three joints with two cameras, and one of five joints, in other units, with one of them."""
    folder = tmp_path_factory.mktemp("arms")
    return [
        str(record_arm(folder / "small", 3, (TOP, WRIST), 1.0)),
        str(record_arm(folder / "large", 5, (TOP,), 100.0, seed=1)),
    ]


def padded(names, **options):
    sources = [open_source(name, **options) for name in names]
    lines = pad_sources(sources)
    return unite(sources), lines


def test_what_a_dataset_lacks_is_padded_and_told(arms):
    source, lines = padded(arms)
    small_arm, large_arm = arms
    assert lines == [
        f"padded: in {small_arm} action has 3 of 5 numbers; observation.state has 3 of 5 numbers",
        f"padded: in {large_arm} {WRIST} is black",
    ]
    own = [open_source(name) for name in arms]
    rows = own[0].rows
    assert torch.equal(source.columns["action"][:rows, :3], own[0].columns["action"])
    assert not source.columns["action"][:rows, 3:].any()
    assert torch.equal(source.columns["action"][rows:], own[1].columns["action"])
    assert source.columns["dataset_index"].tolist() == [0] * rows + [1] * own[1].rows
    assert torch.equal(source.columns[f"{WRIST}{MASK}"], source.columns["dataset_index"] == 0)
    assert f"{TOP}{MASK}" not in source.columns

    frames = Frames(source)
    wanted = torch.tensor([3, rows + 3])
    wrist = frames.read(WRIST, wanted)
    assert torch.equal(wrist[0], Frames(own[0]).read(WRIST, wanted[:1])[0])
    assert not wrist[1].any()
    assert torch.equal(frames.read(TOP, wanted)[1], Frames(own[1]).read(TOP, wanted[:1])[0])


@pytest.mark.parametrize("mode", ["on", "lossless"])
def test_frame_stores(arms, tmp_path, mode):
    source, _ = padded(arms)
    wanted = torch.tensor([3, source.rows - 3])
    expected = Frames(source).read(WRIST, wanted)
    for _ in range(2):
        frames = Frames.open_or_build(source, mode=mode, cache_dir=str(tmp_path), quiet=True)
        assert torch.equal(frames.read(WRIST, wanted), expected)
        frames.close()


def test_pictures_in_tables(tmp_path):
    names = [
        str(record_arm(tmp_path / "a", 2, (TOP, WRIST), 1.0, video=False)),
        str(record_arm(tmp_path / "b", 2, (TOP,), 1.0, video=False)),
    ]
    source, _ = padded(names)
    wanted = torch.tensor([0, source.rows - 1])
    pictures = Frames(source).read(WRIST, wanted)
    assert pictures[0].any()
    assert not pictures[1].any()


@pytest.fixture(scope="module")
def runs(arms, tmp_path_factory):
    """policy -> the last checkpoint of a run on both arms, whose step 2 has one too."""
    made = {}

    def run(policy: str):
        if policy not in made:
            output_dir = str(tmp_path_factory.mktemp(policy))
            made[policy] = train(**small(policy, dataset_id=arms, pad_datasets=True, output_dir=output_dir)).checkpoint
        return made[policy]

    return run


@pytest.fixture
def planned(arms):
    """policy, settings -> (source, preprocessor) of a run on both arms."""

    def plan(policy: str, **settings):
        config = TrainConfig(**small(policy, dataset_id=arms, pad_datasets=True, **settings))
        distributed = Distributed()
        distributed.use("cpu")
        source = build_source(config)
        plan = plan_policy(config, None, source, distributed)
        return source, build_processors(plan, source.meta)[0]

    return plan


@pytest.mark.parametrize(("policy", "low", "high"), [("act", "mean", "std"), ("diffusion", "min", "max")])
def test_each_dataset_is_normalised_by_its_own_statistics(planned, policy, low, high):
    source, preprocess = planned(policy)
    batch = Loader(source, Frames(source), {}, 4, seed=0).batch_of(torch.arange(source.rows))
    ready = preprocess_batch(preprocess, to_float_batch(batch, source.meta, "cpu"))
    for dataset, width in enumerate((3, 5)):
        own = ready["action"][ready["dataset_index"] == dataset].double()
        ends = (own.mean(0), own.std(0, correction=0)) if low == "mean" else (own.amin(0), own.amax(0))
        expected = (0.0, 1.0) if low == "mean" else (-1.0, 1.0)
        for got, value in zip(ends, expected, strict=True):
            torch.testing.assert_close(got[:width], torch.full((width,), value).double(), atol=2e-3, rtol=0)
        assert not own[:, width:].abs().gt(1e-5).any()
    assert torch.equal(ready[f"{WRIST}{MASK}"], ready["dataset_index"] == 0)


@pytest.mark.slow
def test_units_that_differ_by_far(tmp_path):
    fine = str(record_arm(tmp_path / "fine", 2, (TOP,), 0.005, offset=0))
    coarse = str(record_arm(tmp_path / "coarse", 2, (TOP,), 20000, offset=0.5))
    still = str(record_arm(tmp_path / "still", 2, (TOP,), 5e-6, offset=4e5))
    for names in ([fine, coarse], [coarse, fine], [still, fine]):
        settings = small(
            "diffusion",
            dataset_id=names,
            pad_datasets=True,
            image_size=[64, 64],
            steps=2,
            output_dir=str(tmp_path / "run"),
        )
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        checkpoint = train(**settings).checkpoint
        source = build_source(TrainConfig(**settings))
        distributed = Distributed()
        distributed.use("cpu")
        preprocess, _ = build_processors(plan_policy(TrainConfig(**settings), None, source, distributed), source.meta)
        for dataset, name in enumerate(names):
            acting = load_policy(checkpoint, "cpu", trained_on=name)
            own = open_source(name)
            batch = Loader(source, Frames(source), {}, 4, seed=0).batch_of(source.starts[dataset * 4] + torch.arange(9))
            expected = preprocess_batch(preprocess, to_float_batch(batch, source.meta, "cpu"))
            got = acting.preprocess({"action": own.columns["action"][:9], TOP: torch.zeros(9, 3, 32, 32)})
            if name != still:  # whose own numbers are steps of float32
                torch.testing.assert_close(got["action"], expected["action"], atol=2e-3, rtol=0)
                assert got["action"].abs().max() > 0.9


@pytest.mark.parametrize(
    ("policy", "other"),
    [
        ("act", {"more": {"observation.gripper": (1,)}}),
        ("act", {"dtype": "int64"}),
        ("act", {"joints": 1}),
        ("diffusion", {"has_state": False}),  # two observations at a time
    ],
)
def test_kinds_of_states_and_actions(tmp_path, policy, other):
    names = [
        str(record_arm(tmp_path / "one", 2, (TOP, WRIST), 50.0)),
        str(record_arm(tmp_path / "other", **{"joints": 2, "cameras": (TOP,), "scale": 50.0, **other})),
    ]
    for order in (names, names[::-1]):
        output_dir = tmp_path / "run"
        shutil.rmtree(output_dir, ignore_errors=True)
        settings = small(policy, dataset_id=order, pad_datasets=True, image_size=[64, 64], steps=2)
        checkpoint = train(**settings, output_dir=str(output_dir)).checkpoint
        for name in names:
            acting = load_policy(checkpoint, "cpu", trained_on=f"{name}/")
            assert acting.act(acting.blank_observation()).shape == (acting.action_width,)
    command = [str(checkpoint), "--dataset_id", names[1], "--trained_on", "other", "--episodes", "0", "--device", "cpu"]
    assert evaluate([*command, "--output_dir", str(tmp_path / "report")]) == 0


@pytest.mark.parametrize("shape", [(2, 4), (1, 2)])
def test_other_kinds_of_features_are_refused(tmp_path, shape):
    sources = [
        open_source(str(record_arm(tmp_path / "one", 2, (TOP,), 1.0, more={"observation.other": (4,)}))),
        open_source(str(record_arm(tmp_path / "other", 2, (TOP,), 1.0, more={"observation.other": shape}))),
    ]
    pad_sources(sources)
    with pytest.raises(UserError, match=r"datasets differ in observation\.other: "):
        unite(sources)


def test_acting_has_the_masks_of_training(arms, runs, planned):
    source, preprocess = planned("act")
    for dataset, name in enumerate(arms):
        policy = load_policy(runs("act"), "cpu", trained_on=name)
        batch = Loader(source, Frames(source), {}, 4, seed=0).batch_of(source.starts[dataset * 4 :][:1])
        expected = preprocess_batch(preprocess, to_float_batch(batch, source.meta, "cpu"))
        got = policy.preprocess(policy.batch_of(policy.blank_observation()))
        for key in (f"{WRIST}{MASK}", "dataset_index"):
            assert torch.equal(got[key], expected[key])


def test_a_resume_without_the_flag_is_refused(arms, runs, tmp_path):
    arm = str(record_arm(tmp_path / "arm", 5, (TOP, WRIST), 1.0))
    with pytest.raises(
        UserError, match=r"in units of the datasets .*: expected --pad_datasets and --dataset_id .*large"
    ):
        train(
            resume_from_checkpoint=str(runs("act").parent / "checkpoint-2"),
            dataset_id=[arm],
            pad_datasets=False,
            output_dir=str(tmp_path / "run"),
        )


def test_a_mask_gets_the_name_that_the_policy_knows(planned):
    source, preprocess = planned("act", rename=[f"{WRIST}=observation.images.hand"])
    batch = Loader(source, Frames(source), {}, 4, seed=0).batch_of(torch.arange(2))
    ready = preprocess_batch(preprocess, to_float_batch(batch, source.meta, "cpu"))
    assert f"observation.images.hand{MASK}" in ready


@pytest.mark.parametrize("policy", ["act", "flow"])
def test_a_resumed_run_is_the_same_run(arms, runs, tmp_path, policy):
    checkpoint = runs(policy)
    before = checkpoint.parent / "checkpoint-2"
    resumed = train(resume_from_checkpoint=str(before), output_dir=str(tmp_path), steps=4)
    expected = load_file(checkpoint / "policy.safetensors")
    got = load_file(resumed.checkpoint / "policy.safetensors")
    assert all(torch.equal(value, got[key]) for key, value in expected.items())


def test_a_resume_on_the_datasets_in_another_order_is_refused(arms, runs, tmp_path):
    with pytest.raises(
        UserError,
        match=r"expected --pad_datasets and --dataset_id .*small .*large, in that order",
    ):
        train(
            resume_from_checkpoint=str(runs("act").parent / "checkpoint-2"),
            dataset_id=arms[::-1],
            output_dir=str(tmp_path),
        )


@pytest.mark.parametrize("policy", ["act", "flow"])
def test_the_policy_acts_for_each_arm(arms, runs, planned, policy):
    checkpoint = runs(policy)
    source, preprocess = planned(policy)
    for dataset, (name, width) in enumerate(zip(arms, (3, 5), strict=True)):
        acting = load_policy(checkpoint, "cpu", trained_on=name)
        cameras = {TOP, WRIST} if dataset == 0 else {TOP}
        assert acting.expected.keys() == {"observation.state", *cameras}
        assert acting.action_width == width

        # The same input as in training, from the arm's own numbers.
        own = open_source(name)
        observation = {"observation.state": own.columns["observation.state"][7].numpy()}
        for key in cameras:
            observation[key] = Frames(own).read(key, torch.tensor([7]))[0].permute(1, 2, 0).numpy()
        row = int(source.starts[dataset * 4]) + 7
        batch = Loader(source, Frames(source), {}, 4, seed=0).batch_of(torch.tensor([row]))
        expected = preprocess(to_float_batch(batch, source.meta, "cpu"))
        got = acting.preprocess(acting.batch_of(observation))
        for key in ("observation.state", TOP, WRIST):
            torch.testing.assert_close(got[key], expected[key], atol=1e-5, rtol=1e-5)

        action = acting.act(observation)
        assert action.shape == (width,)
        scale = (1.0, 100.0)[dataset]
        assert np.all(np.abs(action / scale - 5) < 4)  # in the arm's own units
    assert load_policy(checkpoint, "cpu").action_width == 3  # the first
    assert load_policy(checkpoint, "cpu", trained_on="1").action_width == 5
    assert load_policy(checkpoint, "cpu", trained_on="large").action_width == 5


def test_a_dataset_that_it_was_not_trained_on(made, runs, tmp_path):
    with pytest.raises(
        UserError, match=r"--trained_on none: expected one of the datasets .*: 0 \(.*small\), 1 \(.*large\)"
    ):
        load_policy(runs("act"), "cpu", trained_on="none")
    other = train(**small(dataset_id=str(made("video")), steps=2, output_dir=str(tmp_path))).checkpoint
    with pytest.raises(UserError, match=r"--trained_on 0: .* was not trained with --pad_datasets"):
        load_policy(other, "cpu", trained_on="0")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda info: info.update(datasets=3),
        lambda info: info["datasets"][0].pop("widths"),
        lambda info: info["datasets"][0]["statistics"]["action"].update(mean=["a"]),
    ],
)
def test_a_damaged_record_is_a_line(runs, tmp_path, spoil):
    folder = shutil.copytree(runs("act"), tmp_path / "policy")
    (folder / "manifest.json").unlink()
    edit_json(folder / "training_info.json", spoil)
    with pytest.raises(UserError, match=r"training_info\.json"):
        load_policy(folder, "cpu")


def test_comparing_with_recorded_episodes(arms, runs, capsys):
    for name, width in zip(arms, (3, 5), strict=True):
        command = [str(runs("act")), "--dataset_id", name, "--trained_on", name, "--device", "cpu"]
        assert infer(command) == 0
        assert capsys.readouterr().out.count("joint_") == width


def test_another_arms_episodes_are_refused_with_the_flag(arms, runs, capsys):
    assert infer([str(runs("act")), "--dataset_id", arms[1], "--device", "cpu"]) == 2
    assert "with --trained_on which of them this is" in capsys.readouterr().err


def test_the_report_of_recorded_episodes(arms, runs, tmp_path, capsys):
    for name in arms:
        command = [str(runs("act")), "--dataset_id", name, "--trained_on", name, "--output_dir", str(tmp_path)]
        assert evaluate([*command, "--device", "cpu"]) == 0
        printed = capsys.readouterr()
        assert "action error" in printed.out
        assert "other joints" not in printed.err


def test_episodes_of_each_are_held_out(arms):
    source, _ = padded(arms)
    for fraction, counts in ((0.25, [1, 1]), (0.9, [3, 3])):
        config = TrainConfig(dataset_id=arms, val_fraction=fraction)
        held_out = split_episodes(source, config).held_out
        assert source.dataset_of_episode[held_out].bincount().tolist() == counts
    single = unite([open_source(name, episodes="0") for name in (arms[0], arms[0])])
    with pytest.raises(
        UserError, match=r"--val_fraction 0\.5: each dataset has one episode, so that none can be held out"
    ):
        split_episodes(single, TrainConfig(dataset_id=arms, val_fraction=0.5))


def test_the_refusal_names_the_flag(arms, tmp_path):
    with pytest.raises(
        UserError,
        match=r"datasets differ in .*Pass --pad_datasets to pad what one of them lacks, or train on each by itself",
    ):
        unite([open_source(name) for name in arms])
    slower = str(record_arm(tmp_path / "slower", 3, (TOP,), 1.0, fps=5))
    sources = [open_source(arms[0]), open_source(slower)]
    pad_sources(sources)
    with pytest.raises(UserError, match=r"datasets differ in fps: .* has 10, .* has 5\. Train on each by itself"):
        unite(sources)


def test_the_flag_with_one_dataset_or_a_simulation(arms):
    with pytest.raises(UserError, match=r"--pad_datasets makes several datasets alike, got one"):
        TrainConfig(dataset_id=arms[:1], pad_datasets=True)
    with pytest.raises(UserError, match=r"--pad_datasets: a simulation has the features of one robot"):
        TrainConfig(dataset_id=arms, pad_datasets=True, eval_env="metaworld")
