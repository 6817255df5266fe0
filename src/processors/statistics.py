"""Statistics that normalising can use and undo."""

import math
from copy import deepcopy

import torch

STATS_OF_MODE = {
    "MEAN_STD": ("mean", "std"),
    "MIN_MAX": ("min", "max"),
    "QUANTILES": ("q01", "q99"),
    "QUANTILE10": ("q10", "q90"),
}


def usable_stats(meta, imagenet: bool) -> dict:
    """The dataset's statistics, such that normalising and undoing it is the identity also for a joint that never moved.

    LeRobot normalises by std + 1e-8 and undoes it by std: at std 0 noise of one rounding error becomes of order 1, and
    nothing brings it back. A range that rounding error could explain is given unit width here instead.
    """
    from lerobot.utils.constants import IMAGENET_STATS

    stats = deepcopy(meta.stats) or {}
    if "observation.state" in stats:  # the state stands in for it where policy_features() says so
        stats.setdefault("observation.environment_state", deepcopy(stats["observation.state"]))
    for key, of_key in stats.items():
        if meta.features.get(key, {}).get("dtype") in ("video", "image", "string") or "mean" not in of_key:
            continue
        of_key.update({name: torch.as_tensor(value, dtype=torch.float64) for name, value in of_key.items()})
        if len({value.shape for name, value in of_key.items() if name != "count"}) > 1:
            continue  # stats_problems tells
        scale = rounding(of_key["mean"])
        if "std" in of_key:
            still = of_key["std"] <= scale
            if "min" in of_key and "max" in of_key:
                still |= of_key["max"] - of_key["min"] <= scale
            of_key["std"] = torch.where(still, 1.0, of_key["std"])
        for low, high in (("min", "max"), ("q01", "q99"), ("q10", "q90")):
            if low in of_key and high in of_key:
                still = of_key[high] - of_key[low] <= scale
                of_key[low], of_key[high] = (
                    torch.where(still, of_key[end] + by, of_key[end]) for end, by in ((low, -1.0), (high, 1.0))
                )
    if imagenet:
        for key in meta.camera_keys:
            for name, value in IMAGENET_STATS.items():
                stats.setdefault(key, {})[name] = torch.tensor(value, dtype=torch.float32)
    return stats


def rounding(values: torch.Tensor) -> torch.Tensor:
    """How far values may differ from these, or from their mean, by rounding alone."""
    return values.abs() * 1e-6 + 1e-12


def is_still(values: torch.Tensor) -> torch.Tensor:
    """(A,) which of (N, A) columns do not move: those that usable_stats gives unit width."""
    scale = rounding(values.mean(0))
    return (values.std(0) <= scale) | (values.amax(0) - values.amin(0) <= scale)


def stats_problems(config, stats: dict) -> list[str]:
    """Features that the policy normalises and that have no statistics (LeRobot would pass them through in silence)."""
    problems = []
    for key, feature in {**config.input_features, **config.output_features}.items():
        mode = config.normalization_mapping.get(feature.type.value)
        missing = [
            name for name in STATS_OF_MODE.get(getattr(mode, "value", "IDENTITY"), ()) if name not in stats.get(key, {})
        ]
        remedy = "lerobot-edit-dataset recomputes meta/stats.json"
        of_key = {} if feature.type.value == "VISUAL" else stats.get(key, {})
        sizes = {len(of_key[name].reshape(-1)) for name in ("mean", "std", "min", "max") if name in of_key}
        # of several axes LeRobot has those of the last
        if wrong := sizes - {math.prod(feature.shape), feature.shape[-1]}:
            problems.append(
                f"meta/stats.json has {max(wrong)} numbers of {key}, which has shape {feature.shape}: {remedy}"
            )
        if missing:
            if missing[0].startswith("q"):
                remedy = "python -m lerobot.scripts.augment_dataset_quantile_stats adds them"
            problems.append(
                f"meta/stats.json has no {' and '.join(missing)} of {key}, which the policy normalises by: {remedy}"
            )
    return problems
