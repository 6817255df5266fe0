"""Memory: weights in bf16, moments in 8 bits, and what a run takes before it takes it."""

import json
import re
import shutil
import sys

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.act.configuration_act import ACTConfig
from lerobot.policies.pi0.configuration_pi0 import PI0Config
from safetensors.torch import load_file

from checkpoints import writer as writer_module
from checkpoints.folder import TRAINED_WEIGHTS, write_manifest
from config import TrainConfig
from errors import UserError
from exchange.lerobot_runs import to_lerobot
from helpers.dataset_edits import edit_json
from helpers.runs import SMALL_POLICY_ARGS, assert_same_run, read_metrics, small
from policy.loaded import load_policy
from runtime import cgroup_memory
from train import build_run, train
from training import memory as memory_module
from training.learner import AVERAGE
from training.memory import memory_remedies
from training.optimizers import round_at_random, step_in_float32, sum_gradients_in_float32
from training.plan import plan_run


def test_checkpoints_of_versions_that_updated_bf16_weights_in_bf16_are_told(made, tmp_path, capsys):
    settings = small("act", dataset_id=str(made("no_camera")), steps=2, save_freq=1, weights_dtype="bf16")
    train(**settings, output_dir=str(tmp_path / "run"))
    checkpoint = tmp_path / "run" / "checkpoint-1"
    capsys.readouterr()
    train(resume_from_checkpoint=str(checkpoint), output_dir=str(tmp_path / "run"))
    assert "updated bf16 weights in bf16" not in capsys.readouterr().out
    edit_json(checkpoint / "trainer_state.json", lambda state: state.pop("optimizer_entries"))
    write_manifest(checkpoint)
    train(resume_from_checkpoint=str(checkpoint), output_dir=str(tmp_path / "run"))
    assert "updated bf16 weights in bf16, where small steps round to none" in capsys.readouterr().out


def same_files(one, other) -> bool:
    a, b = load_file(one), load_file(other)
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def without_times(run) -> list[dict]:
    times = ("samples_per_s", "step_s", "data_wait")
    return [{name: value for name, value in line.items() if name not in times} for line in read_metrics(run)]


