"""Fine-tune some of the weights: PEFT adapters (LoRA and others) through LeRobot's wrapper, and freezing by name."""

import json
import re
import typing
import warnings
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from types import MethodType

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.modules.batchnorm import _BatchNorm

from command_line import decoded, parse_overrides, split_pair
from config import FIELDS
from errors import UserError, as_user_error, find_path, one_line
from policy.limits import SizeLimit
from policy.quiet import quiet_lerobot
from policy.weights import MISFIT, first_difference
from trust import ADAPTER_CONFIG, OTHER_COPY, no_remote_code, read_adapter_config

INSTALL_PEFT = "needs the package peft. Install it with: uv pip install peft==0.21.2"
# Methods of PEFT that a policy is not trained with, and why.
UNUSABLE = {
    "adalora": "this method moves rank between layers by calls between the steps, which Armature does not make",
    "adaption_prompt": "this method changes the attention of a language model, and not a policy's layers",
    "poly": "this method needs a task's number in each batch",
    "shadow": "this method runs beside a language model, and not in a policy's layers",
    "trainable_tokens": "this method trains tokens of a language model, and not a policy's layers",
}
METHOD_DEFAULTS = {
    "ia3": {"feedforward_modules": []},  # PEFT knows them only for language models
    "oft": {"oft_block_size": 0},  # which excludes r
}
# Fields of PEFT's configs that are no settings.
OF_THE_RUN = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "runtime_config",
    "megatron_config",
    "megatron_core",
)
# Settings of LoRA that need data before training, other losses, or other calls of the policy.
NEEDS_MORE = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "layer_replication",
    "loftq_config",
    "lora_ga_config",
    "monteclora_config",
    "trainable_token_indices",
)
# Values of init_lora_weights that need data, or that change the frozen weights at random, which no file keeps.
NEEDS_DATA = ("corda", "eva", "loftq", "lora_ga", "pissa_niter")
NAMES = ("target_modules", "exclude_modules", "modules_to_save")
# Settings that hold regular expressions, and dicts by regular expressions.
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


def add_adapters(policy, base: str, method: str, settings: dict):
    """The policy wrapped with new adapters; its own weights are frozen.

    Args:
        policy: LeRobot policy with the weights to adapt.
        base: folder or Hub id of those weights, which the adapters' file names.
        method: a PEFT method, such as lora.
        settings: of the method's config, from `adapter_settings`.

    Raises:
        UserError: the settings do not fit the policy.
    """
    policy.config.pretrained_path = Path(base)
    try:
        with quiet_lerobot():  # which doubts that smolvla's base is trained
            adapted = policy.wrap_with_peft(peft_cli_overrides={"method_type": method, **settings})
    except ValueError as error:
        remedy = ". Name modules with --peft_args target_modules=all-linear" if "target" in str(error) else ""
        raise UserError(f"--peft {method}: {one_line(error)[:300].rstrip('.')}{remedy}") from error
    check_adapted(adapted)
    keep_frozen_norms(adapted)
    return adapted


def adapter_settings(method: str, r: int, overrides: list[str] | None) -> dict:
    """Settings of new adapters, as the method's config in PEFT takes them.

    Args:
        method: a PEFT method, such as lora.
        r: rank of the adapters.
        overrides: NAME=VALUE for the method's config, such as target_modules=all-linear.

    Raises:
        UserError: peft is not installed, or has no such method or setting, or the method refuses a value.
    """
    config_class = method_config(method)
    method = method.lower()
    known = {f.name for f in fields(config_class)}
    # LeRobot's names of two settings, which lerobot-train takes.
    initial = "init_weights" if "init_weights" in known else f"init_{method}_weights"
    renamed = []
    for override in overrides or []:
        name, equals, text = split_pair(override)
        name = {"full_training_modules": "modules_to_save", "init_type": initial}.get(name, name)
        renamed.append(name + equals + text)
    given = parse_overrides("--peft_args", config_class, renamed)
    for name, value in given.items():
        check_setting(name, value)

    settings = dict(METHOD_DEFAULTS.get(method, {}))
    if "r" in known:
        settings["r"] = r
    elif r != FIELDS["peft_r"].default:
        raise UserError(f"--peft_r: {method} has no rank. Leave it out")
    settings |= given
    with as_user_error(f"--peft {method}", invalid=ValueError):
        config_class(**settings)
    return settings


