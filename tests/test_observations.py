"""What the policy sees is chosen and told: --observations, --rename and the names of joints."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

import evaluate
import infer
from data import open_dataset
from data.names import joint_names, order_warnings
from data.observations import choose_observations
from data.opening import open_metadata, open_source
from errors import UserError
from helpers import recording
from helpers.dataset_edits import edit_json
from helpers.recording import record, usual_scheduling
from helpers.runs import small
from policy.loaded import load_policy
from train import train
from training.changes import describe_data
from training.open_loop import open_for_policy, recorded_observations
from training.plan import plan_run

TOP = "observation.images.top"
FRONT = "observation.images.front"
WRIST = "observation.images.wrist"
STATE = "observation.state"
FRONT_IS_TOP = {"rename": [f"{FRONT}={TOP}"]}


def flags_in(message: str) -> dict[str, list[str]]:
    """The ready-made flags in a message, as keywords of train(): pasted as they stand."""
    flags = {}
    name = None
    pasted = re.search(r"(?:[Pp]ass|without[:,]|out:) (--\w+ .*)", message)[1]
    for word in shlex.split(re.split(r", or | if ", pasted)[0]):
        if word.startswith("--"):
            name = word.removeprefix("--")
            flags[name] = []
        else:
            flags[name].append(word)
    return flags


@pytest.fixture(scope="module")
def smaller(tmp_path_factory):
    """A dataset like `video` whose pictures are smaller."""
    with pytest.MonkeyPatch.context() as patch, usual_scheduling():
        patch.setattr(recording, "HEIGHT", 48)
        patch.setattr(recording, "WIDTH", 72)
        return record(tmp_path_factory.mktemp("smaller") / "smaller")


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A checkpoint trained on the camera `top` and the state."""
    output = tmp_path_factory.mktemp("trained") / "run"
    return train(**small("flow", dataset_id=str(made("video")), steps=1), output_dir=str(output)).checkpoint


@pytest.fixture(scope="module")
def trained_on_two(made, tmp_path_factory):
    """A checkpoint trained on two datasets, in which the camera has two names."""
    output = tmp_path_factory.mktemp("trained") / "two"
    datasets = [str(made("video")), str(made("front"))]
    return train(**small("flow", dataset_id=datasets, steps=1), **FRONT_IS_TOP, output_dir=str(output)).checkpoint


def planned(tmp_path, datasets, policy: str = "flow", **settings):
    """The plan of a run, which is not built."""
    datasets = datasets if isinstance(datasets, list) else [datasets]
    settings = {**small(policy, dataset_id=[str(name) for name in datasets]), **settings}
    return plan_run({**settings, "output_dir": str(tmp_path / "run")})


def refusal(tmp_path, datasets, policy: str = "flow", **settings) -> str:
    with pytest.raises(UserError) as error, planned(tmp_path, datasets, policy, **settings):
        pass
    return str(error.value)


def base(checkpoint: Path) -> dict:
    """Settings of a run that is fine-tuned from a checkpoint."""
    return {"policy_path": str(checkpoint), "policy_args": None}


# --observations


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ([TOP, STATE], [TOP, STATE]),
        (["top", "state"], [TOP, STATE]),
        (["observation.images.*"], [TOP, WRIST]),
        (["*ist", "observation.s*"], [WRIST, STATE]),
        (["*"], [TOP, WRIST, STATE]),
    ],
)
def test_observations_are_chosen_by_name_or_pattern(made, patterns, chosen):
    meta = open_metadata(str(made("two_cameras")))
    left_out = choose_observations(meta, patterns)
    assert {key for key in meta.features if key.startswith("observation.")} == set(chosen)
    assert {key for key in meta.stats if key.startswith("observation.")} == set(chosen)
    assert set(left_out) == {TOP, WRIST, STATE} - set(chosen)
    assert "action" in meta.features


@pytest.mark.parametrize("pattern", ["tip", "observation.images.tip", "wrsit*", "action", "front"])
def test_a_pattern_that_matches_nothing_is_refused(made, pattern):
    with pytest.raises(UserError, match=r"^--observations .*: no such observation in dataset two_cameras") as error:
        open_source(str(made("two_cameras")), observations=["state", pattern])
    assert str(error.value).endswith(f"There are {TOP}, {WRIST}, {STATE}")
    if "tip" in pattern:
        assert f"did you mean {pattern.replace('tip', 'top')!r}?" in str(error.value)


