"""A base takes what it can of another robot's dataset: narrower vectors, some of its cameras, pictures of any size.

The tests with networks build tiny SmolVLA, pi0.5 and X-VLA bases, and need LeRobot's extras for those.
"""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_policy_config, make_pre_post_processors
from lerobot.processor import NormalizerProcessorStep, PolicyProcessorPipeline, RenameObservationsProcessorStep

import evaluate
import infer
from errors import UserError, read_json
from exchange.lerobot_runs import to_lerobot
from helpers.paths import ROOT
from helpers.recording import record, usual_scheduling
from helpers.runs import assert_same_run, small
from helpers.vla_bases import CAMERAS, lerobot_train, make_base
from policy.loaded import LoadedPolicy, expected_observation, load_policy, optional_cameras
from processors.bases import match_statistics, pair_cameras, width_problems
from processors.features import feature_problems
from processors.pipelines import adapt_processors, load_processors
from train import train
from training.plan import plan_run

DRAWER = str(ROOT / "examples" / "datasets" / "metaworld_drawer_open")  # one camera, 4 numbers of state and action
CORNER = "observation.images.corner2"
STATE = "observation.state"
RENAME = {CORNER: CAMERAS[0]}
PASTED = [f"{CORNER}={CAMERAS[0]}"]
TOP = "observation.images.top"
FRONT = "observation.images.front"
WRIST = "observation.images.wrist"


def picture(height: int = 256, width: int = 256) -> PolicyFeature:
    return PolicyFeature(FeatureType.VISUAL, (3, height, width))


def numbers(count: int, kind=FeatureType.STATE) -> PolicyFeature:
    return PolicyFeature(kind, (count,))


def config_of(kind: str, cameras=CAMERAS, joints: int = 32, **settings):
    """A policy's config, as a base has it. Needs no network."""
    inputs = {camera: picture() for camera in cameras} | {STATE: numbers(joints)}
    outputs = {"action": numbers(joints, FeatureType.ACTION)}
    return make_policy_config(kind, device="cpu", input_features=inputs, output_features=outputs, **settings)


def problems_of(config, cameras, joints: int = 4, **settings) -> list[str]:
    """What such a base cannot take of a dataset with these cameras."""
    inputs = {camera: picture(64, 96) for camera in cameras} | {STATE: numbers(joints)}
    outputs = {"action": numbers(joints, FeatureType.ACTION)}
    return feature_problems(config, inputs, outputs, "base", {}, **settings)


def flags_in(message: str, flag: str) -> list[str]:
    """The values of a ready-made flag in a message."""
    return shlex.split(re.search(rf"--{flag} (.*?)(?:, or | if |$)", message)[1])


# Names of cameras


@pytest.mark.parametrize(
    ("cameras", "wanted", "pairs"),
    [
        ("corner2", "camera1 camera2 camera3", {"corner2": ("camera1", "by order")}),
        ("front wrist", "camera1 camera2", {"front": ("camera1", "by order"), "wrist": ("camera2", "by order")}),
        ("cam_2 cam_1", "camera1 camera2", {"cam_2": ("camera2", "by name"), "cam_1": ("camera1", "by name")}),
        (
            "cam_high cam_left_wrist cam_right_wrist",
            "base_0_rgb left_wrist_0_rgb right_wrist_0_rgb",
            {
                "cam_high": ("base_0_rgb", "by order"),
                "cam_left_wrist": ("left_wrist_0_rgb", "by name"),
                "cam_right_wrist": ("right_wrist_0_rgb", "by name"),
            },
        ),
        ("wrist top", "top_view gripper", {"wrist": ("gripper", "by order"), "top": ("top_view", "by name")}),
        ("gripper_cam", "camera1 grip", {"gripper_cam": ("grip", "by name")}),
        ("a b c", "camera1", {"a": ("camera1", "by order")}),
        ("", "camera1", {}),
        ("a", "", {}),
    ],
)
def test_cameras_are_paired_by_likeness_and_then_in_order(cameras, wanted, pairs):
    assert pair_cameras(cameras.split(), wanted.split()) == pairs


