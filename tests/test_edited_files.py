"""Files of a run that others edited: bad lines of metrics.jsonl, JSON with values of another type, another optimizer's state."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints.folder import read_state, write_manifest
from errors import UserError
from helpers.runs import assert_same_run, read_metrics, small
from reports.pages import read_history
from runs import main
from train import train


@pytest.fixture(scope="module")
def settings(made):
    return small(dataset_id=str(made("no_camera")), steps=4, save_freq=2, log_freq=1)


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("edited") / "run"
    train(**settings, output_dir=str(folder))
    return folder


@pytest.fixture
def run(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "run"))


GOOD = b'{"step": 1, "loss": 2.0, "by_joint": {"a": 1.0}, "by_step": [1, 2.5], "val_loss": NaN}'
BAD_LINES = {
    "no JSON": b"loss went up here, why?",
    "a list": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "no step": b'{"loss": 1.0}',
    "a step of text": b'{"step": "2", "loss": 1.0}',
    "a step of null": b'{"step": null}',
    "a step of true": b'{"step": true}',
    "a loss of text": b'{"step": 2, "loss": "low"}',
    "a loss of null": b'{"step": 2, "loss": null}',
    "a success rate without its interval": b'{"step": 2, "eval_success_rate": 0.5}',
    "a loss of true": b'{"step": 2, "loss": true}',
    "a joint of text": b'{"step": 2, "by_joint": {"a": "b"}}',
    "lists of lists": b'{"step": 2, "by_step": [[1]]}',
    "not UTF-8": b'{"step": 2, "caf\xe9": 1}',
    "zeros": b"\0" * 40,
    "too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_passed_over_with_a_warning(tmp_path, bad):
    (tmp_path / "metrics.jsonl").write_bytes(GOOD + b"\n" + bad + b"\n\n" + GOOD + b"\n")
    warnings = []
    assert len(read_history(tmp_path, warnings.append)) == 2
    (warning,) = warnings
    assert warning.startswith(f"{tmp_path}/metrics.jsonl: passed over line 2: expected a JSON mapping with a step")


def test_many_bad_lines_are_one_warning_and_one_that_a_kill_cut_short_is_none(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b"x\n" * 9 + GOOD + b"\n" + GOOD[:20])
    warnings = []
    assert len(read_history(tmp_path, warnings.append)) == 1
    assert [warning.split(": ")[1] for warning in warnings] == ["passed over line 1, 2, 3, 4, 5, ..."]


def test_a_run_with_bad_lines_is_resumed_and_compared(settings, whole, run, capsys):
    shutil.rmtree(run / "checkpoint-4")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\n".join(BAD_LINES.values()) + b"\n")
    result = train(**settings, output_dir=str(run), resume_from_checkpoint="latest")
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert "metrics.jsonl: passed over line 5, 6, 7, 8, 9, ...: expected" in warning
    assert_same_run(whole, run, 4)
    assert [line["step"] for line in read_metrics(run)] == [1, 2, 3, 4]
    assert len(result.history) == 4
    result.report()
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"mine\n")
    assert main(["compare", str(run), "--output", str(run / "page")]) == 0
    assert "metrics.jsonl: passed over line 5: expected" in capsys.readouterr().err


def edited(checkpoint, file, change):
    """Write a JSON file of a checkpoint again as `change` makes it, and the manifest with it."""
    content = json.loads((checkpoint / file).read_text())
    changed = change(content)
    (checkpoint / file).write_text(changed if isinstance(changed, str) else json.dumps(changed))
    write_manifest(checkpoint)


NAN = float("nan")
INFINITY = float("inf")
SCALER = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0}
WRONG = [
    ("trainer_state.json", "step", ["4", None, 4.5, True, [4], {}, -1, 10**400, 2**62]),
    ("trainer_state.json", "samples_seen", ["16", None, 1.5, False, [], -4, 10**400, 2**62]),
    ("trainer_state.json", "world_size", ["1", None, 0, -1]),
    ("trainer_state.json", "loss_count", ["1", None, 0.5, -1, 10**400]),
    ("trainer_state.json", "loss_sums", ["1", None, 1.0, ["1"], [None], {}, [], [NAN], [INFINITY], [10**400], [True]]),
    ("trainer_state.json", "sub_loss_sums", [{}, [[]], [{"a": 1}], [{"a": [1.0]}], [{"a": [1.0, 0]}], [{"a": [1, -2]}],
                                             [{"a": [1, NAN]}], [{"a": [10**400, 1]}], [{"a": ["1", 1]}]]),
    ("trainer_state.json", "optimizer_entries", ["1", None, -1]),
    ("trainer_state.json", "folder", [1, None]),
    ("trainer_state.json", "branch", ["1", None, 1.5, -1, 10**400]),
    ("trainer_state.json", "ancestors", [None, 1, [1], [["0", 1]], [[1, 2, 3]], {}]),
    ("trainer_state.json", "scaler", [None, [], 1, {"scale": "big"}, {"scale": 1.0}, {**SCALER, "scale": NAN},
                                      {**SCALER, "scale": 0}, {**SCALER, "growth_interval": 10**400}]),
    ("trainer_state.json", "tracker_run_id", [1, []]),
    ("trainer_state.json", "data", ["x", [], 1, {}, {"episodes": 3}]),
    ("train_config.json", "steps", ["many", None, 1.5, True, [4], "4", 10**400, INFINITY]),
    ("train_config.json", "lr", ["fast", [1], {}, True, "0.1", 10**400]),
    ("train_config.json", "compile", ["on", 1, None]),
    ("train_config.json", "policy", [None, 1, [], {}]),
    ("train_config.json", "dataset_id", [1, {}, [1], [None]]),
    ("train_config.json", "policy_args", ["chunk_size=4", 1, [1]]),
    ("train_config.json", "image_size", ["64x64", 64, ["64", "64"]]),
    ("training_info.json", "train_seconds", ["1", None, [], True, -1, NAN, 10**400]),
    ("training_info.json", "loss", ["1", [], True, 10**400]),
    ("training_info.json", "val_loss", ["1", {}]),
    ("training_info.json", "saved_at", [1, None]),
    ("training_info.json", "versions", [[], "0.6.1"]),
    ("training_info.json", "joint_names", [[], "a"]),
]  # fmt: skip


@pytest.mark.parametrize(("file", "name", "values"), WRONG, ids=[f"{file}-{name}" for file, name, _ in WRONG])
def test_a_value_of_another_type_is_damage(settings, run, capsys, file, name, values):
    checkpoint = run / "checkpoint-4"
    content = json.loads((checkpoint / file).read_text())
    for value in values:
        edited(checkpoint, file, lambda _, value=value: {**content, name: value})
        with pytest.raises(UserError, match=rf"checkpoint-4 is damaged: .*{file}.*{name}") as refused:
            train(resume_from_checkpoint=str(checkpoint))
        assert "\n" not in str(refused.value)
        assert main(["verify", str(checkpoint)]) == 2
        assert main(["list", str(run)]) == 0
        assert main(["show", str(checkpoint)]) == 2
    capsys.readouterr()


REQUIRED = ["step", "samples_seen", "world_size", "loss_count", "loss_sums", "train_seconds"]


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_value_is_damage(run, name):
    file = "training_info.json" if name == "train_seconds" else "trainer_state.json"
    edited(run / "checkpoint-4", file, lambda content: {key: content[key] for key in content if key != name})
    with pytest.raises(UserError, match=f"checkpoint-4 is damaged: {file} has no {name}"):
        train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("file", ["trainer_state.json", "train_config.json", "training_info.json"])
@pytest.mark.parametrize("text", ["[]", "null", '"text"', "7", "", "{", "[" * 100_000, '{"a": '])
def test_a_file_of_another_form_is_damage_and_latest_goes_on_from_the_one_before(
    settings, whole, run, capsys, file, text
):
    edited(run / "checkpoint-4", file, lambda _: text)
    assert train(**settings, output_dir=str(run), resume_from_checkpoint="latest").steps == 4
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.endswith("it is skipped")]
    assert len(warnings) == 1
    assert file in warnings[0]
    assert_same_run(whole, run, 4)


def test_names_of_older_versions_and_unknown_ones_are_no_damage(settings, whole, run):
    def older(state):
        state["course"] = state.pop("branch")
        state["loss_sum"] = state.pop("loss_sums")[0]
        del state["ancestors"], state["data"]
        return {**state, "something": "else"}

    checkpoint = run / "checkpoint-2"
    edited(checkpoint, "trainer_state.json", older)
    edited(
        checkpoint,
        "train_config.json",
        lambda config: {**config, "dataset_id": config["dataset_id"][0], "of_later": [1]},
    )
    shutil.rmtree(run / "checkpoint-4")
    train(output_dir=str(run), resume_from_checkpoint="latest")
    assert_same_run(whole, run, 4)


def change_optimizer(checkpoint, change):
    path = checkpoint / "optimizer_state.pth"
    state = torch.load(path, weights_only=True)
    torch.save(change(state) or state, path)
    write_manifest(checkpoint)


def shaped(name, make):
    def change(state):
        first = next(number for number, entry in state["state"].items() if entry["exp_avg"].ndim == 2)
        state["state"][first][name] = make(state["state"][first][name])

    return change


WRONG_STATES = {
    "transposed": shaped("exp_avg", lambda moment: torch.zeros(moment.shape[1] + 1, moment.shape[0])),
    "a row": shaped("exp_avg", lambda moment: moment[:1]),
    "flat": shaped("exp_avg_sq", lambda moment: moment.flatten()),
    "one number": shaped("exp_avg_sq", lambda moment: torch.tensor(0.0)),
    "no tensor": shaped("exp_avg", lambda moment: 0.0),
    "text": shaped("exp_avg", lambda moment: "zero"),
    "a step of many": shaped("step", lambda step: torch.zeros(3)),
    "a step of text": shaped("step", lambda step: "three"),
    "another parameter": lambda state: state["state"].update({999: state["state"][0]}),
    "parameters by name": lambda state: {**state, "state": {f"p{n}": entry for n, entry in state["state"].items()}},
    "fewer groups": lambda state: {**state, "param_groups": state["param_groups"][:1]},
    "fewer parameters": lambda state: state["param_groups"][0]["params"].__delitem__(-1),
}


@pytest.mark.parametrize("change", WRONG_STATES.values(), ids=WRONG_STATES)
def test_an_optimizers_state_of_another_policy_is_refused(run, change):
    change_optimizer(run / "checkpoint-4", change)
    with pytest.raises(
        UserError, match=r"optimizer_state\.pth (does not fit|is damaged|holds no).*Resume from another"
    ):
        train(resume_from_checkpoint=str(run / "checkpoint-4"), steps=6)


@pytest.mark.parametrize(
    "content",
    [[], {}, 7, {"state": {}}, {"state": [], "param_groups": []}, {"state": {}, "param_groups": {}},
     {"state": {}, "param_groups": [{}]}, {"state": {0: 1}, "param_groups": []}],
)  # fmt: skip
def test_what_is_no_optimizers_state_is_refused(run, content):
    change_optimizer(run / "checkpoint-4", lambda _: {"replaced": content}["replaced"])
    if not content:  # which stands for no change above
        torch.save(content, run / "checkpoint-4" / "optimizer_state.pth")
        write_manifest(run / "checkpoint-4")
    with pytest.raises(
        UserError, match=r"optimizer_state\.pth holds no optimizer's state: expected state and param_groups"
    ):
        train(resume_from_checkpoint=str(run / "checkpoint-4"), steps=6)


@pytest.mark.parametrize(("name", "value"), [
    ("steps", -4), ("lr", NAN), ("lr", INFINITY), ("weight_decay", INFINITY), ("batch_size", 0), ("seed", -1), ("steps", 2),
])  # fmt: skip
def test_settings_beyond_their_limits_are_one_line(run, name, value):
    edited(run / "checkpoint-4", "train_config.json", lambda config: {**config, name: value})
    with pytest.raises(UserError, match=f"--{name}"):
        train(resume_from_checkpoint=str(run / "checkpoint-4"))


@pytest.mark.parametrize("content", [{}, {"val_fraction": None}])
def test_settings_that_are_missing_are_the_defaults(settings, whole, run, content):
    """As in a checkpoint of an older version."""
    settings = {**settings}
    shutil.rmtree(run / "checkpoint-4")
    edited(run / "checkpoint-2", "train_config.json", lambda _: content)
    del settings["policy_args"]
    train(**settings, resume_from_checkpoint=str(run / "checkpoint-2"))
    assert_same_run(whole, run, 4)


def first_moment(make):
    def change(state):
        state["state"][0]["exp_avg"] = make(state["state"][0]["exp_avg"])

    return change


def as_quantized(moment):
    return torch.quantize_per_tensor(moment, 0.1, 0, torch.qint8)


UNUSABLE = {
    "NaN": first_moment(lambda moment: moment.fill_(NAN)),
    "one NaN": lambda state: state["state"][3]["exp_avg_sq"].view(-1)[-1:].fill_(NAN),
    "infinite": first_moment(lambda moment: moment.fill_(-INFINITY)),
    "NaN in float16": first_moment(lambda moment: moment.half().fill_(NAN)),
    "sparse": first_moment(lambda moment: moment.to_sparse()),
    "meta": first_moment(lambda moment: moment.to("meta")),
    "quantized": first_moment(as_quantized),
    "complex": first_moment(lambda moment: torch.complex(moment, moment)),
    "a step of NaN": lambda state: state["state"][0].update(step=torch.tensor(NAN)),
    "a step of Python's NaN": lambda state: state["state"][0].update(step=NAN),
    "a negative step": lambda state: state["state"][0].update(step=torch.tensor(-3.0)),
    "a step beyond counting": lambda state: state["state"][0].update(step=10**400),
    "a complex step": lambda state: state["state"][0].update(step=torch.tensor(1j)),
    "no entry of one parameter": lambda state: state["state"].__delitem__(0),
    "no entries": lambda state: state["state"].clear(),
    "an entry without a moment": lambda state: state["state"][0].__delitem__("exp_avg_sq"),
    "an entry without its step": lambda state: state["state"][0].__delitem__("step"),
    "an entry of nothing": lambda state: state["state"][0].clear(),
    "parameters in another order": lambda state: state["param_groups"][0]["params"].reverse(),
    "parameters twice": lambda state: state["param_groups"][0]["params"].append(0),
    "parameters by name": lambda state: state["param_groups"][0].update(params=["a", "b"]),
}


@pytest.mark.parametrize("change", UNUSABLE.values(), ids=UNUSABLE)
def test_an_optimizers_state_that_nothing_can_be_trained_from_is_refused(run, change):
    change_optimizer(run / "checkpoint-4", lambda state: change(state) and None)
    with pytest.raises(UserError, match=r"optimizer_state\.pth (does not fit|is damaged|holds no)") as refused:
        train(resume_from_checkpoint=str(run / "checkpoint-4"), steps=6)
    assert str(refused.value).endswith("Resume from another checkpoint") or "pass this one as" in str(refused.value)
    assert "\n" not in str(refused.value)


def with_shared_memory(state):
    """Zero moments whose entries are all views of one tensor, and repeat one number of it."""
    for entry in state["state"].values():
        entry["exp_avg"].zero_()
        entry["exp_avg_sq"].zero_()
    zero = torch.zeros(1)
    views = {number: zero.expand(entry["exp_avg"].shape) for number, entry in state["state"].items()}
    return {
        number: {**entry, "exp_avg": views[number], "exp_avg_sq": views[number]}
        for number, entry in state["state"].items()
    }


@pytest.mark.parametrize("kind", ["float64", "a gradient", "shared memory", "transposed memory"])
def test_moments_that_are_stored_in_another_way_train_the_same(settings, whole, run, kind):
    shutil.rmtree(run / "checkpoint-4")
    checkpoint = run / "checkpoint-2"
    same = {
        "float64": lambda moment: moment.double(),
        "a gradient": lambda moment: moment.clone().requires_grad_(),
        "transposed memory": lambda moment: moment.t().contiguous().t() if moment.ndim == 2 else moment,
    }
    if kind == "shared memory":
        zeros = run.parent / "zeros"
        shutil.copytree(run, zeros)

        def zeroed(state):
            for entry in state["state"].values():
                entry["exp_avg"].zero_()
                entry["exp_avg_sq"].zero_()

        change_optimizer(zeros / "checkpoint-2", zeroed)
        train(**settings, resume_from_checkpoint=str(zeros / "checkpoint-2"))
        change_optimizer(checkpoint, lambda state: {**state, "state": with_shared_memory(state)})
        train(**settings, resume_from_checkpoint=str(checkpoint))
        assert_same_run(zeros, run, 4)
        return

    def change(state):
        for entry in state["state"].values():
            entry["exp_avg"] = same[kind](entry["exp_avg"])

    change_optimizer(checkpoint, change)
    train(**settings, resume_from_checkpoint=str(checkpoint))
    assert_same_run(whole, run, 4)


@pytest.mark.parametrize("kind", ["NaN", "complex"])
@pytest.mark.parametrize("file", ["policy.safetensors", "training_weights.safetensors"])
def test_weights_that_nothing_can_be_trained_from_are_refused(settings, tmp_path, file, kind):
    checkpoint = train(**{**settings, "ema_decay": 0.9, "steps": 1}, output_dir=str(tmp_path / "run")).checkpoint
    weights = load_file(checkpoint / file)
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = weights[name] * NAN if kind == "NaN" else torch.complex(weights[name], weights[name])
    save_file(weights, checkpoint / file)
    if file == "policy.safetensors":
        write_manifest(checkpoint)
        with pytest.raises(UserError, match=r"damaged: model\.safetensors is not the same file as policy\.safetensors"):
            train(resume_from_checkpoint=str(checkpoint), steps=2)
        save_file(weights, checkpoint / "model.safetensors")
    write_manifest(checkpoint)
    with pytest.raises(UserError, match=r"checkpoint-1/.*\.safetensors is damaged: .*Resume from another checkpoint"):
        train(resume_from_checkpoint=str(checkpoint), steps=2)


def test_weights_that_the_last_step_spoilt_are_not_saved(settings, tmp_path):
    """Its loss and gradient were finite, and no later step shows it."""
    with pytest.raises(UserError, match="the weights are not finite after step 1, which is not saved; last good"):
        train(**{**settings, "lr": 1e39, "steps": 1}, output_dir=str(tmp_path / "run"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["batch_size", "seed"])
def test_settings_that_the_data_continue_by_are_kept_twice(run, name):
    checkpoint = run / "checkpoint-2"
    content = json.loads((checkpoint / "train_config.json").read_text())
    edited(checkpoint, "train_config.json", lambda config: {key: value for key, value in config.items() if key != name})
    assert read_state(checkpoint, None).train_config[name] == content[name]
