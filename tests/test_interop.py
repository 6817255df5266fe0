"""A checkpoint loads in LeRobot as it is, and acts there as here."""

import json

import numpy as np
import pytest
import torch

from checkpoints.folder import verify
from helpers.runs import small
from infer import main
from policy.loaded import load_policy
from train import train

FILES = {
    "policy.safetensors", "model.safetensors", "config.json", "preprocessor_config.json", "postprocessor_config.json",
    "policy_preprocessor.json", "policy_postprocessor.json", "optimizer_state.pth", "trainer_state.json", "train_config.json",
    "training_info.json", "manifest.json",
}  # fmt: skip


@pytest.fixture(scope="module", params=["act", "diffusion"])
def run(request, made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("interop") / "run"
    return train(
        **small(request.param, dataset_id=str(made("two_cameras")), image_size=[32, 48]), output_dir=str(folder)
    )


@pytest.fixture(scope="module")
def policy(run):
    return load_policy(run.checkpoint, device="cpu")


def an_observation(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "observation.state": rng.standard_normal(3).astype(np.float32),
        "observation.images.top": rng.integers(0, 255, (64, 96, 3), np.uint8),
        "observation.images.wrist": rng.integers(0, 255, (64, 96, 3), np.uint8),
        "task": "lift",
    }


def lerobots_own(folder):
    """As lerobot-eval loads and calls a policy (scripts/lerobot_eval.py)."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    preprocess, postprocess = make_pre_post_processors(
        config, pretrained_path=str(folder), preprocessor_overrides={"device_processor": {"device": "cpu"}}
    )
    policy.reset()

    def act(observation):
        batch = {key: torch.from_numpy(value)[None] for key, value in observation.items() if key == "observation.state"}
        for key, value in observation.items():
            if "image" in key:
                batch[key] = torch.from_numpy(value).permute(2, 0, 1)[None].float() / 255
        batch["task"] = [observation["task"]]
        with torch.inference_mode():
            return postprocess(policy.select_action(preprocess(batch)))[0].numpy()

    return act


def test_folder_is_complete(run):
    assert {path.name for path in run.checkpoint.iterdir()} >= FILES
    verify(run.checkpoint)
    assert (run.checkpoint / "model.safetensors").stat().st_ino == (run.checkpoint / "policy.safetensors").stat().st_ino
    state = json.loads((run.checkpoint / "trainer_state.json").read_text())
    assert (state["step"], state["samples_seen"], state["batch_size"]) == (4, 16, 4)
    info = json.loads((run.checkpoint / "training_info.json").read_text())
    assert info["versions"]["lerobot"] == "0.6.1"
    assert info["loss"] == run.final_loss
    assert (run.output_dir / "model.safetensors").stat().st_ino == (run.checkpoint / "policy.safetensors").stat().st_ino
    assert not (run.output_dir / "optimizer_state.pth").exists()
    assert (run.output_dir / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("final", [False, True], ids=["checkpoint", "final model files"])
def test_lerobot_loads_it_and_acts_the_same(run, final):
    folder = run.output_dir if final else run.checkpoint
    ours, theirs = load_policy(folder, device="cpu"), lerobots_own(folder)
    for seed in range(6):  # past the end of a chunk
        torch.manual_seed(seed)
        here = ours.act(an_observation(seed))
        torch.manual_seed(seed)
        there = theirs(an_observation(seed))
        assert here.dtype == np.float32
        assert here.shape == (3,)
        assert np.array_equal(here, there)


def test_policy_in_the_result_is_the_one_saved(run):
    assert not run.policy.training
    saved = load_policy(run.checkpoint, device="cpu").policy.state_dict()
    assert all(torch.equal(value, saved[key]) for key, value in run.policy.state_dict().items())


def test_reset_starts_a_new_chunk(policy):
    policy.reset()
    torch.manual_seed(0)
    first = policy.act(an_observation(0))
    policy.act(an_observation(1))
    policy.reset()
    torch.manual_seed(0)
    assert np.array_equal(policy.act(an_observation(0)), first)


def test_constant_joint_comes_back_as_it_was(policy):
    """Action 2 and the last state never move in the data: normalising and undoing it keeps them to the bit."""
    for value in (0.7, 0.70001, 3.0):
        action = torch.tensor([[0.1, -0.2, value]])
        batch = {
            "action": action.clone(),
            **{k: torch.from_numpy(v)[None] for k, v in an_observation().items() if k == "observation.state"},
        }
        for camera in ("top", "wrist"):
            batch[f"observation.images.{camera}"] = torch.zeros(1, 3, 64, 96)
        normal = policy.preprocess(batch)
        assert torch.allclose(policy.postprocess(normal["action"]), action, atol=1e-6)
        assert normal["action"][0, 2].abs() < 5
        assert normal["observation.state"].abs().max() < 100
    assert torch.equal(
        policy.postprocess(policy.preprocess({**batch, "action": torch.tensor([[0.0, 0.0, 0.7]])})["action"])[0, 2],
        torch.tensor(0.7),
    )


STATE, TOP = "observation.state", "observation.images.top"
PICTURE = f"{TOP}: expected uint8 of shape (any, any, 3) (height, width, channels), got "


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (STATE, None, f"the observation has no '{STATE}': expected float of shape (3,), got keys"),
        (STATE, np.zeros(4), f"{STATE}: expected numbers of shape (3,), got float64 of shape (4,)"),
        (STATE, ["a", "b", "c"], f"{STATE}: expected numbers of shape (3,), got <U1"),
        (TOP, np.zeros((3, 64, 96), np.uint8), PICTURE + "uint8 of (3, 64, 96)"),
        (TOP, np.zeros((64, 96, 3), np.float32), PICTURE + "float32"),
        (
            "observation.images.Top",
            0,
            f"has 'observation.images.Top', which this policy does not take, did you mean '{TOP}'?",
        ),
    ],
)
def test_wrong_observation(policy, key, value, message):
    observation = {**an_observation(), key: value}
    if value is None:
        del observation[key]
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        policy.act(observation)
    assert message in str(caught.value)


def test_infer_command(run, made, capsys):
    assert (
        main([str(run.checkpoint), "--dataset_id", str(made("two_cameras")), "--episode", "1", "--device", "cpu"]) == 0
    )
    shown = capsys.readouterr().out
    assert "shoulder" in shown
    assert "gripper" in shown
    assert "episode 1, 9 frames" in shown
    assert "latency of act() on cpu: first frame" in shown
    assert main([str(run.checkpoint), "--dataset_id", str(made("no_camera"))]) == 2
    assert (
        "has no observation.images.top, observation.images.wrist, which the policy takes: got observation.state. "
        "Pass the dataset that the policy was trained on" in capsys.readouterr().err
    )
    assert main([str(run.checkpoint), "--dataset_id", str(made("two_cameras")), "--episode", "99"]) == 2
    assert capsys.readouterr().err == "error: --episode 99: 99 is out of range, the dataset has 3 episodes, 0:3\n"
    assert main([str(run.output_dir / "none"), "--dataset_id", str(made("two_cameras"))]) == 2
    assert (
        capsys.readouterr().err
        == f"error: policy {run.output_dir}/none: expected an existing folder, or a Hub id written user/name\n"
    )
