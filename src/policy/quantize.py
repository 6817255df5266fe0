"""Round the frozen linear layers of a policy to 4 bits, so that training adapters on them takes less memory (QLoRA)."""

import importlib.util
from collections import Counter

import torch
from torch import nn

from errors import UserError

INSTALL = "needs the package bitsandbytes. Install it with: uv pip install bitsandbytes==0.50.2"
# Modules of PyTorch that use the weights of the linear layers in them without calling these.
ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def check_quantize(method: str, settings: dict, kind: str) -> None:
    """Check that adapters can be trained on 4-bit layers.

    Args:
        method: PEFT method, such as lora.
        settings: the adapters' settings.
        kind: how the run is distributed, such as "DDP".

    Raises:
        UserError: bitsandbytes is not installed, or cannot do this.
    """
    if importlib.util.find_spec(f"peft.tuners.{method.lower()}.bnb") is None:
        raise UserError(
            f"--peft_quantize: PEFT does not adapt layers of 4 bits by {method}. Pass --peft lora, or leave "
            "--peft_quantize out"
        )
    changes_weights = {
        "init_lora_weights": settings.get("init_lora_weights") in ("pissa", "olora"),
        "kasa_config": bool(settings.get("kasa_config")),
    }
    for name, is_refused in changes_weights.items():
        if is_refused:
            raise UserError(
                f"--peft_quantize: {name}={settings[name]} changes the frozen weights, which are rounded to 4 bits. "
                "Leave one of them out"
            )
    if kind in ("FSDP", "DeepSpeed"):
        raise UserError(f"--peft_quantize does not work with {kind}, which splits the weights. Launch with DDP")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--peft_quantize {INSTALL}")


def quantize(policy, device: str, kept: list[str]) -> None:
    """Round a policy's linear layers to NF4 in place, and move the policy to `device`.

    Layers stay as they are if other code reads their weights, or if they share them. The same weights always round alike.
    Source: Dettmers et al. (2023), QLoRA: Efficient Finetuning of Quantized LLMs.

    Args:
        policy: LeRobot policy, on the CPU.
        kept: modules whose names end with one of these stay as they are.
    """
    import bitsandbytes  # slow, and not always installed

    defaults = policy._get_default_peft_targets() or {}
    kept_ends = (*kept, *(defaults.get("modules_to_save") or ()))
    owners = Counter(id(parameter) for module in policy.modules() for parameter in module.parameters(recurse=False))
    modules = dict(policy.named_modules())
    left_out = []
    for name, module in modules.items():
        if isinstance(module, ATTENTION) or name.endswith(kept_ends):
            left_out.append(f"{name}.")
    for name, module in modules.items():
        if type(module) is not nn.Linear or f"{name}.".startswith(tuple(left_out)):
            continue
        if owners[id(module.weight)] > 1:
            continue
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, quantized(bitsandbytes, module).to(device))
    policy.to(device)
    policy.is_loaded_in_4bit = True  # where PEFT looks for it


def is_packed(tensor) -> bool:
    """Whether a tensor holds 4-bit numbers. Its dtype is then that of the weights before they were rounded."""
    return getattr(tensor, "quant_state", None) is not None


def quantized(bitsandbytes, linear: nn.Linear) -> nn.Module:
    """A 4-bit layer with the weights of `linear`. It rounds them when it is moved to a device."""
    dtype = linear.weight.dtype
    with torch.device("meta"):  # takes no memory for weights that are replaced below
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,  # by default the dtype of its first input, which may differ in a resumed run
            quant_type="nf4",
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        quant_type="nf4",
        quant_storage=dtype,  # policies cast their inputs to the dtype of the weights
        module=layer,
    )
    layer.bias = linear.bias
    # Otherwise validation on a CPU repacks the weights in a layout that training cannot read.
    layer.support_avx512bf16_for_cpu = False
    return layer
