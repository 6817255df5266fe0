"""Our own policy keeps the trainer's promises, and what its parts claim."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from errors import UserError
from helpers.flow_policies import TINY, tiny_flow
from helpers.runs import assert_same_run, small
from infer import recorded_observations
from policy.async_policy import AsyncPolicy
from policy.factory import build_policy, policy_config
from policy.flow import FlowConfig, make_flow_pre_post_processors, medoid
from policy.flow_encoder import CameraEncoder, TaskWords, spatial_softmax
from policy.loaded import LoadedPolicy, expected_observation, load_policy
from train import train


def a_batch(policy, count=4):
    torch.manual_seed(1)
    steps = (policy.config.n_obs_steps,) if policy.config.n_obs_steps > 1 else ()
    batch = {key: torch.randn(count, *steps, *f.shape) for key, f in policy.config.input_features.items()}
    shape = (count, policy.config.chunk_size, policy.config.action_feature.shape[0])
    return {**batch, "action": torch.randn(shape), "action_is_pad": torch.zeros(shape[:2], dtype=torch.bool)}


class Relative:
    """What LeRobot's pipelines do for actions that are relative to the state they were predicted from (pi0's setting)."""

    def __init__(self):
        from lerobot.processor import AbsoluteActionsProcessorStep, RelativeActionsProcessorStep

        self.step = RelativeActionsProcessorStep(enabled=True)
        self.steps = [AbsoluteActionsProcessorStep(enabled=True, relative_step=self.step)]

    def reset(self): ...

    def preprocess(self, batch):
        self.step({"observation": batch})
        return batch

    def __call__(self, actions):
        return self.steps[0]({"action": actions})["action"]


def test_actions_relative_to_the_state_are_undone_by_the_one_they_were_predicted_from():
    policy, pipelines = tiny_flow("head=regression", "blend_steps=0", cameras=0, state=2), Relative()
    before = SimpleNamespace(steps=[], reset=pipelines.reset)
    loaded = LoadedPolicy(policy, before, pipelines)
    loaded.preprocess = pipelines.preprocess
    count = policy.config.n_action_steps
    for tick in range(2 * count):
        state = np.full(2, 10.0 * tick, np.float32)
        if tick % count == 0:
            chunk = policy.predict_action_chunk({"observation.state": torch.from_numpy(state)[None]})[0] + state
        np.testing.assert_allclose(loaded.act({"observation.state": state}), chunk[tick % count], atol=1e-5)
    with pytest.raises(UserError, match="relative to the state"):
        AsyncPolicy(loaded, 1)


def test_gradient_checkpointing_changes_no_gradient_and_no_batch_norm():
    """Gradients and the running statistics of batch norms are those of activations that were kept."""
    ended = []
    for twice in ("false", "true"):
        policy = tiny_flow("backbone=resnet18", f"gradient_checkpointing={twice}").train()
        batch = a_batch(policy)
        torch.manual_seed(2)
        policy(batch)[0].backward()
        ended.append({**policy.state_dict(), **{f"{name}.grad": p.grad for name, p in policy.named_parameters()}})
    assert ended[0]["encoder.eyes.0.backbone.1.num_batches_tracked"] == 1
    for name, tensor in ended[0].items():
        torch.testing.assert_close(ended[1][name], tensor, rtol=0, atol=0, msg=name)


def test_cameras_that_a_vla_fills_in_are_not_expected():
    policy = tiny_flow()
    features = policy.config.input_features
    features["observation.images.empty_camera_0"] = features["observation.images.0"]
    expected = expected_observation(policy.config, SimpleNamespace(steps=[]))
    assert [*expected] == ["observation.images.0", "observation.state"]


@pytest.mark.parametrize(
    "settings",
    [
        {"policy_args": TINY},
        {"policy_args": [*TINY, "head=regression", "n_obs_steps=2"]},
        {"policy_args": [*TINY, "task_embedding=true"], "augment": True},
        {"policy_args": [*TINY, "backbone=conv", "task_words=false"], "augment": True, "augment_style": "full"},
        pytest.param(
            {"policy_args": [*TINY, "backbone=resnet18", "optimizer_lr_backbone=1e-4"]}, marks=pytest.mark.slow
        ),
    ],
)
def test_resumes_to_the_bit_and_loads(made, tmp_path, settings):
    settings = small("flow", dataset_id=str(made("two_cameras")), image_size=[48, 64], **settings)
    train(**{**settings, "steps": 6, "save_freq": 3}, output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert_same_run(tmp_path / "whole", tmp_path / "part", 6)
    from lerobot.policies import get_policy_class

    from data.opening import open_source

    policy = load_policy(tmp_path / "whole", "cpu")
    get_policy_class("flow").from_pretrained(tmp_path / "whole")  # as LeRobot loads it
    source = open_source(str(made("two_cameras")), episodes="1")
    for observation, _ in recorded_observations(source, 1, [*policy.expected]):
        assert policy.act({**observation, "task": source.tasks[1]}).shape == (3,)


def test_learns_two_ways_of_doing_a_thing(monkeypatch):
    """Half of the demonstrations go left, half right, from the same observation: flow draws both, and takes one of them."""
    ends = {}
    for head in ("flow", "regression"):
        policy = tiny_flow(f"head={head}", cameras=0, actions=1)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
        # As in a run, the rate ends at 0: with a constant one, the share of each way depends on the last few steps.
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=120)
        actions = torch.where(torch.arange(32)[:, None, None] % 2 == 0, 1.0, -1.0).expand(-1, 6, 1)
        batch = {"observation.state": torch.ones(32, 3), "action": actions}
        batch["action_is_pad"] = torch.zeros(32, 6, dtype=torch.bool)
        for _ in range(120):
            optimizer.zero_grad()
            policy.train()
            policy.forward(batch)[0].backward()
            optimizer.step()
            scheduler.step()
        state = torch.ones(128, 3)
        ends[head] = policy.predict_action_chunk({"observation.state": state})[:, 0, 0]
        if head == "flow":
            monkeypatch.setattr("policy.flow.medoid", lambda regressed, draws: draws[:, 0])
            ends["drawn"] = policy.predict_action_chunk({"observation.state": state})[:, 0, 0]
    for which in ("flow", "drawn"):
        assert (ends[which].abs() - 1).abs().mean() < 0.25
    assert 0.25 < (ends["drawn"] > 0).float().mean() < 0.75
    assert ends["flow"].min() < 0 < ends["flow"].max()
    assert ends["regression"].std() < 1e-4


def test_medoid_is_the_regressed_chunk_or_a_draw_of_the_most_common_way():
    around = 0.1 * torch.randn(1, 8, 6, 2, generator=torch.Generator().manual_seed(0))  # about the regressed one, 0
    regressed = torch.zeros(1, 6, 2)
    assert torch.equal(medoid(regressed, around), regressed)
    apart = around + torch.tensor([1.0] * 5 + [-1.0] * 3)[:, None, None]  # five go one way, three another
    chosen = medoid(regressed, apart)
    assert any(torch.equal(chosen, apart[:, i]) for i in range(5))
    both = medoid(regressed.repeat(2, 1, 1), torch.cat([around, apart]))  # each sample by itself
    assert torch.equal(both, torch.cat([regressed, chosen]))


def test_padded_steps_do_not_count():
    policy = tiny_flow("head=regression")
    batch = a_batch(policy)
    batch["action_is_pad"][:, 4:] = True
    loss = policy.forward(batch)[0]
    batch["action"][:, 4:] = 1e6
    assert policy.forward(batch)[0] == loss


def test_keypoints_find_a_spot():
    eye = CameraEncoder(FlowConfig(device="cpu", num_keypoints=1, backbone="conv"))
    eye.backbone = torch.nn.Identity()
    eye.maps = torch.nn.Identity()
    pictures = torch.zeros(1, 1, 9, 17)
    pictures[0, 0, 2, 12] = 100.0
    x, y, _ = eye(pictures)[0].tolist()
    assert (x, y) == pytest.approx((12 / 16 * 2 - 1, 2 / 8 * 2 - 1), abs=1e-5)


def test_keypoints_of_sharp_maps_have_no_subnormal_gradients():
    maps = 20 * torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    maps.requires_grad_()
    keypoints = spatial_softmax(maps, torch.tensor(8.0))
    (1e-3 * keypoints).square().sum().backward()
    assert maps.grad.abs().max() > 1e-9
    assert not ((maps.grad != 0) & (maps.grad.abs() < torch.finfo(torch.float32).tiny)).any()


@pytest.mark.parametrize("head", ["flow", "regression"])
def test_a_chunk_blends_into_the_next(head):
    """Committed actions stay as planned, the next ones go over to the new chunk, and without blending nothing is kept."""
    policy = tiny_flow(f"head={head}", "blend_steps=2")
    batch = a_batch(policy)
    planned = torch.full((4, 3, 2), 0.7)
    torch.manual_seed(2)
    unblended = policy.predict_action_chunk(batch)
    torch.manual_seed(2)
    blended = policy.predict_action_chunk(batch, planned=planned)
    nearer = [(blended[:, i] - 0.7).abs().mean() < (unblended[:, i] - 0.7).abs().mean() for i in range(2)]
    assert all(nearer)
    for num_committed, expected in (
        (0, [2 / 3, 1 / 3, 0, 0, 0, 0]),
        (1, [1, 2 / 3, 1 / 3, 0, 0, 0]),
        (3, [1, 1, 1, 0, 0, 0]),
    ):
        assert policy.blend(planned, num_committed).weight[:, 0].tolist() == pytest.approx(expected)
    policy.config.blend_steps = 0
    torch.manual_seed(2)
    assert torch.equal(policy.predict_action_chunk(batch, planned=planned), unblended)


def test_history_at_an_episodes_start_and_queue():
    policy = tiny_flow("n_obs_steps=3", "head=regression", "blend_steps=0")
    batch = {key: value[:, -1] for key, value in a_batch(policy, 1).items() if key.startswith("observation")}
    first = policy.select_action(batch)
    history = {key: value[:, None].expand(-1, 3, *value.shape[1:]) for key, value in batch.items()}
    assert torch.equal(first, policy.predict_action_chunk(history)[:, 0])
    assert len(policy._actions) == 2
    policy.reset()
    assert not policy._actions


def test_an_unknown_task_is_refused():
    policy = tiny_flow("task_embedding=true", "tasks=[lift,push]")
    batch = {**a_batch(policy), "task": ["lift", "push", "push", "pour"]}
    with pytest.raises(
        UserError, match=r"task 'pour' is not one that this policy was trained on: expected one of \['lift', 'push'\]"
    ):
        policy.forward(batch)


def test_learning_rate_ends_with_the_run(made, tmp_path):
    settings = small("flow", dataset_id=str(made("no_camera")), steps=40, save_freq=0, log_freq=1)
    rates = [line["lr"] for line in train(**settings, output_dir=str(tmp_path)).history]
    assert max(rates) == pytest.approx(1e-3, rel=1e-2)
    assert rates.index(max(rates)) <= 3
    assert rates[-1] == pytest.approx(1e-3 * 0.5 * (1 + math.cos(math.pi * 39 / 40)), rel=1e-3)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("size=huge", "size must be one of tiny, small, base, got 'huge'"),
        ("head=flw", "head must be flow or regression, got 'flw'"),
        ("n_action_steps=20", r"n_action_steps must be 1 to chunk_size \(6\), got 20"),
        ("blend_steps=-1", "blend_steps must be 0 or more, got -1"),
        ("num_draws=1", "num_draws must be 2 or more, got 1"),
    ],
)
def test_settings_are_checked(pair, message):
    with pytest.raises(UserError, match=message):
        tiny_flow(pair)


def test_every_vector_is_an_observation():
    """Velocities and the like, also one of a single number, in training (B,) as LeRobot's loader has it, and one at a time."""
    from lerobot.configs import FeatureType, PolicyFeature

    config = policy_config("flow", ["size=tiny", "chunk_size=2", "n_action_steps=1"], "cpu")
    shapes = {"observation.state": (3,), "observation.velocity": (3,), "observation.effort": (1,)}
    config.input_features = {key: PolicyFeature(FeatureType.STATE, shape) for key, shape in shapes.items()}
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    policy = build_policy(config, None)
    batch = {"observation.state": torch.rand(4, 3), "observation.velocity": torch.rand(4, 3)}
    assert policy.encoder({**batch, "observation.effort": torch.rand(4)}).shape == (4, 256)
    loaded = LoadedPolicy(policy, *make_flow_pre_post_processors(config))
    assert loaded.act({key: np.zeros(shape) for key, shape in shapes.items()}).shape == (2,)


