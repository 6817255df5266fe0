"""The checkpoint folder: find, verify, read and prune. Knows files, but nothing about policies or training."""

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from checkpoints.contents import REQUIRED, content_problems, is_number
from config import FIELDS
from errors import UserError, find_path, nearest, not_a_file, one_line, read_json, reason_of_disk
from hub import newest_checkpoint

WEIGHTS = "policy.safetensors"
TRAINED_WEIGHTS = "training_weights.safetensors"  # with --ema_decay, where WEIGHTS are the average
OPTIMIZER = "optimizer_state.pth"
OPTIMIZER_ENTRIES = "optimizer_entries"  # in trainer_state.json: how many parameters have a state in OPTIMIZER
MANIFEST = "manifest.json"
POLICY_MANIFEST = "policy_manifest.json"  # of the finished policy in a run's own folder
ALIASES = {  # LeRobot's name of a file: ours. Both are links to one file.
    "model.safetensors": WEIGHTS,
    "policy_preprocessor.json": "preprocessor_config.json",
    "policy_postprocessor.json": "postprocessor_config.json",
}
ADAPTER = "adapter_model.safetensors"  # PEFT's name of WEIGHTS, if these are adapters
RESUME_ONLY = (OPTIMIZER, TRAINED_WEIGHTS, "trainer_state.json", MANIFEST)  # not needed to run the policy
# Names that something reads if they exist. In a folder whose manifest does not list them, they are damage.
WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".pth")
MEANINGFUL = {
    *ALIASES.values(), *ALIASES, "config.json", "trainer_state.json", "train_config.json", "training_info.json",
    "adapter_config.json", "adapter_model.bin", "pytorch_model.bin", "pretrained_model", "pretrained_model_ema", "training_state",
    "checkpoints",
}  # fmt: skip
# What a killed process may leave: a checkpoint that it was writing or deleting, and single files.
HALF_WRITTEN = re.compile(r"\.(checkpoint-\d+.*|writable|.+\.(json|safetensors|md|png|html))\.tmp")


@dataclass
class TrainState:
    """What a checkpoint holds besides the policy, its processors and the optimizer.

    Attributes:
        trainer_state: step, samples seen, seed, batch geometry and partial sums of the log.
        train_config: every setting of the run.
        training_info: facts for people.
    """

    trainer_state: dict
    train_config: dict
    training_info: dict


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_text(files: dict[str, dict]) -> str:
    """manifest.json of `files` (name -> size and sha256); its last entry is a sha256 of the others."""
    checksum = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({**files, MANIFEST: {"sha256": checksum}}, indent=2) + "\n"


def write_manifest(folder: Path) -> None:
    """Write manifest.json, which lists every other file of the folder."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name != MANIFEST:
            files[path.name] = {"size": path.stat().st_size, "sha256": sha256(path)}
    (folder / MANIFEST).write_text(manifest_text(files))


def listed_files(path: Path, manifest: str = MANIFEST) -> dict[str, dict]:
    """{name: size and sha256} of the files that a checkpoint's manifest lists.

    Raises:
        UserError: the manifest cannot be read, or is damaged.
    """
    content = read_json(path / manifest)
    files = {name: entry for name, entry in content.items() if name != MANIFEST}
    if manifest_text(files) != (path / manifest).read_text():
        raise UserError(f"{path} is damaged: {manifest} does not match its sha256")
    for name, entry in files.items():
        if not is_entry(entry) or Path(name).name != name:
            raise UserError(
                f"{path} is damaged: {manifest}: expected a file's name with its size and sha256, got {name!r}: {entry!r}"
            )
    return files


def is_entry(entry) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)


def has_trained_weights(checkpoint: Path) -> bool:
    """Whether a checkpoint holds the weights in training beside their average, by its manifest.

    Raises:
        UserError: as `listed_files`.
    """
    return TRAINED_WEIGHTS in listed_files(checkpoint)


def step_of(path: Path) -> int | None:
    """The step in a folder's name; None if it has none."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoint-<step> folders, lowest step first."""
    folders = Path(output_dir).glob("checkpoint-*")
    complete = [path for path in folders if step_of(path) is not None and os.path.isfile(path / MANIFEST)]
    return sorted(complete, key=lambda path: (step_of(path), path))


