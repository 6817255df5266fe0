"""Chunks predicted ahead: every action is the one for its tick, and a tick does not wait for a prediction under way."""

import asyncio
import itertools
import re
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lerobot.policies import get_policy_class, make_pre_post_processors
from lerobot.policies.rtc import ActionQueue, RTCConfig

import evaluate
import infer
from data.opening import open_source
from errors import UserError
from helpers.flow_policies import tiny_flow
from helpers.paths import SHIPPED
from helpers.runs import small
from helpers.vla_bases import CAMERAS, make_base
from infer import compare, print_chunks
from policy.async_policy import AsyncPolicy
from policy.chunk import rtc_off
from policy.loaded import LoadedPolicy, load_policy
from serve import PolicyServer, unpack
from train import train
from training.open_loop import EpisodeComparison


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
        self.policy, self.device, self.kind, self.expected, self.depth = self, "cpu", "clock", {}, {}
        self.optional, self.needed = set(), lambda names: {}
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


class Guided(Clock):
    """A Clock with real-time chunking, whose predictions take the seconds that are asked for, by its own watch."""

    def __init__(self, chunk_size=10, n_action_steps=4, rtc_config=None):
        super().__init__(chunk_size, n_action_steps)
        self.config.rtc_config = rtc_config
        self.now, self.seconds, self.calls = 0.0, iter([]), []

    def supports_rtc(self):
        return True

    def init_rtc_processor(self): ...

    def requires_grad_(self, needed):
        assert not needed

    def predict_action_chunk(self, batch, **arguments):
        assert self.config.rtc_config.enabled
        self.calls.append(arguments)
        self.now += next(self.seconds, 0.0)
        return super().predict_action_chunk(batch)

    def ahead(self, lead, fps=10):
        return AsyncPolicy(self, lead, fps, clock=lambda: self.now)


def tick(policy, t: int) -> float:
    """The action of a tick. A chunk that may be predicted is, before the next tick."""
    action = float(policy.act({"t": t})[0])
    if policy.pending is not None and policy.loaded.may_answer.is_set():
        policy.pending.exception()
    return action


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


@pytest.mark.parametrize("lead", [1, 2, 4, 7])
@pytest.mark.parametrize("n_action_steps", [1, 4, 20])
@pytest.mark.parametrize("fps", [None, 10])
def test_rtc_gets_what_lerobots_queue_would_give(lead, n_action_steps, fps):
    """Every action is the one for its tick, and a chunk continues what LeRobot's ActionQueue has left."""
    guided = Guided(20, n_action_steps)
    guided.seconds = itertools.repeat(lead / 10 - 0.05)
    policy = guided.ahead(lead, fps)
    for _ in range(2):
        guided.calls.clear()
        guided.asked.clear()
        policy.reset()
        assert [tick(policy, t) for t in range(60)] == list(range(60))
        policy.reset()  # waits for the last one
        assert guided.calls.pop(0) == {}
        queue = ActionQueue(RTCConfig())
        chunks = [asked + torch.arange(20.0)[:, None] for asked in guided.asked]
        queue.merge(chunks[0], chunks[0], 0)
        for arguments, asked, chunk in zip(guided.calls, guided.asked[1:], chunks[1:], strict=True):
            while float(queue.queue[queue.last_index]) < asked:
                queue.get()
            before = queue.get_action_index()
            left = queue.get_left_over()
            assert torch.equal(arguments["prev_chunk_left_over"][0], left)
            assert arguments["inference_delay"] == lead
            assert arguments["execution_horizon"] == min(10, len(left)) >= lead
            while queue.get_action_index() < before + lead:
                queue.get()
            queue.merge(chunk, chunk, lead, before)
    assert (policy.late, policy.held, policy.lead) == (0, 0, lead)


def test_rtc_takes_the_settings_of_the_policy():
    settings = RTCConfig(enabled=False, execution_horizon=3, max_guidance_weight=5.0)
    guided = Guided(10, 4, settings)
    policy = guided.ahead(1)
    for t in range(5):
        tick(policy, t)
    assert guided.calls[1]["execution_horizon"] == 3
    assert guided.config.rtc_config == replace(settings, enabled=True)
    assert not settings.enabled  # that is the saved one


def test_select_action_is_asked_without_rtc():
    guided = Guided(rtc_config=RTCConfig())
    with rtc_off(guided):
        assert not guided.config.rtc_config.enabled
    assert guided.config.rtc_config.enabled
    guided.config.rtc_config.enabled = False
    with rtc_off(guided):
        assert not guided.config.rtc_config.enabled
    assert not guided.config.rtc_config.enabled
    with rtc_off(Clock()):
        pass


