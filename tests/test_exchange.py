"""LeRobot's checkpoints in and out, renamed observations, old policies, and networks without Python."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import export
from checkpoints.folder import sort_key
from config import TrainConfig
from errors import UserError, read_json
from exchange import lerobot_runs, portable
from exchange.lerobot_runs import from_lerobot, read_schedule, scheduler_config, to_lerobot
from helpers.hub_server import Hub, connect
from helpers.runs import SMALL_POLICY_ARGS, small
from hub import check_login, newest_checkpoint
from policy.factory import policy_config
from policy.loaded import load_policy
from policy.presets import optimizer_preset
from train import train

BIN = Path(sys.executable).parent


def same_tensors(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def chunk(folder: Path) -> torch.Tensor:
    """What the policy in a folder predicts for one observation, by LeRobot's loading code alone."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    policy = get_policy_class(config.type).from_pretrained(folder, config=config).eval()
    torch.manual_seed(0)
    return policy.predict_action_chunk({key: torch.rand(1, *f.shape) for key, f in config.input_features.items()})


@pytest.fixture(scope="module")
def ours(made, tmp_path_factory):
    """checkpoint-4 of a run of 6 steps."""
    output = tmp_path_factory.mktemp("ours") / "run"
    settings = small("act", dataset_id=[str(made("video"))], steps=6, save_freq=4, lr_schedule="cosine", warmup_steps=2)
    return train(**settings, output_dir=str(output)).checkpoint.parent / "checkpoint-4"


def test_out_and_in_again(ours, tmp_path, capsys):
    """Our checkpoint as LeRobot's and back: weights, optimizer, step, settings and position are what they were."""
    folder = to_lerobot(ours, tmp_path / "lerobot")
    assert folder == tmp_path / "lerobot" / "checkpoints" / "000004"
    assert (folder.parent / "last").resolve() == folder.resolve()
    back = from_lerobot(folder)
    assert back.name == ours.name
    assert same_tensors(ours / "policy.safetensors", back / "policy.safetensors")
    assert torch.equal(chunk(ours), chunk(folder / "pretrained_model"))
    one, other = (torch.load(path / "optimizer_state.pth", weights_only=True)["state"] for path in (ours, back))
    assert all(torch.equal(entry[key], other[i][key]) for i, entry in one.items() for key in entry)
    states = [read_json(path / "trainer_state.json") for path in (ours, back)]
    assert [states[0][key] for key in ("step", "samples_seen", "batch_size", "seed")] == [
        states[1][key] for key in ("step", "samples_seen", "batch_size", "seed")
    ]
    configs = [read_json(path / "train_config.json") for path in (ours, back)]
    for name in ("steps", "lr", "lr_schedule", "warmup_steps", "augment", "dataset_id"):
        assert configs[0][name] == configs[1][name], name
    ends = [
        train(resume_from_checkpoint=str(path), output_dir=str(tmp_path / name), quiet=True).checkpoint
        for name, path in (("straight", ours), ("round", folder))
    ]
    assert same_tensors(*(end / "policy.safetensors" for end in ends))  # the course is the same, to the bit
    assert "another run" not in capsys.readouterr().out


def test_out_refuses_what_is_there(ours, tmp_path, capsys):
    (tmp_path / "there").mkdir()
    assert export.main([str(ours), str(tmp_path / "there"), "--format", "lerobot"]) == 2
    assert "exists already. Choose another folder" in capsys.readouterr().err


def test_episodes_and_names_go_both_ways(made, tmp_path):
    """Held-out episodes stay out there, and LeRobot's own split and rename_map hold here."""
    settings = small(
        "act",
        dataset_id=[str(made("video"))],
        steps=1,
        val_episodes="1",
        rename=["observation.images.top=observation.images.cam"],
    )
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    folder = to_lerobot(checkpoint, tmp_path / "lerobot")
    path = folder / "pretrained_model" / "train_config.json"
    config = read_json(path)
    total = read_json(made("video") / "meta" / "info.json")["total_episodes"]
    assert config["dataset"]["episodes"] == [i for i in range(total) if i != 1]
    assert config["rename_map"] == {"observation.images.top": "observation.images.cam"}
    path.write_text(json.dumps({**config, "dataset": {**config["dataset"], "eval_split": 0.4}}))
    settings = read_json(from_lerobot(folder) / "train_config.json")
    assert settings["rename"] == ["observation.images.top=observation.images.cam"]
    assert settings["episodes"] == ",".join(str(i) for i in range(total) if i != 1)
    assert settings["val_episodes"] == str(total - 1)


