"""Open a LeRobot dataset from a folder or the Hub, and check it."""

import glob
import re
from pathlib import Path

import hub
from data.checks import content_problems, content_warnings, info_problems, table_problems
from data.episodes import counted, parse_episodes, ranges
from data.files import (
    data_paths,
    episodes_by_file,
    examples,
    file_lines,
    is_v2,
    misplaced_lines,
    pattern_of,
    read_json,
    stray_files,
    video_paths,
)
from data.frame_times import frame_times_of
from data.names import joint_names
from data.observations import choose_observations, matches, observation_names, observations_flag, rename_features
from data.pictures import read_pictures
from data.source import Source, read_columns
from data.statistics import complete_statistics, statistics_file, statistics_problems, statistics_warnings
from data.tables import read_tables
from data.tasks import complete_task_index, set_tasks
from data.v2 import fill_v2_metadata
from data.v3 import fill_v3_metadata, placement_warnings
from data.video_checks import video_faults, video_warnings
from data.videos import find_videos, skip_undescribed
from errors import UserError, as_user_error, find_path, plural

REQUIRED = ("codebase_version", "fps", "features")  # in meta/info.json
VERSIONS = ("v3.0", "v2.1", "v2.0")  # of the format, the best first
# What other kinds of datasets have in their folder.
FOREIGN = {
    "HDF5": ("*.hdf5", "*.h5", "*/*.hdf5", "*/*.h5"),
    "RLDS": ("*.tfrecord*", "*/*.tfrecord*", "*/*/*.tfrecord*"),
    "Zarr": (".zgroup", "*.zarr", "*.zarr.zip", "*/.zgroup"),
    "rosbag": ("*.bag", "*.mcap", "*.db3", "*/*.bag", "*/*.mcap", "*/*.db3"),
    "LeRobot v1": ("meta_data/info.json",),
}


def open_source(
    dataset_id: str,
    dataset_root: str | None = None,
    revision: str | None = None,
    episodes: str | None = None,
    observations: list[str] | None = None,
    cache_dir: str | None = None,
    flag: str = "--episodes",
    quiet: bool = False,
    val_episodes: str | None = None,
    action: str = "action",
) -> Source:
    """Open a folder or a Hub dataset (downloaded first) and check it.

    Args:
        dataset_id: a folder, or a Hub id; LeRobot v3.0, v2.1 or v2.0.
        dataset_root: folder that a Hub dataset is downloaded into.
        revision: branch, tag or commit of a Hub dataset.
        episodes: which episodes, such as "0:40,45"; None for all.
        observations: names or patterns of the cameras and states to read; None for all.
        cache_dir: where the times of the videos' frames are remembered; None for the user's cache.
        flag: the flag that `episodes` comes from, for messages.
        quiet: no progress bar.
        val_episodes: more episodes to open, by the flag --val_episodes.
        action: name of the feature that is read as `action`, if the dataset has it.

    Returns:
        The open dataset. `Source.problems` lists what is wrong with it, and `Source.require` raises if anything is.

    Raises:
        UserError: there is no such dataset, it is in another format, or an episode is not there.
    """
    # The metadata: features, fps, tasks, and which episodes there are.
    meta = open_metadata(dataset_id, dataset_root, revision)
    left_out = leave_out_unreadable(meta, observations)
    if observations is not None:
        left_out += choose_observations(meta, observations)
    names = {action: "action"} if action in meta.features and action != "action" else {}
    rename_features(meta, names)
    lengths = episode_lengths(meta)
    selected = parse_episodes(episodes, lengths, flag)
    if val_episodes:
        selected = sorted({*selected, *parse_episodes(val_episodes, lengths, "--val_episodes")})

    # The files of the selected episodes.
    not_downloaded = []
    if not Path(dataset_id).expanduser().is_dir():
        not_downloaded = download(meta, dataset_id, dataset_root, revision, selected)

    # The table, one row a frame, of the episodes that are whole.
    problems = set_tasks(meta)
    table = read_tables(meta, selected, lengths)
    source = Source(
        dataset_id, meta, table.episodes, table.starts, table.ends, table.files, left_out=left_out, renamed=names
    )
    source.warnings = meta.warnings + episode_warnings(meta, table.files) + table.warnings
    if table.problems:
        table.problems += not_downloaded
    source.problems = problems + table.problems
    if not table.episodes:
        return source
    rows = complete_task_index(meta, table.rows)
    rows = rows.rename_columns([names.get(name, name) for name in rows.column_names])
    problems += table_problems(meta, rows)
    if problems:  # the stages below rely on what was checked
        source.problems = problems + table.problems
        return source

    # Columns in memory, and where the pixels are: pictures in the table, frames in videos.
    source.columns = read_columns(meta, rows)
    source.images = {key: read_pictures(rows[key]) for key in meta.image_keys}
    for key in meta.video_keys:
        videos = find_videos(meta, key, source.episodes)
        videos.times = frame_times_of(videos.files, meta.root, key, cache_dir, quiet)
        if not is_v2(meta):
            source.warnings += skip_undescribed(videos, meta, key, source.episodes)
        source.videos[key] = videos

    problems = content_problems(source) + statistics_problems(source)
    if not problems:
        source.warnings += complete_statistics(source)
    faults = video_faults(source)
    lines = table.problems + video_lines(source, faults)
    if lines and not table.problems:
        lines += not_downloaded
    source.problems = problems + lines
    if lines and not problems:
        flags = {flag: episodes}
        if val_episodes:
            flags["--val_episodes"] = val_episodes
        source.remedy = remedy_of(flags, lengths, whole_episodes(source, faults))
    if not source.problems:
        source.warnings += content_warnings(source) + statistics_warnings(source) + video_warnings(source)
        if not is_v2(meta):
            source.warnings += placement_warnings(source)
    return source


