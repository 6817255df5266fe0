"""Which run is meant: a new one, or one to resume, with its settings, its folder and its checkpoint."""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import hub
import runtime
from checkpoints.folder import (
    MANIFEST,
    TrainState,
    branch_of,
    find_checkpoints,
    find_resume,
    has_backup,
    read_state,
    sort_key,
    step_of,
    verify,
)
from checkpoints.lock import RunFolder, sole_writer
from checkpoints.tensors import require_real
from config import TrainConfig, check_names, merge, read_config_file
from errors import UserError, find_path
from exchange.lerobot_runs import from_lerobot, lerobot_checkpoint
from policy.factory import saved_config_class
from policy.migration import resolve_policy_folder
from processors.bases import AUTO
from training.changes import compare_machine, compare_settings, settings_taken_over
from training.distributed import Distributed
from training.optimizers import check_optimizer
from training.trackers import check_trackers

# None in these stands for the policy's preset.
PRESET_FIELDS = ("batch_size", "ema_decay", "augment", "augment_style", "image_size")
PATH_FIELDS = (
    "dataset_id", "dataset_root", "cache_dir", "policy_path", "output_dir", "resume_from_checkpoint", "config_path",
)  # fmt: skip
FP32_ONLY = ("vqbet",)  # the averages of its codebook cannot be computed under autocast


@dataclass
class ChosenRun:
    """Which run the settings mean: a new one, or one to resume. Attributes as RunPlan's."""

    config: TrainConfig
    output_dir: Path
    folder: RunFolder | None
    checkpoint: Path | None
    state: TrainState | None
    warnings: list[str]


def gather_settings(settings: dict) -> dict:
    """The settings over those of their --config_path file, with ~ expanded in folders.

    Raises:
        UserError: a name is unknown, or the file cannot be read.
    """
    check_names(settings, "for train()")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    from_file = {}
    check_paths(settings)
    if settings.get("config_path"):
        from_file = read_config_file(settings["config_path"])
    given = merge_lengths(from_file, settings)
    check_paths(given)
    for name in ("output_dir", "dataset_root"):
        if given.get(name):
            given[name] = os.path.expanduser(given[name])
    return given


