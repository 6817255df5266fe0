"""Statistics as a policy normalises by them: made usable, and checked in its processors.

How a dataset's own statistics are read, completed and checked is in data/statistics.py.
"""

import math
from copy import deepcopy

import torch
from lerobot.configs import FeatureType
from lerobot.processor import NormalizerProcessorStep, RenameObservationsProcessorStep, UnnormalizerProcessorStep
from lerobot.utils.constants import IMAGENET_STATS

from errors import DELETE_STATISTICS, UserError

STATS_OF_MODE = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
IMAGENET = {name: torch.tensor(value, dtype=torch.float32) for name, value in IMAGENET_STATS.items()}
EMPTY_CAMERA = ".empty_camera_"  # part of the names of cameras that LeRobot's VLAs add and fill in themselves
# Policies of LeRobot whose processors do not follow the mapping in their config.
NORMALISE_THEMSELVES = ("groot",)  # in steps of their own
UNDONE_BY = {"lingbot_va": "QUANTILES"}  # the mode by which the action is unnormalised
ROUNDING = 1e-3  # by which the statistics of pictures may leave 0 to 1
RANGES = [names for mode, names in STATS_OF_MODE.items() if mode != "MEAN_STD"]


def usable_stats(meta, imagenet: bool) -> dict:
    """The dataset's statistics, changed so that unnormalising gives back what was normalised.

    LeRobot divides by std + 1e-8 and multiplies by std: for a joint that never moves, it turns a rounding error into noise
    of order 1 that nothing undoes. Here such a joint gets a std of 1 and a range of 2 or more instead.

    Args:
        meta: LeRobot's metadata of the dataset.
        imagenet: whether cameras are normalised by ImageNet's statistics.

    Returns:
        {feature: {name: float64 tensor}}.
    """
    stats = deepcopy(meta.stats) or {}
    if "observation.state" in stats:  # policy_features() may add the state a second time
        stats.setdefault("observation.environment_state", deepcopy(stats["observation.state"]))
    for key, stats_of_key in stats.items():
        is_picture_or_text = meta.features.get(key, {}).get("dtype") in ("video", "image", "string")
        if not is_picture_or_text and "mean" in stats_of_key:
            stats[key] = widen_constant(stats_of_key)
    if imagenet:
        for key in meta.camera_keys:
            stats[key] = stats.get(key, {}) | IMAGENET
    return stats


def widen_constant(stats_of_key: dict) -> dict:
    """The statistics of one feature, with unit width where it is constant."""
    widened = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in stats_of_key.items()}
    if len({value.shape for name, value in widened.items() if name != "count"}) > 1:
        return widened  # such as those of a camera that was left out
    error = rounding_error(widened["mean"])
    if "std" in widened:
        constant = widened["std"] <= error
        if "min" in widened and "max" in widened:
            constant |= widened["max"] - widened["min"] <= error
        widened["std"] = torch.where(constant, 1.0, widened["std"])
    for low, high in RANGES:
        if low in widened and high in widened:
            constant = widened[high] - widened[low] <= error
            widened[low] = torch.where(constant, widened[low] - 1.0, widened[low])
            widened[high] = torch.where(constant, widened[high] + 1.0, widened[high])
    return widened


def rounding_error(values: torch.Tensor) -> torch.Tensor:
    """How far rounding may put values from their mean."""
    return values.abs() * 1e-6 + 1e-12


def is_still(values: torch.Tensor) -> torch.Tensor:
    """(A,) which columns of (N, A) are constant, as in `usable_stats`."""
    error = rounding_error(values.mean(0))
    return (values.std(0) <= error) | (values.amax(0) - values.amin(0) <= error)


def needed_statistics(config) -> dict[str, tuple[str, ...]]:
    """{feature: names of the statistics} that a policy normalises by, under the policy's names.

    Args:
        config: the policy's config.
    """
    needed = {}
    for key in features_of(config):
        names = STATS_OF_MODE.get(wanted_mode(config, key, undone=key == "action"))
        if names and EMPTY_CAMERA not in key:
            needed[key] = names
    return needed


def stats_problems(config, stats: dict, empty=()) -> list[str]:
    """Features that the policy normalises and that have no usable statistics, a line each. LeRobot would not normalise them.

    Args:
        config: the policy's config.
        stats: statistics under the policy's names.
        empty: cameras that the dataset does not have.
    """
    problems = []
    features = features_of(config)
    for key, needed in needed_statistics(config).items():
        if key in empty:
            continue
        stats_of_key = stats.get(key, {})
        is_picture = features[key].type is FeatureType.VISUAL
        missing = [name for name in needed if name not in stats_of_key]
        if missing:
            problems.append(
                f"meta/stats.json has no {' and '.join(missing)} of {key} to normalise by. {DELETE_STATISTICS}"
            )
        for name in needed:
            if is_picture and name in stats_of_key and stats_of_key[name] is not IMAGENET.get(name):
                values = torch.as_tensor(stats_of_key[name], dtype=torch.float64)
                within = (values >= -ROUNDING) & (values <= 1 + ROUNDING)  # NaN is not
                unusable = not within.all() or (name == "std" and not (values > 0).all())
                channels = features[key].shape[0]
                if unusable or values.numel() != channels:
                    expected = f"expected {channels} numbers within 0 to 1 as {name} of {key}, a std above 0"
                    got = values.flatten().tolist()
                    problems.append(f"meta/stats.json: {expected}, got {got[:10]}. {DELETE_STATISTICS}")
    return problems