def test_what_was_held_out_stays_so_there_when_the_dataset_has_grown(made, tmp_path):
    settings = small("act", dataset_id=[str(made("no_camera"))], steps=1, val_fraction=0.3)
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    state = read_json(checkpoint / "trainer_state.json")
    drawn = state["data"]["held_out"]
    other = [episode for episode in range(3) if episode not in drawn][:1]
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, "data": {**state["data"], "held_out": other}}))
    folder = to_lerobot(checkpoint, tmp_path / "lerobot")
    assert set(read_json(folder / "pretrained_model" / "train_config.json")["dataset"]["episodes"]) == {0, 1, 2} - set(
        other
    )


@pytest.mark.parametrize(("policy", "settings", "name", "warmup"), [
    ("diffusion", {"grad_clip_norm": 5.0}, "cosine", 500), ("diffusion", {"warmup_steps": 7}, "cosine", 7),
    ("act", {"warmup_steps": 7}, "constant_with_warmup", 7), ("act", {"lr_schedule": "linear"}, "linear", 0)])  # fmt: skip
def test_the_schedule_goes_along(policy, settings, name, warmup):
    policy_cfg = policy_config(policy, None, "cpu")
    config = TrainConfig(dataset_id=["x"], **settings)
    scheduler = scheduler_config(policy_cfg, config)
    assert (scheduler.name, scheduler.num_warmup_steps) == (name, warmup)
    assert optimizer_preset(policy_cfg, config).grad_clip_norm == settings.get("grad_clip_norm", 10.0)


@pytest.mark.parametrize("settings", [{}, {"warmup_steps": 7}, {"lr_schedule": "constant", "warmup_steps": 7},
    {"lr_schedule": "linear"}, {"lr_schedule": "cosine", "warmup_steps": 7}])  # fmt: skip
@pytest.mark.parametrize("policy", ["act", "diffusion", "flow"])
def test_the_schedule_comes_back(policy, settings):
    """What is written for lerobot-train is read back as settings that have the same schedule."""
    policy_cfg = policy_config(policy, None, "cpu")
    config = TrainConfig(dataset_id=["x"], **settings)
    written = scheduler_config(policy_cfg, config)
    as_json = written and {"type": written.type, **asdict(written)}
    back = read_schedule(as_json, policy_cfg, TrainConfig(dataset_id=["x"]))
    assert scheduler_config(policy_cfg, TrainConfig(dataset_id=["x"], **back)) == written


def test_a_schedule_that_is_not_ours_is_refused(ours, tmp_path):
    folder = to_lerobot(ours, tmp_path / "lerobot")
    path = folder / "pretrained_model" / "train_config.json"
    scheduler = {"type": "cosine_annealing_with_warmup", "num_warmup_steps": 5}
    path.write_text(json.dumps({**read_json(path), "use_policy_training_preset": False, "scheduler": scheduler}))
    with pytest.raises(
        UserError, match=r"cosine_annealing.* Armature does not have. Pass --policy_path .*/000004 to start"
    ):
        from_lerobot(folder)


def test_a_later_lerobot_is_named(ours, tmp_path, monkeypatch):
    """After 0.6.1 LeRobot has other functions for its checkpoints."""
    monkeypatch.delattr("lerobot.common.train_utils.save_checkpoint")
    monkeypatch.setattr(lerobot_runs, "version", lambda package: "0.7.0")
    with pytest.raises(UserError, match=r"expected lerobot 0.6.1, got 0.7.0 .* Run `uv pip install lerobot==0.6.1`"):
        to_lerobot(ours, tmp_path / "lerobot")


@pytest.mark.parametrize(("changed", "why"), [
    ("train_config.json", "several datasets"), ("train_config.json", "a base of 4 bits"),
    ("train_config.json", "frozen weights")])  # fmt: skip
