"""Settings of PEFT's adapters, from --peft_args or from a saved adapter_config.json: read, and checked before PEFT sees them."""

import json
import re
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path

from command_line import decoded, parse_overrides, split_pair
from config import FIELDS
from errors import UserError, as_user_error, find_path
from trust import ADAPTER_CONFIG, OTHER_COPY, read_adapter_config

INSTALL_PEFT = "needs the package peft. Install it with: uv pip install peft==0.21.2"
# PEFT's methods that policies are not trained with, and why.
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
# Fields of PEFT's configs that the run sets.
SET_BY_THE_RUN = (
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
MODULE_NAMES = ("target_modules", "exclude_modules", "modules_to_save")
# Settings that hold regular expressions, and dicts by regular expressions.
PATTERNS = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")


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
    methods = peft_methods("--peft")
    if method.lower() not in methods:
        raise UserError(f"--peft: expected one of {usable_methods(methods)}, got {method}. lora is the usual one")
    config_class = methods[method.lower()]
    reason = unusable(method.lower(), config_class)
    if reason:
        raise UserError(f"--peft {method}: {reason}. Pass another method, such as lora")
    return config_class


def peft_methods(what: str) -> dict:
    """{name of a method in lower case: its config class} of all that PEFT has.

    Args:
        what: needs them, for the message.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise UserError(f"{what} {INSTALL_PEFT}") from error
    return {kind.value.lower(): config_class for kind, config_class in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def usable_methods(methods: dict) -> str:
    """The names of the methods that a policy can be trained with, for messages."""
    return ", ".join(sorted(name for name in methods if unusable(name, methods[name]) is None))


def unusable(method: str, config_class) -> str | None:
    """Why a policy cannot be trained with a method of PEFT; None if it can be."""
    if "target_modules" not in {f.name for f in fields(config_class)}:
        return "this method changes the prompt of a language model, or mixes adapters, and not a policy's layers"
    return UNUSABLE.get(method)


def check_setting(name: str, value) -> None:
    """Refuse a setting of --peft_args that PEFT would take, but that does not work in a run.

    Raises:
        UserError: the run sets it, it needs what Armature does not do, or its value is impossible.
    """
    flag = f"--peft_args {name}"
    if name in SET_BY_THE_RUN:
        raise UserError(f"{flag}: the run sets it by itself. Leave it out")
    if name in NEEDS_MORE and value:
        raise UserError(f"{flag}: needs data or steps of its own, which Armature does not provide. Leave it out")
    if name == "init_lora_weights" and str(value).startswith(NEEDS_DATA):
        raise UserError(
            f"{flag}={value} needs data before training, or changes the frozen weights at random: expected true, false, "
            "gaussian, orthogonal, pissa, olora or mica. Pass one of these"
        )
    check_value(flag, name, value)


def check_value(what: str, name: str, value) -> None:
    """Refuse a value of the right type that PEFT refuses late, or with a traceback.

    Args:
        what: the setting, for messages.

    Raises:
        UserError: a number is out of range, or a pattern is no regular expression.
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


def base_model_of(folder: Path) -> str:
    """Folder or Hub id of the weights that a folder's adapters were trained on.

    Raises:
        UserError: peft is not installed, or has no adapters of this kind.
    """
    methods = peft_methods(f"{folder} holds adapters, which")
    config = read_adapter_config(folder)
    kind = config.get("peft_type")
    config_class = None
    if isinstance(kind, str) and kind.isupper():  # as PEFT writes it
        config_class = methods.get(kind.lower())
    if config_class is None or unusable(kind.lower(), config_class):
        raise UserError(
            f"{folder} holds adapters of the kind {kind!r:.60}: expected one of {usable_methods(methods).upper()}. "
            "Install a later peft"
        )
    check_saved_settings(folder / ADAPTER_CONFIG, config_class, config)
    return config["base_model_name_or_path"]


def read_peft_config(folder: Path):
    """PEFT's config of the adapters in a folder. If the base is a folder here, its path is made absolute.

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
    """The settings of an Armature run whose adapters have this config of PEFT's."""
    method = config.peft_type.value.lower()
    settings = {"peft": method, "policy_path": config.base_model_name_or_path, "peft_args": []}
    for f in fields(config):
        value = getattr(config, f.name)
        default = f.default if f.default_factory is MISSING else f.default_factory()
        if f.name == "r" and value >= 1:
            settings["peft_r"] = value
        elif f.name not in SET_BY_THE_RUN and value != default:
            if is_dataclass(value):
                value = asdict(value)
            if isinstance(value, set):
                value = sorted(value)
            settings["peft_args"].append(f"{f.name}={json.dumps(value)}")
    return {name: value for name, value in settings.items() if value != []}


def check_saved_settings(path: Path, config_class, config: dict) -> None:
    """Refuse values in the saved config of adapters that PEFT would fail on.

    Raises:
        UserError: names the first of them.
    """
    kinds = typing.get_type_hints(config_class)
    for f in fields(config_class):
        value = config.get(f.name)
        kind = kinds[f.name]
        if value is None or f.name in SET_BY_THE_RUN:
            continue
        takes_numbers = not {int, float}.isdisjoint({kind, *typing.get_args(kind)})
        is_number = type(value) in (int, float) and takes_numbers
        try:
            if f.name == "init_lora_weights" and str(value).startswith("pissa_niter"):
                raise UserError(f"{value} changed the frozen weights at random, which the adapters' files do not hold")
            if not is_number:  # PEFT takes an int for a float and a float for an int
                decoded(json.dumps(value), kind, f.name)
            is_list_of_names = f.name in MODULE_NAMES and isinstance(value, list)
            if is_list_of_names and not all(isinstance(item, str) for item in value):
                raise UserError(f"{f.name}: expected names, got {value!r:.80}")
            check_value(f.name, f.name, value)
        except UserError as error:
            raise UserError(f"{path}: {error}. {OTHER_COPY}") from None