@pytest.mark.parametrize(("pictures", "size"), [
    ([], None), ([(64, 64)], None), ([(480, 640)], [96, 128]), ([(480, 640), (240, 320)], [96, 128]),
    ([(64, 64), (480, 640)], [96, 128]), ([(640, 480)], [128, 96])])  # fmt: skip
def test_the_preset_makes_pictures_small(pictures, size):
    assert FlowConfig.training_preset("cpu", pictures).get("image_size") == size


def test_words_tell_tasks_apart_and_new_words_are_taken():
    """A text that is nearly a known one is nearer to it than to the others, and one without words is none."""
    words = TaskWords()
    known = ["reach the red mark", "push the cup to the goal", "open the drawer"]
    embedded = words(known)
    assert torch.pdist(embedded).min() > 1
    near = words("Reach the red marker!")
    distances = (embedded - near).norm(dim=1)
    assert distances.argmin() == 0
    assert torch.equal(words(["", "?!"]), torch.zeros(2, embedded.shape[1]))
    assert torch.equal(words("Open  the DRAWER"), embedded[2:])


def test_words_matter_where_there_are_several_tasks():
    policy = tiny_flow("task_words=true", tasks=["left", "right"])
    batch = {**a_batch(policy), "task": ["left"] * 4}
    left = policy.encoder(batch)
    right = policy.encoder({**batch, "task": ["right"] * 4})
    assert (left - right).abs().max() > 0.01
    alone = tiny_flow("task_words=true", tasks=["left"])
    assert alone.encoder.words is None
    assert alone.encoder.eyes[0].films is None