def require_statistics(config, preprocessor, postprocessor, inputs: list[str], holder: str) -> None:
    """Refuse pipelines that do not normalise and unnormalise as the policy's config says. LeRobot would pass the numbers on.

    Args:
        config: the policy's config.
        preprocessor, postprocessor: LeRobot's pipelines.
        inputs: features that the policy gets from the preprocessor.
        holder: the policy's folder.

    Raises:
        UserError: a step is missing, normalises in another way, or has no statistics or impossible ones.
    """
    if config.type in NORMALISE_THEMSELVES:
        return
    faults = []
    absent = False
    not_normalised = unnormalised_names(preprocessor)
    for pipeline, file, keys in (
        (preprocessor, "policy_preprocessor.json", inputs),
        (postprocessor, "policy_postprocessor.json", ["action"]),
    ):
        # Steps of a plugin may normalise in their own way.
        is_known = all(type(step).__module__.startswith(("lerobot.", "processors.")) for step in pipeline.steps)
        for key in keys:
            if EMPTY_CAMERA in key or key in not_normalised:
                continue
            wanted = wanted_mode(config, key, undone=pipeline is postprocessor)
            found = [step for step in pipeline.steps if mode_in_step(step, key) != "IDENTITY"]
            if is_known and not found and wanted != "IDENTITY":
                absent = True
                faults.append(f"{file} does not normalise {key}, but config.json says {wanted}")
            for step in found:
                mode = mode_in_step(step, key)
                if is_known and mode != wanted:
                    faults.append(f"{file} normalises {key} by {mode}, but config.json says {wanted}")
                    continue
                fault = fault_in_step(step, key, mode, features_of(config).get(key))
                if fault is not None:
                    faults.append(f"{file} normalises {key} and has {fault}")
    if faults:
        remedy = "Train it on a dataset, whose statistics it takes: train.py --policy_path"
        if absent:
            remedy += ", once policy_preprocessor.json and policy_postprocessor.json are deleted, which makes new ones"
        raise UserError(f"{holder}: {'; '.join(faults)}. The numbers would not be in the robot's units. {remedy}")


def unnormalised_names(preprocessor) -> dict[str, str]:
    """{the policy's name: the dataset's} of observations that a preprocessor of lerobot-train renames and does not normalise.

    lerobot-train keeps their statistics under the dataset's names, where its normalising does not look: the policy was trained
    on their numbers as they are.
    """
    known = keys_with_statistics(preprocessor)
    return {new: old for old, new in rename_map_of(preprocessor).items() if old in known and new not in known}


def rename_map_of(preprocessor) -> dict[str, str]:
    """{old: new} names by which a preprocessor renames observations."""
    names = {}
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            names = dict(step.rename_map)
    return names


def keys_with_statistics(preprocessor) -> set[str]:
    """The features whose statistics a preprocessor holds."""
    keys = set()
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep):
            keys |= {name.rpartition(".")[0] for name in step.state_dict()}
    return keys


def features_of(config) -> dict:
    """The inputs and outputs of a policy."""
    return {**(config.input_features or {}), **(config.output_features or {})}


def wanted_mode(config, key: str, undone: bool) -> str:
    """Name of the mode by which a policy's config says that a feature is normalised, or unnormalised if `undone`."""
    if undone and config.type in UNDONE_BY:
        return UNDONE_BY[config.type]
    feature = features_of(config).get(key)
    kind = feature.type.value if feature else "ACTION"  # published bases may leave out the action
    return name_of_mode(config.normalization_mapping.get(kind))


def name_of_mode(mode) -> str:
    """The name of one of LeRobot's normalization modes; IDENTITY for None."""
    return getattr(mode, "value", "IDENTITY")


def mode_in_step(step, key: str) -> str:
    """Name of the mode by which a step normalises a feature, or unnormalises the action."""
    if isinstance(step, UnnormalizerProcessorStep) and key == "action":
        return name_of_mode(step.norm_map.get(FeatureType.ACTION))
    if not isinstance(step, NormalizerProcessorStep) or key not in step.features:
        return "IDENTITY"
    chosen = step.normalize_observation_keys
    if chosen is not None and key not in chosen and key != "action":
        return "IDENTITY"
    return name_of_mode(step.norm_map.get(step.features[key].type))


def fault_in_step(step, key: str, mode: str, feature) -> str | None:
    """What is wrong with the statistics by which a step normalises a feature; None if nothing is.

    Args:
        feature: the policy's description, used if the step has none; None if the policy has none either.
    """
    names = STATS_OF_MODE[mode]
    held = step.state_dict()
    missing = [name for name in names if f"{key}.{name}" not in held]
    if missing:
        return f"no {' and '.join(missing)} of it"
    values = {name: held[f"{key}.{name}"].double() for name in names}
    feature = step.features.get(key, feature)
    for name, value in values.items():
        if feature is not None and not fits(value, feature):
            shape = list(feature.shape)
            return f"a {name} of shape {list(value.shape)} that does not fit the feature's, {shape}"
        wrong = ~value.isfinite()
        if name == "std":
            wrong |= value < 0
        if wrong.any():
            return f"{value[wrong][0]:g} as {name} of it"
    low, high = (values[name] for name in names)
    if mode != "MEAN_STD" and (low > high).any():
        return f"a {names[0]} above the {names[1]} of it"
    return None


def fits(value: torch.Tensor, feature) -> bool:
    """Whether a statistic has the shape that LeRobot's normalising expects: a number for each channel or vector element."""
    shape = tuple(feature.shape)
    if feature.type is FeatureType.VISUAL:
        return value.numel() == shape[0] and tuple(value.shape[-3:]) == (shape[0], 1, 1)
    if math.prod(shape) == 1:
        return value.numel() == 1
    return value.numel() in (math.prod(shape), shape[-1]) and value.shape[-1:] == shape[-1:]
