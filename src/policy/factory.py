"""Build a policy of LeRobot or ours: its config, by name or from a folder, then the network with new or saved weights."""

import contextlib
import importlib.metadata
import math
import pickle
import types
import typing
from dataclasses import fields, replace
from pathlib import Path

import draccus
from draccus.utils import DraccusException
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class

import hub
import policy.flow  # noqa: F401  (registers our policy with LeRobot)
from command_line import parse_overrides, type_text
from errors import UserError, as_user_error, nearest, one_line, read_json
from policy.adapter_settings import base_model_of
from policy.adapters import load_adapters
from policy.limits import SizeLimit
from policy.quantize import quantize
from policy.quiet import quiet_lerobot
from policy.settings import check_no_features, check_policy_settings, size_problem
from policy.weights import WEIGHTS, load_weights
from processors.saved_steps import LARGEST
from trust import OTHER_COPY, check_policy_folder, no_remote_code

CONFIG = "config.json"  # LeRobot's name
# Policies of LeRobot's that learn from rewards: `forward` of the first two is no loss, and tdmpc plans with its rewards.
REINFORCEMENT = ("gaussian_actor", "sac", "tdmpc")


def policy_config_class(name: str) -> type[PreTrainedConfig]:
    """The config class of a policy.

    Raises:
        UserError: there is no such policy, or it does not learn by imitation.
    """
    refuse_reinforcement(name, f"--policy {name}")
    known = imitation_policies()
    if name not in known:
        raise UserError(f"unknown policy {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    return PreTrainedConfig.get_choice_class(name)


def imitation_policies() -> list[str]:
    """Names of the policies that learn from recorded actions: all but some of LeRobot's."""
    return sorted(set(PreTrainedConfig.get_known_choices()) - set(REINFORCEMENT))


def refuse_reinforcement(name: str, what: str) -> None:
    """Raise a UserError for a policy that learns from rewards; `what` names where it comes from."""
    if name in REINFORCEMENT:
        raise UserError(
            f"{what}: policy {name} learns by reinforcement, from rewards, and Armature trains by imitation, from "
            f"recorded actions: expected one of {', '.join(imitation_policies())}. Train it with LeRobot's own tools"
        )


def policy_config(name: str, overrides: list[str] | None, device: str) -> PreTrainedConfig:
    """The config of a new policy, without features.

    Args:
        name: such as act or flow.
        overrides: NAME=VALUE for single settings.
        device: torch device to build the policy on.

    Raises:
        UserError: there is no such policy or setting, or the policy refuses a value.
    """
    config_class = policy_config_class(name)
    check_no_features(overrides)
    settings = parse_overrides("--policy_args", config_class, overrides)
    settings = shorten_action_steps(settings, getattr(config_class, "n_action_steps", None))
    check_policy_settings(config_class, settings)
    offline = "Go online once"
    if name == "eo1":  # the only config that reads another one
        repo = settings.get("vlm_base", config_class.vlm_base)
        offline = f"Run this online once: {hub.download_command(repo)}"
    with as_user_error(f"policy {name}", invalid=ValueError, offline=offline, policy=name):
        new_policy = getattr(config_class, "new_policy", {})
        return config_class(**{"device": device, "push_to_hub": False, **new_policy, **settings})


def load_policy_config(folder: Path, overrides: list[str] | None, device: str) -> PreTrainedConfig:
    """The config of a saved policy, with single settings overridden.

    Args:
        folder: holds LeRobot's config.json.
        overrides: NAME=VALUE for single settings.
        device: torch device to build the policy on.

    Raises:
        UserError: the folder holds no policy that this LeRobot knows, a file of it names code, or the policy refuses a value.
    """
    check_policy_folder(folder)
    config_class = saved_config_class(folder)
    check_saved_fields(config_class, folder)
    name = config_class.get_choice_name(config_class)
    with as_user_error(f"policy {name}", invalid=ValueError, policy=name), quiet_lerobot():
        check_no_features(overrides)
        try:
            with no_remote_code(str(folder)):
                saved = PreTrainedConfig.from_pretrained(folder)
        except (DraccusException, NotImplementedError) as error:
            reason = one_line(error.__cause__ or error)[:300]  # draccus hides what the policy says
            raise UserError(f"{folder / CONFIG}: policy {name} refuses its values: {reason}") from error
        # Some bases leave them to the first dataset.
        saved.input_features = saved.input_features or {}
        saved.output_features = saved.output_features or {}
        check_policy_settings(saved, {}, f"{folder / CONFIG}:")
        settings = parse_overrides("--policy_args", type(saved), overrides)
        settings = shorten_action_steps(settings, getattr(saved, "n_action_steps", None))
        check_policy_settings(saved, settings)
        return replace(saved, device=device, **settings)


def saved_config_class(folder: Path) -> type[PreTrainedConfig]:
    """The config class of the policy in a folder.

    Raises:
        UserError: the folder holds no policy that this LeRobot knows, or one that does not learn by imitation.
    """
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no policy: it has no {CONFIG}. Pass a folder or Hub repo that has one")
    name = read_json(folder / CONFIG, OTHER_COPY).get("type")
    refuse_reinforcement(name, str(folder))
    known = imitation_policies()
    if not isinstance(name, str) or name not in known:
        raise UserError(f"{folder} holds a policy {name!r:.80}: expected one of {', '.join(known)}")
    return PreTrainedConfig.get_choice_class(name)


def check_saved_fields(config_class: type[PreTrainedConfig], folder: Path) -> None:
    """Compare the fields in a policy's config.json with those that this LeRobot's policy has.

    Raises:
        UserError: a field is unknown, or of another type.
    """
    saved = {name: value for name, value in read_json(folder / CONFIG, OTHER_COPY).items() if name != "type"}
    name = config_class.get_choice_name(config_class)
    version = importlib.metadata.version("lerobot")
    hints = typing.get_type_hints(config_class)
    known = {f.name: f for f in fields(config_class)}
    unknown = [field for field in saved if field not in known]
    if unknown:
        raise UserError(
            f"{folder / CONFIG}: policy {name} of lerobot {version} has no {', '.join(map(repr, unknown[:10]))}"
            f"{nearest(unknown[0], set(known) - set(saved))}. Install the version of LeRobot that wrote the file, or "
            "delete from it what this version does without"
        )
    for field, value in saved.items():
        expected = type_problem(hints[field], value, known[field].default) or size_problem(field, value)
        if expected is None and field in ("input_features", "output_features") and value:
            expected = features_problem(value)
        if expected is not None:
            raise UserError(
                f"{folder / CONFIG}: {field} of policy {name} in lerobot {version}: expected {expected}, "
                f"got {value!r:.80}. Install the version of LeRobot that wrote the file, or mend it there"
            )


def type_problem(kind, value, default) -> str | None:
    """The expected type, if a JSON file's `value` is neither of type `kind` nor of the type of the field's default."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = set(typing.get_args(kind)) if is_union else {kind}
    if kind is typing.Any or (value is None and type(None) in options):
        return None
    is_of_default_type = type(value) is type(default)  # some of LeRobot's have False for an int
    is_wrong = is_converted(options - {type(None)}, value) and not is_of_default_type
    try:
        draccus.decode(kind, value)
    except Exception:  # of any type: draccus checks nothing before it converts
        is_wrong = True
    return type_text(kind) if is_wrong else None


def is_converted(options: set, value) -> bool:
    """Whether draccus takes a value that is of none of the types: null for any, a text or true for a number, anything for a text."""
    if value is None:
        return True
    if isinstance(value, str):
        return options <= {int, float, bool}
    if options <= {str}:
        return True
    return isinstance(value, bool) and bool not in options and not options.isdisjoint({int, float})


def features_problem(features: dict) -> str | None:
    """What was expected, if a feature of a policy has an impossible shape."""
    for name, feature in features.items():
        sizes = feature.get("shape")
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            return f"sizes of 1 or more as shape of {name}"
        if math.prod(sizes) > LARGEST:
            return f"{LARGEST} numbers or fewer as shape of {name}"
        if feature.get("type") == "VISUAL" and len(sizes) != 3:
            return f"channels, height and width as shape of {name}"
    return None


def shorten_action_steps(settings: dict, n_action_steps: int | None) -> dict:
    """The settings, with n_action_steps (unless it is among them) no longer than the chunk_size that they set."""
    if "chunk_size" not in settings or n_action_steps is None:
        return settings
    return {"n_action_steps": min(settings["chunk_size"], n_action_steps), **settings}


def build_policy(
    config: PreTrainedConfig, meta, folder: Path | None = None, quantized: list[str] | None = None, quiet: bool = True
):
    """The policy on its device, with new weights or those in a folder.

    Args:
        config: with its input and output features set.
        meta: the dataset's LeRobotDatasetMetadata, which some policies read; None to act.
        folder: holds weights, whose tensors must be exactly the policy's, or adapters.
        quantized: round the weights below adapters to 4 bits, except in modules whose names end with one of these.
        quiet: no progress bar while weights are read.

    Raises:
        UserError: an extra is not installed, a backbone cannot be downloaded, or the weights do not fit.
    """
    if folder is None:
        policy = construct(config, meta, None)
    elif config.use_peft:
        named = base_model_of(folder)
        if Path(named).is_absolute() and not Path(named).is_dir():
            raise UserError(
                f"{folder} holds adapters of the policy in {named}, which is not there. Move it back; then "
                "`export.py CHECKPOINT FOLDER --merge` makes a policy that does without it"
            )
        base = hub.fetch(named, "the adapters' policy")
        check_policy_folder(base)
        policy = load_adapters(build_policy(replace(config, use_peft=False), meta, base, quantized, quiet), folder)
        policy.config.use_peft = True  # LeRobot looks for adapters where the saved config says so
    elif quantized is not None:
        # On the CPU first: a GPU may not hold the weights unrounded.
        policy = build_policy(replace(config, device="cpu"), meta, folder, quiet=quiet)
        quantize(policy, config.device, kept=quantized)
        policy.config.device = config.device
    else:
        with without_backbone_weights(config), no_remote_code(str(folder)):
            policy = construct(config, meta, folder / WEIGHTS)
        policy = policy.to(config.device)  # before the weights are read, which then need no memory of the host
        load_weights(policy, folder, quiet)
    return policy.to(config.device)


def construct(config: PreTrainedConfig, meta, weights: Path | None):
    """The policy with new weights, to be replaced by those in the file `weights`."""
    if meta is not None:
        config._runtime_dataset_meta = meta  # where some of LeRobot's policies look for it
    offline = "Go online once"
    if getattr(config, "pretrained_backbone_weights", None) is not None:
        offline += ", or pass --policy_args pretrained_backbone_weights=none"
    what = f"policy {config.type}"
    invalid = (ValueError, pickle.UnpicklingError)  # the latter of a backbone that is a pickle of code
    with (
        as_user_error(what, invalid=invalid, offline=offline, policy=config.type),
        quiet_lerobot(),
        SizeLimit(what, weights),
    ):
        return get_policy_class(config.type)(config, dataset_stats=meta and meta.stats, dataset_meta=meta)


@contextlib.contextmanager
def without_backbone_weights(config: PreTrainedConfig):
    """Within this context, building the policy downloads no pretrained backbone: saved weights replace it anyway."""
    weights = getattr(config, "pretrained_backbone_weights", None)
    if weights is None:
        yield
        return
    config.pretrained_backbone_weights = None
    try:
        yield
    finally:
        config.pretrained_backbone_weights = weights
