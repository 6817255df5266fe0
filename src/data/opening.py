"""Open a LeRobot dataset from a folder or the Hub, and check it."""

import os
import re
from pathlib import Path

import hub
from data.checks import content_problems, content_warnings, table_problems
from data.download import download, fetch_lance, open_hub
from data.episodes import counted, parse_episodes, ranges
from data.files import (
    episodes_by_file,
    examples,
    file_lines,
    is_v2,
    misplaced_lines,
    stray_files,
    video_paths,
)
from data.frame_times import frame_times_of
from data.lance_stream import is_lance
from data.metadata import read_metadata
from data.names import joint_names
from data.observations import choose_observations, matches, observation_names, observations_flag, rename_features
from data.pictures import read_pictures
from data.remote import is_remote
from data.source import Source, read_columns
from data.statistics import complete_statistics, statistics_file, statistics_problems, statistics_warnings
from data.streams import fetch_files, open_folder, open_stream, stream_videos
from data.tables import read_tables
from data.tasks import complete_task_index, set_tasks
from data.v3 import placement_warnings
from data.video_checks import video_faults, video_warnings
from data.videos import find_videos, skip_undescribed
from errors import UserError, find_path, plural


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
    copy_tables: bool = False,
    stream: bool = False,
    cache_gb: float | None = None,
) -> Source:
    """Open a folder or a Hub dataset (downloaded first) and check it.

    Args:
        dataset_id: a folder, a URL, or a Hub id; LeRobot v3.0, v2.1 or v2.0.
        dataset_root: folder that a Hub dataset is downloaded into.
        revision: branch, tag or commit of a Hub dataset.
        episodes: which episodes, such as "0:40,45"; None for all.
        observations: names or patterns of the cameras and states to read; None for all.
        cache_dir: where the times of the videos' frames are remembered, and copies of tables; None for the user's cache.
        flag: the flag that `episodes` comes from, for messages.
        quiet: no progress bar.
        val_episodes: more episodes to open, by the flag --val_episodes.
        action: name of the feature that is read as `action`, if the dataset has it.
        copy_tables: copy large tables with pictures to the cache, so that they are not held in memory.
        stream: do not download the videos of a Hub dataset; those of a URL never are.
        cache_gb: bound of the pieces of streamed videos on disk, in 1e9 bytes; None for a quarter of the free disk.

    Returns:
        The open dataset. `Source.problems` lists what is wrong with it, and `Source.require` raises if anything is.

    Raises:
        UserError: there is no such dataset, it is in another format, or an episode is not there.
    """
    # The metadata: features, fps, tasks, and which episodes there are.
    meta = open_metadata(
        dataset_id, dataset_root, revision, stream=stream, cache_dir=cache_dir, cache_gb=cache_gb, quiet=quiet
    )
    left_out = leave_out_unreadable(meta, observations)
    if observations is not None:
        left_out += choose_observations(meta, observations)
    names = {}
    if action != "action" and action in meta.features:
        names = {action: "action"}
    rename_features(meta, names)
    lengths = episode_lengths(meta)
    flags = {flag: episodes}
    if val_episodes:
        flags["--val_episodes"] = val_episodes
    selected = sorted({episode for name, text in flags.items() for episode in parse_episodes(text, lengths, name)})

    # The files of the selected episodes.
    not_downloaded = []
    if meta.stream is not None:
        fetch_files(meta, selected)
    elif not Path(os.path.expanduser(dataset_id)).is_dir():
        not_downloaded = download(meta, dataset_id, dataset_root, revision, selected)

    # The table of the episodes that are whole, one row a frame.
    problems = set_tasks(meta)
    table = read_tables(meta, selected, lengths, copy_tables=copy_tables, cache_dir=cache_dir, quiet=quiet)
    source = Source(
        name=dataset_id,
        meta=meta,
        episodes=table.episodes,
        starts=table.starts,
        ends=table.ends,
        tables=table.files,
        left_out=left_out,
        renamed=names,
    )
    source.warnings = meta.warnings + episode_warnings(meta, table.files) + table.warnings
    incomplete = table.problems  # why episodes are not whole; `problems` are those of the whole dataset
    if incomplete:
        incomplete += not_downloaded
    source.problems = problems + incomplete
    if not table.episodes:
        return source
    rows = complete_task_index(meta, table.rows)
    rows = rows.rename_columns([names.get(name, name) for name in rows.column_names])
    problems += table_problems(meta, rows)
    if problems:  # the stages below rely on what was checked
        source.problems = problems + incomplete
        return source

    # Columns in memory, and where the pixels are: pictures in the table, frames in videos.
    source.columns = read_columns(meta, rows)
    source.images = {key: read_pictures(rows[key]) for key in meta.image_keys}
    open_videos(source, cache_dir, quiet)

    whole = check_content(source, incomplete, not_downloaded)
    if whole is not None:
        source.remedy = remedy_of(flags, lengths, whole)
    return source


