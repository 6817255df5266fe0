"""The checkpoint folder: found, verified, read, pruned, and a CLI to look at it. Knows files, not loops.

python src/checkpoint.py list outputs/my_run
python src/checkpoint.py verify outputs/my_run
python src/checkpoint.py show outputs/my_run/checkpoint-5000
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from errors import UserError, nearest, one_line
from hub import newest_checkpoint

WEIGHTS, MANIFEST, OPTIMIZER = "policy.safetensors", "manifest.json", "optimizer_state.pth"
TRAINED_WEIGHTS = "training_weights.safetensors"  # with --ema_decay: those being trained, WEIGHTS being their average
ALIASES = {  # LeRobot's name: ours, one file under both
    "model.safetensors": WEIGHTS,
    "policy_preprocessor.json": "preprocessor_config.json",
    "policy_postprocessor.json": "postprocessor_config.json",
}
NOT_FINAL = (
    OPTIMIZER,
    TRAINED_WEIGHTS,
    "trainer_state.json",
    MANIFEST,
)  # what resuming needs and running the policy does not


@dataclass
class TrainState:
    """What a checkpoint holds besides the policy and its processors.

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
    """manifest.json of `files` (name -> size and sha256), with its own sha256 as the last entry."""
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({**files, MANIFEST: {"sha256": own}}, indent=2) + "\n"


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files that lie in `folder`."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    (folder / MANIFEST).write_text(manifest_text(files))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoint-<step> folders, lowest step first."""
    found = [(step_of(path), path) for path in Path(output_dir).glob("checkpoint-*") if (path / MANIFEST).is_file()]
    return [path for step, path in sorted((step, path) for step, path in found if step is not None)]


def step_of(path: Path) -> int | None:
    """The step in a folder's name, None if it has none."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def sort_key(path: Path) -> tuple[int, int]:
    """(course, step) of a checkpoint, by which the newest is the largest: a run that goes back to an earlier step begins another course."""
    try:
        return int(read_json(path / "trainer_state.json").get("course", 0)), step_of(path)
    except (UserError, AttributeError, TypeError, ValueError):
        return 0, step_of(path)


def prune(output_dir: Path, step: int, keep_last: int | None, keep_every: int | None, protected=()) -> None:
    """Delete checkpoints up to `step` but the `keep_last` newest (None keeps all), multiples of `keep_every`, and `never`.

    Those after `step` are an earlier course of the run, which it replaces as it comes to them.
    """
    if keep_last is None:
        return
    kept = {path.resolve() for path in protected}
    up_to_now = [path for path in find_checkpoints(output_dir) if step_of(path) <= step]
    for path in sorted(up_to_now, key=sort_key)[:-keep_last]:
        if path.resolve() not in kept and not (keep_every and step_of(path) % keep_every == 0):
            gone = path.with_name(f".{path.name}.tmp")
            os.rename(path, gone)  # a half-deleted folder is never called checkpoint-<step>
            shutil.rmtree(gone)


def best_checkpoint(output_dir: Path) -> tuple[Path | None, float | None]:
    """The checkpoint with the lowest validation loss, and that loss; None twice if none was validated."""
    losses = {}
    for path in find_checkpoints(output_dir):
        with contextlib.suppress(UserError):  # a damaged one is not the best
            losses[path] = read_json(path / "training_info.json").get("val_loss")
    losses = {path: loss for path, loss in losses.items() if loss is not None}
    return min(losses.items(), key=lambda item: item[1], default=(None, None))


def recover(output_dir: Path) -> None:
    """Remove what a process that is gone left half-written, and put back what it was replacing.

    Raises:
        OSError: the folder cannot be written.
    """
    (output_dir / ".writable.tmp").write_bytes(b"?" * 4096)
    for backup in output_dir.glob(".checkpoint-*.old"):
        place = output_dir / backup.name[1:].removesuffix(".old")
        shutil.rmtree(backup) if place.exists() else os.rename(backup, place)
    for path in output_dir.glob(".*.tmp"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def verify_policy(folder: Path) -> None:
    """Compare the tensors of a policy and its processors with the manifest, where the folder has one.

    Raises:
        UserError: as `verify`.
    """
    if (folder / MANIFEST).is_file():
        verify(folder, ".safetensors")


def has_backup(path: Path) -> bool:
    """Whether a checkpoint was being replaced when the process was killed: `recover` puts it back."""
    return (path.parent / f".{path.name}.old").is_dir()


def find_resume(asked: str, output_dir: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that `--resume_from_checkpoint` means, verified (None if `auto` finds none), and what to warn of.

    Raises:
        UserError: there is none, it is no checkpoint, or it is damaged.
    """
    if asked in ("latest", "auto"):
        return newest_whole(output_dir, asked)
    path = Path(asked).expanduser()
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            newest = max(find_checkpoints(path), key=sort_key, default=None)
            hint = f": it holds {newest.name}, pass {newest}" if newest else ": pass a checkpoint-<step> folder"
            raise UserError(f"--resume_from_checkpoint {asked} is no complete checkpoint (it has no {MANIFEST}){hint}")
    elif asked.count("/") == 1 and not path.parent.exists() and not asked.startswith((".", "~")):
        path = newest_checkpoint(asked, "--resume_from_checkpoint", sort_key)
    else:
        names = [p.name for p in find_checkpoints(path.parent)]
        there = ": latest and auto find one by themselves"
        if names:
            there = f"{nearest(path.name, names)}: {path.parent} has {', '.join(names)}"
        raise UserError(f"--resume_from_checkpoint {asked}: there is no such folder{there}")
    try:
        verify(path)
    except UserError as error:
        raise UserError(f"{error}: take another checkpoint") from None
    return path, []


