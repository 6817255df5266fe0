"""What a policy's folder records of its training, for acting and for further training."""

from pathlib import Path

from data.depth import DepthRange, read_range
from errors import UserError, read_json
from processors.padding import is_record
from trust import OTHER_COPY


def training_info(folder: Path) -> dict:
    """The content of a policy's training_info.json; empty without one, as in folders of LeRobot's."""
    path = folder / "training_info.json"
    return read_json(path) if path.is_file() else {}


def trained_joint_names(folder: Path, config) -> dict[str, list[str]]:
    """{feature: names} of the joints that a saved policy was trained with, as far as its folder records them.

    Args:
        folder: the policy's.
        config: LeRobot's config in it; some policies keep the action's names there.
    """
    names = {"action": getattr(config, "action_feature_names", None)}
    names |= getattr(config, "dataset_feature_names", None) or {}
    recorded = training_info(folder).get("joint_names")
    names |= recorded if isinstance(recorded, dict) else {}
    return {key: list(names_of_key) for key, names_of_key in names.items() if is_list_of_text(names_of_key)}


def trained_datasets(folder: Path) -> list[dict]:
    """What a policy's folder records of the padded datasets that it was trained on; empty for others.

    Raises:
        UserError: the record is damaged.
    """
    records = training_info(folder).get("datasets") or []
    if not (isinstance(records, list) and all(map(is_record, records))):
        raise UserError(
            f"{folder / 'training_info.json'}: expected the datasets of --pad_datasets, got something else. {OTHER_COPY}"
        )
    return records


def trained_depth(folder: Path) -> dict[str, DepthRange]:
    """{camera: DepthRange} of the depth cameras that a saved policy was trained with, under its names.

    Raises:
        UserError: the folder records a range that cannot be.
    """
    recorded = training_info(folder).get("depth")
    if not isinstance(recorded, dict):
        return {}
    try:
        return {key: read_range(settings) for key, settings in recorded.items()}
    except ValueError as error:
        raise UserError(f"{folder / 'training_info.json'}: depth: {error}. {OTHER_COPY}") from None


def trained_rename(folder: Path) -> list[str]:
    """The --rename of the run that wrote a policy's folder, if the folder records it."""
    path = folder / "train_config.json"
    rename = read_json(path).get("rename") if path.is_file() else None
    return rename if is_list_of_text(rename) else []


def is_list_of_text(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