def test_rounding_at_random_is_right_in_the_mean():
    torch.manual_seed(0)
    number = torch.full((100_000,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next number of bf16
    rounded = round_at_random(number)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.double().mean().item() == pytest.approx(number[0].item(), abs=1e-4)
    exact = torch.randn(1000).bfloat16().float()
    assert torch.equal(round_at_random(exact).float(), exact)
    assert round_at_random(torch.tensor([float("inf"), float("-inf")])).tolist() == [float("inf"), float("-inf")]
    assert round_at_random(torch.tensor([float("nan")])).isnan().all()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_small_steps_of_bf16_weights_are_not_lost(kind):
    """300 steps of a rate that bf16 rounds away: the mean of the weights follows that of fp32 weights."""
    torch.manual_seed(0)
    start = torch.full((4000,), 0.5)
    exact = torch.nn.Parameter(start.clone())
    rounded = torch.nn.Parameter(start.bfloat16())
    plain = torch.nn.Parameter(start.bfloat16())
    optimizers = [kind([parameter], lr=1e-5) for parameter in (exact, rounded, plain)]
    optimizers[1].step = lambda step=optimizers[1].step: step_in_float32(optimizers[1], step)
    for _ in range(300):
        for parameter, optimizer in zip((exact, rounded, plain), optimizers, strict=True):
            parameter.grad = torch.full_like(parameter, 0.25)
            optimizer.step()
    moved = (exact - start).mean().item()
    assert moved < 0
    assert (rounded.float() - start).mean().item() == pytest.approx(moved, rel=0.1)
    assert torch.equal(plain.float(), start)  # what PyTorch alone does
    if kind is torch.optim.AdamW:
        assert all(optimizers[1].state[rounded][key].dtype is torch.float32 for key in ("exp_avg", "exp_avg_sq"))


def test_gradients_of_many_micro_batches_add_up_in_float32():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    sum_gradients_in_float32(torch.optim.SGD([weight]))
    for _ in range(1000):
        (weight * 1e-3).sum().backward()
    torch.testing.assert_close(weight.grad, torch.full((4,), 1000 * torch.tensor(1e-3).bfloat16().item()))


@pytest.mark.parametrize("policy", ["act", "flow", "diffusion"])
def test_bf16_weights_resume_to_the_bit(made, tmp_path, policy):
    settings = small(policy, dataset_id=str(made("video")), weights_dtype="bf16", ema_decay=0.9, val_episodes="2")
    settings |= {"grad_accumulation_steps": 2 if policy == "act" else 1}
    train(**settings, output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "part" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "part")
    train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part", 4)
    lines = [without_times(tmp_path / run) for run in ("whole", "part")]
    assert lines[0] == lines[1]
    assert any("val_action_error" in line for line in lines[0])
    whole = tmp_path / "whole" / "checkpoint-4"
    assert same_files(whole / TRAINED_WEIGHTS, tmp_path / "part" / "checkpoint-4" / TRAINED_WEIGHTS)
    acting = load_file(whole / "policy.safetensors")
    trained = load_file(whole / TRAINED_WEIGHTS)
    averages = {name: tensor for name, tensor in trained.items() if name.startswith(AVERAGE)}
    assert averages
    for name, average in averages.items():
        assert average.dtype is torch.float32
        assert torch.equal(average.bfloat16(), acting[name.removeprefix(AVERAGE)])
    assert json.loads((whole / "train_config.json").read_text())["precision"] == "bf16"

    # It acts here, and in LeRobot's own loading code, which has the weights in fp32.
    loaded = load_policy(whole, device="cpu")
    assert {parameter.dtype for parameter in loaded.policy.parameters()} == {torch.float32}
    loaded.latency(runs=1)
    from lerobot.policies import get_policy_class

    theirs = get_policy_class(policy).from_pretrained(whole)
    ours = loaded.policy.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.state_dict().items())


def test_bf16_weights_learn(made, tmp_path):
    """The loss falls as with fp32 weights."""
    settings = small("flow", dataset_id=str(made("no_camera")), steps=40, log_freq=20, save_freq=0, batch_size=16)
    exact = train(**settings, output_dir=str(tmp_path / "fp32"))
    rounded = train(**settings, weights_dtype="bf16", output_dir=str(tmp_path / "bf16"))
    assert rounded.final_loss == pytest.approx(exact.final_loss, rel=0.05)
    assert rounded.final_loss < 0.8 * exact.history[0]["loss"]


def test_what_does_not_go_with_bf16_weights_is_refused(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), weights_dtype="bf16")
    for precision in ("fp16", "fp32"):
        with pytest.raises(
            UserError, match=f"--weights_dtype bf16 needs --precision bf16, got {precision}. Leave --prec"
        ):
            train(**settings, precision=precision)
    result = train(**{**settings, "steps": 2})
    with pytest.raises(UserError, match="--weights_dtype: checkpoint-2 was trained with bf16, got fp32"):
        train(resume_from_checkpoint=str(result.checkpoint), weights_dtype="fp32", steps=4)


def test_adamw8bit_without_torchao_says_how_to_install_it(made, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match=r"needs the package torchao\. Install it with: uv pip install torchao==0.18.0"):
        train(**small(dataset_id=str(made("no_camera"))), optimizer="adamw8bit", output_dir=str(tmp_path / "run"))


@pytest.mark.parametrize("weights_dtype", ["fp32", "bf16"])
def test_adamw8bit_resumes_to_the_bit(made, tmp_path, weights_dtype):
    pytest.importorskip("torchao", reason="torchao is not installed (uv pip install torchao==0.18.0)")
    settings = small("act", dataset_id=str(made("no_camera")), optimizer="adamw8bit", weights_dtype=weights_dtype)
    settings["policy_args"] = [text.replace("32", "64") for text in SMALL_POLICY_ARGS["act"].split()]
    whole = train(**settings, output_dir=str(tmp_path / "whole"))
    state = torch.load(whole.checkpoint / "optimizer_state.pth", weights_only=True)["state"]
    codes = [entry["exp_avg"] for entry in state.values() if "exp_avg.scale" in entry]
    assert codes
    assert all(tensor.dtype is torch.uint8 for tensor in codes)
    others = [entry["exp_avg"] for entry in state.values() if "exp_avg.scale" not in entry]
    assert all(tensor.dtype is torch.float32 for tensor in others)
    train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True
    )
    assert_same_run(tmp_path / "whole", tmp_path / "part", 4)
    with pytest.raises(
        UserError, match="trained with --optimizer adamw8bit, whose moments lerobot-train does not have"
    ):
        to_lerobot(whole.checkpoint, tmp_path / "exported")
    with pytest.raises(UserError, match="--optimizer: checkpoint-4 was trained with adamw8bit, got auto"):
        train(resume_from_checkpoint=str(whole.checkpoint), optimizer="auto", steps=6)


