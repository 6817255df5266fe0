"""Round the frozen linear layers of a policy to 4 bits, so that adapters are trained on them in less memory (QLoRA)."""

import importlib.util

import torch
from torch import nn

from errors import UserError

INSTALL = "needs the package bitsandbytes. Install it with: uv pip install bitsandbytes==0.50.2"
# Modules of PyTorch that use the weights of the linear layers in them without calling these.
ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def check_quantize(method: str, settings: dict, kind: str) -> None:
    """Check that adapters can be trained on layers of 4 bits.

    Args:
        method: of PEFT, such as lora.
        settings: of the adapters.
        kind: of the processes of the run, such as "DDP".

    Raises:
        UserError: bitsandbytes is not installed, or cannot do this.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"--peft_quantize {INSTALL}")
    if importlib.util.find_spec(f"peft.tuners.{method.lower()}.bnb") is None:
        raise UserError(
            f"--peft_quantize: PEFT does not adapt layers of 4 bits by {method}. Pass --peft lora, or leave "
            "--peft_quantize out"
        )
    for name in ("init_lora_weights", "kasa_config"):
        if settings.get(name) in ("pissa", "olora") or (name == "kasa_config" and settings.get(name)):
            raise UserError(
                f"--peft_quantize: {name}={settings[name]} changes the frozen weights, which are rounded to 4 bits. "
                "Leave one of them out"
            )
    if kind in ("FSDP", "DeepSpeed"):
        raise UserError(f"--peft_quantize does not work with {kind}, which splits the weights. Launch with DDP")


def quantize(policy, device: str, kept: list[str]) -> None:
    """Round a policy's linear layers to NF4 in place, and move the policy to `device`.

    Layers whose weights other code reads, or that share them, stay as they are. The rounding is a function of the weights.
    Source: Dettmers et al. (2023), QLoRA: Efficient Finetuning of Quantized LLMs.

    Args:
        policy: LeRobot policy, on the CPU.
        kept: ends of the names of modules that stay as they are.
    """
    import bitsandbytes  # slow, and not always installed

    kept = [*kept, *((policy._get_default_peft_targets() or {}).get("modules_to_save") or [])]
    owners: dict[int, int] = {}
    for module in policy.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    modules = dict(policy.named_modules())
    left_out = [
        f"{name}." for name, module in modules.items() if isinstance(module, ATTENTION) or ends_with(name, kept)
    ]
    for name, module in modules.items():
        is_shared = type(module) is nn.Linear and owners[id(module.weight)] > 1
        if type(module) is not nn.Linear or is_shared or f"{name}.".startswith(tuple(left_out)):
            continue
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, quantized(bitsandbytes, module).to(device))
    policy.to(device)
    policy.is_loaded_in_4bit = True  # where PEFT looks for it


def ends_with(name: str, ends: list[str]) -> bool:
    return any(name.endswith(end) for end in ends)


def quantized(bitsandbytes, linear: nn.Linear) -> nn.Module:
    """A layer of 4 bits with the weights of `linear`, which it rounds when it is moved to a device."""
    dtype = linear.weight.dtype
    with torch.device("meta"):  # its own weights are never made
        layer = bitsandbytes.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=dtype,  # else that of its first input, which a resumed run may have in another
            quant_type="nf4",
        )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data,
        requires_grad=False,
        quant_type="nf4",
        quant_storage=dtype,  # policies ask the weights for their dtype, and cast their inputs to it
        module=layer,
    )
    layer.bias = linear.bias
    layer.support_avx512bf16_for_cpu = (
        False  # else validation packs the weights in another way, which training cannot read
    )
    return layer
