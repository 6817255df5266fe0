"""Which datasets a saved policy can be fine-tuned on: widths of vectors, cameras, sizes of pictures, and names.

LeRobot's vision-language-action policies pad states and actions, resize pictures, and work without some of their cameras. The
features in such a policy's config say what it was trained on, not what a dataset must have.
"""

import re
import shlex

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.processor import NormalizerProcessorStep

from errors import UserError, last_part, plural, rename_remedy
from processors.statistics import EMPTY_CAMERA, keys_with_statistics, rename_map_of

AUTO = "auto"  # as a value of --rename
# Words that say nothing of what a camera sees.
GENERIC = {"cam", "camera", "cameras", "color", "image", "images", "img", "observation", "rgb", "video", "view"}
# LeRobot's names of the size that a policy resizes its pictures to.
RESIZES_TO = ("resize_imgs_with_padding", "image_resolution")


def pads(config) -> bool:
    """Whether a policy pads states and actions to fixed widths, so that its weights fit any narrower robot."""
    return hasattr(config, "max_state_dim") and hasattr(config, "max_action_dim")


def does_without_cameras(config) -> bool:
    """Whether a policy fills in or skips cameras that a batch lacks, if it has at least one.

    Policies with LeRobot's setting `empty_cameras` do, except EVO1, which counts its cameras. Wall-X skips them without it.
    """
    return (hasattr(config, "empty_cameras") and config.type != "evo1") or config.type == "wall_x"


def resizes_pictures(config) -> bool:
    """Whether a policy resizes pictures of any size itself."""
    return any(getattr(config, name, None) is not None for name in RESIZES_TO)


def cameras_of(features: dict) -> list[str]:
    """The cameras among features, without those that a policy adds and fills in itself."""
    return [key for key, feature in features.items() if feature.type is FeatureType.VISUAL and EMPTY_CAMERA not in key]


# Widths.


def width_problems(config) -> list[str]:
    """A line for each vector that is wider than a policy pads to, or that does not fit its action space.

    Args:
        config: the policy's config, with the dataset's features.
    """
    if not pads(config):
        return []
    problems = []
    for key, feature, setting in (
        ("observation.state", config.robot_state_feature, "max_state_dim"),
        ("action", config.action_feature, "max_action_dim"),
    ):
        most = getattr(config, setting)
        if feature is not None and feature.shape[-1] > most:
            problems.append(
                f"{key}: expected at most {plural(most, 'number')}, to which policy {config.type} pads, got "
                f"{feature.shape[-1]}. Train a new policy with --policy {config.type} --policy_args {setting}={feature.shape[-1]}"
            )
    space = action_space(config)
    if space is not None and not problems and config.action_feature is not None:
        predicted = torch.zeros(1, 1, space.dim_action)
        width = space.postprocess(predicted).shape[-1]
        got = config.action_feature.shape[-1]
        if got != width:
            problems.append(
                f"action: expected {plural(width, 'number')}, as action_mode={config.action_mode} of policy {config.type} has "
                f"them, got {got}. Add action_mode=auto max_action_dim={space.dim_action} to --policy_args, for robots of any joints"
            )
    return problems


def action_space(config):
    """X-VLA's action space of a fixed width; None for its mode `auto` and for other policies.

    Raises:
        UserError: there is no such mode.
    """
    if config.type != "xvla" or config.action_mode.lower() == "auto":
        return None
    from lerobot.policies.xvla import action_hub  # imports transformers, which is slow

    if config.action_mode.lower() not in action_hub.ACTION_REGISTRY:
        modes = ", ".join(sorted(action_hub.ACTION_REGISTRY))
        raise UserError(f"--policy_args action_mode: expected one of {modes}, got {config.action_mode}")
    return action_hub.build_action_space(config.action_mode)


def match_statistics(config, preprocessor) -> None:
    """Correct the state's width in the config and the preprocessor of a policy that pads its vectors.

    lerobot-train leaves the base's width there. The statistics have the width of the dataset that it was trained on.
    """
    if not pads(config) or not config.input_features:
        return
    for step in preprocessor.steps:
        if not isinstance(step, NormalizerProcessorStep):
            continue
        statistics = step.state_dict()
        for key, feature in list(config.input_features.items()):
            # EVO1's step has other features than its config: it normalises the state when that is padded already.
            if feature.type is not FeatureType.STATE or step.features.get(key) != feature:
                continue
            for name in ("mean", "min", "q01"):
                value = statistics.get(f"{key}.{name}")
                if value is not None and value.ndim == 1 and tuple(value.shape) != tuple(feature.shape):
                    feature = PolicyFeature(feature.type, tuple(value.shape))
            config.input_features[key] = feature
            step.features = {**step.features, key: feature}


# Cameras.


