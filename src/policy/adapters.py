"""Fine-tune some of the weights: PEFT adapters (LoRA and others) through LeRobot's wrapper, and freezing by name."""

import re
from dataclasses import fields
from pathlib import Path
from types import MethodType

from lerobot.configs.default import PeftConfig
from safetensors import SafetensorError, safe_open
from torch.nn.modules.batchnorm import _BatchNorm

from command_line import parse_overrides
from errors import UserError, as_user_error, one_line
from policy.weights import MISFIT, first_difference
from trust import OTHER_COPY, no_remote_code, read_adapter_config

INSTALL_PEFT = "needs the package peft. Install it with: uv pip install peft"


def add_adapters(policy, base: str, method: str, r: int, overrides: list[str] | None):
    """The policy wrapped with new adapters; its own weights are frozen.

    Args:
        policy: LeRobot policy with the weights to adapt.
        base: folder or Hub id of those weights, which the adapters' file names.
        method: a PEFT method, such as lora.
        r: rank of the adapters.
        overrides: NAME=VALUE for LeRobot's PeftConfig, such as target_modules=all-linear.

    Raises:
        UserError: peft is not installed, or the settings do not fit the method or the policy.
    """
    settings = adapter_settings(method, r, overrides)
    policy.config.pretrained_path = Path(base)
    try:
        return policy.wrap_with_peft(peft_cli_overrides=settings)
    except ValueError as error:
        remedy = ". Name modules with --peft_args target_modules=all-linear" if "target" in str(error) else ""
        raise UserError(f"--peft {method}: {one_line(error)[:200].rstrip('.')}{remedy}") from error


def adapter_settings(method: str, r: int, overrides: list[str] | None) -> dict:
    """Settings of new adapters, as LeRobot's wrap_with_peft takes them; arguments as for `add_adapters`.

    Raises:
        UserError: peft is not installed, or the settings do not fit the method.
    """
    settings = {"method_type": method, "r": r, **parse_overrides("--peft_args", PeftConfig, overrides)}
    check_method(method, settings)
    return settings


def check_method(method: str, settings: dict) -> None:
    """Refuse a method that PEFT does not have, or settings that the method does not have.

    Raises:
        UserError: one of these, or peft is not installed.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise UserError(f"--peft {INSTALL_PEFT}") from error
    methods = {kind.name.lower(): config_class for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method.lower() not in methods:
        raise UserError(f"--peft: expected one of {', '.join(sorted(methods))}, got {method}. lora is the usual one")
    # LeRobot translates these into the method's own
    known = {"method_type", "init_type", "full_training_modules"}
    known |= {f.name for f in fields(methods[method.lower()])}
    for name in settings:
        if name not in known:
            raise UserError(f"--peft {method}: this method has no setting {name}. Pass --peft lora")


def load_adapters(policy, folder: Path):
    """The policy wrapped with the adapters in a checkpoint folder, to train further or to act.

    Raises:
        UserError: the adapters' file is missing, or does not fit the policy.
    """
    from peft import PeftModel

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():  # PEFT would look for a pickle
        raise UserError(f"{folder} has no {weights.name}, the adapters' weights. Use another copy of the policy")
    what = f"the adapters in {folder}"
    try:
        with as_user_error(what, invalid=(ValueError, SafetensorError)), no_remote_code(str(folder)):
            adapted = PeftModel.from_pretrained(policy, str(folder), is_trainable=True)
    except RuntimeError as error:
        if not str(error).startswith(MISFIT):
            raise
        raise UserError(f"{what} do not fit their settings: {first_difference(error)}. {OTHER_COPY}") from None
    # PEFT drops tensors that it does not know, and only warns of those that are missing.
    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
    expected = adapter_state_dict(adapted, adapted.state_dict()).keys()
    if saved != expected:
        missing = sorted(expected - saved)[:3]
        unexpected = sorted(saved - expected)[:3]
        raise UserError(f"{what} do not fit the policy: missing {missing}, unexpected {unexpected}. {OTHER_COPY}")
    return adapted


def base_model_of(folder: Path) -> str:
    """Folder or Hub id of the weights that a folder's adapters were trained on.

    Raises:
        UserError: peft is not installed, or has no adapters of this kind.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise UserError(f"{folder} holds adapters, which {INSTALL_PEFT}") from error
    config = read_adapter_config(folder)
    if config.get("peft_type") not in list(PEFT_TYPE_TO_CONFIG_MAPPING):
        raise UserError(
            f"{folder} holds adapters of the kind {config.get('peft_type')!r:.60}: expected one of "
            f"{', '.join(sorted(kind.name for kind in PEFT_TYPE_TO_CONFIG_MAPPING))}. Install a later peft"
        )
    return config["base_model_name_or_path"]


def has_adapters(policy) -> bool:
    return hasattr(policy, "peft_config")


def adapter_config(policy):
    """PEFT's config of the policy's adapters; None without adapters."""
    return policy.active_peft_config if has_adapters(policy) else None


def adapter_state_dict(policy, state_dict: dict) -> dict:
    """The adapters' tensors of a state dict, under the names in PEFT's files."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(policy, state_dict)


def load_adapter_state_dict(policy, tensors: dict) -> None:
    """Load tensors from `adapter_state_dict` into the policy."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(policy, tensors)


def freeze(policy, patterns: list[str]) -> None:
    """Exclude the parameters whose names match one of the regular expressions from training.

    Raises:
        UserError: a pattern matches no parameter, or nothing is left to train.
    """
    for pattern in patterns:
        freeze_matching(policy, pattern)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train. Pass fewer patterns")
    # A frozen batch norm normalises as it will at inference: in eval mode, whatever train() asks for.
    for module in policy.modules():
        parameters = list(module.parameters(recurse=False))
        trains = any(parameter.requires_grad for parameter in parameters)
        if isinstance(module, _BatchNorm) and parameters and not trains:
            module.eval().train = MethodType(lambda self, mode=True: self, module)


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
