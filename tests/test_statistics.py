"""A dataset's statistics: completed where they are missing, refused where they cannot be, told where they do not fit."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode, PolicyFeature
from lerobot.policies import make_pre_post_processors
from safetensors.torch import load_file, save_file

from data.opening import open_source
from data.statistics import BASIC, as_arrays, camera_statistics, merge_statistics, statistics_warnings
from data.union import unite
from errors import UserError
from helpers.dataset_edits import edit_json
from helpers.runs import small
from helpers.v2_dataset import write_v2
from policy.factory import policy_config_class
from policy.loaded import load_policy
from processors.pipelines import load_processors
from processors.statistics import STATS_OF_MODE, require_statistics
from train import train


def stats_file(root):
    return root / "meta" / "stats.json"


def edit_stats(root, change):
    edit_json(stats_file(root), change)


# Missing ones.


@pytest.mark.parametrize("content", [None, "{}", "null", '{"action": null, "observation.state": {"mean": null}}'])
def test_missing_statistics_are_computed_from_the_table(made, copy_of, content):
    root = copy_of("no_camera")
    stats_file(root).unlink()
    if content is not None:
        stats_file(root).write_text(content)
    source = open_source(str(root))
    assert source.problems == []
    line = "meta/stats.json lacks mean std min max of observation.state, mean std min max of action: "
    assert source.warnings == [f"{line}computed from the 33 rows of the table"]
    recorded = open_source(str(made("no_camera"))).meta.stats
    for key in ("observation.state", "action"):
        for name in BASIC:
            np.testing.assert_allclose(source.meta.stats[key][name], recorded[key][name], rtol=1e-4, atol=1e-3)
        assert source.meta.stats[key]["count"] == 33
        assert set(source.meta.stats[key]) >= {"q01", "q99"}


def test_only_what_is_missing_is_computed(made, copy_of):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: [stats["action"].pop(name) for name in ("min", "count")])
    source = open_source(str(root))
    assert source.warnings == ["meta/stats.json lacks min of action: computed from the 33 rows of the table"]
    recorded = open_source(str(made("no_camera"))).meta.stats
    for name, value in recorded["action"].items():
        close = np.testing.assert_allclose if name == "min" else np.testing.assert_array_equal
        close(source.meta.stats["action"][name], value)


@pytest.mark.parametrize("value", [None, "x", ["a", "b", "c"], [None, 1.0, 2.0], {"of": 1.0}])
def test_what_is_no_number_is_computed_too(made, copy_of, value):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: stats["action"].update(mean=value, count=value))
    source = open_source(str(root))
    assert source.warnings == ["meta/stats.json lacks mean of action: computed from the 33 rows of the table"]
    recorded = open_source(str(made("no_camera"))).meta.stats["action"]
    np.testing.assert_allclose(source.meta.stats["action"]["mean"], recorded["mean"], atol=1e-6)
    assert source.meta.stats["action"]["count"] == 33


def test_a_dataset_without_statistics_trains_like_one_with_them(made, copy_of, tmp_path, capsys):
    root = copy_of("no_camera")
    stats_file(root).unlink()
    losses = [
        train(**small("flow", dataset_id=str(folder)), output_dir=str(tmp_path / str(number))).final_loss
        for number, folder in enumerate((root, made("no_camera")))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert "warning: meta/stats.json lacks mean std min max of observation.state" in capsys.readouterr().out


def test_statistics_that_only_this_policy_needs(copy_of, tmp_path, capsys):
    """Quantiles, which no dataset of v2.1 has, are asked for by a policy that normalises by them, and by no other."""
    root = copy_of("images")
    edit_stats(root, lambda stats: [stats["observation.state"].pop(name) for name in ("q01", "q99")])
    train(**small("flow", dataset_id=str(root), output_dir=str(tmp_path / "plain"), steps=1))
    assert "lacks" not in capsys.readouterr().out

    quantiles = 'normalization_mapping={"STATE":"QUANTILES","ACTION":"QUANTILES","VISUAL":"IDENTITY"}'
    settings = small("flow", dataset_id=str(root), output_dir=str(tmp_path / "quantiles"), steps=1)
    settings["policy_args"] = [*settings["policy_args"], quantiles]
    result = train(**settings)
    assert (
        "warning: meta/stats.json lacks q01 q99 of observation.state: computed from the 33" in capsys.readouterr().out
    )
    stats = normalizer(result.checkpoint).state_dict()
    states = open_source(str(root)).columns["observation.state"]
    assert (stats["observation.state.q01"] < states.quantile(0.05, dim=0) + 1e-6).all()


def normalizer(checkpoint):
    from lerobot.processor import NormalizerProcessorStep

    preprocessor, _ = load_processors(checkpoint, "cpu")
    return next(step for step in preprocessor.steps if isinstance(step, NormalizerProcessorStep))


@pytest.mark.parametrize("kind", ["images", "video"])
def test_a_cameras_statistics_come_from_sampled_frames(made, copy_of, tmp_path, capsys, kind):
    root, key = copy_of(kind), "observation.images.top"
    recorded = open_source(str(root)).meta.stats[key]
    edit_stats(root, lambda stats: stats.pop(key))
    computed = camera_statistics(open_source(str(root)), key)
    assert computed.keys() == recorded.keys()
    for name, value in recorded.items():
        assert computed[name].shape == value.shape
        if name in ("mean", "std"):
            np.testing.assert_allclose(computed[name], value, atol=0.02)

    train(**small("flow", dataset_id=str(root), output_dir=str(tmp_path / "on"), steps=1))
    assert "lacks" not in capsys.readouterr().out  # ImageNet's are used
    train(**small("flow", dataset_id=str(root), output_dir=str(tmp_path / "off"), steps=1, imagenet_stats="off"))
    assert f"lacks mean std of {key}: computed from frames of the 33 rows" in capsys.readouterr().out


def test_datasets_of_which_one_has_no_statistics_are_merged(made, copy_of):
    root = copy_of("no_camera")
    stats_file(root).unlink()
    merged = unite([open_source(str(folder)) for folder in (root, made("no_camera"))]).meta.stats
    alone = open_source(str(made("no_camera"))).meta.stats
    assert merged["action"]["count"] == 66
    np.testing.assert_allclose(merged["action"]["mean"], alone["action"]["mean"], atol=1e-6)


# Wrong ones.


def test_a_damaged_file(copy_of):
    root = copy_of("no_camera")
    stats_file(root).write_text("{")
    with pytest.raises(
        UserError, match=r"stats\.json holds no statistics: .* Delete it: they are computed from the data"
    ):
        open_source(str(root))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": [0.0, float("nan"), 0.0]}, "action: expected a finite number as mean of elbow, got nan"),
        ({"max": [9.0, 9.0, float("inf")]}, "action: expected a finite number as max of gripper, got inf"),
        ({"q99": [9.0, float("nan"), 9.0]}, "action: expected a finite number as q99 of elbow, got nan"),
        ({"std": [1.0, 1.0, -0.5]}, "action: expected 0 or more as std of gripper, got -0.5"),
        ({"mean": [9.0, 0.0, 0.7]}, "action: expected mean <= max of shoulder, got 9 and"),
        ({"min": [-9.0, 5.0, 0.7]}, "action: expected min <= mean of elbow, got 5 and"),
        ({"q10": [-1.5, 8.0, 0.7]}, "action: expected q10 <= q50 of elbow, got 8 and"),
        ({"std": [1.0, 1.0]}, "action: expected 3 numbers as std, got 2"),
        ({"std": [1.0] * 4, "mean": [0.0] * 4}, "action: expected 3 numbers as std, got 4"),
    ],
)
def test_statistics_that_cannot_be(copy_of, change, message):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: stats["action"].update(change))
    problem = open_source(str(root)).problems[0]
    assert problem.startswith(f"meta/stats.json: {message}")
    assert "lerobot-edit-dataset" in problem
    stats_file(root).unlink()  # the other remedy
    assert open_source(str(root)).problems == []


def test_a_feature_that_no_policy_normalises_is_not_looked_at(copy_of):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: stats["timestamp"].update(mean=[float("nan")]))
    assert open_source(str(root)).problems == []


def test_a_camera_by_which_the_policy_normalises(copy_of, tmp_path):
    root, key = copy_of("images"), "observation.images.top"
    edit_stats(root, lambda stats: stats[key].update(std=[[[0.1]], [[-0.1]], [[0.1]]]))
    train(**small("flow", dataset_id=str(root), output_dir=str(tmp_path / "on"), steps=1))
    with pytest.raises(
        UserError, match=rf"expected 3 numbers within 0 to 1 as std of {key}, a std above 0, got \[0\.1, -0\.1, 0\.1\]"
    ):
        train(**small("flow", dataset_id=str(root), output_dir=str(tmp_path / "off"), steps=1, imagenet_stats="off"))


# Of other data.


def scale(stats: dict, factor: float) -> None:
    for name, value in stats.items():
        if name != "count":
            stats[name] = (np.array(value) * factor).tolist()


@pytest.mark.parametrize("factor", [180 / np.pi, np.pi / 180, 1000.0, 0.01])
def test_statistics_in_other_units_are_told_with_both_values(copy_of, factor):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: scale(stats["observation.state"], factor))
    source = open_source(str(root))
    assert source.problems == []
    (warning,) = source.warnings
    assert warning.startswith(
        "meta/stats.json does not fit the table in 3 of 3 numbers of observation.state: joint_0 has mean"
    )
    mean = source.columns["observation.state"][:, 0].double().mean()
    assert f"mean {mean:.4g}, std" in warning.partition(" there, and ")[2]
    assert f"mean {mean * factor:.4g}, std" in warning.partition(" there, and ")[0]
    assert "lerobot-edit-dataset" in warning


def test_one_joint_of_another_robot_is_told(copy_of):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: stats["action"].update(mean=[0.0, 0.0, 5.0], min=[-3, -3, 4.0], max=[3, 3, 6.0], q01=[-3, -3, 4],
               q10=[-2, -2, 4], q50=[0, 0, 5], q90=[2, 2, 6], q99=[3, 3, 6]))  # fmt: skip
    (warning,) = open_source(str(root)).warnings
    assert "does not fit the table in 1 of 3 numbers of action: gripper has mean 5" in warning


@pytest.mark.parametrize("kind", ["no_camera", "wide", "many_files"])
@pytest.mark.parametrize("episodes", [None, "0", "1"])
def test_what_lerobot_recorded_fits(made, kind, episodes):
    assert open_source(str(made(kind)), episodes=episodes).warnings == []


def test_what_real_recordings_have_fits(cr5):
    for episodes in (None, "0", "3:9"):
        assert open_source(str(cr5), episodes=episodes).warnings == []


def test_some_episodes_in_other_units_are_told_too(copy_of):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: scale(stats["action"], 180 / np.pi))
    assert "does not fit the table in" in open_source(str(root), episodes="1").warnings[0]


def test_an_episode_in_which_a_joint_rests_fits(made):
    source = open_source(str(made("no_camera")))
    source.columns["action"][:, 0] = 0.1
    source.meta.info.total_frames = 1000  # as if these were some of its episodes
    assert statistics_warnings(source) == []


def test_statistics_of_the_last_axis_fit(copy_of):
    """LeRobot has a feature of several axes by its last one."""
    root = copy_of("no_camera")
    poses = np.random.default_rng(0).normal(5, 2, (33, 2, 3)).astype(np.float32)
    path = next((root / "data").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).append_column("observation.pose", pa.array(poses.tolist())), path)
    feature = {"dtype": "float32", "shape": [2, 3], "names": None}
    edit_json(root / "meta" / "info.json", lambda info: info["features"].update({"observation.pose": feature}))
    source = open_source(str(root))
    assert source.problems == []
    stats = source.meta.stats["observation.pose"]
    np.testing.assert_allclose(stats["mean"], poses.mean((0, 1)), rtol=1e-5)
    as_json = {name: value.tolist() for name, value in stats.items()}
    edit_stats(root, lambda content: content.update({"observation.pose": as_json}))
    assert open_source(str(root)).warnings == []
    edit_stats(root, lambda content: scale(content["observation.pose"], 10))
    assert "does not fit the table in 3 of 3 numbers of observation.pose" in open_source(str(root)).warnings[0]


# Pipelines that normalise without them.


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A checkpoint of a small policy."""
    folder = tmp_path_factory.mktemp("trained")
    return train(**small("flow", dataset_id=str(made("no_camera")), output_dir=str(folder), steps=1)).checkpoint