def camera_problems(config, inputs: dict, holder: str, rename: dict[str, str], left_out: dict[str, str]) -> list[str]:
    """A line if a saved policy cannot use the cameras of a dataset.

    As in LeRobot's own check, a dataset may have more cameras than the policy, and fewer if the policy works without some.

    Args:
        config: the policy's config.
        inputs: the dataset's features, under the policy's names.
        holder: name of the policy's folder.
        rename: {old: new} names that the user gave.
        left_out: {the policy's name: the dataset's} of observations that --observations leaves out.
    """
    wanted = cameras_of(config.input_features)
    got = cameras_of(inputs)
    missing = [key for key in wanted if key not in inputs]
    unknown = [key for key in got if key not in wanted]
    does_without = does_without_cameras(config)
    if not missing or (does_without and got and not unknown):
        return []

    what = f"it has no {', '.join(missing)}, which {holder} was trained on"
    expected = ", ".join(wanted)
    if does_without:
        what = f"{holder} takes no {', '.join(unknown)}" if unknown else "it has no camera"
        expected = f"some of {expected}"

    pairs = {camera: name for camera, (name, _) in pair_cameras(unknown, missing).items()}
    to_add = [left_out[key] for key in missing if key in left_out]
    if to_add:
        remedy = f"Add {' '.join(to_add)} to --observations"
    elif pairs:
        remedy = f"{rename_remedy(pairs, rename)} if that is the same"
        if does_without and len(unknown) < len(got):
            names_before = {new: old for old, new in rename.items()}
            known = [names_before.get(key, key) for key in inputs if key not in unknown]
            remedy += f", or leave the rest out with --observations {' '.join(map(shlex.quote, known))}"
        remedy += ", or train a new policy"
    else:
        remedy = "Pass a dataset that has it, or train a new policy"
    return [f"{what}: expected {expected}, got {', '.join(got) or 'none'}. {remedy}"]


def pair_cameras(cameras: list[str], wanted: list[str]) -> dict[str, tuple[str, str]]:
    """Pair a dataset's cameras with a policy's: the most alike in name first, then the rest in order.

    Returns:
        {camera: (wanted name, "by name" or "by order")}, each once, until one side runs out.
    """
    scored = []
    for camera in cameras:
        for name in wanted:
            alike = likeness(camera, name)
            if alike > 0:
                scored.append((alike, camera, name))
    pairs = {}
    taken = set()
    for _, camera, name in sorted(scored, key=lambda entry: -entry[0]):  # among equals, the first in order
        if camera not in pairs and name not in taken:
            pairs[camera] = (name, "by name")
            taken.add(name)
    cameras_left = [camera for camera in cameras if camera not in pairs]
    names_left = [name for name in wanted if name not in taken]
    for camera, name in zip(cameras_left, names_left, strict=False):
        pairs[camera] = (name, "by order")
    return {camera: pairs[camera] for camera in cameras if camera in pairs}


def likeness(camera: str, other: str) -> float:
    """The share of words that two cameras' names have in common, 0 to 1: cam_left_wrist and wrist_0_rgb share `wrist`.

    Numbers count only if neither name has a word that says what the camera sees, as in cam_2 and camera2.
    """
    words = set(re.findall("[a-z]+", last_part(camera).lower())) - GENERIC
    others = set(re.findall("[a-z]+", last_part(other).lower())) - GENERIC
    if not words and not others:
        words = set(re.findall(r"\d+", last_part(camera)))
        others = set(re.findall(r"\d+", last_part(other)))
    if not words or not others:
        return 0.0
    shared = sum(any(is_same_word(word, other_word) for other_word in others) for word in words)
    return 2 * shared / (len(words) + len(others))


def is_same_word(word: str, other: str) -> bool:
    """Whether two words are the same, or one begins with the other, as grip and gripper."""
    shorter, longer = sorted((word, other), key=len)
    return word == other or (len(shorter) > 3 and longer.startswith(shorter))


def pairs_line(pairs: dict[str, tuple[str, str]]) -> str:
    """The line that says how `--rename auto` paired the cameras of `pair_cameras`."""
    texts = [f"{old} -> {new} ({how})" for old, (new, how) in pairs.items()]
    return f"--rename {AUTO}: {', '.join(texts) or 'no camera is left to rename'}"


def trained_cameras(config, preprocessor) -> set[str] | None:
    """The cameras that a policy was trained with, under its own names: those that it has statistics of.

    Returns:
        None if that is unknown, or if the policy needs all of its cameras.
    """
    if not does_without_cameras(config):
        return None
    names = rename_map_of(preprocessor)
    known = keys_with_statistics(preprocessor)
    # lerobot-train keeps the statistics under the dataset's names
    known |= {names[key] for key in known if key in names}
    return known.intersection(cameras_of(config.input_features)) or None
