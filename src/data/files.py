"""Where the tables and videos of a dataset's episodes are, and why some cannot be read."""

import contextlib
import glob
import json
import os
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from data.episodes import counted
from errors import UserError, one_line, plural, reason_of_disk

LFS_HEADER = b"version https://git-lfs.github.com/spec/v1"
LONGEST_NAME = 255  # bytes that file systems allow
LFS_POINTER = "is a Git LFS pointer and not the file itself (run `git lfs pull` in the dataset's folder)"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the short text that a clone without Git LFS has in its place."""
    try:
        with open(path, "rb") as file:
            return file.read(len(LFS_HEADER)) == LFS_HEADER
    except OSError:
        return False


def check_readable(path: Path) -> None:
    """Raise a UserError if a metadata file is missing, or a Git LFS pointer."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Copy or download the whole dataset again")
    if is_lfs_pointer(path):
        raise UserError(f"{path} {LFS_POINTER}")


@contextlib.contextmanager
def reading(path: Path):
    """Turn Arrow's errors on a damaged Parquet file into UserErrors."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {arrow_reason(error)}. Copy or download it again") from error


def arrow_reason(error: Exception) -> str:
    """Why Arrow cannot read a file, without the file's name and the question that Arrow puts before the reason."""
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno)
    text = one_line(error)
    return (text.rpartition("': ")[2] or text)[:200].rstrip(".")


def read_text(path: Path) -> str:
    """The text of a metadata file.

    Raises:
        UserError: the file is missing, a Git LFS pointer, not in UTF-8, or may not be read.
    """
    check_readable(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason_of_disk(error)}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} line {line}: expected text in UTF-8, got byte {content[error.start]:#x}. Save the file as UTF-8"
        ) from None


def read_json(path: Path) -> dict:
    """The object that a JSON file of the metadata holds.

    Raises:
        UserError: the file is missing or damaged.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of deeply nested lists
        raise UserError(f"{path} is not valid JSON: {one_line(error)}. Copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}. Copy or download it again")
    return content


def is_v2(meta) -> bool:
    """Whether a dataset has one table, and one video of each camera, for every episode."""
    return meta.info.codebase_version.startswith("v2")


def data_paths(meta) -> dict[int, Path] | None:
    """{episode: its table}; None if the metadata does not say, as in early v3.0 datasets.

    Raises:
        UserError: as for `video_paths`.
    """
    columns = {"data/chunk_index", "data/file_index"}
    if not columns <= set(meta.episodes.column_names) or any(None in meta.episodes[name][:] for name in columns):
        return None
    paths = episode_paths(meta, "data_path", "data", {})
    return paths | misplaced(meta.root / "data", paths) if is_v2(meta) else paths


def video_paths(meta, key: str) -> dict[int, Path]:
    """{episode: its video of camera `key`}.

    Raises:
        UserError: the template in info.json cannot be filled in, or leads out of the dataset.
    """
    paths = episode_paths(meta, "video_path", f"videos/{key}", {"video_key": key, "key": key})
    return paths | misplaced(meta.root / "videos", paths, key) if is_v2(meta) else paths


def episode_paths(meta, setting: str, columns: str, more_fields: dict[str, str]) -> dict[int, Path]:
    """{episode: its file by a template of info.json}, for every described episode, whether the file exists or not.

    Args:
        setting: name of the template, `data_path` or `video_path`.
        columns: prefix of the columns of meta/episodes that hold the file's numbers.
        more_fields: further placeholders, with their values.
    """
    paths = {}
    filled: dict[tuple, Path] = {}  # by what the template may depend on: many episodes share a file
    is_by_episode = "{episode" in str(getattr(meta.info, setting))
    numbers = [meta.episodes[f"{columns}/{name}"][:] for name in ("chunk_index", "file_index")]
    for episode, chunk, file in zip(meta.episodes["episode_index"][:], *numbers, strict=True):
        if chunk is None or file is None or chunk != chunk or file != file:  # null or NaN, as a merge may leave them
            raise UserError(
                f"dataset {meta.root}: meta/episodes does not say in which file of {columns} episode {episode} is"
            )
        known_by = (chunk, file, episode if is_by_episode else None)
        if known_by in filled:
            paths[episode] = filled[known_by]
            continue
        fields = {
            "episode_index": episode,
            "episode": episode,
            "episode_chunk": episode // meta.info.chunks_size,
            "chunk_index": int(chunk),
            "chunk": int(chunk),
            "file_index": int(file),
            "file": int(file),
        }
        paths[episode] = filled[known_by] = meta.root / filled_in(meta, setting, fields | more_fields)
    return paths


def filled_in(meta, setting: str, fields: dict) -> str:
    """A template of info.json with its placeholders filled in.

    Raises:
        UserError: it has an unknown placeholder, or leads out of the dataset's folder.
    """
    template = getattr(meta.info, setting)
    where = f"{meta.root / 'meta' / 'info.json'}: {setting} {template!r}"
    if not isinstance(template, str) or os.path.normpath(template) == os.curdir:
        raise UserError(f"{where}: expected the name of a file with placeholders such as {{episode_index:06d}}")
    try:
        for _, name, width, _ in string.Formatter().parse(template):
            if name is not None and name not in fields:
                raise UserError(
                    f"{where} has the placeholder {{{name}}}: expected one of {', '.join(fields)}. Correct it"
                )
            if any(int(number) > LONGEST_NAME for number in re.findall(r"\d+", (width or "").format(**fields))):
                raise UserError(f"{where}: expected a width of at most {LONGEST_NAME}, got {width:.20}. Correct it")
        path = template.format(**fields)
    except UserError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(f"{where} cannot be filled in: {one_line(error)}. Correct it") from None
    if not path.isprintable():
        raise UserError(f"{where}: expected the name of a file, got {path!r:.60}. Correct it")
    if any(len(os.fsencode(name)) > LONGEST_NAME for name in path.split("/")):
        raise UserError(f"{where}: expected names of at most {LONGEST_NAME} bytes, got {len(path)}. Correct it")
    normal = os.path.normpath(path)
    if os.path.isabs(normal) or normal.split(os.sep)[0] == os.pardir:
        raise UserError(f"{where} leads out of the dataset, to {path}. Give a path within its folder")
    return normal


def pattern_of(meta, setting: str, key: str = "*") -> str:
    """A pattern that matches all files of a template of info.json, of camera `key`. `*` matches a slash too."""
    pattern = ""
    for text, name, _, _ in string.Formatter().parse(getattr(meta.info, setting)):
        pattern += glob.escape(text)
        if name is not None:
            pattern += glob.escape(key) if name in ("video_key", "key") else "*"
    return os.path.normpath(pattern)


def misplaced(folder: Path, paths: dict[int, Path], key: str | None = None) -> dict[int, Path]:
    """{episode: file of the same name elsewhere below `folder`} for those of `paths` that are missing and have just one.

    The folders in some published templates are not those of the files. If some of the files are in their own place, the
    folder of another may differ only by its number: any other folder may hold an older copy.

    Args:
        key: the camera, whose name must be among the folders; None for tables.
    """
    absent = {episode: path for episode, path in paths.items() if not path.is_file()}
    if not absent:
        return {}
    own = set(paths.values())
    names = Counter(path.name for path in own)
    places = set()
    if len(absent) < len(paths):
        places = {without_numbers(path) for path in paths.values()}
    namesakes: dict[str, list[Path]] = {}
    for path in folder.rglob("*"):
        fits = key is None or key in path.parts
        if fits and names[path.name] == 1 and path not in own and (not places or without_numbers(path) in places):
            namesakes.setdefault(path.name, []).append(path)
    found = {episode: namesakes.get(path.name, []) for episode, path in absent.items()}
    return {episode: candidates[0] for episode, candidates in found.items() if len(candidates) == 1}


def without_numbers(path: Path) -> str:
    """A file's path with every number as 0: the same for all files of a template."""
    return re.sub(r"\d+", "0", str(path))