def branch_of(trainer_state: dict) -> int:
    """Branch that a run was on, 0 at first. Going back to an earlier step begins another; older checkpoints call it `course`."""
    return int(trainer_state.get("branch", trainer_state.get("course", 0)))


def sort_key(path: Path) -> tuple[int, int]:
    """(branch, step) of a checkpoint, largest for the newest: the latest step of the most recent branch."""
    try:
        return branch_of(read_json(path / "trainer_state.json")), step_of(path)
    except (UserError, TypeError, ValueError, OverflowError):  # damaged, which `verify` reports
        return 0, step_of(path)


def is_on_branch(path: Path, newest: Path) -> bool:
    """Whether the run that wrote the checkpoint `newest` passed the one at `path`, or left it behind when it went back."""
    branch, step = sort_key(path)
    try:
        state = read_json(newest / "trainer_state.json")
        last_steps = {branch_of(state): step_of(newest), **dict(state.get("ancestors", []))}
    except (UserError, TypeError, ValueError, OverflowError):  # damaged
        last_steps = {0: step_of(newest)}
    return step <= last_steps.get(branch, -1)


def remove(path: Path) -> None:
    """Delete a file, a folder or a link, but never the target of a link.

    Raises:
        OSError: some of it is still there.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def discard(path: Path) -> None:
    """Rename a checkpoint, or a backup of one, and delete it, so that its own name never stands for half of it.

    Raises:
        OSError: some of it is still there. Its own name is free, unless it could not even be renamed.
    """
    half_deleted = path.with_name(f".{path.name.removeprefix('.')}.{uuid4().hex[:8]}.tmp")
    os.rename(path, half_deleted)
    remove(half_deleted)


def nothing(*args) -> None:
    """A `check` or `warn` that does nothing."""


def prune(
    output_dir: Path,
    step: int,
    keep_last: int | None,
    keep_every: int | None,
    protected=(),
    check: Callable[[], None] = nothing,
) -> list[str]:
    """Delete old checkpoints, but keep the `keep_last` newest (None: all), multiples of `keep_every`, and `protected`.

    Checkpoints after `step` stay too: they are an earlier branch's, and the run replaces them when it reaches their steps.

    Args:
        check: called before each deletion; what it raises passes.

    Returns:
        What could not be deleted, a line each.
    """
    if keep_last is None:
        return []
    warnings = []
    protected = {path.resolve() for path in protected}
    up_to_now = [path for path in find_checkpoints(output_dir) if step_of(path) <= step]
    for path in sorted(up_to_now, key=sort_key)[:-keep_last]:
        is_multiple = keep_every is not None and step_of(path) % keep_every == 0
        if is_multiple or path.resolve() in protected:
            continue
        try:
            check()
            discard(path)
        except OSError as error:
            warnings.append(f"{path} could not be deleted ({reason_of_disk(error)})")
    return warnings


def best_checkpoint(output_dir: Path) -> tuple[Path | None, float | None]:
    """The checkpoint with the lowest validation loss on the newest branch, and that loss; (None, None) if none has one."""
    losses = {}
    checkpoints = find_checkpoints(output_dir)
    newest = max(checkpoints, key=sort_key, default=None)
    for path in checkpoints:
        with contextlib.suppress(UserError):  # a damaged checkpoint is not the best
            loss = read_json(path / "training_info.json").get("val_loss")
            if is_number(loss) and math.isfinite(loss) and is_on_branch(path, newest):
                losses[path] = loss
    return min(losses.items(), key=lambda item: item[1], default=(None, None))


def recover(output_dir: Path) -> list[str]:
    """Delete what a killed process left half-written, and put back the checkpoint that it was replacing.

    Returns:
        What could not be deleted, a line each.

    Raises:
        OSError: the folder cannot be written.
    """
    (output_dir / ".writable.tmp").write_bytes(bytes(4096))  # fails if the folder is read-only or its disk is full
    left_over = [path for path in output_dir.glob(".*.tmp") if HALF_WRITTEN.fullmatch(path.name)]
    for backup in output_dir.glob(".checkpoint-*.old"):
        checkpoint = output_dir / backup.name[1:].removesuffix(".old")
        if os.path.lexists(checkpoint):
            left_over.append(backup)
        else:
            os.rename(backup, checkpoint)
    warnings = []
    for path in left_over:
        try:
            remove(path)
        except OSError as error:
            warnings.append(f"{path}, which a killed run left, could not be deleted ({reason_of_disk(error)})")
    return warnings


def has_backup(path: Path) -> bool:
    """Whether a process was killed while it replaced this checkpoint; `recover` puts the old one back."""
    return os.path.isdir(path.parent / f".{path.name}.old")


def find_resume(asked: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume_from_checkpoint` names, verified, and warnings about damaged ones.

    The checkpoint is None if `auto` finds none.

    Raises:
        UserError: there is none, it is not a checkpoint, or it is damaged.
    """
    if asked in ("latest", "auto"):
        return newest_intact(output_dir, asked)
    found = find_path(asked, "--resume_from_checkpoint")
    path = found or Path(os.path.expanduser(asked))
    if found is not None and step_of(path) is None:
        path = path.resolve()  # a link to a checkpoint by another name, such as last
    if not path.is_dir():
        # me/my_run is a Hub repo, unless there is a folder `me`
        if asked.count("/") != 1 or path.parent.exists() or asked.startswith((".", "~")):
            raise UserError(f"--resume_from_checkpoint {asked}: there is no such folder{others_than(path)}")
        path = newest_checkpoint(asked, "--resume_from_checkpoint", sort_key)
    elif not (path / MANIFEST).is_file():
        newest = max(find_checkpoints(path), key=sort_key, default="another checkpoint-<step> folder, or latest")
        raise UserError(
            f"--resume_from_checkpoint {asked} is not a complete checkpoint (it has no {MANIFEST}). Pass {newest}"
        )
    try:
        verify(path)
    except UserError as error:
        raise UserError(f"{error}. Resume from another checkpoint") from None
    return path, []


