"""Read a folder's metadata, in any format, into LeRobot's own class; say what a folder is that is no dataset."""

from pathlib import Path

from data.checks import description_problems, info_problems
from data.depth import depth_ranges, info_of, is_depth
from data.files import read_json
from data.v2 import fill_v2_metadata
from data.v3 import fill_v3_metadata
from errors import UserError, as_user_error, find_path

REQUIRED = ("codebase_version", "fps", "features")  # in meta/info.json
VERSIONS = ("v3.0", "v2.1", "v2.0")  # of the format, the best first
# What other kinds of datasets have in their folder.
FOREIGN = {
    "HDF5": ("*.hdf5", "*.h5", "*/*.hdf5", "*/*.h5"),
    "RLDS": ("*.tfrecord*", "*/*.tfrecord*", "*/*/*.tfrecord*"),
    "Zarr": (".zgroup", "*.zarr", "*.zarr.zip", "*/.zgroup"),
    "rosbag": ("*.bag", "*.mcap", "*.db3", "*/*.bag", "*/*.mcap", "*/*.db3"),
    "Lance": ("*.lance", "*/*.lance"),
    "LeRobot v1": ("meta_data/info.json",),
}


def read_metadata(dataset_id: str, folder: Path, repo_id: str):
    """LeRobot's metadata of a folder in any of VERSIONS.

    Raises:
        UserError: it is no LeRobot dataset, is in another format, or a file of the metadata is damaged.
    """
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    if find_path(folder / "meta" / "info.json", "dataset") is None:
        raise UserError(not_a_dataset(dataset_id, folder))
    info, unreadable = read_info(folder / "meta" / "info.json")
    meta = LeRobotDatasetMetadata.__new__(LeRobotDatasetMetadata)  # its constructor reads whole v3.0 folders only
    meta.repo_id = repo_id
    meta.repo_type = "dataset"
    meta.root = folder
    meta.revision = info["codebase_version"]
    # These three are ours, not LeRobot's.
    meta.stream = None  # the Stream of a dataset that is not downloaded
    meta.warnings = []  # what reading the metadata left out, a line each
    meta.unreadable = unreadable  # {observation: what is wrong with it}, which are not among the features
    with opening(dataset_id):
        if info["codebase_version"] == "v3.0":
            fill_v3_metadata(meta, info)
        else:
            fill_v2_metadata(meta, info)
    for key in depth_ranges(meta.features):
        meta.stats.pop(key, None)  # of distances, not of the grey picture that is made of them
    if meta.episodes is None:
        raise UserError(f"dataset {dataset_id} has no episodes: its metadata describes none")
    return meta


def opening(dataset_id: str):
    """A context that turns LeRobot's and the Hub's errors on opening a dataset into UserErrors."""
    return as_user_error(
        f"dataset {dataset_id}", invalid=ValueError, offline="Pass a local folder, or try again online"
    )


def read_info(path: Path) -> tuple[dict, dict[str, str]]:
    """The fields of meta/info.json that LeRobot knows, and {observation: what is wrong} of those that cannot be read.

    Raises:
        UserError: it is damaged, lacks what every dataset has, or is in a format that is not read.
    """
    from dataclasses import fields

    from lerobot.datasets.utils import DatasetInfo

    info = read_json(path)
    missing = [name for name in REQUIRED if info.get(name) is None]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}. Copy or download the dataset again")
    version = info["codebase_version"]
    if version not in VERSIONS:
        raise UserError(
            f"{path}: expected codebase_version {', '.join(VERSIONS[:-1])} or {VERSIONS[-1]}, got {version!r}. "
            "Use a copy of the dataset in one of these formats"
        )
    if info.get("storage_format") not in (None, "parquet", "lance"):
        raise UserError(
            f"{path}: expected storage_format parquet, lance or none, got {info['storage_format']!r}, which is not read. "
            "Use a copy of the dataset that is stored as Parquet"
        )
    if info.get("storage_format") == "lance" and not version.startswith("v3"):
        raise UserError(
            f"{path}: expected codebase_version v3.0 of a dataset in Lance tables, got {version!r}. "
            "Convert the dataset to v3.0 before you convert it to Lance"
        )
    chunks_size = info.get("chunks_size", 1)
    if not isinstance(chunks_size, int) or chunks_size < 1:
        raise UserError(f"{path}: expected chunks_size of 1 or more, got {chunks_size!r}. Correct it")
    info["features"], unreadable = split_unreadable(info["features"])
    problems = info_problems(info)
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    set_camera_axes(info["features"])
    # LeRobot would warn of other fields, and check sizes that only its recorder uses.
    known = {field.name for field in fields(DatasetInfo) if not field.name.endswith("_size_in_mb")}
    return {name: value for name, value in info.items() if name in known and value is not None}, unreadable


def split_unreadable(features) -> tuple[dict, dict[str, str]]:
    """The features without the observations whose dtype or shape cannot be read, and what is wrong with each of these.

    They are refused only if --observations does not leave them out.
    """
    if not isinstance(features, dict):
        return features, {}
    unreadable = {}
    for key, feature in features.items():
        problems = description_problems(key, feature)
        if problems and key.startswith("observation."):
            unreadable[key] = "; ".join(problems)
    return {key: feature for key, feature in features.items() if key not in unreadable}, unreadable


def set_camera_axes(features: dict) -> None:
    """Write every camera's shape as (height, width, channels) and name its axes so, as our decoders give it."""
    for feature in features.values():
        if feature.get("dtype") not in ("image", "video"):
            continue
        shape = tuple(feature["shape"])
        if len(shape) == 3 and shape[0] == 3 and shape[2] != 3:  # channels first
            shape = (*shape[1:], 3)
        if is_depth(feature):  # a grey picture, see data/depth.py
            height, width = shape[:2] if shape[2] == 1 else shape[1:]
            shape = (height, width, 3)
            feature["info"] = info_of(feature) | {"is_depth_map": True}  # where LeRobot looks for it
        feature["shape"] = shape
        feature["names"] = ["height", "width", "channels"]


def not_a_dataset(dataset_id: str, folder: Path) -> str:
    """What a folder without meta/info.json is, as far as its files say."""
    inside = sorted(path.parent.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/meta/info.json"))
    if inside:
        names = ", ".join(str(path) for path in inside[:5]) + (", ..." if len(inside) > 5 else "")
        return f"{dataset_id} is a folder of {len(inside)} LeRobot datasets, not one itself: pass {names}"
    if (folder.parent / "meta" / "info.json").exists():
        return f"{dataset_id} is a part of a LeRobot dataset: pass {folder.parent}"
    for kind, patterns in FOREIGN.items():
        files = [path for pattern in patterns for path in folder.glob(pattern)]
        if files:
            return (
                f"{dataset_id} is not a LeRobot dataset: expected meta/info.json, got {kind} data such as "
                f"{files[0].relative_to(folder)}. Convert it to LeRobot's format first"
            )
    return f"{dataset_id} is not a LeRobot dataset: it has no meta/info.json. Pass the folder that holds meta, data and videos"