def newest_whole(output_dir: Path, asked: str) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is not damaged, and a warning for each newer one that is."""
    found, warnings = sorted(find_checkpoints(output_dir), key=sort_key), []
    for path in reversed(found):
        try:
            verify(path)
            return path, warnings
        except UserError as error:
            warnings.append(f"{error}: it is passed over")
    if found:
        raise UserError(f"{warnings[-1]}, and {output_dir} has no other: delete it to start afresh")
    if asked == "latest":
        raise UserError(
            f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint-<step> folder: drop the flag to start afresh"
        )
    return None, []


def verify(path: Path, suffix: str = "") -> None:
    """Compare every file, or those whose names end so, with the manifest.

    Raises:
        UserError: names the files that are missing or differ.
    """
    manifest, damage, hashed = read_json(path / MANIFEST), [], {}
    files = {name: entry for name, entry in manifest.items() if name != MANIFEST} if type(manifest) is dict else {}
    if manifest_text(files) != (path / MANIFEST).read_text():
        raise UserError(f"{path} is damaged: {MANIFEST} does not match its sha256")
    for name, wanted in files.items():
        if not name.endswith(suffix):
            continue
        file = path / name
        try:
            if not file.is_file():
                damage.append(f"{name} is missing")
                continue
            there = file.stat()
            if there.st_size != wanted["size"]:
                damage.append(f"{name} has {there.st_size} bytes, expected {wanted['size']}")
                continue
            inode = (there.st_dev, there.st_ino) if there.st_ino else name
            if inode not in hashed:  # two names of one file are read once
                hashed[inode] = sha256(file)
            if hashed[inode] != wanted["sha256"]:
                damage.append(f"{name} does not match its sha256")
        except OSError as error:
            damage.append(f"{name} cannot be read ({one_line(error)})")
    if damage:
        raise UserError(f"{path} is damaged: {', '.join(damage)}")


def read_state(path: Path, resume_step: int | None) -> TrainState:
    """What a checkpoint recorded of its run, with the step in its name (or `resume_step`) checked against it.

    Raises:
        UserError: the step in the name is not the step inside.
    """
    state = TrainState(
        *(read_json(path / f"{name}.json") for name in ("trainer_state", "train_config", "training_info"))
    )
    if "loss_sum" in state.trainer_state:  # of an older version
        state.trainer_state["loss_sums"] = [state.trainer_state.pop("loss_sum")]
    named, inside = step_of(path) if resume_step is None else resume_step, state.trainer_state["step"]
    if named is None:
        raise UserError(
            f"{path.name} has no step in its name: pass --resume_step {inside} if that is the step it holds"
        )
    if named != inside:
        said = f"--resume_step {named}" if resume_step is not None else f"the name {path.name}"
        raise UserError(
            f"{said} says step {named}, trainer_state.json inside says {inside}: "
            f"rename the folder to checkpoint-{inside} or pass --resume_step {inside}"
        )
    return state


def load_optimizer(path: Path, distributed, policy, optimizer) -> None:
    """Load optimizer_state.pth, which may hold tensors and numbers and no code; rates, decay and kernels stay as they are."""
    import torch

    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def with_settings(groups) -> None:
        for group, mine in zip(groups, settings, strict=False):  # their number is checked when they are loaded
            group.update(mine)

    try:
        state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it would run {code[1]}, and may hold tensors and numbers alone" if code else one_line(error)[:160]
        raise UserError(f"{path / OPTIMIZER} is refused: {why}") from error
    try:
        with_settings(state["param_groups"])  # by which torch chooses the state's device
        distributed.load_optimizer_state(policy, optimizer, state)
        with_settings(optimizer.param_groups)  # FSDP's way changes them
    except (ValueError, KeyError) as error:
        raise UserError(f"{path / OPTIMIZER} does not fit this policy's optimizer: {one_line(error)[:160]}") from error


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)[:160]}") from None
