"""What a dataset has and what a policy needs: their features, and the names that --rename gives them.

C channels, H and W pixels.
"""

import math

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.feature_utils import dataset_to_policy_features

from command_line import split_pair
from errors import UserError, likeliest_pairs, plural, rename_flag, rename_remedy
from processors.bases import AUTO, camera_problems, pads, width_problems

NEED_STATE = ("act", "diffusion", "vqbet", "multi_task_dit")
ENVIRONMENT_STATE = "observation.environment_state"
FEATURES = "observation.features."  # in a batch, before the names of what a frozen backbone sees


def policy_features(meta, image_size: list[int] | None) -> tuple[dict, dict]:
    """LeRobot's policy features (inputs, outputs) of a dataset.

    Args:
        meta: LeRobot's metadata of the dataset.
        image_size: (H, W) to which cameras are resized; None for no resize.
    """
    described = {}
    for key, feature in meta.features.items():
        if key in meta.camera_keys and len(feature["shape"]) != 3:
            feature = {**feature, "shape": (1, 1, 3)}  # one of the dataset's problems, which LeRobot would raise here
        if feature["dtype"] != "string":
            described[key] = feature
    features = dataset_to_policy_features(described)
    inputs, outputs = {}, {}
    for key, feature in features.items():
        if feature.type is FeatureType.VISUAL and image_size is not None:
            feature = PolicyFeature(type=feature.type, shape=(feature.shape[0], *image_size))
        side = outputs if feature.type is FeatureType.ACTION else inputs
        side[key] = feature
    # LeRobot's act and diffusion need a camera or an environment state: without either, the state is both.
    sees = any(feature.type in (FeatureType.VISUAL, FeatureType.ENV) for feature in inputs.values())
    if not sees and "observation.state" in inputs:
        inputs[ENVIRONMENT_STATE] = PolicyFeature(FeatureType.ENV, inputs["observation.state"].shape)
    return inputs, outputs


def window_deltas(config, meta) -> dict[str, list[int]]:
    """The frames of each feature that a sample holds, relative to its own, such as {"action": [0, 1, ..., 99]}.

    Source: LeRobot 0.6.1 `resolve_delta_timestamps`, in frames instead of seconds.
    """
    deltas = {}
    for key in meta.features:
        frames = None
        if key == "action":
            frames = config.action_delta_indices
        elif key == "next.reward":
            frames = config.reward_delta_indices
        elif key.startswith("observation."):
            frames = config.observation_delta_indices
        if frames is not None:
            deltas[key] = list(frames)
    return deltas


def feature_problems(
    config, inputs: dict, outputs: dict, holder: str, rename: dict[str, str], left_out=(), *, fine_tune: bool = True
) -> list[str]:
    """What of a dataset's features a saved policy cannot take, a line each.

    Args:
        config: the policy's config.
        inputs, outputs: the dataset's features, under the policy's names.
        holder: name of the policy's folder.
        rename: {old: new} names that the user gave.
        left_out: the dataset's observations that --observations leaves out.
        fine_tune: whether a new run starts from the policy, with statistics of this dataset: then a policy that pads its
            vectors takes those of other widths.
    """
    names_of_left_out = {rename.get(old, old): old for old in left_out}
    features = {**inputs, **outputs}
    takes_any_width = fine_tune and pads(config)
    vectors = {
        key: feature
        for key, feature in {**config.input_features, **config.output_features}.items()
        if feature.type is not FeatureType.VISUAL
    }
    lacking = [key for key in vectors if key not in features and key in config.input_features]
    missing = {key: kind_of(vectors[key]) for key in lacking}
    unused = {key: kind_of(feature) for key, feature in inputs.items() if key not in config.input_features}
    pairs = likeliest_pairs(missing, unused)
    problems = camera_problems(config, inputs, holder, rename, names_of_left_out)
    for key, wanted in vectors.items():
        if key not in features:
            remedy = "Pass a dataset that has it, or train a new policy"
            if key in names_of_left_out:
                remedy = f"Add {names_of_left_out[key]} to --observations"
            elif key in pairs.values():
                remedy = f"{rename_remedy(pairs, rename)} if it has another name here, or train a new policy"
            problems.append(f"it has no {key}, which {holder} was trained on. {remedy}")
        elif tuple(wanted.shape) != tuple(features[key].shape) and not takes_any_width:
            problems.append(
                f"{key}: expected {size_text(wanted)}, as in {holder}, got {size_text(features[key])}. "
                "Pass the dataset it was trained on, or train a new policy"
            )
    return problems


def size_text(feature: PolicyFeature) -> str:
    """How many numbers a feature has: `3 numbers`, or its shape where that is not a plain list."""
    shape = list(feature.shape)
    return plural(shape[0], "number") if len(shape) == 1 else f"shape {shape}"


def kind_of(feature: PolicyFeature) -> str | tuple:
    """What a feature must share with another to stand for it: both are pictures, or have the same shape."""
    return "picture" if feature.type is FeatureType.VISUAL else tuple(feature.shape)


def ignored_states(config) -> list[str]:
    """States among a policy's inputs that its network ignores: some of LeRobot's read only observation.state."""
    if config.type not in NEED_STATE:
        return []
    states = [key for key, feature in config.input_features.items() if feature.type is FeatureType.STATE]
    return [key for key in states if key != "observation.state"]


