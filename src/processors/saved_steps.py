"""The settings of a saved pipeline's steps, of the types that the steps declare: LeRobot checks none, and fails when they run."""

import enum
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

from lerobot.processor import ProcessorStepRegistry

from errors import UserError
from trust import OTHER_COPY

LARGEST = 1_000_000_000
LARGEST_SIDE = 100_000  # of a size in pixels or a crop, which are lists of integers


def check_step_settings(steps: list[dict], path: Path) -> None:
    """Compare the settings of a pipeline's steps with the types that the steps declare for them.

    Args:
        steps: as `trust.read_pipeline` returns them.
        path: the pipeline's file, for messages.

    Raises:
        UserError: a setting is of another type.
    """
    for number, step in enumerate(steps):
        step_class = class_of(step)
        declared = declared_types(step_class)
        defaults = defaults_of(step_class)
        for name, value in step.get("config", {}).items():
            is_of_default_type = type(value) is type(
                defaults.get(name, MISSING)
            )  # some of LeRobot's have None for a list
            if name in declared and not is_of_default_type and not fits(declared[name], value):
                kind = getattr(declared[name], "__name__", str(declared[name]))
                if typing.get_args(declared[name]):
                    kind = str(declared[name])
                raise UserError(
                    f"{path}: step {number} ({step_class.__name__}) is refused: expected {kind} as {name}, "
                    f"got {value!r:.60}. {OTHER_COPY}"
                )
            if not is_buildable(value):
                raise UserError(
                    f"{path}: step {number} ({step_class.__name__}) is refused: expected a finite number of at most "
                    f"{LARGEST}, and sides of at most {LARGEST_SIDE}, as {name}, got {value!r:.60}. {OTHER_COPY}"
                )


def class_of(step: dict) -> type:
    """The class of a step that `trust.read_pipeline` let in, and by that has imported."""
    if "registry_name" in step:
        return ProcessorStepRegistry.get(step["registry_name"])
    module, _, name = step["class"].rpartition(".")
    return getattr(sys.modules[module], name)


def declared_types(step_class: type) -> dict:
    """{setting: type} of a step; empty if a type is only known to type checkers."""
    try:
        return typing.get_type_hints(step_class if is_dataclass(step_class) else step_class.__init__)
    except NameError:
        return {}


def defaults_of(step_class: type) -> dict:
    """{setting: default} of a step that is a dataclass."""
    if not is_dataclass(step_class):
        return {}
    return {f.name: f.default for f in fields(step_class) if f.default is not None}


def fits(kind, value) -> bool:
    """Whether a value from a JSON file is of a type; True for types that JSON holds in a form of their own."""
    arguments = typing.get_args(kind)
    container = typing.get_origin(kind) or kind
    if container in (typing.Union, types.UnionType):
        return any(fits(option, value) for option in arguments)
    if container is typing.Literal:
        return value in arguments
    if kind in (None, type(None)):
        return value is None
    if kind in (bool, str):
        return isinstance(value, kind)
    if kind in (int, float):
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return is_whole or (kind is float and isinstance(value, float))
    if not isinstance(container, type):
        return True  # Any, and type variables
    if issubclass(container, enum.Enum):
        return value in [member.value for member in container]
    if issubclass(container, Mapping):
        inner = arguments[1] if len(arguments) == 2 else typing.Any
        return isinstance(value, dict) and all(fits(inner, item) for item in value.values())
    if issubclass(container, Iterable) and container is not bytes:
        return isinstance(value, list) and items_fit(container, arguments, value)
    if is_dataclass(container) and isinstance(value, dict):
        inner = declared_types(container)
        return all(name in value and fits(inner[name], value[name]) for name in inner)
    return not is_dataclass(container)


def items_fit(container: type, arguments: tuple, values: list) -> bool:
    """Whether the values of a JSON list are of the types in `list[T]`, `set[T]`, `tuple[T, ...]` or `tuple[T, U]`."""
    if not arguments:
        return True
    if container is tuple and arguments[-1] is not Ellipsis:
        return len(values) == len(arguments) and all(map(fits, arguments, values))
    return all(fits(arguments[0], value) for value in values)


def is_buildable(value, most: int = LARGEST) -> bool:
    """Whether all numbers of a setting are finite, and none is too large to make anything of that size."""
    if isinstance(value, dict):
        return all(is_buildable(item, most) for item in value.values())
    if isinstance(value, list):
        return all(is_buildable(item, LARGEST_SIDE) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, int) or abs(value) <= most