def without_statistics(checkpoint, folder, of: str, pipeline: str):
    """A copy of a policy's LeRobot files whose pipeline has no statistics of a feature."""
    import shutil

    folder.mkdir()
    for name in ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"):
        shutil.copyfile(checkpoint / name, folder / name)
    for path in checkpoint.glob("policy_*.safetensors"):
        tensors = load_file(path)
        if path.name.startswith(pipeline):
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{of}.")}
        save_file(tensors, folder / path.name)
    return folder


@pytest.mark.parametrize(
    ("of", "pipeline"), [("observation.state", "policy_preprocessor"), ("action", "policy_postprocessor")]
)
def test_a_policy_without_statistics_does_not_act(trained, made, tmp_path, of, pipeline):
    folder = without_statistics(trained, tmp_path / "policy", of, pipeline)
    with pytest.raises(UserError) as caught:
        load_policy(folder, "cpu")
    assert f"{folder}: {pipeline}.json normalises {of} and has no mean and std of it" in str(caught.value)
    assert "train.py --policy_path" in str(caught.value)

    settings = small("flow", dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), steps=1)
    settings.pop("policy_args")
    tuned = train(**settings, policy_path=str(folder)).checkpoint  # the remedy
    load_policy(tuned, "cpu").act({"observation.state": np.zeros(3)})


