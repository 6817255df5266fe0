"""Settings of runs that take seconds, and what two runs have in common."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

# The smallest settings of each policy that still build all its parts.
SMALL_POLICY_ARGS = {
    "act": "chunk_size=4 dim_model=32 dim_feedforward=32 n_heads=2 n_encoder_layers=1 n_vae_encoder_layers=1 "
    "latent_dim=4 pretrained_backbone_weights=none",
    "flow": "size=tiny chunk_size=6 n_action_steps=3 num_keypoints=4",
    "vqbet": "n_action_pred_token=2 action_chunk_size=2 gpt_n_layer=1 gpt_n_head=2 gpt_hidden_dim=16 "
    "gpt_output_dim=16 gpt_input_dim=16 n_obs_steps=2 vqvae_n_embed=4 vqvae_embedding_dim=8 vqvae_enc_hidden_dim=8 "
    "spatial_softmax_num_keypoints=4 crop_shape=[40,56] n_vqvae_training_steps=7 pretrained_backbone_weights=none",
    "diffusion": "horizon=4 n_action_steps=2 down_dims=[8,16] n_groups=4 spatial_softmax_num_keypoints=4 "
    "diffusion_step_embed_dim=8 num_train_timesteps=4 drop_n_last_frames=1 pretrained_backbone_weights=none",
}
# An ACT without dropout and without a latent: nothing in its steps is random.
DETERMINISTIC_ACT_ARGS = (
    "chunk_size=4 dim_model=32 dim_feedforward=32 n_heads=2 n_encoder_layers=1 dropout=0 use_vae=false "
    "pretrained_backbone_weights=none"
)
DETERMINISTIC_ACT = {"policy_args": DETERMINISTIC_ACT_ARGS.split(), "batch_size": 8, "log_freq": 1}


def small(policy: str = "act", **settings) -> dict:
    """Settings of a run that takes seconds."""
    return {
        "policy": policy,
        "policy_args": SMALL_POLICY_ARGS[policy].split(),
        "device": "cpu",
        "batch_size": 4,
        "steps": 4,
        "log_freq": 2,
        "save_freq": 2,
        "lr": 1e-3,
        "quiet": True,
        **settings,
    }


def assert_same_run(one: Path, other: Path, step: int) -> None:
    """Weights and optimizer of two runs at `step` are equal to the bit."""
    weights, others = (load_file(run / f"checkpoint-{step}" / "policy.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], others[key]) for key in weights)
    assert_same_optimizer(one / f"checkpoint-{step}", other / f"checkpoint-{step}")


def assert_same_optimizer(one: Path, other: Path) -> None:
    """The optimizer's state of two checkpoints is equal to the bit."""
    a, b = (torch.load(folder / "optimizer_state.pth", weights_only=True) for folder in (one, other))
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    for i, entry in a["state"].items():
        assert all(torch.equal(value, b["state"][i][name]) for name, value in entry.items())


def read_metrics(run: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def logged(run: Path) -> list[dict]:
    """What a run's metrics.jsonl says of training, without the timings."""
    names = ("step", "epoch", "loss", "lr", "grad_norm")
    return [{name: line[name] for name in names} for line in read_metrics(run)]


def at_step(monkeypatch, step: int, act) -> None:
    """Call `act` in the middle of a step of the run."""
    from train import Learner

    take_step = Learner.step

    def learner_step(learner, batch, steps_done):
        if steps_done + 1 == step:
            act()
        return take_step(learner, batch, steps_done)

    monkeypatch.setattr(Learner, "step", learner_step)