def check_content(source: Source, incomplete: list[str], not_downloaded: list[str]) -> set[int] | None:
    """Complete the statistics of an opened dataset, and note what is wrong with its content, or doubtful.

    Args:
        incomplete: why episodes of the table are not whole, a line each; those of the videos are added.
        not_downloaded: lines to add where files are missing.

    Returns:
        The whole episodes, if others are the only problem; else None.
    """
    problems = content_problems(source) + statistics_problems(source)
    if not problems:
        source.warnings += complete_statistics(source)
    faults = video_faults(source)
    of_videos = video_lines(source, faults)
    if of_videos and not incomplete:
        of_videos += not_downloaded
    incomplete += of_videos
    source.problems = problems + incomplete
    if not source.problems:
        source.warnings += content_warnings(source) + statistics_warnings(source) + video_warnings(source)
        if not is_v2(source.meta):
            source.warnings += placement_warnings(source)
    return whole_episodes(source, faults) if incomplete and not problems else None


def open_metadata(
    dataset_id: str,
    dataset_root: str | None = None,
    revision: str | None = None,
    *,
    stream: bool = False,
    cache_dir: str | None = None,
    cache_gb: float | None = None,
    quiet: bool = True,
):
    """LeRobot's metadata of a dataset, with cameras' shapes and axes as LeRobot's decoders give them.

    Arguments as for `open_source`.

    Raises:
        UserError: there is no such dataset, or it is in another format.
    """
    folder = None if is_remote(dataset_id) else find_path(dataset_id, "dataset")
    opened = open_stream(
        dataset_id, dataset_root, revision, stream=stream, cache_dir=cache_dir, cache_gb=cache_gb, quiet=quiet
    )
    if opened is not None:
        meta = read_metadata(dataset_id, opened.folder, opened.remote.url.rpartition("/")[2])
        meta.stream = opened
    elif folder is not None and folder.is_dir():
        meta = read_metadata(dataset_id, folder, folder.resolve().name)
    elif re.fullmatch(hub.HUB_ID, dataset_id) and folder is None:
        name, _, given = dataset_id.partition("@")
        if given:
            raise UserError(
                f"dataset {dataset_id}: a revision is a flag of its own. Pass {name} --revision {given}, or, to other commands "
                f"than train.py, a folder: hf download {name} --repo-type dataset --revision {given} --local-dir FOLDER"
            )
        meta = open_hub(dataset_id, dataset_root, revision)
        if is_lance(meta.root):
            root = fetch_lance(dataset_id, dataset_root, revision, meta.root)
            opened = open_folder(root, cache_dir=cache_dir, cache_gb=cache_gb, quiet=quiet)
            meta = read_metadata(dataset_id, opened.folder, dataset_id)
            meta.stream = opened
    elif folder is not None:
        raise UserError(f"dataset {dataset_id} is a file: expected the folder of a LeRobot dataset, or a Hub id")
    else:
        raise UserError(f"no dataset {dataset_id}: there is no such folder, and a Hub id is written user/name")
    for key, feature in meta.features.items():
        if key not in meta.camera_keys:
            feature["names"] = joint_names(feature)  # LeRobot's policies take them for a flat list
    return meta


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


def open_videos(source: Source, cache_dir: str | None, quiet: bool) -> None:
    """Find the frames of every video camera, for `Source.videos`. Arguments as for `open_source`."""
    meta = source.meta
    for key in meta.video_keys:
        videos = find_videos(meta, key, source.episodes)
        videos.times = frame_times_of(videos.files, meta.root, key, cache_dir, quiet)
        if meta.stream is not None:
            stream_videos(videos, meta, key, cache_dir, quiet)
        if not is_v2(meta):
            source.warnings += skip_undescribed(videos, meta, key, source.episodes)
        source.videos[key] = videos


def episode_lengths(meta) -> dict[int, int]:
    """{episode: number of rows} of the described episodes that have any."""
    described = zip(meta.episodes["episode_index"][:], meta.episodes["length"][:], strict=True)
    return {episode: length for episode, length in described if length > 0}


def episode_warnings(meta, tables: list[Path]) -> list[str]:
    """What the metadata says and the files do not bear out, and what is therefore read or left out: a line each.

    Args:
        tables: the files that were read.
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
    """What is wrong with the videos, with the episodes that they hold.

    Args:
        faults: {camera: {file: what is wrong with it}}.
    """
    meta = source.meta
    holds = {key: episodes_by_file(video_paths(meta, key)) for key in faults}
    absent = [key for key in faults if not any(path.is_file() for path in holds[key])]
    lines = []
    for key, of_camera in faults.items():
        of_files = file_lines(meta.root, of_camera, holds[key])
        if key in absent:
            of_files = [f"{of_files[0]}. No video of {key} is there{remedy_without(meta, absent)}"]
        lines += of_files
    return lines


def remedy_without(meta, cameras: list[str]) -> str:
    """How to train without some cameras; empty if these are the only observations."""
    others = [name for name in observation_names(meta) if name not in cameras]
    return f": copy them, or train without, {observations_flag(others, {})}" if others else ""


def whole_episodes(source: Source, faults: dict[str, dict[Path, str]]) -> set[int]:
    """The opened episodes that have no faulty video."""
    broken: set[int] = set()
    for key, of_camera in faults.items():
        paths = video_paths(source.meta, key)
        broken |= {episode for episode in source.episodes if paths[episode] in of_camera}
    return set(source.episodes) - broken


def remedy_of(flags: dict[str, str | None], lengths: dict[int, int], whole: set[int]) -> str:
    """How to leave out the episodes that are not whole; empty if a flag would have no episodes left.

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