def test_auto_is_recorded_as_the_pairs_that_it_found(made, tmp_path, capsys):
    """A resume is the same run, whether it is asked for `auto` again or not."""
    base = train(
        **small("flow", dataset_id=[str(made("video"))], steps=1), output_dir=str(tmp_path / "base")
    ).checkpoint
    settings = {**small("flow", dataset_id=[str(made("front"))]), "policy_args": None, "policy_path": str(base)}
    end = train(**{**settings, "quiet": False}, rename=["auto"], output_dir=str(tmp_path / "run")).checkpoint
    assert f"\n--rename auto: {FRONT} -> {TOP} (by order)\n" in capsys.readouterr().out
    assert read_json(end / "train_config.json")["rename"] == [f"{FRONT}={TOP}"]
    for name, given in (("again", {"rename": ["auto"]}), ("plain", {})):
        train(
            resume_from_checkpoint=str(end.with_name("checkpoint-2")),
            output_dir=str(tmp_path / name),
            quiet=True,
            **given,
        )
        assert_same_run(tmp_path / "run", tmp_path / name, 4)
        assert "another run" not in capsys.readouterr().err

    # The base itself, on the same dataset.
    flags = [str(base), "--dataset_id", str(made("front")), "--device", "cpu", "--rename", "auto"]
    for command, more in ((infer, []), (evaluate, ["--output_dir", str(tmp_path / "report")])):
        assert command.main([*flags, *more]) == 0
        assert f"--rename auto: {FRONT} -> {TOP} (by order)" in capsys.readouterr().err


def test_auto_needs_cameras_to_pair_with(made, tmp_path):
    settings = small("flow", dataset_id=[str(made("video"))], rename=["auto"], output_dir=str(tmp_path / "run"))
    with pytest.raises(
        UserError, match=r"--rename auto pairs the cameras with those of a base: expected --policy_path"
    ):
        plan_run(settings)


def test_a_base_renames_as_it_was_trained(made, tmp_path):
    """So does a checkpoint of lerobot-train with its rename_map, which is kept in the same step."""
    renamed = [f"{TOP}=observation.images.cam"]
    settings = small("flow", dataset_id=[str(made("video"))], steps=1)
    base = train(**settings, rename=renamed, output_dir=str(tmp_path / "base")).checkpoint
    with plan_run(
        {**settings, "policy_args": None, "policy_path": str(base), "output_dir": str(tmp_path / "run")}
    ) as plan:
        assert plan.notes == (f"renamed as the base was trained: {TOP} -> observation.images.cam",)
        assert plan.config.rename == renamed


def test_a_policy_is_served_under_the_names_of_its_clients(made, tmp_path, caplog):
    settings = small("flow", dataset_id=[str(made("video"))], steps=1, rename=[f"{TOP}=observation.images.cam"])
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    names = [f"{FRONT}={TOP}", f"observation.arm={STATE}"]
    policy = load_policy(checkpoint, device="cpu", task="push", rename=names)
    assert policy.expected.keys() == {FRONT, "observation.arm"}
    values = {"picture": np.full((64, 96, 3), 7, np.uint8), "arm": np.arange(3)}
    plain = load_policy(checkpoint, device="cpu", task="push")
    torch.manual_seed(0)  # of the noise
    action = policy.act({FRONT: values["picture"], "observation.arm": values["arm"]})
    torch.manual_seed(0)
    same = plain.act({TOP: values["picture"], STATE: values["arm"]})
    assert np.array_equal(action, same)
    without_task = load_policy(checkpoint, device="cpu")
    for _ in range(2):
        without_task.act({TOP: values["picture"], STATE: values["arm"]})
    told = [record.getMessage() for record in caplog.records]
    assert told == ["the policy does several tasks, and none is given: expected one like ['lift', 'push']"]
    with pytest.raises(
        UserError, match=rf"^--rename {FRONT}={WRIST}: the policy takes no {WRIST}.*It takes {TOP}, {STATE}$"
    ):
        load_policy(checkpoint, device="cpu", rename=[f"{FRONT}={WRIST}"])
    with pytest.raises(UserError, match=r"^--rename auto pairs .* Pass OLD=NEW$"):
        load_policy(checkpoint, device="cpu", rename=["auto"])
    with pytest.raises(
        UserError, match=f"^--rename mine={TOP}: expected names that begin with observation., got mine$"
    ):
        load_policy(checkpoint, device="cpu", rename=[f"mine={TOP}"])


