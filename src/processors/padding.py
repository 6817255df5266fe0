"""Padded datasets (data/padding.py) in the policy's processors: each dataset's numbers by its own statistics.

A pipeline normalises by one set of statistics. So the numbers of each dataset are brought to common units first, in which those
statistics give what the dataset's own would give. To act for one of the datasets, its own statistics take their place.

N rows of all datasets, W numbers of a state or action.
"""

import torch
from lerobot.configs import FeatureType
from lerobot.processor import (
    NormalizerProcessorStep,
    PolicyActionProcessorStep,
    ProcessorStep,
    TransitionKey,
    UnnormalizerProcessorStep,
)
from torch import Tensor
from torch.nn import functional

from errors import UserError
from processors.statistics import needed_statistics, rename_map_of, widen_constant
from runtime import MASK


def to_common_units(source, config, rename: dict[str, str]) -> list[dict]:
    """Bring the numbers of padded datasets to units in which one set of statistics normalises each as by its own.

    A number is in the units of the first dataset that has it.

    Args:
        source: the datasets as one Source, whose columns and statistics are changed.
        config: the policy's.
        rename: {name in the source: name that the policy knows}.

    Returns:
        What a checkpoint records of each dataset: name, cameras, widths, names of joints, and statistics, under the policy's
        names of features.
    """
    needed = needed_statistics(config)
    stats = dict(source.meta.stats)
    records = []
    for own in source.own_features:
        records.append(
            {
                "name": own.name,
                "cameras": [rename.get(key, key) for key in own.cameras],
                "widths": {rename.get(key, key): width for key, width in own.widths.items()},
                "joint_names": {rename.get(key, key): names for key, names in own.joint_names.items()},
                "statistics": {},
            }
        )
    for key in source.own_features[0].widths:
        new = rename.get(key, key)
        if new not in needed or key not in source.columns:
            continue
        low, high = needed[new]  # such as mean and std, or min and max
        each = []  # {name: (W,)} of each dataset
        for own in source.own_features:
            usable = widen_constant(own.stats[key])
            each.append({name: usable[name] for name in (low, high)})
        common = of_first_that_has(each, [own.widths[key] for own in source.own_features])
        column = source.columns[key].reshape(source.rows, -1)  # (N, W), the same memory
        for index, of_dataset in enumerate(each):
            rows = source.columns["dataset_index"] == index
            column[rows] = rescaled(column[rows].double(), of_dataset, common).float()
            values = {name: value.tolist() for name, value in of_dataset.items()}
            records[index]["statistics"][new] = values
        stats[key] = stats[key] | {name: value.numpy() for name, value in common.items()}
    source.meta.stats = stats
    return records


def of_first_that_has(each: list[dict[str, Tensor]], widths: list[int]) -> dict[str, Tensor]:
    """{name: (W,)} statistics of each number in the first dataset that has it.

    Args:
        each: those of each dataset.
        widths: how many numbers each has.
    """
    common = {name: value.clone() for name, value in each[0].items()}
    for of_dataset, width in reversed(list(zip(each, widths, strict=True))):
        for name, value in of_dataset.items():
            common[name][:width] = value[:width]
    return common


def rescaled(values: Tensor, own: dict[str, Tensor], common: dict[str, Tensor]) -> Tensor:
    """(N, W) numbers that `common` normalises as `own` does (N, W) `values`.

    Args:
        own, common: {name: (W,)} mean and std, or the two ends of a range.
    """
    low, high = own
    if high == "std":
        return (values - own[low]) / own[high] * common[high] + common[low]
    share = (values - own[low]) / (own[high] - own[low])
    return share * (common[high] - common[low]) + common[low]


def is_record(value) -> bool:
    """Whether a value that was read from a file is a record of `to_common_units`."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return False
    widths = value.get("widths")
    statistics = value.get("statistics")
    if not isinstance(value.get("cameras"), list) or not isinstance(widths, dict) or not isinstance(statistics, dict):
        return False
    if not isinstance(value.get("joint_names"), dict):
        return False
    if not all(isinstance(width, int) and width >= 0 for width in widths.values()) or not widths.get("action"):
        return False
    lists = [values for of_key in statistics.values() if isinstance(of_key, dict) for values in of_key.values()]
    return all(isinstance(values, list) and all(isinstance(number, float) for number in values) for values in lists)


def check_records(now: list[dict], before: list[dict], checkpoint) -> None:
    """Raise a UserError if a checkpoint was trained on datasets in other units."""

    def units(records: list[dict]) -> list:
        return [[record["widths"], record["statistics"]] for record in records]

    if units(now) != units(before):
        raise UserError(
            f"{checkpoint} was trained on {', '.join(record['name'] for record in before) or 'datasets that were not padded'}: "
            f"expected datasets with the same statistics in the same order, got {', '.join(r['name'] for r in now)}. "
            "Pass those, or start a new run from it: --policy_path"
        )


# Batches with masks.


def preprocess_batch(preprocess, batch: dict) -> dict:
    """A batch through a preprocessor, with the masks and dataset indices of padded datasets, which LeRobot's steps would not keep."""
    if "dataset_index" not in batch:
        return preprocess(batch)
    ready = preprocess({key: value for key, value in batch.items() if not key.endswith(MASK)})
    device = ready["action"].device
    names = rename_map_of(preprocess)
    for key, value in batch.items():
        if key.endswith(MASK):
            camera = key.removesuffix(MASK)
            ready[f"{names.get(camera, camera)}{MASK}"] = value.to(device)
    ready["dataset_index"] = batch["dataset_index"].to(device)
    if "domain_id" in ready:  # X-VLA's name for it
        ready["domain_id"] = ready["dataset_index"]
    return ready


