"""Statistics of a dataset that normalising can use and undo."""

from copy import deepcopy

import torch
from lerobot.configs import FeatureType
from lerobot.processor import NormalizerProcessorStep, UnnormalizerProcessorStep
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
            stats[key] = stats.get(key, {}) | IMAGENET
    return stats


def widen_constant(stats_of_key: dict) -> dict:
    """The statistics of one feature, with unit width where it is constant."""
    widened = {name: torch.as_tensor(value, dtype=torch.float64) for name, value in stats_of_key.items()}
    if len({value.shape for name, value in widened.items() if name != "count"}) > 1:
        return widened  # of a camera, say, whose statistics are not used
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


def needed_statistics(config) -> dict[str, tuple[str, ...]]:
    """{feature: names of the statistics} that a policy normalises by, under the policy's names.

    Args:
        config: the policy's config.
    """
    needed = {}
    for key, feature in {**config.input_features, **config.output_features}.items():
        names = statistics_of(config.normalization_mapping.get(feature.type.value))
        if names and EMPTY_CAMERA not in key:
            needed[key] = names
    return needed


def statistics_of(mode) -> tuple[str, ...]:
    """Names of the statistics that one of LeRobot's normalization modes, or none, needs."""
    return STATS_OF_MODE.get(getattr(mode, "value", "IDENTITY"), ())


def stats_problems(config, stats: dict) -> list[str]:
    """Features that the policy normalises without having usable statistics, a line each; LeRobot would not normalise them.

    Args:
        config: the policy's config.
        stats: statistics under the policy's names.
    """
    problems = []
    features = {**config.input_features, **config.output_features}
    for key, needed in needed_statistics(config).items():
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
                unusable = not values.isfinite().all() or (name == "std" and not (values > 0).all())
                if unusable or values.numel() not in (1, features[key].shape[0]):
                    expected = f"expected {features[key].shape[0]} finite numbers as {name} of {key}, a std above 0"
                    problems.append(
                        f"meta/stats.json: {expected}, got {values.flatten().tolist()}. {DELETE_STATISTICS}"
                    )
    return problems


def require_statistics(preprocessor, postprocessor, inputs: list[str], holder: str) -> None:
    """Refuse saved pipelines that normalise, or undo, without statistics: LeRobot would pass the numbers on as they are.

    Args:
        preprocessor, postprocessor: LeRobot's pipelines.
        inputs: features that the policy gets from the preprocessor.
        holder: the policy's folder.

    Raises:
        UserError: a normalised feature has no statistics.
    """
    lacking = []
    for pipeline, file in ((preprocessor, "policy_preprocessor.json"), (postprocessor, "policy_postprocessor.json")):
        for step in pipeline.steps:
            for key in features_of_step(step, inputs):
                kind = step.features[key].type if key in step.features else FeatureType.ACTION
                held = step.state_dict()
                missing = [name for name in statistics_of(step.norm_map.get(kind)) if f"{key}.{name}" not in held]
                if missing:
                    lacking.append(f"{file} normalises {key} and has no {' and '.join(missing)} of it")
    if lacking:
        raise UserError(
            f"{holder}: {'; '.join(lacking)}. The numbers would not be in the robot's units. Train it on a dataset, whose "
            "statistics it takes: train.py --policy_path"
        )


def features_of_step(step, inputs: list[str]) -> list[str]:
    """The features that a step normalises: observations that the policy gets, or the action where it is undone."""
    if isinstance(step, UnnormalizerProcessorStep):
        return ["action"]
    if not isinstance(step, NormalizerProcessorStep):
        return []
    chosen = step.normalize_observation_keys
    keys = [key for key in inputs if key in step.features and EMPTY_CAMERA not in key]
    return [key for key in keys if chosen is None or key in chosen or key == "action"]