# What a base takes, by its config


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05", "pi0_fast", "xvla", "wall_x"])
def test_vectors_and_cameras_may_be_fewer(kind):
    config = config_of(kind, joints=20)
    assert problems_of(config, CAMERAS[1:2]) == []
    assert problems_of(config, [*CAMERAS, "observation.images.more"]) == []  # it is not decoded
    (message,) = problems_of(config, [CAMERAS[1], WRIST])
    assert message.startswith(
        f"base takes no {WRIST}: expected some of {', '.join(CAMERAS)}, got {CAMERAS[1]}, {WRIST}. "
    )
    assert flags_in(message, "rename") == [f"{WRIST}={CAMERAS[0]}"]
    assert flags_in(message, "observations") == [CAMERAS[1], STATE]
    (message,) = problems_of(config, [])
    assert message.startswith("it has no camera: expected some of ")
    # A run that is resumed has the statistics of its own dataset.
    (state, action) = problems_of(config, CAMERAS[:1], fine_tune=False)
    assert state.startswith(f"{STATE}: expected 20 numbers, as in base, got 4 numbers")
    assert action.startswith("action: expected 20 numbers, as in base, got 4 numbers")


@pytest.mark.parametrize("kind", ["act", "multi_task_dit", "evo1"])
def test_other_policies_need_each_of_their_cameras(kind):
    config = config_of(kind, joints=4)
    (message,) = problems_of(config, CAMERAS[:2])
    expected = f"it has no {CAMERAS[2]}, which base was trained on: expected {', '.join(CAMERAS)}, got {', '.join(CAMERAS[:2])}."
    assert message == f"{expected} Pass a dataset that has it, or train a new policy"
    (message,) = problems_of(config, [*CAMERAS[:2], WRIST])
    assert flags_in(message, "rename") == [f"{WRIST}={CAMERAS[2]}"]
    assert "--observations" not in message


def test_policies_that_do_not_pad_need_their_widths():
    (state, action) = problems_of(config_of("act"), CAMERAS)
    assert state.startswith(f"{STATE}: expected 32 numbers, as in base, got 4 numbers")
    assert action.startswith("action: expected 32 numbers, as in base, got 4 numbers")


@pytest.mark.parametrize("kind", ["smolvla", "pi05"])
def test_vectors_wider_than_a_policy_pads_to_are_refused(kind):
    state, action = width_problems(config_of(kind, joints=40))
    assert state.startswith(
        f"{STATE}: expected at most 32 numbers, to which policy {kind} pads, got 40. Train a new policy"
    )
    assert state.endswith(f"with --policy {kind} --policy_args max_state_dim=40")
    assert action.endswith(f"with --policy {kind} --policy_args max_action_dim=40")
    assert width_problems(config_of(kind, joints=32)) == []


def test_an_action_space_of_fixed_width_needs_actions_of_that_width():
    (message,) = width_problems(config_of("xvla", joints=4, action_mode="ee6d"))
    assert message.startswith(
        "action: expected 20 numbers, as action_mode=ee6d of policy xvla has them, got 4. Add action_mode="
    )
    again = dict(pair.split("=") for pair in re.search(r"Add (\S+ \S+) to --policy_args", message)[1].split())
    assert width_problems(config_of("xvla", joints=4, action_mode=again["action_mode"], max_action_dim=20)) == []
    assert width_problems(config_of("xvla", joints=7, action_mode="franka_joint7")) == []
    with pytest.raises(UserError, match=r"^--policy_args action_mode: expected one of agibot_ee6d, .*, got ee7d$"):
        width_problems(config_of("xvla", joints=20, action_mode="ee7d"))


