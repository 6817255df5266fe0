"""Tiny vision-language-action bases in LeRobot's format, shaped like the published ones. Needs transformers, and no network.

Run as a script, it is LeRobot's lerobot-train with pi0.5's network as small as here.
"""

import os
import subprocess
import sys
from pathlib import Path

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors
from lerobot.processor import TokenizerProcessorStep

CAMERAS = [f"observation.images.camera{number}" for number in (1, 2, 3)]
TOKENS = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}


def make_tokenizer(out: Path):
    """A tokenizer of 400 words or fewer, saved to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *TOKENS.values()]
    special += [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["open a drawer", "put the banana on the plate\n"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=TOKENS,
    )
    for name, token in TOKENS.items():
        setattr(fast, name, token)
    fast.save_pretrained(out)
    return fast


def smolvla_settings(out: Path) -> dict:
    """Settings of a SmolVLA on a vision-language model that is written to a folder."""
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    tokenizer = make_tokenizer(out)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor(), image_seq_len=4).save_pretrained(out)
    text = {"model_type": "llama", "vocab_size": len(tokenizer) + 3, "hidden_size": 48, "intermediate_size": 64}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 6}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 64, "patch_size": 16}
    SmolVLMConfig(
        text_config=text, vision_config=vision, image_token_id=3, scale_factor=2, pad_token_id=2
    ).save_pretrained(out)
    return {"vlm_model_name": str(out), "num_vlm_layers": 2, "resize_imgs_with_padding": (64, 64), "num_steps": 3}


def xvla_settings(out: Path) -> dict:
    """Settings of an X-VLA whose tokenizer is written to a folder."""
    tokenizer = make_tokenizer(out)
    text = {"d_model": 32, "vocab_size": len(tokenizer), "pad_token_id": 2}
    for part in ("encoder", "decoder"):
        text |= {f"{part}_layers": 1, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 2}
    vision = {"embed_dim": [16, 16, 32, 32], "depths": [1] * 4, "num_heads": [2] * 4, "num_groups": [2] * 4}
    florence = {"vision_config": {**vision, "projection_dim": 32}, "text_config": text, "projection_dim": 32}
    small = {"hidden_size": 32, "depth": 1, "num_heads": 2, "num_domains": 2, "num_denoising_steps": 2}
    return {
        "florence_config": florence,
        "tokenizer_name": str(out),
        "action_mode": "auto",
        "max_action_dim": 32,
        "resize_imgs_with_padding": (64, 64),
        **small,
    }


def pi_settings(out: Path) -> dict:
    """Settings of a pi0 or pi0.5 whose tokenizer is written to a folder; `shrink_pi` makes its network small."""
    make_tokenizer(out)
    return {"image_resolution": (28, 28), "num_inference_steps": 2, "tokenizer_max_length": 48}


def shrink_pi(patch=setattr) -> None:
    """Make the networks of pi0 and pi0.5, whose sizes are fixed in LeRobot's code, small: with setattr, or a monkeypatch's."""
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    for module in (modeling_pi0, modeling_pi05):
        # 8 heads are fixed in the code too
        small = module.GemmaConfig(width=32, depth=1, mlp_dim=32, num_heads=8, num_kv_heads=1, head_dim=8)
        patch(module, "get_gemma_config", lambda variant, small=small: small)
        network = module.PaliGemmaForConditionalGenerationWithPiGemma
        patch(module, "PaliGemmaForConditionalGenerationWithPiGemma", lambda config, make=network: make(shrunk(config)))
        expert = module.PiGemmaForCausalLM
        patch(module, "PiGemmaForCausalLM", lambda config, make=expert: make(with_few_words(config)))


def with_few_words(config):
    """Gemma's config, with a small vocabulary."""
    config.vocab_size = 512
    return config


def shrunk(config):
    """PaliGemma's config, with a small vision tower and a small vocabulary."""
    with_few_words(config.text_config)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, value in {**vision, "patch_size": 14, "projection_dim": 32}.items():
        setattr(config.vision_config, name, value)
    return config


SETTINGS = {"smolvla": smolvla_settings, "xvla": xvla_settings, "pi0": pi_settings, "pi05": pi_settings}


def make_base(out: Path, kind: str, monkeypatch, joints: int, cameras=CAMERAS, **settings) -> Path:
    """Write a policy with random weights to out/<kind>_base, and what it needs besides to out/<kind>_files."""
    if kind.startswith("pi"):
        shrink_pi(monkeypatch.setattr)
        from lerobot.policies.pi0 import processor_pi0
        from lerobot.policies.pi05 import processor_pi05

        def local_tokenizer(**options):
            return TokenizerProcessorStep(**{**options, "tokenizer_name": str(out / f"{kind}_files")})

        for module in (processor_pi0, processor_pi05):
            monkeypatch.setattr(module, "TokenizerProcessorStep", local_tokenizer)
    torch.manual_seed(0)
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, 256, 256)) for key in cameras}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (joints,))
    config = make_policy_config(
        kind,
        device="cpu",
        push_to_hub=False,
        chunk_size=8,
        n_action_steps=8,
        input_features=inputs,
        output_features={"action": PolicyFeature(FeatureType.ACTION, (joints,))},
        **{**SETTINGS[kind](out / f"{kind}_files"), **settings},
    )
    base = out / f"{kind}_base"
    get_policy_class(kind)(config).save_pretrained(base)
    numbers = {
        "mean": torch.zeros(joints),
        "std": torch.ones(joints),
        "q01": -torch.ones(joints),
        "q99": torch.ones(joints),
    }
    stats = {key: dict(numbers) for key in ("observation.state", "action")}
    for pipeline in make_pre_post_processors(config, dataset_stats=stats):
        pipeline.save_pretrained(base)
    return base


def lerobot_train(kind: str, *arguments: str) -> None:
    """Run the real lerobot-train, without the Hub, for a policy of this kind."""
    command = [str(Path(sys.executable).parent / "lerobot-train")]
    if kind.startswith("pi"):
        command = [sys.executable, __file__]  # the same program, with a small network
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


if __name__ == "__main__":
    shrink_pi()
    from lerobot.scripts.lerobot_train import main

    main()
