"""Open the datasets that the decoder does not read as files: behind a URL, on the Hub with --stream, in Lance tables."""

import os
import re
from pathlib import Path

import hub
from data.download import best_revision, commit_of
from data.files import data_paths, video_paths
from data.frame_times import frame_times_of
from data.lance_stream import LanceFolder, LanceStream, has_only_tables, is_lance
from data.metadata import opening
from data.placeholders import kept_spans
from data.remote import RemoteFolder, is_remote
from data.stream import Stream
from data.videos import Videos
from errors import UserError


def open_stream(
    dataset_id: str,
    dataset_root: str | None,
    revision: str | None,
    *,
    stream: bool,
    cache_dir: str | None,
    cache_gb: float | None,
    quiet: bool,
) -> Stream | None:
    """The stream of a URL, of a Hub dataset with --stream, or of a folder's Lance tables, with its metadata in the cache.

    Returns:
        None for a dataset whose own files are read from the disk.

    Raises:
        UserError: a flag has no meaning for it, or there is no such dataset.
    """
    cache = {"cache_dir": cache_dir, "cache_gb": cache_gb, "quiet": quiet}
    folder = Path(os.path.expanduser(dataset_id))
    if is_remote(dataset_id):
        for flag, value in (("--dataset_root", dataset_root), ("--revision", revision)):
            if value is not None:
                raise UserError(
                    f"{flag} {value}: it is for datasets of the Hub, and {dataset_id} is a URL. Leave it out"
                )
        return open_url(dataset_id, **cache)
    if folder.is_dir():
        return open_folder(folder, **cache)
    if not stream:
        return None
    if not re.fullmatch(hub.HUB_ID, dataset_id):
        raise UserError(f"--stream: expected a Hub id written user/name, or a URL, got {dataset_id}")
    with opening(dataset_id):
        revision = commit_of(dataset_id, revision or best_revision(dataset_id))
    return open_url(f"hf://datasets/{dataset_id}@{revision}", **cache)


def open_url(url: str, **cache) -> Stream:
    """The open stream of a URL. `cache` has the further arguments of Stream."""
    stream = Stream(RemoteFolder(url), **cache)
    if not has_only_tables(stream.remote):
        stream.open()
        if not is_lance(stream.folder):
            return stream
    stream = LanceStream(LanceFolder(url), **cache)
    stream.open()
    return stream


def open_folder(folder: Path, **cache) -> LanceStream | None:
    """The open stream of a folder's Lance tables; None if it has none. `cache` has the further arguments of Stream."""
    if not is_lance(folder):
        return None
    stream = LanceStream(LanceFolder(str(folder.resolve())), **cache)
    stream.open()
    return stream


def fetch_files(meta, episodes: list[int]) -> None:
    """Fetch the tables of `episodes` of a streamed dataset, and what lists the frames of their videos."""

    def names_of(paths: dict[int, Path]) -> list[str]:
        wanted = dict.fromkeys(paths[episode] for episode in episodes)
        return [path.relative_to(meta.root).as_posix() for path in wanted]

    tables = data_paths(meta)
    meta.stream.fetch_tables(meta, None if tables is None else names_of(tables))
    for key in meta.video_keys:
        meta.stream.fetch_videos(meta, names_of(video_paths(meta, key)))


def stream_videos(videos: Videos, meta, key: str, cache_dir: str | None, quiet: bool) -> None:
    """Let the decoder fetch the videos of a streamed camera. Those whose frames cannot be listed without that are downloaded."""
    incomplete = [
        path
        for path, times in zip(videos.files, videos.times, strict=True)
        if isinstance(times, str) and kept_spans(path) is not None
    ]
    for path in incomplete:
        meta.stream.complete(path, path.stat().st_size)
    if incomplete:
        videos.times = frame_times_of(videos.files, meta.root, key, cache_dir, quiet)
    for path, times in zip(videos.files, videos.times, strict=True):
        if not isinstance(times, str):
            video = meta.stream.video(path, times)
            if video is not None:
                videos.remote[path] = video