# What a saved policy takes, by its config and its statistics


def preprocessor_of(config, statistics: dict, rename: dict):
    """A preprocessor as lerobot-train leaves it: with the base's features, and statistics under the dataset's names."""
    features = {**config.input_features, **config.output_features}
    normalizer = NormalizerProcessorStep(features=features, norm_map=config.normalization_mapping, stats=statistics)
    return PolicyProcessorPipeline(steps=[RenameObservationsProcessorStep(rename_map=rename), normalizer])


def statistics_of(**widths: int) -> dict:
    return {
        name: {"mean": np.zeros(width), "std": np.ones(width), "count": np.ones(1)} for name, width in widths.items()
    }


def test_a_policy_takes_the_cameras_and_widths_that_it_was_trained_on():
    config = config_of("smolvla")
    statistics = statistics_of(**{STATE: 4, "action": 4, CORNER: 3})
    preprocessor = preprocessor_of(config, statistics, RENAME)
    match_statistics(config, preprocessor)
    assert expected_observation(config, preprocessor) == {CORNER: ("uint8", (None, None, 3)), STATE: ("float", (4,))}
    assert optional_cameras(config, preprocessor) == set()
    assert preprocessor.steps[1].features[STATE].shape == (4,)


def test_a_base_that_does_not_say_what_it_was_trained_on_does_with_one_camera():
    config = config_of("pi05", joints=4)
    preprocessor = preprocessor_of(config, statistics_of(**{STATE: 4}), {})
    assert optional_cameras(config, preprocessor) == set(CAMERAS)
    policy = LoadedPolicy.__new__(LoadedPolicy)
    policy.expected = expected_observation(config, preprocessor)
    policy.optional = optional_cameras(config, preprocessor)
    assert policy.expected.keys() == {*CAMERAS, STATE}
    assert policy.needed({CAMERAS[2], STATE}).keys() == {CAMERAS[2], STATE}
    assert policy.needed({STATE}).keys() == {*CAMERAS, STATE}


def test_a_policy_that_does_not_resize_takes_pictures_of_its_own_size():
    config = config_of("act", joints=4)
    preprocessor = preprocessor_of(config, {}, {})
    assert expected_observation(config, preprocessor)[CAMERAS[0]] == ("uint8", (256, 256, 3))
    assert optional_cameras(config, preprocessor) == set()


def test_evo1_pads_the_statistics_of_another_robot(tmp_path):
    """What EVO1's pipelines have that no file holds is there after a resume too."""
    numbers_of = {"min": -1.0, "max": 1.0}
    for joints in (7, 4):
        config = config_of("evo1", joints=joints)
        stats = {
            key: {name: torch.full((joints,), value) for name, value in numbers_of.items()} for key in (STATE, "action")
        }
        (tmp_path / str(joints)).mkdir()
        if joints == 7:
            pipelines = make_pre_post_processors(config, dataset_stats=stats)
        else:
            pipelines = adapt_processors(tmp_path / "7", config, stats, None, {})
        for pipeline in pipelines:
            pipeline.save_pretrained(tmp_path / str(joints))
    again, _ = load_processors(tmp_path / "4", "cpu", config=config)
    preprocess, postprocess = pipelines
    made = [
        pipeline({STATE: torch.full((2, 4), 0.5), "action": torch.full((2, 50, 4), 0.5), "task": ["a", "b"], "more": 7})
        for pipeline in (preprocess, again)
    ]
    assert made[0][STATE].shape == (2, config.max_state_dim)
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in (STATE, "action"))
    assert postprocess(torch.zeros(2, config.max_action_dim)).shape == (2, 4)


