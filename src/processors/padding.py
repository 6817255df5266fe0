"""Padded datasets (data/padding.py) in the policy's processors: each dataset's numbers by its own statistics.

A pipeline normalises by one set of statistics. So the numbers of each dataset are brought to common units first, in which those
statistics give what the dataset's own would give. To act for one of the datasets, its own statistics take their place.

N rows of all datasets, W numbers of a state or action.
"""

import os

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

LEAST_MOVE = 1e-3  # range of a number that moves, in parts of its mean


def to_common_units(source, config, rename: dict[str, str]) -> list[dict]:
    """Bring the numbers of padded datasets to units in which one set of statistics normalises each as by its own.

    A number is in the units of the first dataset in which it moves.

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
        each = [widen_constant(own.stats[key]) for own in source.own_features]  # {name: (W,)} of each dataset
        common = of_first_that_moves(each, [own.widths[key] for own in source.own_features])
        low, high = needed[new]  # such as mean and std, or min and max
        column = source.columns[key].reshape(source.rows, -1)  # (N, W), the same memory
        for index, of_dataset in enumerate(each):
            rows = source.columns["dataset_index"] == index
            column[rows] = rescaled(column[rows].double(), of_dataset, common, low, high).float()
            records[index]["statistics"][new] = {name: of_dataset[name].tolist() for name in (low, high)}
        stats[key] = {name: value.numpy() for name, value in common.items()}
    source.meta.stats = stats
    return records


def of_first_that_moves(each: list[dict[str, Tensor]], widths: list[int]) -> dict[str, Tensor]:
    """{name: (W,)} statistics of each number in the first dataset in which it moves, else in the first that has it.

    Where a number hardly moves, the steps between float32 numbers are too wide for another dataset's values.

    Args:
        each: those of each dataset.
        widths: how many numbers each has.
    """
    common = {name: value.clone() for name, value in each[0].items()}
    for moves in (False, True):
        for of_dataset, width in reversed(list(zip(each, widths, strict=True))):
            chosen = torch.arange(len(of_dataset["mean"])) < width
            if moves:
                chosen &= of_dataset["max"] - of_dataset["min"] > LEAST_MOVE * of_dataset["mean"].abs()
            for name, value in of_dataset.items():
                if name != "count":
                    common[name][chosen] = value[chosen]
    return common


def rescaled(values: Tensor, own: dict[str, Tensor], common: dict[str, Tensor], low: str, high: str) -> Tensor:
    """(N, W) numbers that `common` normalises as `own` does (N, W) `values`.

    Args:
        own, common: {name: (W,)} statistics.
        low, high: those that the policy normalises by: mean and std, or the two ends of a range.
    """
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
    joint_names = value.get("joint_names")
    if not isinstance(joint_names, dict) or not all(isinstance(names, list) for names in joint_names.values()):
        return False
    if not all(isinstance(width, int) and width >= 0 for width in widths.values()) or not widths.get("action"):
        return False
    lists = [values for of_key in statistics.values() if isinstance(of_key, dict) for values in of_key.values()]
    return all(isinstance(values, list) and all(isinstance(number, float) for number in values) for values in lists)


def check_records(now: list[dict], before: list[dict], dataset: str, checkpoint) -> None:
    """Raise a UserError if a checkpoint was trained on datasets in other units.

    Args:
        now, before: what a run's data and its checkpoint's record; empty if they are not padded.
        dataset: the name of the run's data.
    """

    def units(records: list[dict]) -> list:
        return [[record["widths"], record["statistics"]] for record in records]

    if units(now) != units(before):
        names = " ".join(record["name"] for record in before)
        expected = f"--pad_datasets and --dataset_id {names}, in that order" if before else "no --pad_datasets"
        raise UserError(
            f"{checkpoint} has numbers in units of the datasets that it was trained on: expected {expected}, got {dataset}"
            f"{' with --pad_datasets' if now else ''}. Pass what is expected, or start a new run from it with --policy_path"
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
        device = next(iter(padded.values())).device
        samples = leading_shape(padded)
        for key, width in self.widths.items():
            own = padded.get(key)
            if own is None and self.own_widths[key] == 0:
                own = torch.zeros(*samples, 0, device=device)
            if own is not None:
                padded[key] = widened(own, width)
        for key, shape in self.cameras.items():
            padded[key] = torch.zeros(*samples, *shape, device=device)
        action = transition.get(TransitionKey.ACTION)
        if action is not None:
            action = widened(action, self.action_width)
        return {**transition, TransitionKey.OBSERVATION: padded, TransitionKey.ACTION: action}

    def transform_features(self, features):
        return features


def leading_shape(observation: dict[str, Tensor]) -> tuple[int, ...]:
    """(B,) or, with history, (B, T) of an observation."""
    for value in observation.values():
        if value.ndim >= 4:  # a picture
            return tuple(value.shape[:-3])
    return tuple(next(iter(observation.values())).shape[:-1])


def widened(values: Tensor, width: int) -> Tensor:
    """(..., W) numbers, with zeros appended."""
    return functional.pad(values, (0, width - values.shape[-1]))


class NameDataset(ProcessorStep):
    """Adds what `preprocess_batch` adds in training: the masks of cameras, and which dataset the robot is of.

    Args:
        masks: {camera: whether the robot has it}, of those that not all datasets have, under the policy's names.
        number: of the dataset.
    """

    def __init__(self, masks: dict[str, bool], number: int):
        self.masks = masks
        self.number = number

    def __call__(self, transition: dict) -> dict:
        observation = dict(transition[TransitionKey.OBSERVATION])
        example = next(iter(observation.values()))
        for key, has in self.masks.items():
            observation[f"{key}{MASK}"] = torch.full((len(example),), has, device=example.device)
        more = dict(transition.get(TransitionKey.COMPLEMENTARY_DATA) or {})
        more["dataset_index"] = torch.full((len(example),), self.number, device=example.device)
        return {**transition, TransitionKey.OBSERVATION: observation, TransitionKey.COMPLEMENTARY_DATA: more}

    def transform_features(self, features):
        return features


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


def act_for(records: list[dict], number: int, config, preprocess, postprocess) -> None:
    """Change a policy's processors so that it acts for the robot of one of the padded datasets that it was trained on.

    Args:
        records: of `to_common_units`.
        number: of the dataset.
        config: the policy's.
        preprocess, postprocess: LeRobot's pipelines, which are changed.
    """
    record = records[number]
    for step in (*preprocess.steps, *postprocess.steps):
        if isinstance(step, (NormalizerProcessorStep, UnnormalizerProcessorStep)):
            set_statistics(step, record["statistics"])
        if hasattr(step, "domain_id"):  # X-VLA's
            step.domain_id = number
    before = {new: old for old, new in rename_map_of(preprocess).items()}
    widths = {}
    own_widths = {}
    cameras = {}
    masks = {}
    for key, feature in config.input_features.items():
        name = before.get(key, key)
        if feature.type is not FeatureType.VISUAL:
            if record["widths"].get(key, feature.shape[0]) < feature.shape[0]:
                widths[name] = feature.shape[0]
                own_widths[name] = record["widths"][key]
            continue
        if key not in record["cameras"]:
            cameras[name] = tuple(feature.shape)
        if not all(key in other["cameras"] for other in records):
            masks[key] = key in record["cameras"]
    pad = PadFeatures(widths, own_widths, config.output_features["action"].shape[0], cameras)
    preprocess.steps = [pad, *preprocess.steps, NameDataset(masks, number)]
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
        if wanted.rstrip("/") in (name, name.rpartition("/")[2]) or is_same_folder(wanted, name):
            found.append(number)
    if not found and wanted.isdecimal() and int(wanted) < len(records):
        found = [int(wanted)]
    if len(found) != 1:
        names = ", ".join(f"{number} ({record['name']})" for number, record in enumerate(records))
        raise UserError(f"--trained_on {wanted}: expected one of the datasets that the policy was trained on: {names}")
    return found[0]


def is_same_folder(one: str, other: str) -> bool:
    folders = [os.path.expanduser(name) for name in (one, other)]
    return all(map(os.path.isdir, folders)) and os.path.samefile(*folders)


def set_statistics(step, statistics: dict[str, dict[str, list]]) -> None:
    """Replace statistics in one of LeRobot's steps; {feature: {name: W numbers}}."""
    state = step.state_dict()
    for key, values in statistics.items():
        for name, value in values.items():
            held = state.get(f"{key}.{name}")
            if held is not None:
                state[f"{key}.{name}"] = torch.tensor(value, dtype=held.dtype, device=held.device).reshape(held.shape)
    step.load_state_dict(state)