def others_than(path: Path) -> str:
    """What to pass instead of a checkpoint that does not exist, to end a message."""
    names = [other.name for other in find_checkpoints(path.parent)]
    if not names:
        return ". Pass latest or auto to find one in --output_dir"
    return f"{nearest(path.name, names) or '.'} {path.parent} has {', '.join(names)}"


def newest_intact(output_dir: Path, asked: str) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a warning for each newer one, which is damaged.

    Raises:
        UserError: all are damaged, or `asked` is latest and there is none.
    """
    warnings = []
    for path in sorted(find_checkpoints(output_dir), key=sort_key, reverse=True):
        try:
            verify(path)
            return path, warnings
        except UserError as error:
            warnings.append(f"{error}; it is skipped")
    if warnings:
        raise UserError(f"{warnings[-1]}, and {output_dir} has no other. Delete it to start afresh")
    if asked == "latest":
        raise UserError(
            f"--resume_from_checkpoint latest: {output_dir} has no checkpoint-<step> folder. Leave the flag out to start afresh"
        )
    return None, []


def verify(path: Path, suffix: str = "", manifest: str = MANIFEST) -> None:
    """Compare the files of a checkpoint (or those whose names end in `suffix`) with its manifest.

    Files that the manifest does not list are damage too, where something would read them. So are values of a wrong type in the
    JSON files of a checkpoint.

    Args:
        manifest: name of the manifest.

    Raises:
        UserError: names every file that is missing, differs, or is not listed.
    """
    files = listed_files(path, manifest)
    damage = []
    hashes = {}  # by inode: a file with two names is read once
    for name, expected in files.items():
        if name.endswith(suffix):
            try:
                problem = file_problem(path / name, expected, hashes)
            except OSError as error:
                problem = f"cannot be read ({one_line(error)})"
            if problem:
                damage.append(f"{name} {problem}")
    damage += [f"{name} is not listed in {manifest}" for name in unlisted(path, files)]
    if not damage and not suffix:
        for alias, name in ALIASES.items():
            if alias in files and name in files and files[alias]["sha256"] != files[name]["sha256"]:
                damage.append(f"{alias} is not the same file as {name}")
        for name in REQUIRED:
            if name in files:
                damage += content_problems(name, read_json(path / name))
    if damage:
        raise UserError(f"{path} is damaged: {', '.join(damage)}")


def unlisted(path: Path, files: dict[str, dict]) -> list[str]:
    """Names in a folder that something would read, although its manifest does not list them."""
    names = sorted(set(os.listdir(path)) - files.keys())
    return [name for name in names if name in MEANINGFUL or name.endswith(WEIGHT_FILES)]


def file_problem(file: Path, expected: dict, hashes: dict) -> str | None:
    """How a file differs from its entry in the manifest; None if it does not."""
    found = not_a_file(file)
    if found:
        return f"is {found}"
    if not file.is_file():
        return "is missing"
    stat = file.stat()
    if stat.st_size != expected["size"]:
        return f"has {stat.st_size} bytes, expected {expected['size']}"
    inode = (stat.st_dev, stat.st_ino or file.name)  # some file systems number no files
    if inode not in hashes:
        hashes[inode] = sha256(file)
    if hashes[inode] != expected["sha256"]:
        return "does not match its sha256"
    return None


def verify_policy(folder: Path) -> None:
    """Compare the tensors of a policy and its processors with the manifest, if the folder has one.

    Raises:
        UserError: as `verify`.
    """
    if (folder / MANIFEST).is_file():
        verify(folder, ".safetensors")
    elif (folder / POLICY_MANIFEST).is_file():
        try:
            verify(folder, ".safetensors", POLICY_MANIFEST)
        except UserError as error:
            raise UserError(
                f"{error}. Load a checkpoint-<step> of that run instead. If you changed the policy yourself, "
                f"delete {POLICY_MANIFEST}"
            ) from None


def read_state(path: Path, resume_step: int | None) -> TrainState:
    """What a checkpoint recorded of its run.

    Args:
        resume_step: the step that `--resume_step` claims; None to take it from the folder's name.

    Raises:
        UserError: a file cannot be read, or the step in it is not the claimed one.
    """
    state = TrainState(
        trainer_state=read_json(path / "trainer_state.json"),
        train_config=read_json(path / "train_config.json"),
        training_info=read_json(path / "training_info.json"),
    )
    position = {name: state.trainer_state[name] for name in ("batch_size", "seed")}  # the data continue by these
    older = {"augment_style": "full"}  # the only one of versions that do not record it
    state.train_config = {name: field.default for name, field in FIELDS.items()} | older | position | state.train_config
    if "loss_sum" in state.trainer_state:  # older versions kept one sum, not one per process
        state.trainer_state["loss_sums"] = [state.trainer_state.pop("loss_sum")]
    step = state.trainer_state["step"]
    claimed = step_of(path) if resume_step is None else resume_step
    if claimed is None:
        raise UserError(
            f"{path.name} has no step in its name. Pass --resume_step {step} if it is the checkpoint of that step"
        )
    if claimed != step:
        flag = f"the name {path.name}" if resume_step is None else f"--resume_step {resume_step}"
        raise UserError(
            f"{flag} says step {claimed}, but trainer_state.json inside says {step}. "
            f"Rename the folder to checkpoint-{step}, or pass --resume_step {step}"
        )
    return state


def folder_id(folder: Path) -> str:
    """The folder's inode number, by which it differs from a copy that was downloaded or unpacked elsewhere."""
    return str(folder.stat().st_ino)


def is_own(checkpoint: Path, state: TrainState) -> bool:
    """Whether a run wrote this checkpoint in the folder where it is now, so that its settings are the user's own.

    This is false for checkpoints from the Hub or lerobot-train, for copies, and for those of older versions.
    """
    return state.trainer_state.get("folder") == folder_id(checkpoint.parent)
