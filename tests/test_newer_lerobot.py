"""Checkpoints and pipelines of LeRobot after 0.6.1, made by hand as its sources at commit 7427f31 (August 2026) write them."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry
from safetensors.torch import load_file, save_file

from errors import UserError, read_json
from exchange import lerobot_runs
from exchange.lerobot_runs import from_lerobot, lerobot_checkpoint, to_lerobot
from helpers.runs import small
from policy.loaded import load_policy
from processors.pipelines import load_processors
from train import train

NEW_SETTINGS = {
    "reward_model": None,
    "persistent_workers": True,
    "dataloader_multiprocessing_context": "spawn",
    "env_eval_freq": 0,
    "checkpoint_format": "safetensors",
    "parallelism": {
        "dp_replicate": 1, "dp_shard": 1, "context_parallel": {"ring_degree": 1, "ulysses_degree": 1}, "cfg_parallel": 1,
    },
    "accelerator": {
        "mixed_precision": "no", "gradient_accumulation": {"steps": 1}, "fsdp": {"reshard_after_forward": True},
        "ddp": {"find_unused_parameters": True}, "compile": {"enabled": False}, "activation_checkpointing": {"mode": "none"},
    },
    "ema": {
        "enable": False, "decay": None, "update_after_step": 0, "inv_gamma": 1.0, "power": 0.75, "min_decay": 0.0,
        "max_decay": 0.9999, "use_for_eval": True,
    },
    "job": {"target": None, "image": "huggingface/lerobot-gpu:latest", "timeout": "2d", "detach": False, "tags": []},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    """checkpoint-2 of a run of ours of 4 steps."""
    settings = small("act", dataset_id=[str(made("no_camera"))])
    return train(**settings, output_dir=str(tmp_path_factory.mktemp("run") / "run")).checkpoint.parent / "checkpoint-2"


@pytest.fixture
def newer(run, tmp_path):
    """A checkpoint of lerobot-train after 0.6.1 that two processes wrote."""
    folder = to_lerobot(run, tmp_path / "theirs")
    edit(folder / "pretrained_model" / "train_config.json", **NEW_SETTINGS)
    position = {
        "step": 2, "dp_world_size": 2, "batch_size": 2, "grad_accum_steps": 1,
        "parallelism": {"dp_replicate": 2, "dp_shard": 1, "ring_degree": 1, "ulysses_degree": 1},
    }  # fmt: skip
    (folder / "training_state" / "training_step.json").write_text(json.dumps(position))
    return folder


def edit(path: Path, **settings) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def add_average(folder: Path) -> dict:
    """Beside pretrained_model a policy of other weights, and the average's state as a pickle, which is not read."""
    average = Path(shutil.copytree(folder / "pretrained_model", folder / "pretrained_model_ema"))
    weights = {name: tensor + 0.5 for name, tensor in load_file(average / "model.safetensors").items()}
    save_file(weights, average / "model.safetensors")
    (folder / "training_state" / "ema_state.pt").write_bytes(b"a pickle")
    return weights


def same(weights: dict, path: Path) -> bool:
    others = load_file(path)
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in others)


def test_new_keys_are_read(newer, run, tmp_path):
    checkpoint = from_lerobot(newer)
    state = read_json(checkpoint / "trainer_state.json")
    config = read_json(checkpoint / "train_config.json")
    assert (state["step"], state["samples_seen"], config["batch_size"], config["precision"]) == (2, 8, 4, "fp32")
    assert not (checkpoint / "training_weights.safetensors").exists()
    ends = [
        train(resume_from_checkpoint=str(path), output_dir=str(tmp_path / name), quiet=True).checkpoint
        for name, path in (("straight", run), ("round", newer))
    ]
    assert same(load_file(ends[0] / "policy.safetensors"), ends[1] / "policy.safetensors")


