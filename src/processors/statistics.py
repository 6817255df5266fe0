"""Statistics of a dataset that normalising can use and undo."""

import math
from copy import deepcopy

import torch
from lerobot.configs import FeatureType
from lerobot.utils.constants import IMAGENET_STATS

from errors import RECOMPUTE_STATISTICS

STATS_OF_MODE = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}
RANGES = (("min", "max"), ("q01", "q99"), ("q10", "q90"))


def usable_stats(meta, imagenet: bool) -> dict:
    """The dataset's statistics, made such that normalising and undoing it is the identity.

    LeRobot divides by std + 1e-8 and multiplies by std: where a joint never moves, it turns a rounding error into noise of
    order 1 that nothing undoes. Here such a joint gets a std of 1 and a range of 2 or more instead.

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
            values = {name: torch.tensor(value, dtype=torch.float32) for name, value in IMAGENET_STATS.items()}
            stats[key] = stats.get(key, {}) | values
    return stats


def widen_constant(stats_of_key: dict) -> dict:
    """The statistics of one feature, with unit width where it is constant."""
    widened = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in stats_of_key.items()}
    if len({value.shape for name, value in widened.items() if name != "count"}) > 1:
        return widened  # stats_problems() reports it
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
    """How far values may differ from their mean by rounding."""
    return values.abs() * 1e-6 + 1e-12


def is_still(values: torch.Tensor) -> torch.Tensor:
    """(A,) which columns of (N, A) are constant, as in `usable_stats`."""
    error = rounding_error(values.mean(0))
    return (values.std(0) <= error) | (values.amax(0) - values.amin(0) <= error)


def stats_problems(config, stats: dict) -> list[str]:
    """Features that the policy normalises without having usable statistics, a line each; LeRobot would not normalise them.

    Args:
        config: the policy's config.
        stats: statistics under the policy's names.
    """
    problems = []
    for key, feature in {**config.input_features, **config.output_features}.items():
        stats_of_key = stats.get(key, {})
        is_picture = feature.type is FeatureType.VISUAL
        mode = config.normalization_mapping.get(feature.type.value)
        needed = STATS_OF_MODE.get(getattr(mode, "value", "IDENTITY"), ())
        missing = [name for name in needed if name not in stats_of_key]
        if missing:
            remedy = RECOMPUTE_STATISTICS
            if is_picture:
                remedy += " --operation.skip_image_video false"
            problems.append(f"meta/stats.json has no {' and '.join(missing)} of {key} to normalise by. {remedy}")
        sizes = {math.prod(stats_of_key[name].shape) for name in ("mean", "std", "min", "max") if name in stats_of_key}
        # of a feature with several axes, LeRobot has statistics of all numbers or of the last axis
        wrong = sizes - {math.prod(feature.shape), feature.shape[-1]}
        if wrong and not is_picture:
            problems.append(
                f"meta/stats.json: expected {math.prod(feature.shape)} numbers of {key}, got {max(wrong)}. {RECOMPUTE_STATISTICS}"
            )
    return problems