def open_metadata(dataset_id: str, dataset_root: str | None = None, revision: str | None = None):
    """LeRobot's metadata of a dataset, with cameras' shapes and axes as LeRobot's decoders give them.

    Raises:
        UserError: there is no such dataset, or it is in another format.
    """
    folder = find_path(dataset_id, "dataset")
    if folder is not None and folder.is_dir():
        meta = read_metadata(dataset_id, folder, folder.resolve().name)
    elif re.fullmatch(hub.HUB_ID, dataset_id) and folder is None:
        name, _, given = dataset_id.partition("@")
        if given:
            raise UserError(
                f"dataset {dataset_id}: a revision is a flag of its own. Pass {name} --revision {given}, or, to other commands "
                f"than train.py, a folder: hf download {name} --repo-type dataset --revision {given} --local-dir FOLDER"
            )
        meta = open_hub(dataset_id, dataset_root, revision)
    elif folder is not None:
        raise UserError(f"dataset {dataset_id} is a file: expected the folder of a LeRobot dataset, or a Hub id")
    else:
        raise UserError(f"no dataset {dataset_id}: there is no such folder, and a Hub id is written user/name")
    for key, feature in meta.features.items():
        if key not in meta.camera_keys:
            feature["names"] = joint_names(feature)  # LeRobot's policies take them for a flat list
    return meta


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
    # These two are ours, not LeRobot's.
    meta.warnings = []  # what reading the metadata left out, a line each
    meta.unreadable = unreadable  # {observation: what is wrong with it}, which are not among the features
    with opening(dataset_id):
        if info["codebase_version"] == "v3.0":
            fill_v3_metadata(meta, info)
        else:
            fill_v2_metadata(meta, info)
    if meta.episodes is None:
        raise UserError(f"dataset {dataset_id} has no episodes: its metadata describes none")
    return meta


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
    if info.get("storage_format") not in (None, "parquet"):
        raise UserError(
            f"{path}: expected storage_format parquet or none, got {info['storage_format']!r}, which is not read. "
            "Use a copy of the dataset that is stored as Parquet"
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

    They are an obstacle only where they are read.
    """
    if not isinstance(features, dict):
        return features, {}
    unreadable = {}
    for key, feature in features.items():
        problems = info_problems({"fps": 1, "features": {key: feature}}) if key.startswith("observation.") else []
        if problems:
            unreadable[key] = "; ".join(problems)
    return {key: feature for key, feature in features.items() if key not in unreadable}, unreadable


def leave_out_unreadable(meta, patterns: list[str] | None) -> list[str]:
    """The names of the observations that cannot be read and that --observations does not choose.

    Raises:
        UserError: it chooses one of them, or is not given.
    """
    for key, problem in meta.unreadable.items():
        if patterns is None or any(matches(key, pattern) for pattern in patterns):
            others = observation_names(meta)
            remedy = f". Or leave it out: {observations_flag(others, {})}" if others else ""
            raise UserError(f"{meta.root / 'meta' / 'info.json'}: {problem}{remedy}")
    return list(meta.unreadable)


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


def episode_lengths(meta) -> dict[int, int]:
    """{episode: number of rows} of the described episodes that have any."""
    described = zip(meta.episodes["episode_index"][:], meta.episodes["length"][:], strict=True)
    return {episode: length for episode, length in described if length > 0}


def episode_warnings(meta, tables: list[Path]) -> list[str]:
    """What the metadata counts otherwise than it describes, episodes without rows, and files that are left over.

    Args:
        tables: files that were read.
    """
    warnings = misplaced_lines(meta)
    count = len(meta.episodes)
    if meta.info.codebase_version == "v2.1" and statistics_file(meta) == "meta/stats.json" and meta.stats:
        warnings.append("meta/episodes_stats.jsonl is missing, the statistics are those of meta/stats.json")
    if meta.info.total_episodes != count:
        warnings.append(
            f"info.json counts {plural(meta.info.total_episodes, 'episode')}, its metadata describes {count}: these are read"
        )
    empty = set(meta.episodes["episode_index"][:]) - set(episode_lengths(meta))
    if empty:
        warnings.append(f"left out, since their length is 0: {counted(empty)}")
    if is_v2(meta):
        stray = sorted(set(stray_files(meta)) - set(tables))
        if stray:
            warnings.append(f"not read, since they belong to no episode: {examples(meta.root, stray)}")
    return warnings


def video_lines(source: Source, faults: dict[str, dict[Path, str]]) -> list[str]:
    """What is wrong with videos, and which episodes they hold."""
    meta = source.meta
    holds = {key: episodes_by_file(video_paths(meta, key)) for key in faults}
    absent = [key for key in faults if not any(path.is_file() for path in holds[key])]
    lines = []
    for key, of_camera in faults.items():
        of_files = file_lines(meta.root, of_camera, holds[key])
        if key in absent:
            of_files = [f"{of_files[0]}. No video of {key} is there{leave_out(meta, absent)}"]
        lines += of_files
    return lines


def leave_out(meta, cameras: list[str]) -> str:
    """How to train without some cameras; empty if nothing else is observed."""
    others = [name for name in observation_names(meta) if name not in cameras]
    return f": copy them, or train without, {observations_flag(others, {})}" if others else ""


def whole_episodes(source: Source, faults: dict[str, dict[Path, str]]) -> set[int]:
    """The opened episodes whose videos are all right too."""
    broken: set[int] = set()
    for key, of_camera in faults.items():
        paths = video_paths(source.meta, key)
        broken |= {episode for episode in source.episodes if paths[episode] in of_camera}
    return set(source.episodes) - broken


def remedy_of(flags: dict[str, str | None], lengths: dict[int, int], whole: set[int]) -> str:
    """How to leave out the episodes that are not whole; empty if a flag would have none left.

    Args:
        flags: the flags that choose episodes, with their values.
        lengths: as for `read_tables`.
        whole: the episodes to keep.
    """
    values = []
    for flag, text in flags.items():
        kept = ranges(whole.intersection(parse_episodes(text, lengths, flag)))
        if not kept:
            return ""
        values.append(f"{flag} {kept}")
    return f"To leave those episodes out, pass {' '.join(values)}"


def open_hub(dataset_id: str, dataset_root: str | None, revision: str | None):
    """Read the metadata of a Hub dataset: a folder's that LeRobot keeps it in, else downloaded.

    Where nothing can be downloaded, what is on disk already is read: the newest snapshot in the cache, or that folder.
    """
    from lerobot.datasets.utils import has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME

    kept = Path(dataset_root).expanduser() if dataset_root else HF_LEROBOT_HOME / dataset_id
    is_kept = (kept / "meta" / "info.json").is_file() and (dataset_root or not has_legacy_hub_download_metadata(kept))
    if is_kept:
        meta = read_metadata(dataset_id, kept, dataset_id)
        # A folder of an older LeRobot may hold a part of the dataset, of another revision.
        if dataset_root or not is_v2(meta) or (revision is None and has_all_files(meta)):
            meta.warnings += other_dataset(dataset_id, kept)
            return meta
    try:
        folder = fetch(dataset_id, dataset_root, revision, ["meta/*"])
    except UserError:
        if dataset_root or revision is not None:
            raise
        folder = cached_snapshot(dataset_id)
        if folder is None and not is_kept:
            raise
        folder = folder or kept
    return read_metadata(dataset_id, folder, dataset_id)


def other_dataset(dataset_id: str, folder: Path) -> list[str]:
    """A line where the dataset card in a folder, as LeRobot writes it, is that of another dataset."""
    card = folder / "README.md"
    if not card.is_file():
        return []
    named = re.search(r"visualize_dataset\?path=([\w.-]+/[\w.-]+)", card.read_text(errors="replace"))
    if named is None or named[1] == dataset_id:
        return []
    return [f"{card} is that of dataset {named[1]}, not of {dataset_id}: is {folder} the folder you mean?"]


def cached_snapshot(dataset_id: str) -> Path | None:
    """The snapshot of a Hub dataset that was downloaded last; None if there is none."""
    from huggingface_hub.file_download import repo_folder_name
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    snapshots = Path(HF_LEROBOT_HUB_CACHE) / repo_folder_name(repo_id=dataset_id, repo_type="dataset") / "snapshots"
    found = sorted(snapshots.glob("*/meta/info.json"), key=lambda path: path.lstat().st_mtime)
    return found[-1].parent.parent if found else None


def fetch(dataset_id: str, dataset_root: str | None, revision: str | None, patterns: list[str]) -> Path:
    """Download the files of a Hub dataset that match any of some patterns, to where LeRobot keeps them."""
    from huggingface_hub import snapshot_download
    from lerobot.utils.constants import HF_LEROBOT_HUB_CACHE

    if dataset_root:  # the card says later which dataset is in there
        patterns = ["README.md", *patterns]
    with opening(dataset_id):
        folder = snapshot_download(
            dataset_id,
            repo_type="dataset",
            revision=revision or best_revision(dataset_id),
            cache_dir=HF_LEROBOT_HUB_CACHE,
            local_dir=dataset_root and Path(dataset_root).expanduser(),
            allow_patterns=patterns,
        )
    return Path(folder)


def best_revision(dataset_id: str) -> str:
    """The branch or tag of a Hub dataset in the best of VERSIONS; where none is called so, main."""
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(dataset_id, repo_type="dataset")
    names = {ref.name for ref in [*refs.branches, *refs.tags]}
    return next((version for version in VERSIONS if version in names), "main")


def has_all_files(meta) -> bool:
    """Whether every episode has its table, and its video of each camera."""
    return all(path.is_file() for path in needed_files(meta, meta.episodes["episode_index"][:]))


def needed_files(meta, episodes: list[int]) -> list[Path]:
    """The tables, where the metadata names them, and the videos of some episodes."""
    maps = [data_paths(meta) or {}] + [video_paths(meta, key) for key in meta.video_keys]
    wanted = set(episodes)
    return list(dict.fromkeys(path for paths in maps for episode, path in paths.items() if episode in wanted))


def download(meta, dataset_id: str, dataset_root: str | None, revision: str | None, episodes: list[int]) -> list[str]:
    """Download the files of `episodes` that are not on disk yet, and set `meta.root` to where they are.

    Returns:
        Why that failed, in at most one line. A recording of one's own need not be on the Hub: then there is no line.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        download_missing(meta, dataset_id, dataset_root, revision, episodes)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, RepositoryNotFoundError) and not isinstance(cause, GatedRepoError):
            return []
        return [f"what is missing was not downloaded: {error}"]
    return []


def download_missing(
    meta, dataset_id: str, dataset_root: str | None, revision: str | None, episodes: list[int]
) -> None:
    """As `download`, but raises a UserError where it fails."""
    tables_named = data_paths(meta) is not None
    missing = [path for path in needed_files(meta, episodes) if not path.is_file()]
    if not missing and (tables_named or any((meta.root / "data").glob("*/*.parquet"))):
        return
    if tables_named:
        patterns = [glob.escape(path.relative_to(meta.root).as_posix()) for path in missing]
        if len(missing) >= 200:  # thousands of names would be matched with thousands of files
            patterns = [pattern_of(meta, "data_path")]
            patterns += [pattern_of(meta, "video_path", key) for key in meta.video_keys]
        meta.root = fetch(dataset_id, dataset_root, revision, ["meta/*", *patterns])
        if all(path.is_file() for path in needed_files(meta, episodes)):
            return
    # Where files are not in the folders that info.json says.
    patterns = ["data/*", *(f"videos/*{glob.escape(key)}/*" for key in meta.video_keys)]
    meta.root = fetch(dataset_id, dataset_root, revision, ["meta/*", *patterns])


def opening(dataset_id: str):
    """A context that turns what keeps LeRobot from opening a dataset into a UserError."""
    return as_user_error(
        f"dataset {dataset_id}", invalid=ValueError, offline="Pass a local folder, or try again online"
    )


def set_camera_axes(features: dict) -> None:
    """Write every camera's shape as (height, width, channels) and name its axes so, as LeRobot's decoders give it."""
    for feature in features.values():
        if feature.get("dtype") not in ("image", "video"):
            continue
        shape = tuple(feature["shape"])
        if len(shape) == 3 and shape[0] == 3 and shape[2] != 3:  # channels first
            shape = (*shape[1:], 3)
        feature["shape"] = shape
        feature["names"] = ["height", "width", "channels"]