def test_batches_hold_the_same_bits_for_what_was_chosen(made):
    for name in ("two_cameras", "many_files"):
        with open_dataset(made(name)) as whole, open_dataset(made(name), observations=["wrist", "state"]) as chosen:
            rows = [3, 0, 20]
            expected = whole[rows]
            batch = chosen[rows]
            assert batch.keys() == expected.keys() - {TOP}
            for key, value in batch.items():
                assert torch.equal(value, expected[key]) if isinstance(value, torch.Tensor) else value == expected[key]


def without_wrist_files(root: Path, described: bool) -> Path:
    """Remove a camera's videos, and what meta/episodes says of them."""
    shutil.rmtree(root / "videos" / WRIST)
    if not described:
        (path,) = (root / "meta" / "episodes").glob("*/*.parquet")
        table = pq.read_table(path)
        pq.write_table(table.drop([name for name in table.column_names if name.startswith(f"videos/{WRIST}")]), path)
    return root


@pytest.mark.parametrize("described", [True, False])
def test_a_camera_without_files_can_be_left_out(tmp_path, copy_of, described):
    root = without_wrist_files(copy_of("two_cameras"), described)
    message = refusal(tmp_path, root)
    assert WRIST in message
    with planned(tmp_path, root, **flags_in(message)) as plan:
        assert set(plan.source.videos) == {TOP}
        assert set(plan.policy.config.input_features) == {TOP, STATE}


def declare(root: Path, key: str, **facts) -> None:
    edit_json(root / "meta" / "info.json", lambda info: info["features"].update({key: facts}))


def test_a_declared_camera_without_a_column(tmp_path, copy_of):
    root = copy_of("video")
    declare(root, "observation.images.ghost", dtype="image", shape=[64, 96, 3], names=None)
    message = refusal(tmp_path, root)
    assert "its table has no column observation.images.ghost, which info.json lists" in message
    assert flags_in(message) == {"observations": [TOP, STATE]}
    with planned(tmp_path, root, **flags_in(message)) as plan:
        assert set(plan.policy.config.input_features) == {TOP, STATE}


def test_an_observation_that_cannot_be_read_can_be_left_out(tmp_path, copy_of, trained):
    root = copy_of("video")
    declare(root, "observation.points", dtype="pointcloud", shape=None)
    for settings in ({}, {"observations": ["points", "state"]}):
        message = refusal(tmp_path, root, **settings)
        assert "feature observation.points: expected a dtype such as float32" in message
        assert flags_in(message) == {"observations": [TOP, STATE]}
    source = open_source(str(root), observations=["top", "state"])
    assert source.problems == []
    assert source.left_out == ["observation.points"]
    declare(root, "action", dtype="pointcloud", shape=[3])
    assert "feature action: expected a dtype" in refusal(tmp_path, root, observations=["top", "state"])


def test_a_policy_that_lacks_what_the_flag_left_out_says_so(tmp_path, made, trained):
    message = refusal(tmp_path, made("two_cameras"), "act", observations=["top"])
    assert "no observation.state, which policy act needs. Add observation.state to --observations" in message
    message = refusal(tmp_path, made("two_cameras"), **base(trained), observations=["wrist", "state"])
    assert message.endswith(f"Add {TOP} to --observations")
    message = refusal(tmp_path, made("two_cameras"), observations=["top"], rename=[f"{WRIST}=observation.images.hand"])
    assert message.endswith(f"--rename {WRIST}: it has no such observation. Add {WRIST} to --observations")