def planned(settings: dict):
    with plan_run(settings) as plan:
        return plan


def run_settings(made, tmp_path, policy: str = "act", **settings) -> dict:
    return small(policy, dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), **settings)


def test_the_header_says_what_a_run_takes(made, tmp_path, capsys):
    settings = run_settings(made, tmp_path, ema_decay=0.9, steps=2, save_freq=1, quiet=False)
    train(**settings)
    header = capsys.readouterr().out
    assert "parameters, fp32, on cpu" in header
    size = r"[\d.]+ MB"
    assert re.search(
        f"memory    weights {size} fp32, gradients {size}, optimizer {size}, average {size}: {size}, plus act", header
    )
    assert re.search(
        f"on the host {size} to copy a checkpoint; a checkpoint {size} on .*, 2 checkpoints, {size}", header
    )
    train(**{**settings, "weights_dtype": "bf16", "output_dir": str(tmp_path / "bf16")})
    assert "parameters, bf16 and fp32 weights computed in bf16, on cpu" in capsys.readouterr().out


@pytest.mark.parametrize("weights_dtype", ["fp32", "bf16"])
def test_the_estimate_is_what_a_run_holds(made, tmp_path, weights_dtype):
    """Without building the policy, to the byte."""
    settings = run_settings(made, tmp_path, ema_decay=0.9, weights_dtype=weights_dtype, freeze=["encoder"])
    memory = planned(settings).memory
    with plan_run(settings) as plan, build_run(plan) as run:
        run.learner.step(run.next_batch(), 0)
        policy, learner = run.policy, run.learner
        assert sum(memory.weights.values()) == sum(t.nbytes for t in (*policy.parameters(), *policy.buffers()))
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        assert len(trained) < len(list(policy.parameters()))
        assert memory.gradients == sum(parameter.nbytes for parameter in trained)
        assert memory.ema == sum(average.nbytes for average in learner.ema.averages.values())
        state = learner.state()
        moments = sum(
            entry[key].nbytes for entry in state.optimizer["state"].values() for key in ("exp_avg", "exp_avg_sq")
        )
        assert moments <= memory.optimizer  # weights that this loss does not use have none
        assert moments > 0.9 * memory.optimizer
        stored = [*state.weights.values(), *state.trained_weights.values()]
        assert memory.checkpoint - memory.optimizer == sum(tensor.nbytes for tensor in stored)


def test_a_device_that_is_too_small_is_refused_before_anything_is_built(made, tmp_path, monkeypatch):
    settings = run_settings(made, tmp_path, ema_decay=0.9)
    needed = planned(settings).memory.on_device
    monkeypatch.setattr(memory_module, "device_memory", lambda device: (needed - 1, needed - 1))
    with pytest.raises(
        UserError, match=r"training takes .* before activations, and cpu has .*: --ema_decay 0"
    ) as refusal:
        planned(settings)
    assert "--grad" not in str(refusal.value)  # which takes less activations only
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(memory_module, "device_memory", lambda device: (needed + 1, needed - 1))
    assert any(re.search("and cpu has .*, .* MB of it free", warning) for warning in planned(settings).warnings)
    monkeypatch.setattr(memory_module, "device_memory", lambda device: (needed, needed))
    assert not planned(settings).warnings


