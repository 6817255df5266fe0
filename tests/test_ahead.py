"""Chunks predicted ahead: every action is the one for its tick, and a tick does not wait for a prediction under way."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
from data.opening import open_source
from errors import UserError
from helpers.flow_policies import tiny_flow
from helpers.paths import SHIPPED
from helpers.runs import small
from infer import compare
from policy.async_policy import AsyncPolicy
from policy.loaded import load_policy
from train import train


class Clock:
    """A policy whose observation is the tick t, and whose chunk is t, t + 1, ...: the right action of a tick is its number."""

    def __init__(self, chunk_size=10, n_action_steps=4):
        self.config = SimpleNamespace(
            chunk_size=chunk_size,
            n_action_steps=n_action_steps,
            n_obs_steps=1,
            observation_delta_indices=None,
            type="clock",
        )
        self.policy, self.device, self.kind, self.expected = self, "cpu", "clock", {}
        self.relative = False
        self.may_answer, self.asked = threading.Event(), []
        self.may_answer.set()

    def reset(self): ...

    def eval(self): ...

    def preprocess(self, batch):
        return batch

    postprocess = batch_of = preprocess

    def predict_action_chunk(self, batch):
        assert self.may_answer.wait(20)
        self.asked.append(batch["t"])
        return batch["t"] + torch.arange(self.config.chunk_size, dtype=torch.float32)[None, :, None]


@pytest.mark.parametrize("lead", [1, 2, 3, 5])
@pytest.mark.parametrize("n_action_steps", [1, 4, 10])
def test_every_action_is_the_one_for_its_tick(lead, n_action_steps):
    clock = Clock(10, n_action_steps)
    policy = AsyncPolicy(clock, lead)
    for _ in range(2):
        clock.asked = []
        policy.reset()
        assert [float(policy.act({"t": t})[0]) for t in range(40)] == list(range(40))
        assert max(np.diff(clock.asked)) <= 10 - lead  # no chunk is used past its end


def test_without_cuda_nothing_is_asked_of_it(monkeypatch):
    monkeypatch.delattr(torch.cuda, "stream")  # a Mac's fails, for the CPU as well
    assert AsyncPolicy(Clock(), 3).act({"t": 5}) == 5


def test_a_tick_does_not_wait_for_a_prediction_under_way():
    clock = Clock()
    policy = AsyncPolicy(clock, 3)
    assert policy.act({"t": 0}) == 0
    clock.may_answer.clear()  # from now on predictions hang
    assert [float(policy.act({"t": t})[0]) for t in (1, 2, 3)] == [1, 2, 3]
    late = threading.Timer(0.2, clock.may_answer.set)
    late.start()
    assert policy.act({"t": 4}) == 4  # its chunk was asked for at tick 1: this one has to wait
    assert clock.asked[:2] == [0, 1]
    assert clock.may_answer.is_set()


@pytest.mark.parametrize(("n_action_steps", "lead"), [(1, 1), (4, 4), (5, 4)])
def test_a_chunk_has_all_the_ticks_that_were_asked_for(n_action_steps, lead):
    clock = Clock(10, n_action_steps)
    policy = AsyncPolicy(clock, lead)
    for t in range(12):
        policy.act({"t": t})
    policy.reset()  # waits for the last one
    taken = range(n_action_steps, 12 + lead, n_action_steps)
    assert clock.asked == [0, *(t - lead for t in taken)][: len(clock.asked)]


def test_what_fails_in_the_thread_is_raised_and_reset_goes_on():
    clock = Clock()
    policy = AsyncPolicy(clock, 2)
    policy.act({"t": 0})
    clock.predict_action_chunk = lambda batch: 1 / 0
    for t in (1, 2, 3):  # the last one while its prediction has failed
        policy.act({"t": t})
    with pytest.raises(ZeroDivisionError):
        policy.act({"t": 4})
    del clock.predict_action_chunk
    policy.reset()
    assert policy.act({"t": 7}) == 7


def test_too_slow_is_refused():
    with pytest.raises(
        UserError,
        match=r"takes 6 control ticks to predict and has 10 actions \(chunk_size\): expected 12 or more\. Act at a lower rate",
    ):
        AsyncPolicy(Clock(), 6)
    diffusion = Clock()
    diffusion.config = SimpleNamespace(horizon=16, n_action_steps=8)  # gives those that it carries out, no more
    with pytest.raises(UserError, match=r"has 8 actions \(n_action_steps\): expected 10 or more"):
        AsyncPolicy(diffusion, 5)


def test_temporal_ensembling_is_refused():
    clock = Clock()
    clock.config.temporal_ensemble_coeff = 0.01
    with pytest.raises(UserError, match="temporal ensembling asks for a chunk at every tick"):
        AsyncPolicy(clock, 1)


@pytest.mark.parametrize("lead", [1, 2, 4, 6])
def test_flow_blends_from_the_committed_actions(lead):
    """The plan jumps from 0 to 1: no action differs more from the one before than with blending alone."""
    policy = tiny_flow("chunk_size=16", "n_action_steps=8", "blend_steps=4", "head=regression", cameras=0, state=1)
    plan = Clock()
    plan.config, plan.policy = policy.config, policy
    policy.head.regress = lambda condition: torch.full((1, 16, 2), plan.now)
    ahead = AsyncPolicy(plan, lead)
    taken = []
    for tick in range(60):
        plan.now = float(tick > 20)
        taken.append(ahead.act({"observation.state": torch.zeros(1, 1)})[0])
    assert (taken[0], taken[-1]) == (0, 1)
    assert max(np.diff(taken)) < 0.21


@pytest.mark.parametrize(("kind", "pairs"), [
    ("flow", []), ("flow", ["n_obs_steps=2"]), ("act", []), ("diffusion", ["n_obs_steps=2"])])  # fmt: skip
def test_real_policies(made, tmp_path, monkeypatch, kind, pairs):
    """As far ahead as their latency asks for; on a still arm the chunks are those that act() would have predicted."""
    settings = small(kind, dataset_id=[str(made("video"))], steps=1)
    settings["policy_args"] = [*settings["policy_args"], *pairs]
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    policy = load_policy(checkpoint, device="cpu", task="lift")
    monkeypatch.setattr(policy, "latency", lambda task: 0.09)
    ahead = policy.ahead(fps=10)
    assert ahead.lead == 1
    source = open_source(str(made("video")), episodes="0")
    result = compare(ahead, source, 0)
    assert result.predicted.shape == (13, 3)
    assert np.isfinite(result.predicted).all()
    if kind == "act":  # no noise, and its chunk is of the observation alone
        still = {"observation.state": np.zeros(3), "observation.images.top": np.zeros((64, 96, 3), np.uint8)}
        policy.reset()
        ahead.reset()
        chunk = [policy.act(still) for _ in range(4)]
        assert np.array_equal(ahead.act(still), chunk[0])
        taken = [ahead.act(still) for _ in range(8)]
        assert all(any(np.allclose(a, b, atol=1e-6) for b in chunk) for a in taken)


def test_latency_is_measured(made, tmp_path, monkeypatch):
    checkpoint = train(
        **small("flow", dataset_id=[str(made("no_camera"))], steps=1), output_dir=str(tmp_path / "run")
    ).checkpoint
    policy = load_policy(checkpoint, device="cpu")
    assert 0 < policy.latency(runs=3) < 1
    quick = policy.policy.predict_action_chunk
    monkeypatch.setattr(policy.policy, "predict_action_chunk", lambda *a, **k: (time.sleep(0.05), quick(*a, **k))[1])
    assert policy.latency(runs=3) >= 0.05


def test_in_simulation(tmp_path, capsys, renderer):
    """evaluate.py --ahead: the same episodes, on chunks that are asked for three steps before they are needed."""
    settings = small("act", dataset_id=str(SHIPPED), episodes="0", steps=1, save_freq=0, image_size=[32, 32])
    settings["policy_args"] = [*settings["policy_args"], "chunk_size=8", "n_action_steps=4"]
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    command = [
        str(checkpoint),
        "--env",
        "metaworld",
        "--task",
        "drawer-open-v3",
        "--num_episodes",
        "2",
        "--num_videos",
        "0",
    ]
    command += ["--max_steps", "12", "--device", "cpu", "--output_dir", str(tmp_path / "out"), "--ahead"]
    assert evaluate.main([*command, "3"]) == 0
    assert "success 0 of 2" in capsys.readouterr().out
    assert evaluate.main([*command, "5"]) == 2
    assert "takes 5 control ticks to predict and has 8 actions" in capsys.readouterr().err
