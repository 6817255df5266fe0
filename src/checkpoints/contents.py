"""What the JSON files of a checkpoint must hold. Any other value is reported as damage, not as a traceback later."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from config import FIELDS, FRESH, TYPE_NAMES, as_on_the_command_line, nargs, value_type

LARGEST = 2**53  # beyond it, floats do not represent every integer
SCALER = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")  # of torch's GradScaler


@dataclass(frozen=True)
class Kind:
    """A kind of value: its name for messages, and whether a value is one."""

    name: str
    fits: Callable[[object], bool]

    def or_null(self) -> "Kind":
        return Kind(f"{self.name} or null", lambda value: value is None or self.fits(value))

    def listed(self) -> "Kind":
        return Kind(f"a list, each {self.name}", lambda value: isinstance(value, list) and all(map(self.fits, value)))


def is_number(value) -> bool:
    """Whether a value is a number that float64 holds: JSON has integers of any length."""
    if isinstance(value, bool):
        return False
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)


def is_finite(value) -> bool:
    return is_number(value) and math.isfinite(value)


def is_integer(value) -> bool:
    return is_finite(value) and value == value // 1


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def is_scaler(value) -> bool:
    """Whether a value is the state of torch's GradScaler, which is empty without fp16."""
    if value == {}:
        return True
    if not isinstance(value, dict) or not set(SCALER) <= value.keys():
        return False
    return all(is_finite(number) and number >= 0 for number in value.values()) and value["scale"] > 0


def is_sum(value) -> bool:
    """Whether a value is [sum, number of terms]. The sum may be NaN or infinite."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    total, count = value
    return is_number(total) and is_finite(count) and count > 0


NUMBER = Kind("a number", is_number)
FINITE = Kind("a finite number", is_finite)
SECONDS = Kind("a number of 0 or more", lambda value: is_finite(value) and value >= 0)
COUNT = Kind(f"an integer from 0 to {LARGEST}", is_count)
AT_LEAST_ONE = Kind(f"an integer from 1 to {LARGEST}", lambda value: is_count(value) and value >= 1)
TEXT = Kind("text", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
EPISODE = Kind("an episode", lambda value: isinstance(value, (int, str)))
BRANCH = Kind(
    "a branch and its last step",
    lambda value: isinstance(value, list) and len(value) == 2 and all(map(COUNT.fits, value)),
)
LOSS_SUMS = Kind("a finite number of each process", lambda value: bool(value) and FINITE.listed().fits(value))
SUMS = Kind(
    "a mapping to sums and counts above 0",
    lambda value: isinstance(value, dict) and all(map(is_sum, value.values())),
)
DATASETS = Kind("a list of names", lambda value: isinstance(value, str) or TEXT.listed().fits(value))

TRAINER_STATE = {
    "step": COUNT,
    "samples_seen": COUNT,
    "batch_size": COUNT,
    "seed": Kind("an integer", is_integer),
    "world_size": AT_LEAST_ONE,
    "branch": COUNT,
    "course": COUNT,  # the name of `branch` in older versions
    "ancestors": BRANCH.listed(),
    "loss_sums": LOSS_SUMS,
    "loss_sum": FINITE,  # in older versions
    "loss_count": COUNT,
    "sub_loss_sums": SUMS.listed(),
    "evaluation_is_missing": Kind("true or false", lambda value: isinstance(value, bool)),
    "optimizer_entries": COUNT,
    "scaler": Kind("the state of torch's GradScaler, or {}", is_scaler),
    "folder": TEXT,
    "tracker_run_id": TEXT.or_null(),
    "stored_features": COUNT,
    "data": MAPPING.or_null(),
}
DATA = {
    "episodes": COUNT,
    "frames": COUNT,
    "picture_bytes": COUNT,
    "sha256": TEXT,
    "videos_sha256": TEXT,
    "pictures_sha256": TEXT,
    "video_decoder": TEXT,
    "held_out": EPISODE.listed(),
}
TRAINING_INFO = {
    "policy": TEXT,
    "parameters": COUNT,
    "dataset": DATASETS,
    "epoch": NUMBER,
    "loss": NUMBER.or_null(),
    "val_loss": NUMBER.or_null(),
    "success_rate": NUMBER.or_null(),
    "saved_at": TEXT,
    "step": COUNT,
    "batch_size": COUNT,
    "train_seconds": SECONDS,
    "joint_names": MAPPING.or_null(),
    "datasets": MAPPING.listed().or_null(),
    "depth": MAPPING.or_null(),
    "device_name": TEXT,
    "versions": MAPPING,
}
REQUIRED = {
    "trainer_state.json": ("step", "samples_seen", "world_size", "loss_count"),
    "train_config.json": (),
    "training_info.json": ("train_seconds",),
}
REQUIRED_DATA = ("episodes", "frames", "sha256", "held_out")


def content_problems(file: str, content: dict) -> list[str]:
    """What is missing from one of the files in REQUIRED or has the wrong type, a line each."""
    problems = [f"{file} has no {name}" for name in REQUIRED[file] if name not in content]
    if file == "train_config.json":
        kinds = {name: kind_of_setting(f) for name, f in FIELDS.items() if name not in FRESH}
        content = {name: as_on_the_command_line(name, value) for name, value in content.items()}
    elif file == "training_info.json":
        kinds = TRAINING_INFO
    else:
        kinds = TRAINER_STATE
        if "loss_sums" not in content and "loss_sum" not in content:
            problems.append(f"{file} has no loss_sums")
        data = content.get("data")
        if MAPPING.fits(data):
            problems += [f"{file} has no data.{name}" for name in REQUIRED_DATA if name not in data]
            problems += wrong_types(f"{file}: data.", data, DATA)
    return problems + wrong_types(f"{file}: ", content, kinds)


def wrong_types(beginning: str, content: dict, kinds: dict[str, Kind]) -> list[str]:
    lines = []
    for name, kind in kinds.items():
        if name in content and not kind.fits(content[name]):
            lines.append(f"{beginning}{name}: expected {kind.name}, got {str(content[name])[:60]!r}")
    return lines


def kind_of_setting(f) -> Kind:
    """The type that a setting of TrainConfig has in JSON. TrainConfig checks choices and limits."""
    tests = {
        bool: lambda value: isinstance(value, bool),
        int: is_integer,
        float: is_number,
        str: lambda value: isinstance(value, (str, bool)),  # older versions wrote true for "on"
    }
    kind = Kind(TYPE_NAMES[value_type(f)], tests[value_type(f)])
    if nargs(f) is not None:
        kind = kind.listed()
    return kind.or_null() if f.default is None else kind