def rename_problems(inputs: dict, rename: dict[str, str], left_out=()) -> list[str]:
    """A line for each name of --rename that the dataset does not have.

    Args:
        inputs: the dataset's features, under its own names.
        rename: {old: new} names that the user gave.
        left_out: the dataset's observations that --observations leaves out.
    """
    known = {old: new for old, new in rename.items() if old in inputs}
    unknown = {old: "image" in new for old, new in rename.items() if old not in inputs}  # and whether it is a picture
    taken = {*known, *rename.values()}
    free = {key: feature.type is FeatureType.VISUAL for key, feature in inputs.items() if key not in taken}
    meant = {old: likeliest for likeliest, old in likeliest_pairs(unknown, free).items()}
    flag = rename_flag({likeliest: rename[old] for old, likeliest in meant.items()}, known)
    problems = []
    for old in unknown:
        remedy = f"It has {', '.join(inputs) or 'none'}"
        if old in left_out:
            remedy = f"Add {old} to --observations"
        elif old in meant:
            remedy = f"Did you mean {meant[old]}? Pass {flag}"
        problems.append(f"--rename {old}: it has no such observation. {remedy}")
    return problems


def twice_named(inputs: dict, rename: dict[str, str]) -> list[str]:
    """A line for each new name of --rename that another observation of the dataset has too.

    Args:
        inputs: the dataset's features, under its own names.
        rename: {old: new} names that the user gave.
    """
    names = [rename.get(key, key) for key in inputs]
    return [
        f"--rename {old}={new}: two of its observations would be {new}. Pass another new name, or leave one of them out "
        "with --observations"
        for old, new in rename.items()
        if names.count(new) > 1
    ]


def policy_problems(config, image_size: list[int] | None, rename: dict[str, str], left_out=()) -> list[str]:
    """What a new policy, or LeRobot's resize step, cannot use about the observations, a line each.

    Args:
        config: the policy's config.
        image_size: (H, W) to which cameras are resized; None for no resize.
        rename: {old: new} names that the user gave.
        left_out: the dataset's observations that --observations leaves out.
    """
    lacks_state = config.type in NEED_STATE and config.robot_state_feature is None
    pairs = {}
    if lacks_state:
        states = [key for key, feature in config.input_features.items() if feature.type is FeatureType.STATE]
        pairs = likeliest_pairs({"observation.state": "state"}, dict.fromkeys(states, "state"))
    is_state_offered = bool(pairs)
    for key in config.image_features:
        if not key.startswith("observation.") or (image_size is not None and "image" not in key):
            pairs[key] = f"observation.images.{key.removeprefix('observation.')}"
    remedy_of_names = rename_remedy(pairs, rename)

    problems = []
    if not config.input_features:
        remedy = "Pass a dataset with a camera or a state"
        if left_out:
            remedy = f"Add some of {', '.join(left_out)} to --observations"
        problems.append(f"it has no observation that a policy could act on. {remedy}")
    elif lacks_state:
        remedy = "Pass --policy flow"
        if "observation.state" in left_out:
            remedy = "Add observation.state to --observations, or pass --policy flow"
        elif is_state_offered:
            remedy = f"{remedy_of_names} if that is the state, or pass --policy flow"
        problems.append(f"it has no observation.state, which policy {config.type} needs. {remedy}")
    for key in config.image_features:
        if not key.startswith("observation."):
            problems.append(
                f"camera {key}: expected a name that begins with observation., got {key}. {remedy_of_names}"
            )
        elif key in pairs:
            problems.append(
                f"camera {key}: expected a name with image in it, without which LeRobot does not resize, got {key}. "
                f"{remedy_of_names}"
            )
    return problems


def shape_problems(config) -> list[str]:
    """A line for an action, or a state that only flow would flatten, that is not a plain list of numbers."""
    features = dict(config.output_features)
    if config.type != "flow" and "observation.state" in config.input_features:
        features["observation.state"] = config.input_features["observation.state"]
    problems = []
    for key, feature in features.items():
        shape = list(feature.shape)
        count = math.prod(shape)
        if feature.type is not FeatureType.VISUAL and (len(shape) != 1 or count < 1):
            remedy = f"Write the shape [{count}] into info.json" if count > 0 else "Pass a dataset that records it"
            problems.append(
                f"{key}: expected a list of numbers, of shape [{count or 'n'}], got shape {shape}. {remedy}"
            )
    return problems or width_problems(config)


def parse_rename(pairs: list[str] | None) -> dict[str, str]:
    """{old: new} names of observations, from OLD=NEW; `auto` among them stands for pairs that are chosen later.

    Raises:
        UserError: a pair has another form, its new name is neither an observation's nor `action`, or its old name is
            `action` or that of another pair.
    """
    names = {}
    for pair in pairs or []:
        if pair == AUTO:
            continue
        old, _, new = split_pair(pair)
        if not old or not new or "=" in new:
            raise UserError(f"--rename {pair}: expected OLD=NEW, such as observation.image=observation.images.top")
        if not new.startswith("observation.") and new != "action":
            raise UserError(f"--rename {pair}: expected a new name that begins with observation., or action, got {new}")
        if old == "action" and new != "action":
            raise UserError(f"--rename {pair}: a policy learns the feature action, by that name. Leave the pair out")
        if names.get(old, new) != new:
            raise UserError(f"--rename {pair}: {old} is renamed twice, to {names[old]} too. Leave one of the pairs out")
        names[old] = new
    return names
