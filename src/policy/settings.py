"""Refuse settings on which a policy fails with an assertion, a KeyError or an error of torch, or loops forever."""

import re
import typing
from dataclasses import fields

from torchvision import models

from command_line import split_pair
from errors import UserError
from processors.saved_steps import LARGEST, number_problem

AT_LEAST_ONE = ("chunk_size", "n_action_steps", "n_obs_steps", "n_heads", "gpt_n_head", "n_groups")
WIDTH_OF_HEADS = {"n_heads": "dim_model", "gpt_n_head": "gpt_hidden_dim"}
CHOICES = {
    "feedforward_activation": ("relu", "gelu", "glu"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
}

# Counts of steps, layers and passes that a policy loops over while it is built or acts: pattern of the name, the most allowed.
MOST = {
    r"inference_(time)?steps|integration_steps|denois\w+_steps|iterations": 1_000,
    r"chunk_size|horizon|timesteps|(obs|action)_steps|action_pred_token|frames?$|repeats$": 10_000,
    r"layers?$|depth$|_draws$|cameras|ensemble": 10_000,
}


def size_problem(name: str, value) -> str | None:
    """What was expected, if a number in a policy's setting is not finite, or too large to build anything of that size.

    Args:
        name: the setting's.
        value: as from JSON, or already of the setting's type.
    """
    limits = [limit for pattern, limit in MOST.items() if re.search(pattern, name)]
    limit = min(limits, default=LARGEST)
    return number_problem(value, limit, limit)


def check_no_features(overrides: list[str] | None) -> None:
    """Refuse --policy_args for a policy's features, which come from the dataset.

    Raises:
        UserError: an override is for one of them.
    """
    for override in overrides or []:
        name = split_pair(override)[0]
        if name in ("input_features", "output_features"):
            raise UserError(
                f"--policy_args {name}: a policy's features are those of the dataset. Pass --observations NAME ... to "
                "choose what it sees, and --rename OLD=NEW to give that other names"
            )


def check_policy_settings(base, overrides: dict, where: str = "--policy_args") -> None:
    """Refuse values that break a policy while it is built, or when it acts.

    Args:
        base: the config class of a new policy, or the config of a saved one.
        overrides: {name: value} of the settings that --policy_args changes.
        where: the flag or file that holds the values, for messages.

    Raises:
        UserError: a value is out of range, or contradicts another one.
    """
    config_class = base if isinstance(base, type) else type(base)
    for name, value in overrides.items():
        expected = size_problem(name, value)
        if expected:
            refuse(where, name, expected, value)
    if config_class.get_choice_name(config_class) not in ("act", "diffusion", "vqbet"):
        return
    settings = {f.name: getattr(base, f.name, None) for f in fields(base)} | overrides
    types = typing.get_type_hints(config_class)
    for name, value in settings.items():
        least = 1 if name in AT_LEAST_ONE else 0
        if types[name] is int and value < least:
            refuse(where, name, f"{least} or more", value)
        if name in CHOICES and value not in CHOICES[name]:
            refuse(where, name, f"one of {', '.join(CHOICES[name])}", value)
        if name in WIDTH_OF_HEADS and settings[WIDTH_OF_HEADS[name]] % value:
            width = WIDTH_OF_HEADS[name]
            refuse(where, name, f"a divisor of {width}, which is {settings[width]}", value)
    if settings.get("temporal_ensemble_coeff") is not None and settings["n_action_steps"] != 1:
        refuse(where, "n_action_steps", "1 with temporal_ensemble_coeff", settings["n_action_steps"])
    num_train_timesteps = settings.get("num_train_timesteps")
    if num_train_timesteps is not None and (settings["num_inference_steps"] or 0) > num_train_timesteps:
        most = f"num_train_timesteps ({num_train_timesteps}) or less"
        refuse(where, "num_inference_steps", most, settings["num_inference_steps"])
    if min(settings.get("crop_shape") or (1,)) < 1:
        refuse(where, "crop_shape", "a height and a width of 1 or more", list(settings["crop_shape"]))
    if "down_dims" in settings and not settings["down_dims"]:
        refuse(where, "down_dims", "one or more widths, such as [512,1024,2048]", list(settings["down_dims"]))
    check_backbone(settings, where)


def check_backbone(settings: dict, where: str) -> None:
    """Refuse a ResNet that torchvision does not have, and what does not go with it."""
    backbone = settings["vision_backbone"]
    if not backbone.startswith("resnet"):
        return  # the policy refuses it, in words
    resnets = [name for name in models.list_models(models) if name.startswith("resnet")]
    if backbone not in resnets:
        refuse(where, "vision_backbone", f"one of {', '.join(resnets)}", backbone)
    check_backbone_weights(where, backbone, settings["pretrained_backbone_weights"])
    dilated = settings.get("replace_final_stride_with_dilation")
    if dilated and backbone in ("resnet18", "resnet34"):
        refuse(where, "replace_final_stride_with_dilation", f"0 with {backbone}", dilated)


def check_backbone_weights(where: str, backbone: str, weights: str | None) -> None:
    """Refuse weights that torchvision does not have for its model `backbone`."""
    known = models.get_model_weights(backbone)
    if weights is not None and weights.removeprefix(f"{known.__name__}.") not in known.__members__:
        refuse(where, "pretrained_backbone_weights", f"none or one of {', '.join(known.__members__)}", weights)


def refuse(where: str, name: str, expected: str, got) -> None:
    raise UserError(f"{where} {name}: expected {expected}, got {got!s:.80}")
