"""`--weights_dtype`: the dtype that a policy's weights are stored in. Autocast chooses what is computed in bf16.

Policies with their own setting for it (pi0, pi0.5, X-VLA, ...) use that, and keep in fp32 what their authors found to need it.
In other policies, the matrices become bf16, which autocast computes in bf16 anyway. Norms and biases are small and stay fp32.
"""

import functools

import torch

from policy.adapters import has_adapters
from policy.quantize import is_packed

FIELDS = ("dtype", "model_dtype")  # LeRobot's names of the setting, in configs of policies
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


def own_setting(policy_config) -> str | None:
    """Name of the policy's setting for its weights' dtype; None if it has none."""
    return next((name for name in FIELDS if isinstance(getattr(policy_config, name, None), str)), None)


def set_weights_dtype(policy_config, name: str) -> None:
    """Write a `--weights_dtype` into the policy's config, if that has a setting for it."""
    field = own_setting(policy_config)
    if name != "auto" and field is not None:
        setattr(policy_config, field, NAMES[name])


def cast_weights(policy, policy_config, name: str) -> None:
    """Cast the weights of a policy that has no setting for it. Adapters, and weights trained beside them, stay fp32."""
    if name == "auto" or own_setting(policy_config) is not None:
        return
    for parameter in policy.parameters():
        if is_cast(parameter, name, has_adapters(policy)):
            parameter.data = parameter.data.to(getattr(torch, NAMES[name]))
    if name == "bf16":
        compute_in_bf16(policy, torch.device(policy_config.device))


def is_cast(parameter, name: str, with_adapters: bool) -> bool:
    """Whether `cast_weights` casts a parameter."""
    if not parameter.is_floating_point() or is_packed(parameter):
        return False
    if name == "fp32":
        return True
    stays_fp32 = with_adapters and parameter.requires_grad
    return parameter.ndim > 1 and not stays_fp32


def compute_in_bf16(policy, device: torch.device) -> None:
    """Run the policy under autocast, also when it acts, because its inputs and norms are fp32. Its actions are fp32 too."""
    for name in ("forward", "select_action", "predict_action_chunk", "frozen_features"):
        method = getattr(policy, name, None)
        if method is None:
            continue

        @functools.wraps(method)
        def under_autocast(*args, method=method, **kwargs):
            with torch.autocast(device.type, torch.bfloat16):
                result = method(*args, **kwargs)
            return result.float() if isinstance(result, torch.Tensor) else result

        setattr(policy, name, under_autocast)