def test_out_refuses_what_lerobot_has_no_place_for(ours, tmp_path, changed, why):
    folder = tmp_path / ours.name
    shutil.copytree(ours, folder)
    content = read_json(folder / changed)
    content |= {
        "several datasets": {"dataset_id": 2 * (content.get("dataset_id") or [])},
        "a base of 4 bits": {"peft_quantize": "4bit", "policy_path": "base"},
        "frozen weights": {"freeze": ["backbone"]},
    }[why]
    (folder / changed).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"was trained with {why}: lerobot-train cannot resume it"):
        to_lerobot(folder, tmp_path / "lerobot")


def test_out_refuses_a_history_of_resized_pictures(made, tmp_path):
    settings = small("diffusion", dataset_id=str(made("video")), image_size=[48, 64], steps=1)
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    with pytest.raises(UserError, match="was trained with resized pictures and a history of them, which"):
        to_lerobot(checkpoint, tmp_path / "lerobot")


@pytest.mark.slow
def test_lerobot_train_takes_over_and_hands_back(ours, made, tmp_path):
    """The real lerobot-train: its run goes on here, ours goes on there, with the same actions at each hand-over."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pairs = [f"--policy.{pair.replace('=none', '=null')}" for pair in SMALL_POLICY_ARGS["act"].split()]
    begin = [
        str(BIN / "lerobot-train"), "--dataset.repo_id=test/made", f"--dataset.root={made('video')}", "--policy.type=act",
        "--policy.push_to_hub=false", "--policy.device=cpu", "--batch_size=4", "--steps=6", "--save_freq=4", "--num_workers=0",
        f"--output_dir={tmp_path / 'theirs'}", "--policy.n_action_steps=4", *pairs,
    ]  # fmt: skip
    done = subprocess.run(begin, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = tmp_path / "theirs" / "checkpoints" / "000004"
    result = train(resume_from_checkpoint=str(theirs), output_dir=str(tmp_path / "here"), quiet=True, save_freq=1)
    taken = from_lerobot(theirs)
    assert torch.equal(chunk(theirs / "pretrained_model"), chunk(taken))
    assert result.steps == 6
    assert read_json(taken / "trainer_state.json")["samples_seen"] == 16

    # `ours` has a schedule of its own, and two groups of parameters
    for name, checkpoint in (("there", tmp_path / "here" / "checkpoint-5"), ("scheduled", ours)):
        folder = to_lerobot(checkpoint, tmp_path / name)
        assert torch.equal(chunk(folder / "pretrained_model"), chunk(checkpoint))
        config = folder / "pretrained_model" / "train_config.json"
        resume = [str(BIN / "lerobot-train"), "--resume=true", f"--config_path={config}", "--steps=7"]
        done = subprocess.run(resume, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert read_json(tmp_path / name / "checkpoints/000007/training_state/training_step.json")["step"] == 7


@pytest.mark.slow
def test_lerobot_eval_runs_a_checkpoint(tmp_path):
    """The real lerobot-eval command on a checkpoint-<step> folder, in our environment type."""
    shipped = Path(__file__).parents[1] / "examples" / "datasets" / "metaworld_drawer_open"
    settings = small("flow", dataset_id=[str(shipped)], steps=1, save_freq=0, image_size=[64, 64])
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    command = [
        str(BIN / "lerobot-eval"), f"--policy.path={checkpoint}", "--env.type=armature_metaworld", "--env.task=drawer-open-v3",
        "--eval.n_episodes=1", "--eval.batch_size=1", "--policy.device=cpu", f"--output_dir={tmp_path / 'eval'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "pc_success" in (tmp_path / "eval" / "eval_info.json").read_text()


def test_renamed_observation(made, tmp_path):
    """--rename: the policy knows the new name, the arm keeps its own."""
    settings = small(
        "flow", dataset_id=[str(made("video"))], steps=1, rename=["observation.images.top=observation.images.cam"]
    )
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    policy = load_policy(checkpoint, device="cpu")
    assert "observation.images.cam" in policy.policy.config.input_features
    picture = np.zeros((64, 96, 3), np.uint8)
    assert policy.act({"observation.images.top": picture, "observation.state": np.zeros(3)}).shape == (3,)
    with pytest.raises(UserError, match=r"it has no such observation. Did you mean observation.images.top\?"):
        train(
            **{**settings, "rename": ["observation.images.tip=observation.images.x"]},
            output_dir=str(tmp_path / "wrong"),
        )


@pytest.mark.slow
def test_old_policy_is_migrated(ours, made, tmp_path):
    """A policy of before processors, whose normalisation lies in its weights, is fine-tuned and acts."""
    old = tmp_path / "old"
    old.mkdir()
    weights = load_file(ours / "policy.safetensors")
    stats = {"observation_state": 3, "action": 3}
    for name, size in stats.items():
        for holder in ("normalize_inputs",) if name != "action" else ("normalize_targets", "unnormalize_outputs"):
            weights |= {
                f"{holder}.buffer_{name}.{what}": torch.full((size,), v) for what, v in (("mean", 0.5), ("std", 2.0))
            }
    weights |= {
        f"normalize_inputs.buffer_observation_images_top.{what}": torch.full((3, 1, 1), 0.5) for what in ("mean", "std")
    }
    save_file(weights, old / "model.safetensors")
    (old / "config.json").write_text((ours / "config.json").read_text())
    policy = load_policy(old, device="cpu")
    assert policy.act(
        {"observation.images.top": np.zeros((64, 96, 3), np.uint8), "observation.state": np.zeros(3)}
    ).shape == (3,)
    settings = small("act", dataset_id=[str(made("video"))], steps=1, policy_args=None, policy_path=str(old))
    assert train(**settings, output_dir=str(tmp_path / "run")).steps == 1


@pytest.mark.parametrize(("policy", "kind"), [("flow", "torch-export"), ("act", "torch-export"),
    pytest.param("flow", "onnx", marks=pytest.mark.slow), pytest.param("act", "onnx", marks=pytest.mark.slow)])  # fmt: skip
def test_export(ours, made, tmp_path, policy, kind, capsys):
    """The written file computes the policy's chunk to 1e-4, and says how to normalise."""
    if policy == "flow":
        ours = train(
            **small("flow", dataset_id=[str(made("video"))], steps=1), output_dir=str(tmp_path / "run")
        ).checkpoint
    path = tmp_path / ("net.onnx" if kind == "onnx" else "net.pt")
    command = [str(ours), str(path), "--format", kind]
    if policy == "flow":
        assert export.main(command) == 2
        assert "the policy does several tasks, and an exported network does one. Add --task" in capsys.readouterr().err
        command += ["--task", "push"]
    assert export.main(command) == 0, capsys.readouterr().err
    about = read_json(path.with_name(f"{path.name}.json"))
    assert about["task"] == ("push" if policy == "flow" else "")
    assert about["largest_difference"] < 1e-4
    assert about["unnormalise"]["action"]["mode"] == "MEAN_STD"
    assert path.stat().st_size > 10_000
    path.unlink()
    assert export.main(command) == 2
    assert f"{path.name}.json exists already. Choose another name" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["act", "flow"])
