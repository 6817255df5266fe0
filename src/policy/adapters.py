"""Fine-tune some of the weights: PEFT adapters (LoRA and others) through LeRobot's wrapper, and freezing by name."""

import re
import warnings
from pathlib import Path
from types import MethodType

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.batchnorm import _BatchNorm

from errors import UserError, as_user_error, one_line
from policy.limits import SizeLimit
from policy.quiet import quiet_lerobot
from policy.weights import MISFIT, first_difference
from trust import OTHER_COPY, no_remote_code


def add_adapters(policy, base: str, method: str, settings: dict):
    """The policy wrapped with new adapters; its own weights are frozen.

    Args:
        policy: LeRobot policy with the weights to adapt.
        base: folder or Hub id of those weights, which the adapters' file names.
        method: a PEFT method, such as lora.
        settings: for the method's config, from `adapter_settings`.

    Raises:
        UserError: the settings do not fit the policy.
    """
    policy.config.pretrained_path = Path(base)
    try:
        with quiet_lerobot():  # it warns that smolvla's base may not be trained
            adapted = policy.wrap_with_peft(peft_cli_overrides={"method_type": method, **settings})
    except ValueError as error:
        remedy = ""
        if "target" in str(error):
            remedy = (
                ". Name modules with --peft_args: 'target_modules=[\"q_proj\"]' for the ends of names, "
                "target_modules=PATTERN for whole names, or target_modules=all-linear"
            )
        raise UserError(f"--peft {method}: {one_line(error)[:300].rstrip('.')}{remedy}") from error
    check_adapted(adapted)
    keep_frozen_norms(adapted)
    return adapted


def check_adapted(policy) -> None:
    """Check what PEFT made of a policy's new adapters.

    Raises:
        UserError: a name or pattern matches nothing, a checkpoint would not hold all that is trained, or a frozen weight
            would change.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    config = adapter_config(policy)
    modules = dict(policy.named_modules())
    adapted = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    saved = [name for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)]
    for wanted in getattr(config, "modules_to_save", None) or ():
        if not any(name.endswith(wanted) for name in saved):
            raise UserError(
                f"--peft_args modules_to_save: {wanted} matches no module. Pass part of the end of a module's name"
            )
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, setting, None) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                raise UserError(
                    f"--peft_args {setting}: {pattern} matches no adapted module, such as {shortened(adapted[0])}"
                )
    for name in adapted:
        inside = [wrapper for wrapper in saved if name.startswith(f"{wrapper}.")]
        if inside:
            raise UserError(
                f"--peft_args modules_to_save: {shortened(inside[0])} holds layers that are adapted as well. "
                "Name these in exclude_modules, or leave it out"
            )
        if isinstance(modules[name].get_base_layer(), torch.nn.MultiheadAttention):
            raise UserError(
                f"--peft: PEFT adapts {shortened(name)}, an attention of torch's, by changing its frozen weights in each "
                "step, which no checkpoint can hold. Name linear layers as target_modules instead"
            )
    # A checkpoint holds these tensors only.
    kept = {tensor.data_ptr() for tensor in adapter_state_dict(policy, policy.state_dict()).values()}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in kept:
            raise UserError(f"--peft: PEFT trains {shortened(name)}, but does not save it. Pass other --peft_args")


def shortened(name: str) -> str:
    """The name that a module or weight of PEFT's wrapper has in the policy."""
    return name.removeprefix("base_model.model.")


def load_adapters(policy, folder: Path):
    """The policy wrapped with the adapters in a checkpoint folder, to train further or to act.

    Raises:
        UserError: the adapters' file is missing, or does not fit the policy.
    """
    from peft import PeftModel

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # PEFT would look for a pickle
        raise UserError(f"{folder} has no {weights.name}, the adapters' weights. {OTHER_COPY}")
    what = f"the adapters in {folder}"
    try:
        with (
            as_user_error(what, invalid=(ValueError, SafetensorError)),
            no_remote_code(str(folder)),
            SizeLimit(what, weights),
            warnings.catch_warnings(action="ignore"),
        ):
            adapted = PeftModel.from_pretrained(policy, str(folder), is_trainable=True)
    except RuntimeError as error:
        if not str(error).startswith(MISFIT):
            raise
        raise UserError(f"{what} do not fit their settings: {first_difference(error)}. {OTHER_COPY}") from None
    # PEFT drops tensors that it does not know, and only warns of missing ones.
    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
    tensors = adapter_state_dict(adapted, adapted.state_dict())
    # The file holds only one of several tensors that share memory.
    loaded = {tensors[name].data_ptr() for name in saved if name in tensors}
    absent = [name for name, tensor in tensors.items() if tensor.data_ptr() not in loaded]
    # PEFT also saves the frozen weights of an embedding that it adapts.
    frozen = {f"base_model.model.{name}" for name in adapted.get_base_model().state_dict() if ".base_layer." in name}
    missing = sorted(absent)[:3]
    unexpected = sorted(saved - tensors.keys() - frozen)[:3]
    if missing or unexpected:
        raise UserError(f"{what} do not fit the policy: missing {missing}, unexpected {unexpected}. {OTHER_COPY}")
    keep_frozen_norms(adapted)
    return adapted


def has_adapters(policy) -> bool:
    return hasattr(policy, "peft_config")


def adapter_config(policy):
    """PEFT's config of the policy's adapters; None without adapters."""
    return policy.active_peft_config if has_adapters(policy) else None


def adapter_state_dict(policy, state_dict: dict) -> dict:
    """The adapters' tensors of a state dict, under the names in PEFT's files."""
    from peft import get_peft_model_state_dict

    # Adapted embeddings have a base too; by default PEFT would save it, and ask the Hub about its size at each call.
    return get_peft_model_state_dict(policy, state_dict, save_embedding_layers=False)


def load_adapter_state_dict(policy, tensors: dict) -> None:
    """Load tensors from `adapter_state_dict` into the policy."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(policy, tensors)


def with_full_names(policy, tensors: dict) -> dict:
    """Tensors from `adapter_state_dict` under the names in the policy's own state dict."""
    state = policy.state_dict()
    names = {id(tensor): name for name, tensor in state.items()}
    return {names[id(tensor)]: tensors[name] for name, tensor in adapter_state_dict(policy, state).items()}


def freeze(policy, patterns: list[str]) -> None:
    """Exclude the parameters whose names match one of the regular expressions from training.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    for pattern in patterns:
        freeze_matching(policy, pattern)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train. Pass fewer patterns")
    keep_frozen_norms(policy)


def keep_frozen_norms(policy) -> None:
    """Keep frozen batch norms in eval mode, even after train(): they normalise as they will at inference."""
    for module in policy.modules():
        parameters = list(module.parameters(recurse=False))
        trains = any(parameter.requires_grad for parameter in parameters)
        if isinstance(module, _BatchNorm) and parameters and not trains:
            module.eval()
            module.train = MethodType(lambda self, mode=True: self, module)


def freeze_matching(policy, pattern: str) -> None:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--freeze {pattern}: expected a regular expression, got an error: {error}") from None
    names = [name for name, _ in policy.named_parameters()]
    if not any(expression.search(name) for name in names):
        beginnings = sorted({".".join(name.split(".")[:2]) for name in names})
        raise UserError(f"--freeze {pattern} matches no parameter: expected part of a name that begins with "
                        f"{', '.join(beginnings[:12])}")  # fmt: skip
    for name, parameter in policy.named_parameters():
        if expression.search(name):
            parameter.requires_grad_(False)