def check_paths(settings: dict) -> None:
    """Raise a UserError for a path among the settings that cannot exist, or that you may not enter."""
    for name in PATH_FIELDS:
        value = settings.get(name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if text and isinstance(text, (str, Path)):
                find_path(text, f"--{name}")


def merge_lengths(from_file: dict, settings: dict) -> dict:
    """`settings` over those of a file, where --steps and --minutes replace each other and minutes win side by side."""
    lengths = ("steps", "minutes")
    if any(settings.get(name) is not None for name in lengths):
        from_file = {name: value for name, value in from_file.items() if name not in lengths}
    given = {**from_file, **settings}
    if given.get("minutes") is not None:
        given.pop("steps", None)
    return given


def choose_run(given: dict, distributed: Distributed, cleanup: ExitStack) -> ChosenRun:
    """Find the output folder, take it for this run until `cleanup` is closed, and find the checkpoint to resume from.

    The main process calls this.
    """
    asked = given.get("resume_from_checkpoint")
    output_dir = given.get("output_dir")
    names_no_checkpoint = asked in (None, "latest", "auto")
    if asked is None:
        check_services(merge(given))  # before a base policy is downloaded

    # The output folder. Its default name has the policy's name in it.
    if asked is None or (output_dir is None and names_no_checkpoint):
        given = with_policy_of_base(given)
    if output_dir is None and names_no_checkpoint:
        output_dir = default_output_dir(merge(given))
    elif output_dir is None and has_backup(Path(os.path.expanduser(asked))):
        output_dir = Path(os.path.expanduser(asked)).parent  # taking the folder puts the backup back in its place
    folder = None
    if output_dir is not None:
        output_dir = Path(output_dir)
        folder = cleanup.enter_context(sole_writer(output_dir))

    # The checkpoint, and what it recorded.
    checkpoint, warnings = find_checkpoint(asked, output_dir)
    state = None
    if checkpoint is not None:
        state = read_state(checkpoint, given.get("resume_step"))
        # A None would ask for the preset again: what it filled in for the checkpoint stays.
        given = {name: value for name, value in given.items() if value is not None or name not in PRESET_FIELDS}
        given = with_recorded_names(given, state.train_config)
    elif asked is not None:  # auto, which found none
        given = with_policy_of_base(given)

    # The settings: those given over those of the checkpoint.
    recorded = None
    if state is not None:
        require_real(checkpoint)
        recorded, not_taken = settings_taken_over(given, state, checkpoint)
        warnings += not_taken
    config = merge(given, recorded)
    check_paths(config.asdict())
    device = distributed.use(config.device)
    check_optimizer(config.optimizer)
    config = replace(config, precision=choose_precision(config, device))
    if asked is not None:
        check_services(config)
    if state is not None:
        warnings += compare_settings(config, state, checkpoint, distributed.size)
        warnings += compare_machine(state, runtime.describe_machine(device))

    if output_dir is None:
        output_dir = folder_of_checkpoint(asked, checkpoint, config)
        folder = cleanup.enter_context(sole_writer(output_dir))
    warnings += folder.warnings
    warnings += check_branch(output_dir, checkpoint, state)
    return ChosenRun(config, output_dir, folder, checkpoint, state, warnings)


def with_recorded_names(given: dict, recorded: dict) -> dict:
    """The settings of a resume, in which `--rename auto` adds to the pairs that the run has."""
    if AUTO not in (given.get("rename") or []):
        return given
    return {**given, "rename": [*(recorded.get("rename") or []), *given["rename"]]}


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """What --precision means for this policy on this device.

    Raises:
        UserError: the device or the policy does not compute in it.
    """
    if config.policy not in FP32_ONLY:
        return runtime.pick_precision(config.precision, device, config.weights_dtype)
    for name in ("precision", "weights_dtype"):
        value = getattr(config, name)
        if value not in ("auto", "fp32"):
            raise UserError(f"--{name} {value}: policy {config.policy} computes in fp32 only. Leave --{name} out")
    return "fp32"


def find_checkpoint(asked: str | None, output_dir: Path | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that --resume_from_checkpoint means (None for a new run), and warnings about damaged ones."""
    if asked is None:
        return None, []
    is_ours = os.path.isfile(Path(os.path.expanduser(asked)) / MANIFEST)  # whatever else is in it or beside it
    of_lerobot = None if is_ours else lerobot_checkpoint(asked)
    if of_lerobot is not None:
        converted = from_lerobot(of_lerobot)
        try:
            verify(converted)
        except UserError as error:
            raise UserError(f"{error}. Delete it: it is converted from {of_lerobot} again") from None
        return converted, []
    return find_resume(asked, output_dir)


def folder_of_checkpoint(asked: str, checkpoint: Path, config: TrainConfig) -> Path:
    """Where a run resumed without --output_dir is kept: beside its checkpoint, unless that came from elsewhere."""
    came_from_elsewhere = Path(os.path.expanduser(asked)).resolve() != checkpoint.resolve()  # the Hub, or lerobot-train
    if came_from_elsewhere or step_of(checkpoint) is None:
        return default_output_dir(config)
    return checkpoint.parent


def check_branch(output_dir: Path, checkpoint: Path | None, state: TrainState | None) -> list[str]:
    """Keep runs apart: refuse a folder with another run's checkpoints; going back to an earlier step begins another branch.

    Writes the branch and its ancestors into `state`. Returns a warning where checkpoints will be replaced.
    """
    newest = max(find_checkpoints(output_dir), key=sort_key, default=None)
    if newest is None:
        return []
    # A checkpoint may be a link to another disk: it belongs to the folder that has its name.
    if checkpoint is None or checkpoint.parent.resolve() != output_dir.resolve():
        raise UserError(
            f"--output_dir {output_dir} already holds {newest.name}. Pass --resume_from_checkpoint latest to resume "
            "from it, or another --output_dir"
        )
    if newest.resolve() == checkpoint.resolve():
        return []
    left_at = [branch_of(state.trainer_state), state.trainer_state["step"]]
    state.trainer_state["ancestors"] = [*state.trainer_state.get("ancestors", []), left_at]
    state.trainer_state["branch"] = 1 + sort_key(newest)[0]
    return [
        f"{newest.name} is newer than {checkpoint.name}: the run goes back, and replaces the checkpoints of later steps "
        "as it reaches them"
    ]


def with_policy_of_base(given: dict) -> dict:
    """The settings with --policy as the base of --policy_path has it, if there is a base.

    Raises:
        UserError: the settings name another policy, or there is none.
    """
    base = given.get("policy_path")
    if not base:
        return given
    folder = resolve_policy_folder(hub.fetch(base, "--policy_path", weights=False))
    policy = saved_config_class(folder)
    name = policy.get_choice_name(policy)
    if given.get("policy", name) != name:
        raise UserError(f"--policy {given['policy']}: --policy_path {base} holds a policy {name}. Leave --policy out")
    return {**given, "policy": name}


def default_output_dir(config: TrainConfig) -> Path:
    names = "+".join(Path(os.path.expanduser(name)).resolve().name for name in config.dataset_id)
    return Path("outputs") / f"{names}_{config.policy}"


def check_services(config: TrainConfig) -> None:
    """Raise a UserError where the run could not report to a tracker or the Hub."""
    check_trackers(config.tracker)
    if config.push_to_hub:
        hub.check_login(config.push_to_hub)