def test_a_policy_that_normalises_nothing_needs_none(trained, tmp_path):
    folder = without_statistics(trained, tmp_path / "policy", "action", "policy_postprocessor")
    edit_json(folder / "config.json", lambda config: config.update(normalization_mapping=IDENTITY))
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        set_modes(folder / name, IDENTITY)
    action = load_policy(folder, "cpu").act({"observation.state": np.zeros(3)})
    assert np.isfinite(action).all()


IDENTITY = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "IDENTITY")


def normalizers(content: dict) -> list[dict]:
    return [step for step in content["steps"] if "normalizer" in step["registry_name"]]


def set_modes(path, modes: dict) -> None:
    """Change by which mode the steps of a saved pipeline normalise."""
    edit_json(path, lambda content: [step["config"].update(norm_map=modes) for step in normalizers(content)])


def drop_steps(path) -> None:
    edit_json(path, lambda content: [content["steps"].remove(step) for step in normalizers(content)])


def copy_of_policy(checkpoint, folder):
    return without_statistics(checkpoint, folder, "nothing", "policy")


@pytest.mark.parametrize("pipeline", ["policy_preprocessor", "policy_postprocessor"])
def test_a_policy_whose_pipeline_does_not_normalise_neither_acts_nor_trains(trained, made, tmp_path, pipeline):
    folder = copy_of_policy(trained, tmp_path / "policy")
    drop_steps(folder / f"{pipeline}.json")
    settings = small("flow", dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), steps=1)
    settings.pop("policy_args")
    key = "observation.state" if pipeline == "policy_preprocessor" else "action"
    message = f"{pipeline}.json does not normalise {key}, but config.json says MEAN_STD"
    with pytest.raises(UserError, match=message):
        load_policy(folder, "cpu")
    with pytest.raises(UserError, match=message):
        train(**settings, policy_path=str(folder))
    for path in folder.glob("policy_*processor.json"):  # the remedy
        path.unlink()
    tuned = train(**settings, policy_path=str(folder)).checkpoint
    load_policy(tuned, "cpu").act({"observation.state": np.zeros(3)})


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ({}, "does not normalise action, but config.json says MEAN_STD"),
        (IDENTITY, "does not normalise action, but config.json says MEAN_STD"),
        ({**IDENTITY, "ACTION": "MIN_MAX"}, "normalises action by MIN_MAX, but config.json says MEAN_STD"),
    ],
)
def test_a_pipeline_that_normalises_otherwise_than_the_policy(trained, tmp_path, modes, message):
    folder = copy_of_policy(trained, tmp_path / "policy")
    set_modes(folder / "policy_postprocessor.json", modes)
    with pytest.raises(UserError, match=f"policy_postprocessor.json {message}"):
        load_policy(folder, "cpu")