@pytest.mark.slow
def test_a_renamed_camera_of_lerobot_train_stays_as_it_was_trained(made, tmp_path, capsys):
    """lerobot-train does not find the statistics of what it renames, and trains on the pictures as they are."""
    settings = small("act", dataset_id=[str(made("video"))], steps=1)
    base = train(**settings, output_dir=str(tmp_path / "base")).checkpoint
    lerobot_train(
        "act", f"--policy.path={base}", f"--dataset.root={made('front')}", "--dataset.repo_id=local/front", "--batch_size=2",
        "--policy.push_to_hub=false", "--policy.device=cpu", "--steps=2", "--save_freq=1", "--num_workers=0",
        f"--output_dir={tmp_path / 'theirs'}", f"--rename_map={json.dumps({FRONT: TOP})}",
    )  # fmt: skip
    theirs = tmp_path / "theirs" / "checkpoints" / "000001"
    ready = load_policy(theirs, device="cpu").preprocess(
        {FRONT: torch.full((1, 3, 64, 96), 0.5), STATE: torch.zeros(1, 3)}
    )
    assert (ready[TOP] == 0.5).all()
    assert train(resume_from_checkpoint=str(theirs), output_dir=str(tmp_path / "resumed"), quiet=True).steps == 2
    assert f"lerobot-train did not normalise {TOP}, whose statistics have the dataset's name" in capsys.readouterr().out
    tuned = train(
        dataset_id=str(made("front")),
        policy_path=str(theirs),
        steps=1,
        device="cpu",
        quiet=True,
        output_dir=str(tmp_path / "tuned"),
    )
    ready = load_policy(tuned.checkpoint, device="cpu").preprocess(
        {FRONT: torch.full((1, 3, 64, 96), 0.5), STATE: torch.zeros(1, 3)}
    )
    assert not (ready[TOP] == 0.5).any()


# Bases with networks


@pytest.fixture(scope="module", params=["smolvla", "pi05", "xvla"])
def base(request, tmp_path_factory):
    """(kind, folder) of a tiny base with 3 cameras, of 6 joints (SmolVLA) or 32."""
    pytest.importorskip("transformers", reason="transformers is not installed ('lerobot[smolvla,pi,xvla]==0.6.1')")
    kind = request.param
    with pytest.MonkeyPatch.context() as patch:  # pi0.5's network stays small as long as the fixture is in use
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield kind, make_base(tmp_path_factory.mktemp("bases"), kind, patch, joints=6 if kind == "smolvla" else 32)


def on_drawer(base, **settings) -> dict:
    """Settings of a run of seconds from a base."""
    _, folder = base
    return {
        "dataset_id": DRAWER,
        "episodes": "0:2",
        "policy_path": str(folder),
        "rename": PASTED,
        "device": "cpu",
        "batch_size": 2,
        "steps": 8,
        "save_freq": 4,
        "log_freq": 4,
        **settings,
    }


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """(kind, checkpoint-8) of a run from a base."""
    output = tmp_path_factory.mktemp("tuned") / "run"
    return base[0], train(**on_drawer(base), output_dir=str(output), quiet=True).checkpoint


def observation() -> dict:
    pixels = np.random.default_rng(0).integers(0, 255, (128, 128, 3)).astype(np.uint8)
    return {CORNER: pixels, STATE: np.array([0.1, 0.6, 0.2, 1.0]), "task": "Open a drawer"}


def our_action(folder) -> np.ndarray:
    policy = load_policy(folder, device="cpu")
    torch.manual_seed(0)
    return policy.act(observation())


