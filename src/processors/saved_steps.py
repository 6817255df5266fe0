"""Check the settings of a saved pipeline's steps: LeRobot checks none of them, and fails when the steps run."""

import enum
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

from lerobot.processor import ProcessorStepRegistry

from command_line import type_text
from errors import UserError
from trust import OTHER_COPY

LARGEST = 1_000_000_000  # beyond it, a number is a mistake: nothing of that size can be built
LARGEST_SIDE = 100_000  # in lists, which hold the sizes of pictures and crops


def check_step_settings(steps: list[dict], path: Path) -> None:
    """Compare the settings of a pipeline's steps with the types that the steps declare.

    Args:
        steps: as `trust.read_pipeline` returns them.
        path: the pipeline's file, for messages.

    Raises:
        UserError: a setting is of another type, or a number is not finite or too large.
    """
    for number, step in enumerate(steps):
        step_class = class_of(step)
        declared = declared_types(step_class)
        defaults = defaults_of(step_class)
        for name, value in step.get("config", {}).items():
            # A default may be of another type than the declared one, such as None for a list.
            is_of_default_type = type(value) is type(defaults.get(name, MISSING))
            if name in declared and not is_of_default_type and not fits(declared[name], value):
                expected = type_text(declared[name])
            else:
                expected = number_problem(value)
            if expected:
                raise UserError(
                    f"{path}: step {number} ({step_class.__name__}) is refused: expected {expected} as {name}, "
                    f"got {value!r:.60}. {OTHER_COPY}"
                )


def class_of(step: dict) -> type:
    """The class of a step, which `trust.read_pipeline` has allowed and imported."""
    if "registry_name" in step:
        return ProcessorStepRegistry.get(step["registry_name"])
    module, _, name = step["class"].rpartition(".")
    return getattr(sys.modules[module], name)


def declared_types(step_class: type) -> dict:
    """{setting: type} of a step; empty if a type is imported only for type checkers, or its package is missing."""
    try:
        return typing.get_type_hints(step_class if is_dataclass(step_class) else step_class.__init__)
    except (NameError, TypeError):  # the latter of `Model | None`, where LeRobot sets a missing Model to None
        return {}


def defaults_of(step_class: type) -> dict:
    """{setting: default} of a step that is a dataclass."""
    if not is_dataclass(step_class):
        return {}
    return {f.name: f.default for f in fields(step_class)}


def fits(kind, value) -> bool:
    """Whether a value from a JSON file is of a type; True for types that JSON cannot hold directly."""
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


def number_problem(value, most: int = LARGEST, most_in_lists: int = LARGEST_SIDE) -> str | None:
    """What was expected, if a number in a setting is not finite, or too large to build anything of that size."""
    if isinstance(value, dict):
        problems = [number_problem(item, most, most_in_lists) for item in value.values()]
        return next(filter(None, problems), None)
    if isinstance(value, (list, tuple)):
        problems = [number_problem(item, most_in_lists, most_in_lists) for item in value]
        return next(filter(None, problems), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if isinstance(value, int) and abs(value) > most:
        return f"{most} or less"
    return None
