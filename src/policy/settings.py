"""Wrong --policy_args that LeRobot's act, diffusion and vqbet answer with an assertion, a KeyError or an error of torch."""

import typing
from dataclasses import fields

from torchvision import models

from command_line import split_pair
from errors import UserError

AT_LEAST_ONE = ("chunk_size", "n_action_steps", "n_obs_steps", "n_heads", "gpt_n_head", "n_groups")
WIDTH_OF_HEADS = {"n_heads": "dim_model", "gpt_n_head": "gpt_hidden_dim"}
CHOICES = {
    "feedforward_activation": ("relu", "gelu", "glu"),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
}


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


def check_policy_settings(base, overrides: dict) -> None:
    """Refuse values that break one of these policies while it is built.

    Args:
        base: the config class of a new policy, or the config of a saved one.
        overrides: {name: value} of the settings that --policy_args changes.

    Raises:
        UserError: a value is out of range, or contradicts another one.
    """
    config_class = base if isinstance(base, type) else type(base)
    if config_class.get_choice_name(config_class) not in ("act", "diffusion", "vqbet"):
        return
    settings = {f.name: getattr(base, f.name, None) for f in fields(base)} | overrides
    types = typing.get_type_hints(config_class)
    for name, value in settings.items():
        least = 1 if name in AT_LEAST_ONE else 0
        if types[name] is int and value < least:
            refuse(name, f"{least} or more", value)
        if name in CHOICES and value not in CHOICES[name]:
            refuse(name, f"one of {', '.join(CHOICES[name])}", value)
        if name in WIDTH_OF_HEADS and settings[WIDTH_OF_HEADS[name]] % value:
            width = WIDTH_OF_HEADS[name]
            refuse(name, f"a divisor of {width}, which is {settings[width]}", value)
    if settings.get("temporal_ensemble_coeff") is not None and settings["n_action_steps"] != 1:
        refuse("n_action_steps", "1 with temporal_ensemble_coeff", settings["n_action_steps"])
    if min(settings.get("crop_shape") or (1,)) < 1:
        refuse("crop_shape", "a height and a width of 1 or more", list(settings["crop_shape"]))
    if "down_dims" in settings and not settings["down_dims"]:
        refuse("down_dims", "one or more widths, such as [512,1024,2048]", list(settings["down_dims"]))
    check_backbone(settings)


def check_backbone(settings: dict) -> None:
    """Refuse a ResNet that torchvision does not have, and what does not go with it."""
    backbone = settings["vision_backbone"]
    if not backbone.startswith("resnet"):
        return  # the policy refuses it, in words
    resnets = [name for name in models.list_models(models) if name.startswith("resnet")]
    if backbone not in resnets:
        refuse("vision_backbone", f"one of {', '.join(resnets)}", backbone)
    check_backbone_weights(backbone, settings["pretrained_backbone_weights"])
    dilated = settings.get("replace_final_stride_with_dilation")
    if dilated and backbone in ("resnet18", "resnet34"):
        refuse("replace_final_stride_with_dilation", f"0 with {backbone}", dilated)


def check_backbone_weights(backbone: str, weights: str | None) -> None:
    """Refuse weights that torchvision does not have for its model `backbone`."""
    known = models.get_model_weights(backbone)
    if weights is not None and weights.removeprefix(f"{known.__name__}.") not in known.__members__:
        refuse("pretrained_backbone_weights", f"none or one of {', '.join(known.__members__)}", weights)


def refuse(name: str, expected: str, got) -> None:
    raise UserError(f"--policy_args {name}: expected {expected}, got {got}")