# Acting for one of the datasets.


class PadFeatures(ProcessorStep):
    """Appends the numbers that a robot does not have, and adds black pictures for cameras that it does not have.

    Args:
        widths: {state: W}, under the names that observations come with.
        own_widths: {state: how many numbers the robot has}.
        action_width: W of a recorded action.
        cameras: {camera: (C, H, W)} that the robot does not have.
    """

    def __init__(
        self, widths: dict[str, int], own_widths: dict[str, int], action_width: int, cameras: dict[str, tuple]
    ):
        self.widths = widths
        self.own_widths = own_widths
        self.action_width = action_width
        self.cameras = cameras

    def __call__(self, transition: dict) -> dict:
        padded = dict(transition[TransitionKey.OBSERVATION])
        for key, width in self.widths.items():
            if key in padded:
                padded[key] = widened(padded[key], width)
        example = next(iter(padded.values()))
        for key, shape in self.cameras.items():
            padded[key] = torch.zeros(len(example), *shape, device=example.device)
        action = transition.get(TransitionKey.ACTION)
        if action is not None:
            action = widened(action, self.action_width)
        return {**transition, TransitionKey.OBSERVATION: padded, TransitionKey.ACTION: action}

    def transform_features(self, features):
        return features


def widened(values: Tensor, width: int) -> Tensor:
    """(..., W) numbers, with zeros appended."""
    return functional.pad(values, (0, width - values.shape[-1]))


class CutAction(PolicyActionProcessorStep):
    """Drops the numbers of an action that a robot does not have.

    Args:
        width: how many it has.
    """

    def __init__(self, width: int):
        self.width = width

    def action(self, action: Tensor) -> Tensor:
        return action[..., : self.width]

    def transform_features(self, features):
        return features


def padding_of(preprocess) -> PadFeatures | None:
    """The step of a preprocessor that pads observations; None if it has none."""
    return next((step for step in preprocess.steps if isinstance(step, PadFeatures)), None)


def act_for(record: dict, number: int, config, preprocess, postprocess) -> None:
    """Change a policy's processors so that it acts for the robot of one of the padded datasets that it was trained on.

    Args:
        record: of `to_common_units`.
        number: of the dataset.
        config: the policy's.
        preprocess, postprocess: LeRobot's pipelines, which are changed.
    """
    for step in (*preprocess.steps, *postprocess.steps):
        if isinstance(step, (NormalizerProcessorStep, UnnormalizerProcessorStep)):
            set_statistics(step, record["statistics"])
        if hasattr(step, "domain_id"):  # X-VLA's
            step.domain_id = number
    before = {new: old for old, new in rename_map_of(preprocess).items()}
    widths = {}
    own_widths = {}
    cameras = {}
    for key, feature in config.input_features.items():
        name = before.get(key, key)
        if feature.type is FeatureType.VISUAL:
            if key not in record["cameras"]:
                cameras[name] = tuple(feature.shape)
        elif record["widths"].get(key, feature.shape[0]) < feature.shape[0]:
            widths[name] = feature.shape[0]
            own_widths[name] = record["widths"][key]
    action_width = config.output_features["action"].shape[0]
    preprocess.steps = [PadFeatures(widths, own_widths, action_width, cameras), *preprocess.steps]
    postprocess.steps = [*postprocess.steps, CutAction(record["widths"]["action"])]


def number_of(records: list[dict], wanted: str | None) -> int:
    """The number of a dataset, by its name, the last part of its name, or its number; the first for None.

    Raises:
        UserError: the policy was trained on no such dataset.
    """
    if wanted is None:
        return 0
    found = []
    for number, record in enumerate(records):
        name = record["name"].rstrip("/")
        if wanted in (record["name"], name, name.rpartition("/")[2]):
            found.append(number)
    if not found and wanted.isdecimal() and int(wanted) < len(records):
        found = [int(wanted)]
    if len(found) != 1:
        names = ", ".join(f"{number} ({record['name']})" for number, record in enumerate(records))
        raise UserError(f"--trained_on {wanted}: expected one of the datasets that the policy was trained on: {names}")
    return found[0]


def set_statistics(step, statistics: dict[str, dict[str, list]]) -> None:
    """Replace statistics in one of LeRobot's steps; {feature: {name: W numbers}}."""
    state = step.state_dict()
    for key, values in statistics.items():
        for name, value in values.items():
            held = state.get(f"{key}.{name}")
            if held is not None:
                state[f"{key}.{name}"] = torch.tensor(value, dtype=held.dtype, device=held.device).reshape(held.shape)
    step.load_state_dict(state)
