"""What fine-tuning a published base takes of memory, estimated: `python bench/bases.py [--json]` (needs lerobot[smolvla,pi,xvla], peft)

Builds SmolVLA, pi0.5 and X-VLA in their published sizes without values and without a network, and prints the table of
docs/finetune.md. The sizes that LeRobot reads from the Hub are written here: those of the backbones
HuggingFaceTB/SmolVLM2-500M-Video-Instruct and microsoft/Florence-2-large.
"""

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import torch
from common import benchmark_parser, print_json

SMOLVLM = {
    "text_config": {
        "model_type": "llama",
        "vocab_size": 49280,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
    },
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 512,
        "patch_size": 16,
    },
    "scale_factor": 4,
}
FLORENCE = {
    "vision_config": {
        "model_type": "davit",
        "dim_embed": [256, 512, 1024, 2048],
        "num_heads": [8, 16, 32, 64],
        "num_groups": [8, 16, 32, 64],
        "depths": [1, 1, 9, 1],
        "projection_dim": 1024,
    },
    "text_config": {
        "vocab_size": 51289,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_attention_heads": 16,
        "decoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 4096,
    },
}
# name of the row: policy, its own settings, settings of the run
RECIPES = {
    "SmolVLA, `configs/smolvla.json`": ("smolvla", {}, {}),
    "pi0.5, `configs/pi05.json`": ("pi05", {}, {"weights_dtype": "bf16"}),
    "the same, with `--optimizer adamw8bit`": ("pi05", {}, {"weights_dtype": "bf16", "optimizer": "adamw8bit"}),
    "the same in fp32": ("pi05", {}, {"weights_dtype": "fp32"}),
    "pi0.5, `configs/pi05_expert.json`": (
        "pi05",
        {"train_expert_only": True},
        {"weights_dtype": "bf16", "grad_accumulation_steps": 4},
    ),
    "pi0.5, `configs/pi05_lora.json`": (
        "pi05",
        {},
        {"weights_dtype": "bf16", "grad_accumulation_steps": 4, "peft": "lora"},
    ),
    "X-VLA, `configs/xvla.json`": ("xvla", {"action_mode": "auto"}, {"weights_dtype": "bf16"}),
}


@contextlib.contextmanager
def published_backbone():
    """Within this context, SmolVLA reads its backbone's sizes from here, and nothing is moved off the meta device."""
    from lerobot.policies.smolvla import smolvlm_with_expert
    from transformers import SmolVLMConfig

    tokenizer = SimpleNamespace(fake_image_token_id=1, global_image_token_id=2, image_token_id=3)
    config = SmolVLMConfig(**SMOLVLM)
    processor = SimpleNamespace(tokenizer=tokenizer)
    with (
        mock.patch.object(smolvlm_with_expert.AutoConfig, "from_pretrained", return_value=config),
        mock.patch.object(smolvlm_with_expert.AutoProcessor, "from_pretrained", return_value=processor),
        torch.device("meta"),
    ):
        yield


def build(name: str, settings: dict, config):
    """A policy of the published size on the meta device, as the run of `config` trains it, for two cameras and six joints."""
    from lerobot.configs import FeatureType, PolicyFeature

    from policy.adapter_settings import adapter_settings
    from policy.adapters import add_adapters
    from policy.factory import build_policy, policy_config_class
    from policy.weights_dtype import cast_weights, set_weights_dtype

    if name == "xvla":
        settings = {**settings, "florence_config": FLORENCE}
    policy_config = policy_config_class(name)(device="cpu", **settings)
    set_weights_dtype(policy_config, config.weights_dtype)
    policy_config.device = "meta"
    for camera in ("top", "wrist"):
        policy_config.input_features[f"observation.images.{camera}"] = PolicyFeature(FeatureType.VISUAL, (3, 480, 640))
    policy_config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (6,))
    policy_config.output_features["action"] = PolicyFeature(FeatureType.ACTION, (6,))
    with published_backbone():
        policy = build_policy(policy_config, None)
        cast_weights(policy, policy_config, config.weights_dtype)
        if config.peft:
            policy = add_adapters(policy, "base", config.peft, adapter_settings(config.peft, config.peft_r, None))
    return policy


def main() -> None:
    parser = benchmark_parser(__doc__)
    args = parser.parse_args()
    from config import TrainConfig
    from training.memory import estimate_memory, size_text

    base = TrainConfig(dataset_id=["any"], policy_path="any", ema_decay=0)
    figures = {}
    print("| | parameters | trained | weights, gradients, optimizer | a checkpoint |")
    print("| --- | --- | --- | --- | --- |")
    for row, (name, settings, run) in RECIPES.items():
        config = replace(base, policy=name, **run)
        policy = build(name, settings, config)
        memory = estimate_memory(policy, config)
        parameters = sum(parameter.numel() for parameter in policy.parameters())
        trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad)
        print(
            f"| {row} | {parameters / 1e9:.2f} B | {trained / 1e6:,.0f} M | {size_text(memory.on_device)} "
            f"| {size_text(memory.checkpoint)} |"
        )
        figures[row] = {"parameters": parameters, "trained": trained, "bytes": memory.on_device}
    if args.json:
        print_json(figures)


if __name__ == "__main__":
    main()