def test_a_late_chunk_is_counted_and_the_arm_held():
    """The plan is carried on, then its last action is held, and the late chunk begins at the tick when it comes."""
    guided = Guided()
    policy = guided.ahead(2)
    assert [tick(policy, t) for t in (0, 1)] == [0, 1]
    guided.may_answer.clear()
    assert [tick(policy, t) for t in (2, 3, 4)] == [2, 3, 4]  # the chunk of tick 2 is due at tick 4
    assert (policy.late, policy.held) == (1, 0)
    assert [tick(policy, t) for t in range(5, 11)] == [5, 6, 7, 8, 9, 9]
    guided.may_answer.set()
    policy.pending.exception()
    assert [tick(policy, t) for t in range(11, 30)] == list(range(11, 30))
    assert (policy.late, policy.held) == (1, 1)
    assert policy.timing().startswith(f"{policy.chunks} chunks begun, 1 late; the last action was held for 1 tick; ")


def test_a_chunk_that_is_past_is_predicted_again():
    guided = Guided()
    policy = guided.ahead(2)
    for t in range(2):
        tick(policy, t)
    guided.may_answer.clear()
    assert [tick(policy, t) for t in range(2, 14)] == [2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9]
    guided.may_answer.set()
    policy.pending.exception()
    assert tick(policy, 14) == 9  # all actions of tick 2's chunk are past
    assert torch.equal(guided.calls[-1]["prev_chunk_left_over"], torch.full((1, 2, 1), 9.0))  # the arm is held there
    assert [tick(policy, t) for t in range(15, 30)] == list(range(15, 30))
    assert (policy.late, policy.held) == (1, 5)


def test_a_policy_without_rtc_waits_for_a_late_chunk():
    clock = Clock()
    policy = AsyncPolicy(clock, 2, fps=10)
    for t in range(2):
        policy.act({"t": t})
    clock.may_answer.clear()
    for t in (2, 3):
        policy.act({"t": t})
    threading.Timer(0.1, clock.may_answer.set).start()
    assert policy.act({"t": 4}) == 4
    assert (policy.late, policy.held) == (1, 0)
    assert policy.timing() == "2 chunks begun, 1 late, which act() waited for"


def test_a_simulation_waits_also_with_rtc():
    guided = Guided()
    policy = guided.ahead(2, fps=None)
    for t in range(2):
        policy.act({"t": t})
    guided.may_answer.clear()
    for t in (2, 3):
        policy.act({"t": t})
    threading.Timer(0.1, guided.may_answer.set).start()
    assert [float(policy.act({"t": t})[0]) for t in range(4, 20)] == list(range(4, 20))
    assert (policy.late, policy.held, policy.lead) == (0, 0, 2)


def test_the_delay_is_the_longest_of_recent_warm_predictions():
    guided = Guided(20, 4)
    policy = guided.ahead(1)
    guided.seconds = iter([30.0, 9.0, 9.0, 9.0, 5.0, 0.12, 0.25, 0.11, 8.0])  # 8.0 is the first with the final lead
    policy.warm_up({"t": 0}, runs=3)
    assert policy.lead == 3
    assert (policy.chunks, policy.late, policy.held) == (0, 0, 0)
    guided.seconds = iter([50.0, 0.12, 0.41])  # the first chunk of an episode is waited for
    leads = []
    for t in range(30):
        assert tick(policy, t) == t
        leads.append(policy.lead)
    assert sorted(set(leads)) == [3, 5]
    assert leads == sorted(leads)
    for t in range(30, 300):
        tick(policy, t)
    assert policy.lead == 1  # the long one is not recent any more


def test_one_long_prediction_does_not_stop_the_arm():
    guided = Guided(10, 4)
    policy = guided.ahead(2)
    for t in range(10):
        tick(policy, t)
    guided.seconds = iter([60.0])
    assert [tick(policy, t) for t in range(10, 40)] == list(range(10, 40))
    assert policy.lead == 5  # half of a chunk


def test_warm_up_refuses_a_policy_that_is_too_slow():
    guided = Guided(10, 4)
    guided.seconds = iter([0.61] * 100)
    with pytest.raises(UserError, match=r"takes 7 control ticks to predict and has 10 actions"):
        guided.ahead(1).warm_up({"t": 0})


def test_infer_ahead(made, tmp_path, monkeypatch, capsys):
    dataset = str(made("no_camera"))
    settings = small("flow", dataset_id=[dataset], steps=1)
    checkpoint = train(**settings, output_dir=str(tmp_path / "run")).checkpoint
    monkeypatch.setattr(LoadedPolicy, "latency", lambda self, task: 0.05)
    assert infer.main([str(checkpoint), "--dataset_id", dataset, "--device", "cpu", "--ahead"]) == 0
    shown = capsys.readouterr().out
    assert "each chunk is requested 1 frames ahead" in shown
    assert re.search(r"where a chunk begins +mean [\d.e+-]+ +most [\d.e+-]+ +frames \d", shown)
    assert re.search(r"\d+ chunks begun, \d+ late", shown)