def test_a_policy_that_normalises_nothing_needs_no_steps(trained, tmp_path):
    folder = copy_of_policy(trained, tmp_path / "policy")
    edit_json(folder / "config.json", lambda config: config.update(normalization_mapping=IDENTITY))
    drop_steps(folder / "policy_preprocessor.json")
    drop_steps(folder / "policy_postprocessor.json")
    action = load_policy(folder, "cpu").act({"observation.state": np.zeros(3)})
    assert np.isfinite(action).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("action.std", lambda value: value * float("nan"), "has nan as std of it"),
        ("action.mean", lambda value: value + float("inf"), "has inf as mean of it"),
        ("action.std", lambda value: -value, "as std of it"),
        ("action.std", lambda value: value[:2], r"has a std of shape \[2\] that does not fit the feature's, \[3\]"),
        ("action.std", lambda value: value[:1], r"has a std of shape \[1\]"),
        ("action.mean", lambda value: value[:, None], r"has a mean of shape \[3, 1\]"),
    ],
)
def test_a_policy_with_statistics_that_cannot_be_does_not_act(trained, tmp_path, name, change, message):
    folder = copy_of_policy(trained, tmp_path / "policy")
    (path,) = folder.glob("policy_postprocessor*.safetensors")
    tensors = load_file(path)
    save_file({**tensors, name: change(tensors[name]).contiguous()}, path)
    with pytest.raises(UserError, match=f"policy_postprocessor.json normalises action and .*{message}"):
        load_policy(folder, "cpu")


