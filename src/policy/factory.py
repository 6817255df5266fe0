"""Build a policy of LeRobot or ours: its config, by name or from a folder, then the network with new or saved weights."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

from draccus.utils import DraccusException
from lerobot.configs import PreTrainedConfig
from lerobot.policies import get_policy_class

import hub
import policy.flow  # noqa: F401  (registers our policy with LeRobot)
from command_line import parse_overrides
from errors import UserError, as_user_error, nearest, one_line
from policy.adapters import base_model_of, load_adapters
from policy.quiet import quiet_lerobot
from policy.settings import check_no_features, check_policy_settings
from policy.weights import load_weights


def policy_config_class(name: str) -> type[PreTrainedConfig]:
    """The config class of a policy.

    Raises:
        UserError: there is no such policy.
    """
    known = sorted(PreTrainedConfig.get_known_choices())
    if name not in known:
        raise UserError(f"unknown policy {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    return PreTrainedConfig.get_choice_class(name)


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
    with as_user_error(f"policy {name}", invalid=ValueError):
        return config_class(**{"device": device, "push_to_hub": False, **settings})


def load_policy_config(folder: Path, overrides: list[str] | None, device: str) -> PreTrainedConfig:
    """The config of a saved policy, with single settings overridden.

    Args:
        folder: holds LeRobot's config.json.
        overrides: NAME=VALUE for single settings.
        device: torch device to build the policy on.

    Raises:
        UserError: the folder holds no policy that this LeRobot knows, or the policy refuses a value.
    """
    try:
        name = json.loads((folder / "config.json").read_text()).get("type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no policy: config.json cannot be read ({one_line(error)})") from None
    known = PreTrainedConfig.get_known_choices()
    if name not in known:
        raise UserError(f"{folder} holds a policy {name!r}: expected one of {', '.join(sorted(known))}")
    # DraccusException: the file has settings that this LeRobot does not know
    with as_user_error(f"policy {name}", invalid=(ValueError, DraccusException)), quiet_lerobot():
        check_no_features(overrides)
        saved = PreTrainedConfig.from_pretrained(folder)
        settings = parse_overrides("--policy_args", type(saved), overrides)
        settings = shorten_action_steps(settings, getattr(saved, "n_action_steps", None))
        check_policy_settings(saved, settings)
        return replace(saved, device=device, **settings)


def shorten_action_steps(settings: dict, n_action_steps: int | None) -> dict:
    """The settings, with n_action_steps (unless it is among them) no longer than the chunk_size that they set."""
    if "chunk_size" not in settings or n_action_steps is None:
        return settings
    return {"n_action_steps": min(settings["chunk_size"], n_action_steps), **settings}


def build_policy(config: PreTrainedConfig, meta, folder: Path | None = None):
    """The policy on its device, with new weights or those in a folder.

    Args:
        config: with its input and output features set.
        meta: the dataset's LeRobotDatasetMetadata, which some policies read; None to act.
        folder: holds model.safetensors, whose tensors must be exactly the policy's, or adapters.

    Raises:
        UserError: an extra is not installed, a backbone cannot be downloaded, or the weights do not fit.
    """
    if folder is None:
        policy = construct(config, meta)
    elif config.use_peft:
        base = hub.fetch(base_model_of(folder), "the adapters' policy")
        policy = load_adapters(build_policy(replace(config, use_peft=False), meta, base), folder)
        policy.config.use_peft = True  # LeRobot looks for adapters where the saved config says so
    else:
        with without_backbone_weights(config):
            policy = construct(config, meta)
        load_weights(policy, folder / "model.safetensors")
    return policy.to(config.device)


def construct(config: PreTrainedConfig, meta):
    """The policy with new weights."""
    if meta is not None:
        config._runtime_dataset_meta = meta  # where some of LeRobot's policies look for it
    offline = "Go online once"
    if getattr(config, "pretrained_backbone_weights", None) is not None:
        offline += ", or pass --policy_args pretrained_backbone_weights=none"
    with as_user_error(f"policy {config.type}", invalid=ValueError, offline=offline), quiet_lerobot():
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
