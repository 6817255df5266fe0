"""Training some of the weights: frozen ones, adapters in LeRobot's layout, and activations computed twice."""

import json

import pytest
import torch
from safetensors.torch import load_file

from errors import UserError
from helpers.runs import SMALL_POLICY_ARGS, small
from policy.loaded import load_policy
from train import train


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """A checkpoint to fine-tune from."""
    output = tmp_path_factory.mktemp("trained") / "run"
    return train(**small("flow", dataset_id=[str(made("video"))], steps=2), output_dir=str(output)).checkpoint


def test_frozen_weights_stay(made, tmp_path, trained, capsys):
    settings = small(
        "flow", dataset_id=[str(made("video"))], policy_args=None, policy_path=str(trained), freeze=["encoder.eyes"]
    )
    end = train(**{**settings, "quiet": False}, output_dir=str(tmp_path / "run")).checkpoint
    shown = capsys.readouterr().out
    assert f"base      weights and processing steps of {trained}\n          new: statistics, optimizer," in shown
    before, after = load_file(trained / "policy.safetensors"), load_file(end / "policy.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same >= {name for name in before if name.startswith("encoder.eyes")}
    assert not any(name.startswith("head.actions") for name in same)
    part = train(resume_from_checkpoint=str(end.parent / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    again = load_file(part.checkpoint / "policy.safetensors")
    assert all(torch.equal(after[name], again[name]) for name in after)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"freeze": ["backbon3"]},
            "--freeze backbon3 matches no parameter: expected part of a name that begins with encoder.eyes",
        ),
        (
            {"freeze": ["("]},
            "--freeze (: expected a regular expression, got an error: missing ), unterminated subpattern",
        ),
        ({"freeze": ["."]}, "leaves nothing to train. Pass fewer patterns"),
        ({"peft": "lora"}, "--peft needs --policy_path. Pass that as well, or leave --peft out"),
        (
            {"policy": "act", "policy_args": SMALL_POLICY_ARGS["act"].split(), "gradient_checkpointing": True},
            "--gradient_checkpointing: policy act has none. Leave the flag out",
        ),
    ],
)
def test_mistakes(made, tmp_path, settings, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        train(**{**small("flow", dataset_id=[str(made("video"))]), **settings}, output_dir=str(tmp_path / "run"))
    assert message in str(error.value)


def test_gradient_checkpointing_changes_no_loss(made, tmp_path):
    settings = small("flow", dataset_id=[str(made("video"))], steps=3, save_freq=0, log_freq=1)
    plain, twice = (
        train(**settings, gradient_checkpointing=on, output_dir=str(tmp_path / str(on))).history for on in (False, True)
    )
    assert [line["loss"] for line in plain] == pytest.approx([line["loss"] for line in twice], rel=1e-6)


def test_a_resume_may_turn_gradient_checkpointing_off(made, tmp_path):
    settings = small("flow", dataset_id=[str(made("video"))], steps=2, save_freq=1, gradient_checkpointing=True)
    first = train(**settings, output_dir=str(tmp_path / "run")).checkpoint.with_name("checkpoint-1")
    for given, then in (({}, True), ({"gradient_checkpointing": False}, False)):
        end = train(resume_from_checkpoint=str(first), quiet=True, **given)
        assert end.policy.config.gradient_checkpointing is then


def test_adapters(made, tmp_path, trained):
    """LoRA through LeRobot: only adapters are trained and saved, LeRobot loads them, and a resume is exact."""
    pytest.importorskip("peft", reason="peft is not installed (uv pip install peft)")
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_policy

    from data.opening import open_source

    settings = small(
        "flow", dataset_id=[str(made("video"))], policy_args=None, policy_path=str(trained), peft="lora", peft_r=4
    )
    end = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    adapters = load_file(end / "adapter_model.safetensors")
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert json.loads((end / "adapter_config.json").read_text())["r"] == 4
    assert not (end / "model.safetensors").exists()
    part = train(resume_from_checkpoint=str(end.parent / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    again = load_file(part.checkpoint / "policy.safetensors")
    assert all(torch.equal(adapters[name], again[name]) for name in adapters)

    config = PreTrainedConfig.from_pretrained(end)
    config.pretrained_path, config.device = end, "cpu"
    theirs = make_policy(config, ds_meta=open_source(str(made("video"))).meta).eval()
    ours = load_policy(part.checkpoint, device="cpu").policy
    batch = {key: torch.rand(1, *feature.shape) for key, feature in config.input_features.items()}
    torch.manual_seed(0)
    expected = theirs.predict_action_chunk(batch)
    torch.manual_seed(0)
    assert torch.equal(ours.predict_action_chunk(batch), expected)


def test_a_frozen_batch_norm_stays_as_it_is(made, tmp_path):
    args = [*SMALL_POLICY_ARGS["flow"].split(), "backbone=resnet18", "n_obs_steps=1"]
    settings = small(
        "flow", dataset_id=[str(made("video"))], policy_args=args, freeze=["backbone"], output_dir=str(tmp_path)
    )
    train(**settings)
    first, last = (load_file(tmp_path / f"checkpoint-{step}" / "policy.safetensors") for step in (2, 4))
    norms = [name for name in first if "running_" in name]
    assert norms
    assert all(torch.equal(first[name], last[name]) for name in norms)


def test_a_task_that_the_policy_does_not_know_is_refused_before_training(made, tmp_path):
    settings = small("flow", dataset_id=[str(made("no_camera"))], steps=1)
    args = [*SMALL_POLICY_ARGS["flow"].split(), "task_embedding=true"]
    trained = train(**{**settings, "policy_args": args, "episodes": "0"}, output_dir=str(tmp_path / "one")).checkpoint
    config = json.loads((trained / "config.json").read_text())
    assert config["tasks"] == ["lift", "push"]
    (trained / "config.json").unlink()
    (trained / "config.json").write_text(json.dumps({**config, "tasks": ["lift", "pull"]}))
    with pytest.raises(
        UserError,
        match=r"task 'push' is not one that checkpoint-1 was trained on: expected one of .*Pass --episodes of those",
    ):
        train(**{**settings, "policy_args": None}, policy_path=str(trained), output_dir=str(tmp_path / "two"))
    ended = train(
        **{**settings, "policy_args": None},
        episodes="0,2",
        policy_path=str(trained),
        output_dir=str(tmp_path / "three"),
    )
    assert ended.steps == 1