def lerobots_action(folder) -> np.ndarray:
    """What LeRobot does with a policy's folder: its loading code, and its processors."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.policies import make_policy, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    config.device = "cpu"
    policy = make_policy(config, ds_meta=LeRobotDatasetMetadata("local/drawer", root=DRAWER), rename_map=RENAME).eval()
    preprocess, postprocess = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    values = observation()
    batch = {
        CORNER: torch.from_numpy(values[CORNER]).permute(2, 0, 1)[None].float() / 255,
        STATE: torch.tensor(values[STATE], dtype=torch.float32)[None],
        "task": values["task"],
    }
    torch.manual_seed(0)
    return postprocess(policy.select_action(preprocess(batch)))[0].numpy()


def test_a_base_is_fine_tuned_on_another_robot(base, tuned, tmp_path, capsys):
    """The weights are the base's, the widths and the statistics the dataset's; a resume is exact; LeRobot acts the same."""
    _, checkpoint = tuned
    saved = read_json(checkpoint / "config.json")
    assert saved["output_features"]["action"]["shape"] == [4]
    assert saved["input_features"][STATE]["shape"] == [4]
    assert set(saved["input_features"]) >= set(CAMERAS)
    policy = load_policy(checkpoint, device="cpu")
    assert policy.expected == {CORNER: ("uint8", (None, None, 3)), STATE: ("float", (4,))}
    statistics = read_json(ROOT / DRAWER / "meta" / "stats.json")
    (step,) = (step for step in policy.preprocess.steps if isinstance(step, NormalizerProcessorStep))
    assert step.state_dict()[f"{STATE}.mean"].tolist() == pytest.approx(statistics[STATE]["mean"])

    train(resume_from_checkpoint=str(checkpoint.with_name("checkpoint-4")), output_dir=str(tmp_path / "resumed"))
    assert (
        f"cameras of the policy that stay empty, since {DRAWER} has none of that name: {', '.join(CAMERAS[1:])}\n"
        in (capsys.readouterr().out)
    )
    assert_same_run(checkpoint.parent, tmp_path / "resumed", 8)
    assert np.array_equal(our_action(checkpoint), lerobots_action(checkpoint))


def test_datasets_of_two_robots(base, tmp_path):
    """With --pad_datasets: a camera that a robot lacks is masked, and X-VLA gets the dataset's number as its domain."""
    kind, _ = base
    with usual_scheduling():
        arms = [
            str(record(tmp_path / "three", cameras=("camera1", "camera2", "camera3"))),
            str(record(tmp_path / "one", cameras=("camera1",), state_dims=5)),
        ]
    settings = on_drawer(base, dataset_id=arms, rename=None, episodes=None, pad_datasets=True, quiet=True, steps=4)
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    for number, cameras in enumerate((3, 1)):
        policy = load_policy(checkpoint, device="cpu", trained_on=arms[number])
        given = policy.blank_observation("lift", pixels=64)
        assert policy.act(given).shape == (policy.action_width,)
        ready = policy.preprocess(policy.batch_of(given))
        assert ready["dataset_index"].tolist() == [number]
        assert sum(key in given for key in CAMERAS) == cameras
        if kind == "smolvla":
            _, masks = policy.policy.prepare_images(ready)
            assert [mask.item() for mask in masks] == [number_of_camera < cameras for number_of_camera in range(3)]
        if kind == "xvla":
            assert ready["domain_id"].tolist() == [number]


def test_what_a_refusal_offers_works(base, tmp_path):
    with usual_scheduling():
        one, more = (
            record(tmp_path / name, cameras=(first, "wrist")) for name, first in (("one", "camera1"), ("two", "top"))
        )
    settings = on_drawer(base, rename=None, episodes="0", quiet=True, output_dir=str(tmp_path / "run"))
    for dataset in (one, more):
        with pytest.raises(UserError, match=r"takes no observation\.images") as error:
            plan_run({**settings, "dataset_id": str(dataset)})
        with plan_run({**settings, "dataset_id": str(dataset), "rename": flags_in(str(error.value), "rename")}) as plan:
            assert len(plan.source.videos) == 2
            assert plan.policy.empty == CAMERAS[2:]
        if "--observations" in str(error.value):
            with plan_run(
                {**settings, "dataset_id": str(dataset), "observations": flags_in(str(error.value), "observations")}
            ) as plan:
                assert set(plan.source.videos) == {CAMERAS[0]}
                assert plan.policy.empty == CAMERAS[1:]