def test_infer_prints_how_the_chunks_fit_together(capsys):
    predicted = np.array([[0.0, 5], [1, 5], [4, 5], [5, 5]])
    recorded = np.array([[0.0, 5], [2, 5], [0, 5], [2, 5]])  # standard deviations 1 and 0
    result = EpisodeComparison(0, ["a", "b"], predicted, recorded, np.ones(4), chunks=np.array([3, 3, 4, 4]))
    print_chunks(result)
    shown = capsys.readouterr().out
    assert "where a chunk begins  mean 3  most 3  frames 1" in shown
    assert "elsewhere             mean 1  most 1  frames 2" in shown
    result.chunks[:] = 1
    print_chunks(result)
    assert capsys.readouterr().out == ""


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


@pytest.mark.slow
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


def test_over_http(caplog):
    """The server logs each late chunk and counts it in /health."""
    guided = Guided()
    guided.batch_of = lambda observation: {"t": float(observation["t"])}
    policy = guided.ahead(2)
    server = PolicyServer(policy, 1_000_000)
    assert server.act_and_log({"t": 0}) == 0
    assert server.act_and_log({"t": 1}) == 1
    guided.may_answer.clear()
    assert [float(server.act_and_log({"t": t})[0]) for t in (2, 3)] == [2, 3]
    assert caplog.text == ""
    assert float(server.act_and_log({"t": 4})[0]) == 4
    assert "a chunk comes late: 1 chunk begun, 1 late; the last action was held for 0 ticks" in caplog.text
    guided.may_answer.set()
    health = unpack(asyncio.run(server.health(None)).body)
    assert health["ahead"] == {"fps": 10, "lead": 2, "chunks": 1, "late": 1, "held": 0}
    policy.reset()


@pytest.mark.parametrize("kind", ["smolvla", "pi0", "pi05"])
def test_lerobots_policies_predict_as_lerobot_would(kind, tmp_path, monkeypatch):
    """A chunk is that of LeRobot's own policy, queue and processors, to the bit, and continues what was planned."""
    pytest.importorskip("transformers", reason="needs lerobot[smolvla]")
    base = make_base(tmp_path, kind, monkeypatch, joints=6, cameras=CAMERAS[:1])
    loaded = load_policy(base, "cpu", task="open a drawer")
    saved = (base / "config.json").read_text()
    moments = []
    for seed in range(12):
        random = np.random.default_rng(seed)
        picture = random.integers(0, 255, (256, 256, 3), np.uint8)
        moments.append({"observation.state": random.normal(size=6), CAMERAS[0]: picture})

    lead = 2
    ahead = AsyncPolicy(loaded, lead)
    torch.manual_seed(0)
    taken = [ahead.act(moment) for moment in moments]
    ahead.reset()

    reference = get_policy_class(kind).from_pretrained(base)
    reference.config.rtc_config = RTCConfig()
    reference.init_rtc_processor()
    reference.eval()
    preprocess, postprocess = make_pre_post_processors(reference.config, base)
    torch.manual_seed(0)
    queue = ActionQueue(reference.config.rtc_config)
    expected = []
    requested = None
    before = 0
    for number, moment in enumerate(moments):
        batch = preprocess({**loaded.batch_of(moment), "task": "open a drawer"})
        if number == 0:
            chunk = reference.predict_action_chunk(batch)
            queue.merge(chunk[0], postprocess(chunk)[0], 0)
            due = ahead.actions_per_chunk
        elif number == due:
            queue.merge(requested[0], postprocess(requested)[0], lead, before)
            due += ahead.actions_per_chunk
        if number == due - lead:
            before = queue.get_action_index()
            noise_from = torch.get_rng_state()
            observed = batch
            left = queue.get_left_over()
            requested = reference.predict_action_chunk(
                batch, inference_delay=lead, prev_chunk_left_over=left, execution_horizon=4
            )
        expected.append(queue.get().numpy())
    assert due > ahead.actions_per_chunk
    assert np.array_equal(np.stack(taken), np.stack(expected))

    # The guidance pulls the committed actions, and less and less the ones after them, to those of the current chunk.
    torch.set_rng_state(noise_from)
    free = reference.predict_action_chunk(observed)
    off = (requested[0, :4] - left[:4]).abs().mean(1) / (free[0, :4] - left[:4]).abs().mean(1)
    assert off[:lead].max() < 0.1
    assert off[lead:].max() < 1

    assert (base / "config.json").read_text() == saved
    assert np.isfinite(loaded.act(moments[0])).all()  # without RTC, as before
    real = loaded.ahead(fps=1)
    assert (real.has_rtc, real.lead, real.late) == (True, 1, 0)
    assert len(real.seconds) == 30
