"""Which observations of a dataset are read: cameras and states, chosen by name or pattern, dropped or renamed.

An observation is a camera, or another feature whose name begins with `observation.`.
"""

import shlex
from fnmatch import fnmatchcase

from data.source import Source
from errors import UserError, last_part, nearest


def observation_names(meta) -> list[str]:
    """The observations that info.json lists, in its order."""
    return [key for key in meta.features if key.startswith("observation.") or key in meta.camera_keys]


def choose_observations(meta, patterns: list[str]) -> list[str]:
    """Keep the observations that match a pattern, and drop all others from the features and the statistics.

    Args:
        meta: LeRobot's metadata, which is changed.
        patterns: names such as observation.images.top, short names such as top, or shell patterns such as *wrist*.

    Returns:
        The names of the dropped observations.

    Raises:
        UserError: a pattern matches no observation.
    """
    names = observation_names(meta)
    check_patterns(patterns, names, f"dataset {meta.repo_id}")
    dropped = [name for name in names if not any(matches(name, pattern) for pattern in patterns)]
    meta.info.features = {key: feature for key, feature in meta.features.items() if key not in dropped}
    if meta.stats is not None:
        meta.stats = {key: stats for key, stats in meta.stats.items() if key not in dropped}
    return dropped


def check_patterns(patterns: list[str], names: list[str], owner: str) -> None:
    """Raise a UserError for a pattern of --observations that matches none of the names."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            hint = nearest(pattern, [*names, *map(last_part, names)]) or "."
            raise UserError(
                f"--observations {pattern}: no such observation in {owner}{hint} There are {', '.join(names) or 'none'}"
            )


def observations_flag(names, renamed: dict[str, str]) -> str:
    """The ready-made --observations for these names. The flag goes by the names in the files.

    Args:
        names: observations of an open source.
        renamed: {name in the files: name here}; of several datasets, some may have the name already.
    """
    in_files = {}
    for name in names:
        in_files |= dict.fromkeys([name, *(old for old, new in renamed.items() if new == name)])
    return "--observations " + " ".join(map(shlex.quote, in_files))


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern of --observations means this observation, by its name, its short name or as a shell pattern."""
    known_as = (name, last_part(name))
    return pattern in known_as or any(fnmatchcase(text, pattern) for text in known_as)


def is_vector(key: str, feature: dict) -> bool:
    """Whether a feature is a plain list of numbers that a policy takes or gives."""
    is_taken = key == "action" or key.startswith("observation.")
    return is_taken and len(feature["shape"]) == 1 and feature["dtype"] not in ("video", "image", "string", "language")


def leave_out(source: Source, keys: list[str]) -> None:
    """Drop observations that the policy does not take from an open dataset, so that their frames are not decoded.

    Statistics stay: some policies of LeRobot are built from all of them.
    """
    source.meta.info.features = {key: feature for key, feature in source.meta.features.items() if key not in keys}
    for held in (source.columns, source.images, source.videos):
        for key in keys:
            held.pop(key, None)


def rename_source(source: Source, names: dict[str, str]) -> None:
    """Rename features of an open dataset by {old: new} names: in its metadata, statistics, columns and cameras.

    Raises:
        UserError: the dataset has a feature of a new name already.
    """
    rename_features(source.meta, names)
    source.columns = renamed(source.columns, names)
    source.images = renamed(source.images, names)
    source.videos = renamed(source.videos, names)
    source.renamed |= names


def name_before(names: dict[str, str], new: str) -> str:
    """The old name of `new` by {old: new} names; `new` itself if none is renamed so."""
    return {given: old for old, given in names.items()}.get(new, new)


def rename_features(meta, names: dict[str, str]) -> None:
    """Rename features by {old: new} names in LeRobot's metadata.

    Raises:
        UserError: the dataset has a feature of a new name already.
    """
    for old, new in names.items():
        if new in meta.features and new not in names:
            raise UserError(
                f"--rename {old}={new}: dataset {meta.repo_id} has {new} already. Leave the flag out, or pass another name"
            )
    meta.info.features = renamed(meta.features, names)
    if meta.stats is not None:
        meta.stats = renamed(meta.stats, names)


def renamed(mapping: dict, names: dict[str, str]) -> dict:
    """The mapping with the keys of `names` replaced, in the same order."""
    return {names.get(key, key): value for key, value in mapping.items()}