def test_a_folder_that_was_edited_is_converted_again(newer):
    first = from_lerobot(newer)
    assert from_lerobot(newer) == first
    edit(newer / "pretrained_model" / "train_config.json", seed=77)
    assert read_json(from_lerobot(newer) / "train_config.json")["seed"] == 77
    edit(newer / "training_state" / "training_step.json", batch_size=3, num_processes=1)
    assert read_json(from_lerobot(newer) / "train_config.json")["batch_size"] == 3
    optimizer = newer / "training_state" / "optimizer_state.safetensors"
    optimizer.write_bytes(b"damaged")
    with pytest.raises(UserError, match="cannot be read as a checkpoint of lerobot-train"):
        from_lerobot(newer)


@pytest.mark.parametrize(("ema", "decay"), [({"decay": 0.9}, 0.9), ({}, 0.9999)])
def test_the_average_of_the_weights_is_read(newer, tmp_path, ema, decay):
    """It is what the policy acts with, and the trained weights are trained on."""
    averages = add_average(newer)
    edit(newer / "pretrained_model" / "train_config.json", ema={**NEW_SETTINGS["ema"], "enable": True, **ema})
    checkpoint = from_lerobot(newer)
    assert read_json(checkpoint / "train_config.json")["ema_decay"] == decay
    assert same(averages, checkpoint / "policy.safetensors")
    assert same(
        load_file(newer / "pretrained_model" / "model.safetensors"), checkpoint / "training_weights.safetensors"
    )
    assert train(resume_from_checkpoint=str(newer), output_dir=str(tmp_path / "run"), quiet=True).steps == 4
    for folder in (newer, newer / "pretrained_model_ema"):
        acting = load_policy(folder, device="cpu").policy.state_dict()
        assert all(torch.equal(acting[name], averages[name]) for name in averages)
    trained = load_policy(newer / "pretrained_model", device="cpu").policy.state_dict()
    assert not all(torch.equal(trained[name], averages[name]) for name in averages)


def test_an_average_that_is_not_there_starts_anew(newer):
    edit(newer / "pretrained_model" / "train_config.json", ema={**NEW_SETTINGS["ema"], "enable": True, "decay": 0.9})
    checkpoint = from_lerobot(newer)
    assert same(load_file(checkpoint / "policy.safetensors"), checkpoint / "training_weights.safetensors")


def test_excluded_episodes_stay_out(newer):
    path = newer / "pretrained_model" / "train_config.json"
    edit(path, dataset={**read_json(path)["dataset"], "exclude_episodes": [1]})
    assert read_json(from_lerobot(newer) / "train_config.json")["episodes"] == "0,2"