def test_remedies_are_those_that_are_not_on_already(made, tmp_path):
    settings = run_settings(made, tmp_path)
    act = planned(settings).memory_remedies()
    assert act == [
        "--grad_accumulation_steps 2",
        "--optimizer adamw8bit",
        "--weights_dtype bf16",
        "a smaller --batch_size",
    ]
    settings |= {"batch_size": 1, "weights_dtype": "bf16"}
    assert planned(settings).memory_remedies() == ["--optimizer adamw8bit"]
    result = train(**{**settings, "steps": 1})
    resumed = {"resume_from_checkpoint": str(result.checkpoint), "steps": 2}
    assert planned(resumed).memory_remedies() == []  # it keeps its policy and its optimizer
    base = {**run_settings(made, tmp_path, ema_decay=0.9), "output_dir": str(tmp_path / "base")}
    del base["policy_args"]
    base["policy_path"] = str(result.checkpoint)
    fine_tuned = planned(base).memory_remedies()
    assert "--peft lora --peft_args target_modules=all-linear" in fine_tuned  # LeRobot names no modules for act
    assert "--ema_decay 0" in fine_tuned


def test_remedies_of_a_policy_that_has_settings_for_it():
    from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig

    config = TrainConfig(dataset_id=["some/data"], policy="smolvla", batch_size=8)
    expert = memory_remedies(config, SmolVLAConfig(device="cpu", train_expert_only=False), resumed=False)
    assert "--policy_args train_expert_only=true" in expert
    assert "--policy_args train_expert_only=true" not in memory_remedies(
        config, SmolVLAConfig(device="cpu"), resumed=False
    )


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes", "remedies"),
    [
        (3, 1, 1, ["--grad_accumulation_steps 3", "a smaller --batch_size"]),
        (6, 2, 1, ["--grad_accumulation_steps 3", "a smaller --batch_size"]),
        (12, 2, 2, ["--grad_accumulation_steps 3", "a smaller --batch_size"]),
        (6, 1, 4, ["a smaller --batch_size"]),
        (2, 2, 1, []),
        (4, 1, 4, []),
    ],
)
def test_a_batch_is_offered_as_the_run_can_split_it(batch_size, accumulation, processes, remedies):
    config = TrainConfig(dataset_id=["some/data"], batch_size=batch_size, grad_accumulation_steps=accumulation)
    assert memory_remedies(config, ACTConfig(device="cpu"), resumed=True, processes=processes) == remedies


def test_smaller_pictures_are_offered_where_they_stay_small():
    camera = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 96, 96))}
    config = TrainConfig(dataset_id=["some/data"], batch_size=1)
    remedy = "a smaller --image_size"
    assert remedy in memory_remedies(config, ACTConfig(device="cpu", input_features=camera), resumed=False)
    assert remedy not in memory_remedies(config, ACTConfig(device="cpu", input_features=camera), resumed=True)
    resizes = PI0Config(device="cpu", input_features=camera)
    assert remedy not in memory_remedies(config, resizes, resumed=False)


def test_a_host_without_room_for_a_copy_writes_in_place(made, tmp_path, monkeypatch, capsys):
    settings = run_settings(made, tmp_path)
    train(**settings)
    assert "no room" not in capsys.readouterr().out
    monkeypatch.setattr(writer_module, "available_memory", lambda: 1000)
    train(**{**settings, "output_dir": str(tmp_path / "full")})
    assert capsys.readouterr().out.count("no room for a copy of the checkpoint: 0.0 GB are not free") == 1
    assert_same_run(tmp_path / "run", tmp_path / "full", 2)
    assert_same_run(tmp_path / "run", tmp_path / "full", 4)


def test_limits_of_control_groups(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/jobs/mine\n")
    mine = tmp_path / "jobs" / "mine"
    mine.mkdir(parents=True)
    for folder, limit, used in ((mine, "max", 50), (mine.parent, "1000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 200\n")
    assert cgroup_memory(tmp_path, own) == [(1000, 500)]
    own.write_text("5:cpu,memory:/slurm\n1:cpu:/\n")
    job = tmp_path / "memory" / "slurm"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("3000\n")
    (job / "memory.usage_in_bytes").write_text("1000\n")
    (job / "memory.stat").write_text("total_inactive_file 400\n")
    assert cgroup_memory(tmp_path, own) == [(3000, 600)]
    assert cgroup_memory(tmp_path, tmp_path / "missing") == []