def test_commands_take_a_fine_tuned_base(tuned, tmp_path, capsys):
    _, checkpoint = tuned
    flags = [str(checkpoint), "--dataset_id", DRAWER, "--device", "cpu"]
    assert infer.main([*flags, "--episode", "1"]) == 0
    assert evaluate.main([*flags, "--episodes", "1", "--output_dir", str(tmp_path)]) == 0
    importance = read_json(tmp_path / "open_loop" / "numbers.json")["permutation_importance"]
    assert set(importance) == {CORNER, STATE}
    capsys.readouterr()


@pytest.mark.slow
def test_lerobot_train_goes_on_with_a_fine_tuned_base(tuned, tmp_path):
    kind, checkpoint = tuned
    folder = to_lerobot(checkpoint.with_name("checkpoint-4"), tmp_path / "there")
    model = folder / "pretrained_model"
    assert np.array_equal(our_action(model), our_action(checkpoint.with_name("checkpoint-4")))
    lerobot_train(kind, "--resume=true", f"--config_path={model / 'train_config.json'}", "--num_workers=0")
    assert read_json(tmp_path / "there/checkpoints/000008/training_state/training_step.json")["step"] == 8


def run_theirs(base, output, *arguments: str):
    """checkpoints/000002 of a run of lerobot-train from a base, with its rename_map."""
    kind, folder = base
    lerobot_train(
        kind, f"--policy.path={folder}", f"--dataset.root={DRAWER}", "--dataset.repo_id=local/drawer",
        "--dataset.episodes=[0,1]", "--policy.push_to_hub=false", "--policy.device=cpu", "--batch_size=2", "--steps=4",
        "--save_freq=2", "--num_workers=0", f"--output_dir={output}", f"--rename_map={json.dumps(RENAME)}", *arguments,
    )  # fmt: skip
    return output / "checkpoints" / "000002"


def check_theirs(theirs, tmp_path) -> None:
    """A checkpoint of lerobot-train acts here as there, is resumed, and is a base."""
    assert np.array_equal(our_action(theirs), lerobots_action(theirs / "pretrained_model"))
    assert load_policy(theirs, device="cpu").expected == {CORNER: ("uint8", (None, None, 3)), STATE: ("float", (4,))}
    resumed = train(resume_from_checkpoint=str(theirs), output_dir=str(tmp_path / "resumed"), quiet=True, save_freq=1)
    assert resumed.steps == 4
    part = train(
        resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-3"), output_dir=str(tmp_path / "part"), quiet=True
    )
    assert_same_run(resumed.checkpoint.parent, part.checkpoint.parent, 4)
    settings = {"dataset_id": DRAWER, "episodes": "0", "device": "cpu", "batch_size": 2, "steps": 1, "quiet": True}
    tuned = train(**settings, policy_path=str(theirs), output_dir=str(tmp_path / "tuned")).checkpoint
    assert read_json(tuned / "train_config.json")["rename"] == PASTED


@pytest.mark.slow
def test_a_run_of_lerobot_train_from_a_base(base, tmp_path):
    check_theirs(run_theirs(base, tmp_path / "theirs"), tmp_path)


@pytest.mark.slow
def test_a_lora_run_of_lerobot_train_from_a_base(base, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (uv pip install peft)")
    targets = ["--peft.target_modules=.*transformer.*fc1"] if base[0] == "xvla" else []  # LeRobot names none for X-VLA
    check_theirs(run_theirs(base, tmp_path / "theirs", "--peft.method_type=LORA", "--peft.r=4", *targets), tmp_path)


def test_adapters_of_a_base(base, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed (uv pip install peft)")
    args = ["target_modules=all-linear"] if base[0] == "xvla" else None
    settings = on_drawer(base, steps=2, save_freq=1, peft="lora", peft_r=4, peft_args=args, quiet=True)
    end = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    train(resume_from_checkpoint=str(end.with_name("checkpoint-1")), output_dir=str(tmp_path / "resumed"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "resumed", 2)
    assert np.array_equal(our_action(end), lerobots_action(end))
