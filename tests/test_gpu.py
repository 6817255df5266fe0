"""On a GPU: resume is exact there too, and what is only faster there changes no result."""

import json

import numpy as np
import pytest
import torch

from checkpoints.tensors import read_optimizer
from helpers.runs import DETERMINISTIC_ACT, assert_same_run, small
from policy.async_policy import AsyncPolicy
from policy.loaded import load_policy
from train import build_run, train
from training.distributed import Distributed
from training.plan import plan_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    pytest.mark.filterwarnings("ignore"),  # --deterministic has torch tell which kernels cannot be
]


@pytest.fixture
def run(made, tmp_path):
    """Train on the GPU with the same bits every time."""

    def run(name: str, policy: str, **settings):
        fixed = {"dataset_id": [str(made("two_cameras"))], "device": "cuda", "deterministic": True}
        return train(**{**small(policy), **fixed, **settings}, output_dir=str(tmp_path / name))

    return run


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("policy", ["act", "diffusion", "flow"])
def test_resumes_to_the_bit(run, tmp_path, policy, precision):
    whole = run("whole", policy, precision=precision, augment=True)
    train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "whole", tmp_path / "part", whole.steps)


@pytest.mark.parametrize("other", [{"frame_cache": "device"}, {"frame_cache": "off"}, {"save_async": "off"}])
def test_what_is_only_faster_changes_no_bit(run, tmp_path, other):
    run("plain", "act", frame_cache="on")
    run("other", "act", **{"frame_cache": "on", **other})
    assert_same_run(tmp_path / "plain", tmp_path / "other", 4)


def test_losses_are_those_of_the_cpu(run):
    """Without dropout and noise, in fp32 without TF32."""
    settings = {**DETERMINISTIC_ACT, "precision": "fp32", "steps": 4}
    courses = [[line["loss"] for line in run(d, "act", **settings, device=d).history] for d in ("cpu", "cuda")]
    assert courses[1] == pytest.approx(courses[0], rel=1e-3)


def test_auto_is_bf16_where_the_gpu_has_it(run):
    saved = json.loads((run("run", "flow").checkpoint / "train_config.json").read_text())
    assert saved["precision"] == ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32")


def test_a_step_that_logs_nothing_does_not_wait_for_the_gpu(made, tmp_path):
    """Of flow, which is ours; LeRobot's ACT makes a tensor on the host and waits for it to be copied."""
    settings = small(
        "flow", dataset_id=[str(made("two_cameras"))], output_dir=str(tmp_path), device="cuda", augment=True
    )
    with plan_run(settings) as plan, build_run(plan) as run:
        for _ in range(2):  # kernels are loaded and chosen, the optimizer's state is made
            run.count(run.learner.step(next(run.loader), run.step))
        batch = next(run.loader)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run.count(run.learner.step(batch, run.step))
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_chunks_predicted_ahead_are_those_of_act(run):
    policy = load_policy(run("run", "act").checkpoint, device="cuda")
    picture = np.zeros((64, 96, 3), np.uint8)
    still = {"observation.state": np.zeros(3), **{f"observation.images.{name}": picture for name in ("top", "wrist")}}
    chunk = [policy.act(still) for _ in range(4)]
    ahead = AsyncPolicy(policy, 1)
    for _ in range(12):
        action = ahead.act(still)
        assert any(np.allclose(action, other, atol=1e-4) for other in chunk)


def test_goes_on_from_an_optimizer_that_is_not_fused(tmp_path):
    """As lerobot-train's is: its count of steps has to come to the GPU as well."""
    theirs, mine = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, device="cuda")
    optimizer = torch.optim.AdamW(theirs.parameters())
    theirs(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer_state.pth")
    optimizer = torch.optim.AdamW(mine.parameters(), fused=True)
    Distributed().load_optimizer_state(mine, optimizer, read_optimizer(tmp_path))
    mine(torch.ones(1, 2, device="cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[mine.weight]["step"].item() == 2


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["act", "flow"])
def test_compiled_losses_are_close(run, policy):
    settings = {
        **(DETERMINISTIC_ACT if policy == "act" else {"policy_args": ["size=tiny"], "log_freq": 1}),
        "precision": "fp32",
    }
    plain, compiled = (run(str(c), policy, **settings, compile=c, steps=3, save_freq=0) for c in (False, True))
    assert [line["loss"] for line in compiled.history] == pytest.approx(
        [line["loss"] for line in plain.history], rel=1e-2
    )