def test_a_resumed_run_keeps_its_observations(tmp_path, made):
    settings = small("flow", dataset_id=str(made("two_cameras")), steps=2, save_freq=1, observations=["top", "state"])
    first = train(**settings, output_dir=str(tmp_path / "run")).checkpoint.with_name("checkpoint-1")
    with plan_run({"resume_from_checkpoint": str(first), "output_dir": str(tmp_path / "run")}) as plan:
        assert set(plan.source.videos) == {TOP}
        assert not [warning for warning in plan.warnings if warning.startswith(("dataset", "--"))]
    resumed = {"resume_from_checkpoint": str(first), "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match=f"it has no {TOP}.* Add {TOP} to --observations"):
        plan_run({**resumed, "observations": ["wrist", "state"]})
    with plan_run({**resumed, "observations": ["*"]}) as plan:
        assert set(plan.source.videos) == {TOP}
        assert plan.notes == (f"not decoded, since the policy does not take it: {WRIST}",)
        assert [
            warning for warning in plan.warnings if warning.startswith("--observations: ['top', 'state'] -> ['*']; ")
        ]


@pytest.mark.parametrize("name", ["input_features", "output_features"])
def test_features_are_no_policy_args(tmp_path, made, trained, name):
    for settings in ({}, {"policy_path": str(trained)}):
        message = refusal(tmp_path, made("video"), **settings, policy_args=[f"{name}={{}}"])
        assert message.startswith(f"--policy_args {name}: a policy's features are those of the dataset. Pass --observ")


# Unused observations


def test_what_a_base_does_not_take_is_told_and_not_decoded(tmp_path, made, trained):
    with planned(tmp_path, made("two_cameras"), **base(trained)) as plan:
        assert set(plan.source.videos) == {TOP}
        assert set(plan.source.meta.features) & {TOP, WRIST, STATE} == {TOP, STATE}
        (note,) = plan.notes
        assert note.startswith(f"not decoded, since the policy does not take it: {WRIST}. ")
        assert flags_in(note) == {"observations": [TOP, STATE]}
        whole = open_source(str(made("two_cameras")))  # a resume of an older version compares this hash
        assert plan.data == describe_data(whole, plan.held_out)
    with planned(tmp_path, made("two_cameras"), **base(trained), **flags_in(note)) as plan:
        assert not plan.notes


def test_states_that_a_policy_ignores_are_told(tmp_path, copy_of):
    root = copy_of("no_camera")
    rename_feature(root, STATE, "observation.velocity", keep=True)
    with planned(tmp_path, root, "act") as plan:
        assert plan.notes == ("policy act looks at observation.state and cameras, not at observation.velocity",)


def rename_feature(root: Path, old: str, new: str, keep: bool = False) -> None:
    """Rename a column of the table, or copy it, and all that the metadata says of it."""

    def change(content: dict) -> None:
        content = content.get("features", content)
        content[new] = content[old] if keep else content.pop(old)

    for name in ("info.json", "stats.json"):
        edit_json(root / "meta" / name, change)
    for path in (root / "data").glob("*/*.parquet"):
        table = pq.read_table(path)
        copied = table.append_column(table.schema.field(old).with_name(new), table[old])
        pq.write_table(copied if keep else copied.drop([old]), path)


# --rename


def test_datasets_with_other_names_of_a_camera_are_renamed_alike(tmp_path, made):
    datasets = [made("video"), made("front")]
    message = refusal(tmp_path, datasets)
    assert message.startswith(f"datasets differ in {TOP}: ")
    assert flags_in(message) == FRONT_IS_TOP
    with planned(tmp_path, datasets, **flags_in(message)) as plan:
        assert set(plan.source.videos) == {TOP}
        assert plan.policy.rename == {}  # done in the source: act() takes `top`
        assert set(plan.policy.config.input_features) == {TOP, STATE}


def test_datasets_with_other_cameras_train_on_those_that_they_share(tmp_path, made):
    message = refusal(tmp_path, [made("two_cameras"), made("video")])
    assert flags_in(message) == {"observations": [TOP, STATE]}
    with planned(tmp_path, [made("two_cameras"), made("video")], **flags_in(message)) as plan:
        assert set(plan.source.videos) == {TOP}

    message = refusal(tmp_path, [made("two_cameras"), made("front")])
    flags = flags_in(message)
    assert flags["rename"] == [f"{FRONT}={WRIST}"]  # the nearest name
    with planned(tmp_path, [made("two_cameras"), made("front")], **flags) as plan:
        assert set(plan.source.videos) == {WRIST}


def test_a_pattern_may_match_in_one_of_several_datasets(tmp_path, made):
    datasets = [made("two_cameras"), made("front")]
    with planned(tmp_path, datasets, **FRONT_IS_TOP, observations=["top", "front", "state"]) as plan:
        assert set(plan.source.videos) == {TOP}
    message = refusal(tmp_path, datasets, **FRONT_IS_TOP, observations=["top", "back", "state"])
    assert message.startswith("--observations back: no such observation in the datasets")


def test_a_name_that_all_datasets_have_is_renamed_for_the_policy_as_before(tmp_path, made):
    with planned(tmp_path, [made("front"), made("front")], **FRONT_IS_TOP) as plan:
        assert plan.policy.rename == {FRONT: TOP}
        assert set(plan.source.videos) == {FRONT}


def test_a_policy_of_several_datasets_acts_on_each(made, trained_on_two, capsys):
    policy = load_policy(trained_on_two, "cpu")
    assert set(policy.expected) == {TOP, STATE}
    recorded = []
    for name in ("video", "front", "two_cameras"):
        source = open_for_policy(policy, str(made(name)), "0")
        assert set(source.videos) == {TOP}
        observation, _ = next(recorded_observations(source, 0, policy.expected))
        recorded.append(observation[TOP])
        assert infer.main([str(trained_on_two), "--dataset_id", str(made(name)), "--device", "cpu"]) == 0
    assert np.array_equal(recorded[0], recorded[1])
    assert "mean |error|" in capsys.readouterr().out


def test_cameras_of_other_sizes_train_together_when_they_are_resized(tmp_path, made, smaller):
    message = refusal(tmp_path, [made("video"), smaller])
    assert f"{TOP} is 64x96, 48x72 in the datasets, in their order: expected one size" in message
    flags = flags_in(message)
    assert flags == {"image_size": ["48", "72"]}
    settings = small("flow", dataset_id=[str(made("video")), str(smaller)], steps=2, image_size=[48, 72])
    checkpoint = train(**settings, frame_cache="off", output_dir=str(tmp_path / "run")).checkpoint
    stored = train(**settings, frame_cache="on", output_dir=str(tmp_path / "stored")).checkpoint
    policies = [load_policy(folder, "cpu") for folder in (checkpoint, stored)]
    for weights, others in zip(*(policy.policy.state_dict().values() for policy in policies), strict=True):
        assert torch.equal(weights, others)
    for dataset in (made("video"), smaller):
        assert infer.main([str(checkpoint), "--dataset_id", str(dataset), "--device", "cpu"]) == 0


def test_a_camera_whose_name_is_no_observation_is_renamed(tmp_path, copy_of):
    root = copy_of("images")
    rename_feature(root, TOP, "top_view")
    message = refusal(tmp_path, root)
    assert message.endswith("Pass --rename top_view=observation.images.top_view")
    with planned(tmp_path, root, **flags_in(message)) as plan:
        assert set(plan.source.images) == {"observation.images.top_view"}
        assert set(plan.policy.config.input_features) == {"observation.images.top_view", STATE}


def test_actions_of_another_name(tmp_path, made, copy_of, trained, capsys):
    root = copy_of("no_camera")
    rename_feature(root, "action", "actions")
    message = refusal(tmp_path, root)
    told = "it has no feature action, did you mean 'actions'? Pass --rename actions=action"
    assert message == f"dataset {root}: {told}"
    with planned(tmp_path, root, **flags_in(message)) as plan:
        assert plan.policy.config.action_feature.shape == (3,)
        assert plan.policy.rename == {}
        source = open_source(str(made("no_camera")))
        assert torch.equal(plan.source.columns["action"], source.columns["action"])
        assert plan.data == describe_data(source, plan.held_out)
    with planned(tmp_path, [made("no_camera"), root], **flags_in(message)) as plan:
        assert plan.source.rows == 2 * source.rows

    for datasets in ([made("no_camera"), root], [root, made("no_camera")]):
        message = refusal(tmp_path, datasets)
        assert flags_in(message) == {"rename": ["actions=action"]}
        with planned(tmp_path, datasets, **flags_in(message)) as plan:
            assert plan.source.rows == 2 * source.rows

    checkpoint = train(
        **small("flow", dataset_id=str(root), steps=1), **flags_in(message), output_dir=str(tmp_path / "r")
    )
    for dataset in (root, made("no_camera")):
        assert infer.main([str(checkpoint.checkpoint), "--dataset_id", str(dataset), "--device", "cpu"]) == 0
    assert "shoulder" in capsys.readouterr().out
    assert refusal(tmp_path, made("no_camera"), rename=["observation.state=action"]).startswith(
        "--rename observation.state=action: dataset no_camera has action already"
    )


@pytest.mark.parametrize(
    ("rename", "said"),
    [
        (["action=observation.action"], "a policy learns the feature action, by that name"),
        ([f"{TOP}={FRONT}", f"{TOP}={WRIST}"], f"{TOP} is renamed twice, to {FRONT} too"),
    ],
)
def test_names_that_cannot_be_given(tmp_path, made, rename, said):
    assert said in refusal(tmp_path, made("video"), rename=rename)


def test_a_run_on_several_datasets_goes_on_with_one(tmp_path, made):
    """The one that has only the new name of the camera, or only the old one."""
    out = str(tmp_path / "run")
    settings = small("flow", dataset_id=[str(made("video")), str(made("front"))], steps=1, output_dir=out)
    train(**settings, **FRONT_IS_TOP)
    for steps, dataset in ((2, "video"), (3, "front")):
        more = {"dataset_id": [str(made(dataset))], "steps": steps, "resume_from_checkpoint": "latest"}
        assert train(**settings | more).steps == steps


def test_two_observations_of_one_name_are_refused(tmp_path, made):
    message = refusal(tmp_path, made("two_cameras"), rename=[f"{WRIST}={TOP}"])
    assert f"--rename {WRIST}={TOP}: two of its observations would be {TOP}" in message
    with planned(tmp_path, made("two_cameras"), rename=[f"{WRIST}={TOP}", f"{TOP}={WRIST}"]) as plan:
        assert set(plan.policy.config.input_features) == {TOP, WRIST, STATE}
    with planned(tmp_path, made("two_cameras"), rename=[f"{WRIST}={TOP}"], observations=["wrist", "state"]) as plan:
        assert set(plan.policy.config.input_features) == {TOP, STATE}


# Refusals offer the likeliest --rename, which works when it is pasted


def test_a_base_with_another_name_of_the_camera(tmp_path, made, trained):
    message = refusal(tmp_path, made("front"), **base(trained))
    assert f"it has no {TOP}, which checkpoint-1 was trained on" in message
    assert flags_in(message) == FRONT_IS_TOP
    with planned(tmp_path, made("front"), **base(trained), **flags_in(message)) as plan:
        assert plan.policy.rename == {FRONT: TOP}


def test_a_wrong_old_name(tmp_path, made, trained):
    wrong = {"rename": ["observation.images.fornt=observation.images.top"]}
    message = refusal(tmp_path, made("front"), **wrong)
    assert f"Did you mean {FRONT}? Pass --rename {FRONT}={TOP}" in message
    assert flags_in(message) == FRONT_IS_TOP
    message = refusal(tmp_path, made("no_camera"), rename=["observation.sate=observation.arm"])
    assert flags_in(message) == {"rename": [f"{STATE}=observation.arm"]}


def test_a_state_of_another_name(tmp_path, copy_of):
    root = copy_of("images")
    rename_feature(root, STATE, "observation.qpos")
    message = refusal(tmp_path, root, "act", rename=[f"{TOP}={FRONT}"])
    assert flags_in(message) == {"rename": [f"{TOP}={FRONT}", f"observation.qpos={STATE}"]}  # the last flag counts
    with planned(tmp_path, root, "act", **flags_in(message)) as plan:
        assert set(plan.policy.config.input_features) == {FRONT, STATE}


@pytest.mark.parametrize("command", [infer, evaluate])
def test_infer_and_evaluate_rename_too(tmp_path, made, trained, capsys, command):
    flags = [str(trained), "--dataset_id", str(made("front")), "--device", "cpu"]
    if command is evaluate:
        flags += ["--output_dir", str(tmp_path)]
    assert command.main(flags) == 2
    message = capsys.readouterr().err
    assert f"has no {TOP}, which the policy takes: got {FRONT}, {STATE}. " in message
    assert flags_in(message) == FRONT_IS_TOP
    assert command.main([*flags, "--rename", *FRONT_IS_TOP["rename"]]) == 0
    capsys.readouterr()
    assert command.main([*flags, "--rename", f"observation.images.frnt={TOP}"]) == 2
    assert flags_in(capsys.readouterr().err) == FRONT_IS_TOP
    assert command.main([*flags, "--rename", f"{FRONT}=observation.images.tip"]) == 2
    assert f"the policy takes no observation.images.tip, did you mean '{TOP}'?" in capsys.readouterr().err


def test_infer_reads_no_camera_that_the_policy_does_not_take(copy_of, trained, capsys):
    root = without_wrist_files(copy_of("two_cameras"), described=True)
    assert infer.main([str(trained), "--dataset_id", str(root), "--device", "cpu"]) == 0


# Names of joints


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([["a", "b"]], ["a", "b"]),
        ({"motors": ["a", "b"]}, ["a", "b"]),
        ({"axes": ["a", "b"]}, ["a", "b"]),
        ({"left": ["a"], "right": ["b"]}, ["a", "b"]),
        (["a"], None),
        (["a", "b", "c"], None),
        (["a", 2], None),
        ("ab", None),
        (None, None),
    ],
)
def test_nested_names_are_names(names, expected):
    assert joint_names({"shape": (2,), "names": names}) == expected
    assert joint_names({"shape": [2], "names": names}) == expected