@pytest.mark.parametrize("kind", ["act", "diffusion", "vqbet", "flow", "groot", "lingbot_va", "vla_jepa", "evo1"])
def test_what_lerobot_makes_for_each_policy_is_accepted(kind):
    """To act, and to train on: its processors need not follow the mapping in the config."""
    config = policy_config_class(kind)(device="cpu")
    config.input_features = {
        "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
    }
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (6,))}
    names = ("min", "q01", "q10", "mean", "std", "q90", "q99", "max")
    shapes = {"observation.state": (6,), "action": (6,), "observation.images.top": (3, 1, 1)}
    stats = {
        key: {name: torch.full(shape, 0.1 + 0.1 * i) for i, name in enumerate(names)} for key, shape in shapes.items()
    }
    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=stats)
    for keys in (list(config.input_features), [*config.input_features, "action"]):
        require_statistics(config, preprocessor, postprocessor, keys, kind)


# In other shapes.


@pytest.mark.parametrize("shape", [(3, 1), (1, 3), (1, 1, 3)])
def test_statistics_in_another_shape_are_the_same(made, copy_of, shape):
    root = copy_of("no_camera")
    edit_stats(root, lambda stats: reshape(stats["action"], shape))
    source = open_source(str(root))
    assert source.problems == []
    recorded = open_source(str(made("no_camera"))).meta.stats["action"]
    for name, value in recorded.items():
        np.testing.assert_array_equal(source.meta.stats["action"][name], value)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1), (1, 3, 1, 1)])
def test_a_cameras_statistics_in_another_shape_are_the_same(made, copy_of, shape):
    root, key = copy_of("images"), "observation.images.top"
    edit_stats(root, lambda stats: reshape(stats[key], shape))
    recorded = open_source(str(made("images"))).meta.stats[key]
    for name, value in open_source(str(root)).meta.stats[key].items():
        np.testing.assert_array_equal(value, recorded[name])


def reshape(stats: dict, shape: tuple) -> None:
    for name, value in stats.items():
        if name != "count":
            stats[name] = np.reshape(value, shape).tolist()


def test_statistics_of_episodes_in_another_shape_are_merged(tmp_path):
    sources = []
    for name, shape in (("flat", (3,)), ("nested", (3, 1))):
        root = write_v2(tmp_path / name, {0: 5, 1: 7})
        path = root / "meta" / "episodes_stats.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        reshape(lines[1]["stats"]["action"], shape)
        path.write_text("\n".join(map(json.dumps, lines)))
        sources.append(open_source(str(root)))
        assert sources[-1].problems == []
    for name, value in sources[0].meta.stats["action"].items():
        np.testing.assert_array_equal(sources[1].meta.stats["action"][name], value)


def test_statistics_of_a_feature_with_two_axes_keep_their_shape():
    features = {"pose": {"dtype": "float32", "shape": [4, 2]}}
    arrays = as_arrays({"pose": {"mean": [0.0, 1.0], "std": list(range(8)), "min": [0.0] * 3}}, features)
    assert {name: value.shape for name, value in arrays["pose"].items()} == {"mean": (2,), "std": (4, 2), "min": (3,)}


def test_a_file_with_a_byte_order_mark_is_read(copy_of):
    root = copy_of("no_camera")
    stats_file(root).write_bytes(b"\xef\xbb\xbf" + stats_file(root).read_bytes())
    source = open_source(str(root))
    assert source.problems + source.warnings == []


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ([[[120.0]]] * 3, r"\[120.0, 120.0, 120.0\]"),
        ([[[0.5]]] * 4, r"\[0.5, 0.5, 0.5, 0.5\]"),
        ([[[0.5]]], r"\[0.5\]"),
    ],
)
def test_a_cameras_statistics_of_other_units_or_channels(copy_of, value, got):
    root, key = copy_of("images"), "observation.images.top"
    edit_stats(root, lambda stats: stats[key].update(mean=value))
    settings = small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1, imagenet_stats="off")
    with pytest.raises(UserError, match=f"expected 3 numbers within 0 to 1 as mean of {key}, a std above 0, got {got}"):
        train(**settings)
    stats_file(root).unlink()  # the remedy
    assert train(**settings).steps == 1


def test_every_mode_of_lerobot_is_known():
    assert {mode.value for mode in NormalizationMode} == {*STATS_OF_MODE, "IDENTITY"}


def test_what_one_of_several_lacks_is_not_merged():
    parts = [{"action": {**{name: np.ones(3) for name in BASIC}, "count": np.ones(1)}} for _ in range(2)]
    assert set(merge_statistics(parts)) == {"action"}
    del parts[1]["action"]["mean"]
    assert merge_statistics(parts) == {}