def method_config(method: str):
    """The config class of a method in PEFT.

    Raises:
        UserError: peft is not installed, or there is no such method, or a policy cannot be trained with it.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise UserError(f"--peft {INSTALL_PEFT}") from error
    methods = {kind.name.lower(): config_class for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    usable = [name for name in methods if unusable(name, methods[name]) is None]
    if method.lower() not in methods:
        raise UserError(f"--peft: expected one of {', '.join(sorted(usable))}, got {method}. lora is the usual one")
    reason = unusable(method.lower(), methods[method.lower()])
    if reason:
        raise UserError(f"--peft {method}: {reason}. Pass another method, such as lora")
    return methods[method.lower()]


def unusable(method: str, config_class) -> str | None:
    """Why a policy is not trained with a method of PEFT; None if it can be."""
    if "target_modules" not in {f.name for f in fields(config_class)}:
        return "this method changes the prompt of a language model, or mixes adapters, and not a policy's layers"
    return UNUSABLE.get(method)


def check_setting(name: str, value) -> None:
    """Refuse a setting that PEFT would take, but that a run could not keep.

    Raises:
        UserError: it belongs to the run, or needs what this trainer has not, or has an impossible value.
    """
    flag = f"--peft_args {name}"
    if name in OF_THE_RUN:
        raise UserError(f"{flag}: the run sets it by itself. Leave it out")
    if name in NEEDS_MORE and value:
        raise UserError(f"{flag}: needs data or steps of its own, which Armature does not give it. Leave it out")
    if name == "init_lora_weights" and str(value).startswith(NEEDS_DATA):
        raise UserError(
            f"{flag}={value} needs data before training, or changes the frozen weights at random: expected true, false, "
            "gaussian, orthogonal, pissa, olora or mica. Pass one of these"
        )
    check_value(flag, name, value)


def check_value(what: str, name: str, value) -> None:
    """Refuse a value of the right type that PEFT refuses only in a traceback, or late.

    Args:
        what: the setting, for messages.

    Raises:
        UserError: it is one.
    """
    if "dropout" in name and isinstance(value, (int, float)) and not 0 <= value < 1:
        raise UserError(f"{what}: expected 0 or more, and less than 1, got {value}")
    if name in ("rank_pattern", "alpha_pattern") and value:
        for pattern, number in value.items():
            is_number = type(number) is int or (type(number) is float and name == "alpha_pattern")
            if not is_number or not 0 < number < float("inf"):
                raise UserError(f"{what}: expected a number above 0 for {pattern}, got {number!r:.60}")
    if name not in PATTERNS:
        return
    for pattern in value if isinstance(value, (list, dict)) else [value]:
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise UserError(f"{what}: expected a regular expression, got {pattern!r:.80}: {error}") from None


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
    """The name of a module or weight in the policy, for its name in PEFT's wrapper."""
    return name.removeprefix("base_model.model.")


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
    # PEFT drops tensors that it does not know, and only warns of those that are missing.
    with safe_open(weights, "pt") as file:
        saved = set(file.keys())
    tensors = adapter_state_dict(adapted, adapted.state_dict())
    # Of tensors that share memory, the file holds one.
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
    kind = config.get("peft_type")
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING.get(kind) if isinstance(kind, str) else None
    if config_class is None or unusable(kind.lower(), config_class):
        usable = [name.name for name, known in PEFT_TYPE_TO_CONFIG_MAPPING.items() if not unusable(name.lower(), known)]
        raise UserError(
            f"{folder} holds adapters of the kind {kind!r:.60}: expected one of {', '.join(sorted(usable))}. "
            "Install a later peft"
        )
    check_saved_settings(folder / ADAPTER_CONFIG, config_class, config)
    return config["base_model_name_or_path"]


def read_peft_config(folder: Path):
    """PEFT's config of the adapters in a folder, whose base is an absolute path if it is one here.

    Raises:
        UserError: as `base_model_of`.
    """
    base = base_model_of(folder)
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # PEFT saves it so
    path = find_path(base, "base_model_name_or_path")
    if path is not None:
        config.base_model_name_or_path = str(path.resolve())
    return config


def settings_of_adapters(config) -> dict:
    """The settings of a run of ours that has adapters with a config of PEFT's."""
    method = config.peft_type.value.lower()
    settings = {"peft": method, "policy_path": config.base_model_name_or_path, "peft_args": []}
    for f in fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name == "r" and value >= 1:
            settings["peft_r"] = value
        elif f.name not in OF_THE_RUN and value != default:
            if is_dataclass(value):
                value = asdict(value)
            value = sorted(value) if isinstance(value, set) else value
            settings["peft_args"].append(f"{f.name}={json.dumps(value)}")
    return {name: value for name, value in settings.items() if value != []}


def check_saved_settings(path: Path, config_class, config: dict) -> None:
    """Refuse values in the saved config of adapters on which PEFT would fail.

    Raises:
        UserError: there is one.
    """
    kinds = typing.get_type_hints(config_class)
    for f in fields(config_class):
        value = config.get(f.name)
        kind = kinds[f.name]
        if value is None or f.name in OF_THE_RUN:
            continue
        is_number = type(value) in (int, float) and not {int, float}.isdisjoint({kind, *typing.get_args(kind)})
        try:
            if f.name == "init_lora_weights" and str(value).startswith("pissa_niter"):
                raise UserError(f"{value} changed the frozen weights at random, which the adapters' files do not hold")
            if not is_number:  # PEFT takes an int for a float, and the other way
                decoded(json.dumps(value), kind, f.name)
            if f.name in NAMES and isinstance(value, list) and not all(isinstance(item, str) for item in value):
                raise UserError(f"{f.name}: expected names, got {value!r:.80}")
            check_value(f.name, f.name, value)
        except UserError as error:
            raise UserError(f"{path}: {error}. {OTHER_COPY}") from None


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
    """Let frozen batch norms normalise as they will at inference: in eval mode, whatever train() asks for."""
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