def test_nested_names_are_flat_for_everyone(tmp_path, copy_of):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: nest(info["features"]))
    with planned(tmp_path, root) as plan:
        assert plan.source.meta.features["action"]["names"] == recording.ACTION_NAMES
        assert plan.policy.joint_names["action"] == recording.ACTION_NAMES


def nest(features: dict) -> None:
    features["action"]["names"] = {"motors": [features["action"]["names"]]}
    features[STATE]["names"] = [features[STATE]["names"]]


def test_joints_in_another_order_or_of_another_name():
    trained = {"action": ["a", "b"], STATE: ["a"]}
    assert order_warnings(trained, {"action": ["a", "b"]}, "base", "data") == []
    (line,) = order_warnings(trained, {"action": ["b", "a"], STATE: ["a"]}, "base", "data")
    assert line.startswith("the joints of action are in another order: base was trained with a, b, data has b, a. ")
    (line,) = order_warnings(trained, {"action": ["b", "c"]}, "base", "data")
    assert line.startswith("the joints of action are other joints: base was trained with a, b, data has b, c. ")


def test_joints_in_another_order_are_told_wherever_a_policy_meets_a_dataset(tmp_path, copy_of, made, trained, capsys):
    recorded = json.loads((trained / "training_info.json").read_text())["joint_names"]
    assert recorded == {STATE: ["joint_0", "joint_1", "joint_2"], "action": recording.ACTION_NAMES}
    root = copy_of("video")
    edit_json(root / "meta" / "info.json", lambda info: info["features"]["action"]["names"].reverse())
    told = "the joints of action are in another order: "
    order = "was trained with shoulder, elbow, gripper"

    with planned(tmp_path, root, **base(trained)) as plan:
        assert [line for line in plan.warnings if line.startswith(told) and order in line]
    with planned(tmp_path, made("video"), **base(trained)) as plan:
        assert not [line for line in plan.warnings if told in line]
    resumed = {"resume_from_checkpoint": str(trained), "dataset_id": [str(root)], "steps": 2}
    with plan_run({**resumed, "output_dir": str(trained.parent)}) as plan:
        assert [line for line in plan.warnings if line.startswith(told) and order in line]
    for command, more in ((infer, []), (evaluate, ["--output_dir", str(tmp_path / "report")])):
        assert command.main([str(trained), "--dataset_id", str(root), "--device", "cpu", *more]) == 0
        assert f"warning: {told}" in capsys.readouterr().err