def test_int8_is_written_if_it_is_close(ours, made, tmp_path, capsys, monkeypatch, policy):
    if policy == "flow":  # which chunk it draws may change with the last bit: the plain one
        settings = small("flow", dataset_id=[str(made("video"))], steps=1)
        settings["policy_args"] = [*settings["policy_args"], "head=regression", "task_words=false"]
        ours = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    sizes = {}
    for name, flags in (("whole", []), ("small", ["--int8"])):
        path = tmp_path / f"{name}.onnx"
        assert export.main([str(ours), str(path), "--format", "onnx", *flags]) == 0, capsys.readouterr().err
        sizes[name] = path.stat().st_size
        assert read_json(path.with_name(f"{path.name}.json"))["largest_difference"] < 0.1
    assert sizes["small"] < sizes["whole"]
    monkeypatch.setattr(portable, "INT8_TOLERANCE", 1e-9)
    assert export.main([str(ours), str(tmp_path / "no.onnx"), "--format", "onnx", "--int8"]) == 2
    assert (
        "--int8: the exported network differs too much from the policy: expected at most 1e-09, got"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "no.onnx").exists()


def test_export_tells_what_does_not_export(made, tmp_path, capsys):
    checkpoint = train(
        **small("diffusion", dataset_id=[str(made("video"))], steps=1), output_dir=str(tmp_path / "run")
    ).checkpoint
    assert export.main([str(checkpoint), str(tmp_path / "x.pt"), "--format", "torch-export"]) == 2
    assert "policy diffusion does not export with these settings: expected act, or flow" in capsys.readouterr().err
    assert not (tmp_path / "x.pt").exists()


