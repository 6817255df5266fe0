"""Datasets on the Hub: their metadata, then the files of the chosen episodes and cameras, where LeRobot keeps them."""

import glob
import os
import re
from pathlib import Path

from data.files import data_paths, is_v2, pattern_of, video_paths
from data.metadata import VERSIONS, opening, read_metadata
from errors import UserError


def open_hub(dataset_id: str, dataset_root: str | None, revision: str | None):
    """Read the metadata of a Hub dataset from the folder where LeRobot keeps it, or download it.

    If the download fails, what is on disk already is read: the newest snapshot in the cache, or that folder.
    """
    from lerobot.datasets.utils import has_legacy_hub_download_metadata
    from lerobot.utils.constants import HF_LEROBOT_HOME

    kept = Path(os.path.expanduser(dataset_root)) if dataset_root else HF_LEROBOT_HOME / dataset_id
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
    """A line if the dataset card in a folder, as LeRobot writes it, is that of another dataset."""
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
            local_dir=dataset_root and Path(os.path.expanduser(dataset_root)),
            allow_patterns=patterns,
        )
    return Path(folder)


def fetch_lance(dataset_id: str, dataset_root: str | None, revision: str | None, folder: Path) -> Path:
    """Download the Lance tables of a Hub dataset; returns where they are.

    Args:
        folder: where its metadata is. If the download fails, tables in there are taken.
    """
    try:
        return fetch(dataset_id, dataset_root, revision, ["meta/*", "frames.lance/*", "videos.lance/*"])
    except UserError:
        if not (folder / "frames.lance").is_dir():
            raise
        return folder


def best_revision(dataset_id: str) -> str:
    """The branch or tag of a Hub dataset that has the best of VERSIONS as its name, else main."""
    from huggingface_hub import HfApi

    refs = HfApi().list_repo_refs(dataset_id, repo_type="dataset")
    names = {ref.name for ref in [*refs.branches, *refs.tags]}
    return next((version for version in VERSIONS if version in names), "main")


def commit_of(dataset_id: str, revision: str) -> str:
    """The commit that a branch or tag of a Hub dataset names now, so that a run reads the same files to its end."""
    from huggingface_hub import HfApi

    return HfApi().repo_info(dataset_id, repo_type="dataset", revision=revision).sha


def has_all_files(meta) -> bool:
    """Whether every episode has its table, and its video of each camera."""
    return all(path.is_file() for path in needed_files(meta, meta.episodes["episode_index"][:]))


def needed_files(meta, episodes: list[int]) -> list[Path]:
    """The tables of some episodes, if the metadata names them, and their videos."""
    maps = [data_paths(meta) or {}] + [video_paths(meta, key) for key in meta.video_keys]
    wanted = set(episodes)
    return list(dict.fromkeys(path for paths in maps for episode, path in paths.items() if episode in wanted))


def download(meta, dataset_id: str, dataset_root: str | None, revision: str | None, episodes: list[int]) -> list[str]:
    """Download the files of `episodes` that are not on disk yet, and set `meta.root` to where they are.

    Returns:
        A line if that failed; none if the Hub has no such dataset, which may be the user's own recording.
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
    # The files are in other folders than info.json says, or it does not name them.
    patterns = ["data/*", *(f"videos/*{glob.escape(key)}/*" for key in meta.video_keys)]
    meta.root = fetch(dataset_id, dataset_root, revision, ["meta/*", *patterns])