@pytest.mark.parametrize(("change", "why"), [
    ("shards", "holds its weights in shards .* Run lerobot-convert-dcp --checkpoint_dir=.* Then pass --policy_path"),
    ("sharded optimizer", r"sharded optimizer state \(FSDP\), which Armature does not resume. Pass --policy_path"),
    ("accumulation", "gradient accumulation, whose steps it counts otherwise, which Armature does not resume"),
    ("reward model", "reward_model, which Armature does not resume"),
    ("no step", "it has no step of LeRobot's form"),
    ("step of text", "it has no step of LeRobot's form"),
    ("no dataset", "it has no dataset.repo_id of LeRobot's form"),
    ("dataset of text", "it has no dataset of LeRobot's form"),
    ("episodes", "it has no dataset.episodes of LeRobot's form"),
    ("list", "expected a JSON object, got list"),
    ("no optimizer", "cannot be read as a checkpoint of lerobot-train"),
    ("optimizer of text", "cannot be read as a checkpoint of lerobot-train: expected a list"),
])  # fmt: skip
def test_what_cannot_be_resumed_is_refused_by_name(newer, tmp_path, change, why):
    model = newer / "pretrained_model"
    state = newer / "training_state"
    config = model / "train_config.json"
    if change == "shards":
        edit(config, checkpoint_format="dcp")
        (model / "model.safetensors").unlink()
        (model / "pytorch_model_fsdp_0").mkdir()
    elif change == "sharded optimizer":
        (state / "optimizer_state.safetensors").unlink()
        (state / "optimizer_0").mkdir()
    elif change == "accumulation":
        edit(state / "training_step.json", grad_accum_steps=4)
    elif change == "reward model":
        edit(config, reward_model={"type": "sarm"}, policy=None)
    elif change == "no step":
        (state / "training_step.json").write_text("{}")
    elif change == "step of text":
        edit(state / "training_step.json", step="two")
    elif change == "no dataset":
        edit(config, dataset=None)
    elif change == "dataset of text":
        edit(config, dataset="lerobot/pusht")
    elif change == "episodes":
        edit(config, dataset={**read_json(config)["dataset"], "episodes": "0:2"})
    elif change == "list":
        config.write_text("[]")
    elif change == "no optimizer":
        (state / "optimizer_state.safetensors").unlink()
    else:
        (state / "optimizer_param_groups.json").write_text('"groups"')
    with pytest.raises(UserError, match=why) as error:
        train(resume_from_checkpoint=str(newer), output_dir=str(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_resuming_needs_no_function_of_lerobots(newer, monkeypatch):
    """Those of 0.6.1 are gone later."""
    for name in ("load_optimizer_state_dict", "load_optimizer_state"):
        monkeypatch.delattr(f"lerobot.optim.optimizers.{name}")
    for name in ("load_training_step", "save_checkpoint", "load_optimizer_state_dict"):
        monkeypatch.delattr(f"lerobot.common.train_utils.{name}")
    assert from_lerobot(newer).name == "checkpoint-2"


def test_a_later_save_checkpoint_counts_by_itself(run, tmp_path, monkeypatch):
    """It takes batch size and number of processes from LeRobot's config."""
    from lerobot.common import train_utils

    saved = []

    def save_checkpoint(
        checkpoint_dir,
        step,
        cfg,
        policy,
        optimizer,
        scheduler=None,
        preprocessor=None,
        postprocessor=None,
        accelerator=None,
    ):
        checkpoint_dir.mkdir(parents=True)
        saved.append((step, cfg.batch_size))

    monkeypatch.setattr(train_utils, "save_checkpoint", save_checkpoint)
    to_lerobot(run, tmp_path / "theirs")
    assert saved == [(2, 4)]


def test_a_lerobot_without_them_is_named(run, tmp_path, monkeypatch):
    monkeypatch.delattr("lerobot.common.train_utils.get_step_checkpoint_dir")
    monkeypatch.setattr(lerobot_runs, "version", lambda package: "0.9.0")
    with pytest.raises(UserError, match=r"expected lerobot 0.6.1, got 0.9.0"):
        to_lerobot(run, tmp_path / "theirs")


def test_files_that_a_step_keeps_in_the_folder_are_found(newer, monkeypatch):
    """Later tokenizer steps save their tokenizer beside the pipeline, under a name relative to it."""
    monkeypatch.setattr(ProcessorStepRegistry, "_registry", dict(ProcessorStepRegistry._registry))

    @ProcessorStepRegistry.register("step_with_files")
    @dataclass
    class WithFiles(ObservationProcessorStep):
        tokenizer_name: str

        def observation(self, observation):
            return observation

        def transform_features(self, features):
            return features

    model = newer / "pretrained_model"
    path = model / "policy_preprocessor.json"
    step = {"registry_name": "step_with_files", "config": {"tokenizer_name": "tokenizer"}}
    step["artifacts"] = {"tokenizer_name": "tokenizer"}
    edit(path, steps=[step, *read_json(path)["steps"]])
    with pytest.raises(UserError, match=f"step 0 has a file tokenizer that is missing from {model}"):
        load_processors(model, "cpu")
    (model / "tokenizer").mkdir()
    assert load_processors(model, "cpu")[0].steps[0].tokenizer_name == str(model / "tokenizer")


def test_the_newest_checkpoint_of_a_run_is_found(newer):
    (newer.parent / "last").unlink(missing_ok=True)
    (newer.parent / "last").symlink_to(newer.name)
    assert lerobot_checkpoint(str(newer.parents[1])).resolve() == newer.resolve()
    assert lerobot_checkpoint(str(newer / "pretrained_model_ema")) == (newer if add_average(newer) else None)