def misplaced_lines(meta) -> list[str]:
    """A line for the tables, and for each camera's videos, that are in other folders than info.json says."""
    if not is_v2(meta):
        return []
    kinds = [("data_path", "data", {}, data_paths(meta))]
    for key in meta.video_keys:
        kinds.append(("video_path", f"videos/{key}", {"video_key": key, "key": key}, video_paths(meta, key)))
    lines = []
    for setting, columns, more_fields, found in kinds:
        expected = episode_paths(meta, setting, columns, more_fields)
        moved = [episode for episode in expected if found[episode] != expected[episode]]
        if moved:
            place = found[moved[0]].relative_to(meta.root)
            lines.append(
                f"{examples(meta.root, [expected[episode] for episode in moved])}: not where {setting} of info.json says, "
                f"read from {place.parent}"
            )
    return lines


def is_hidden(path: Path) -> bool:
    """Whether a file is hidden, such as the ._episode_000000.parquet that macOS leaves beside a copied file."""
    return path.name.startswith(".")


def stray_files(meta) -> list[Path]:
    """Files of a v2.0 or v2.1 dataset, beside its tables and videos, that belong to no described episode."""
    kinds = [("data", data_paths(meta), None)]
    kinds += [("videos", video_paths(meta, key), key) for key in meta.video_keys]
    stray = []
    for folder, paths, key in kinds:
        own = set(paths.values())
        for path in sorted((meta.root / folder).rglob("*")):
            if path not in own and (key is None or key in path.parts) and path.is_file() and not is_hidden(path):
                stray.append(path)
    return stray


def episodes_by_file(paths: dict[int, Path]) -> dict[Path, list[int]]:
    """The episodes that each file holds."""
    holds: dict[Path, list[int]] = {}
    for episode, path in paths.items():
        holds.setdefault(path, []).append(episode)
    return holds


def file_lines(root: Path, faults: dict[Path, str], holds: dict[Path, list[int]]) -> list[str]:
    """A line for each kind of fault: the first file with it, how many more, and the episodes in these files.

    Args:
        root: the dataset's folder.
        faults: what is wrong with each file, such as "is missing".
        holds: the episodes of each file.
    """
    kinds: dict[str, list[Path]] = {}
    for path in sorted(faults):
        kind = re.sub(r"[\d.]+", "0", faults[path].partition(":")[0])  # numbers differ from file to file
        kinds.setdefault(kind, []).append(path)
    lines = []
    for files in kinds.values():
        episodes = [episode for path in files for episode in holds.get(path, [])]
        line = f"{files[0].relative_to(root)} {faults[files[0]]}"
        if len(files) > 1:
            line += f", and {plural(len(files) - 1, 'more file')} like it"
        lines.append(f"{line} ({counted(episodes)})" if episodes else line)
    return lines


def examples(root: Path, files: Iterable[Path]) -> str:
    """Files for a message: "3 files, such as data/chunk-000/a.parquet", or the only one's name."""
    files = list(files)
    name = str(files[0].relative_to(root))
    return name if len(files) == 1 else f"{len(files)} files, such as {name}"