def test_torchscript_was_dropped(capsys):
    with pytest.raises(SystemExit):
        export.main(["checkpoint-1", "x.pt", "--format", "torchscript"])
    assert "TorchScript was dropped: pass torch-export or onnx" in capsys.readouterr().err


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine that huggingface_hub talks to, and no other."""
    from huggingface_hub import constants

    import hub as module

    server = Hub()
    connect(monkeypatch, server)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(module, "WAITS", (0.05, 0.05))
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_hub_up_and_down(hub, made, tmp_path, capsys):
    """Checkpoints as they are made, the final policy with its card, refusals tried again; resumed from there, to the bit."""
    settings = small("flow", dataset_id=[str(made("video"))], push_to_hub="me/arm", push_checkpoints=True, quiet=False)
    hub.failures = 1
    whole = train(**settings, output_dir=str(tmp_path / "run"))
    assert "uploaded to" in capsys.readouterr().out
    files = hub.repos["me/arm"][-1]
    assert {
        "README.md",
        "model.safetensors",
        "checkpoint-4/manifest.json",
        "checkpoint-2/optimizer_state.pth",
    } <= files.keys()
    assert not any(b"hf_secret" in data for data in files.values())
    assert "Bearer hf_secret" in hub.tokens
    go_on = {
        "resume_from_checkpoint": "me/arm",
        "steps": 6,
        "quiet": True,
        "push_to_hub": None,
        "push_checkpoints": False,
    }
    ends = [
        train(**go_on | {"resume_from_checkpoint": source}, output_dir=str(tmp_path / name)).checkpoint
        for name, source in (("hub", "me/arm"), ("disk", str(whole.checkpoint)))
    ]
    assert same_tensors(*(end / "policy.safetensors" for end in ends))
    assert load_policy("me/arm", device="cpu").policy.config.type == "flow"
    assert not list(
        (tmp_path / "hub").glob("**/checkpoint-2/policy.safetensors")
    )  # nothing is fetched that is not needed
    state = "checkpoint-2/trainer_state.json"
    hub.repos["me/arm"].append({**files, state: json.dumps({**json.loads(files[state]), "branch": 1}).encode()})
    assert newest_checkpoint("me/arm", "", sort_key).name == "checkpoint-2"  # the run went back to it


def test_a_repo_without_its_user_is_refused_at_once(hub):
    with pytest.raises(UserError, match="--push_to_hub arm: expected a Hub id written user/name"):
        check_login("arm")


def test_hub_that_refuses_does_not_fail_the_run(hub, made, tmp_path, capsys):
    settings = small("flow", dataset_id=[str(made("video"))], push_to_hub="me/arm", push_checkpoints=True)
    hub.failures = 1000
    result = train(**settings, output_dir=str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert result.steps == 4
    assert result.checkpoint.is_dir()
    assert "warning: --push_checkpoints: checkpoint-" in out
    assert "hf upload me/arm" in out
    assert hub.repos["me/arm"] == [{}]


def test_hub_repo_without_checkpoint(hub, made, tmp_path):
    hub.repos["me/empty"] = [{"README.md": b"nothing"}]
    with pytest.raises(UserError, match=r"me/empty: the Hub repo holds no checkpoint-<step> folder. Pass another repo"):
        train(dataset_id=str(made("video")), resume_from_checkpoint="me/empty", output_dir=str(tmp_path / "run"))


def test_an_optimizers_state_goes_to_the_device_of_its_kernels(tmp_path):
    """lerobot-train's optimizer is not fused, ours is: its count of steps goes to the weights' device ("meta" in a GPU's place)."""
    from checkpoints.tensors import read_optimizer
    from training.distributed import Distributed

    theirs, mine = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="meta")
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer_state.pth")
    optimizer = torch.optim.AdamW(mine.parameters(), lr=0.5)
    optimizer.param_groups[0]["fused"] = True
    Distributed().load_optimizer_state(mine, optimizer, read_optimizer(tmp_path))
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.state[mine.weight]["step"].device.type == "meta"
