"""The checkpoint folder: written whole or not at all, found, verified, read. Knows files, not loops.

A checkpoint is written into a hidden folder beside its place, every file is flushed to disk and listed with its sha256 in
manifest.json, and then the folder is renamed: one called checkpoint-<step> is complete or does not exist.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from config import UserError, nearest, one_line
from hub import fetch

WEIGHTS, MANIFEST, OPTIMIZER = "policy.safetensors", "manifest.json", "optimizer_state.pth"
ALIASES = {  # LeRobot's name: ours, one file under both
    "model.safetensors": WEIGHTS,
    "policy_preprocessor.json": "preprocessor_config.json",
    "policy_postprocessor.json": "postprocessor_config.json",
}
NOT_FINAL = (OPTIMIZER, "trainer_state.json", MANIFEST)  # what resuming needs and running the policy does not


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


def write_checkpoint(
    output_dir: Path, step: int, policy, preprocessor, postprocessor, optimizer, state: TrainState
) -> Path:
    """Write checkpoint-<step> into `output_dir` and return it.

    Raises:
        UserError: the disk is full or cannot be written; nothing is left behind and earlier checkpoints are untouched.
    """
    import torch
    from safetensors.torch import save_model

    place = output_dir / f"checkpoint-{step}"
    folder = output_dir / f".checkpoint-{step}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True)
        save_model(policy, str(folder / WEIGHTS))
        policy.config.save_pretrained(folder)
        preprocessor.save_pretrained(folder, config_filename="preprocessor_config.json")
        postprocessor.save_pretrained(folder, config_filename="postprocessor_config.json")
        torch.save(optimizer.state_dict(), folder / OPTIMIZER)
        for name in ("trainer_state", "train_config", "training_info"):
            (folder / f"{name}.json").write_text(json.dumps(getattr(state, name), indent=2) + "\n")
        for alias, name in ALIASES.items():
            link(folder / name, folder / alias)
        files = sorted(path for path in folder.iterdir())
        manifest = {path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        for path in [*files, folder / MANIFEST, folder]:
            flush(path)
        aside = output_dir / f".checkpoint-{step}.{os.getpid()}.old"
        if place.exists():  # an earlier course of this run wrote that step
            os.rename(place, aside)
        os.rename(folder, place)
        flush(output_dir)
        shutil.rmtree(aside, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # torch and safetensors tell a full disk as errors of their own
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError) or "write" in str(error).lower() or "os error" in str(error).lower():
            raise UserError(
                f"checkpoint-{step} could not be written to {output_dir}: {one_line(error)[:200]}; "
                "earlier checkpoints are whole: free some space and resume"
            ) from error
        raise
    return place


def link(source: Path, alias: Path) -> None:
    """`alias` as a hard link to `source`, or as a copy where the file system has none."""
    try:
        os.link(source, alias)
    except OSError:
        shutil.copyfile(source, alias)


def flush(path: Path) -> None:
    """Have a file or folder on the disk itself, not only in the system's cache."""
    if path.is_dir() and os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Put the files that run the policy into `output_dir` itself, one atomic replacement each."""
    for source in sorted(checkpoint.iterdir()):
        if source.name not in NOT_FINAL:
            fresh = output_dir / f".{source.name}.{os.getpid()}.tmp"
            # weights are linked, for their size; what a person might edit is copied, or the checkpoint would change with it
            (link if source.suffix == ".safetensors" else shutil.copyfile)(source, fresh)
            os.replace(fresh, output_dir / source.name)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoint-<step> folders, lowest step first."""
    found = [(step_of(path), path) for path in Path(output_dir).glob("checkpoint-*") if (path / MANIFEST).is_file()]
    return [path for step, path in sorted((step, path) for step, path in found if step is not None)]


def step_of(path: Path) -> int | None:
    """The step in a folder's name, None if it has none."""
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def prune(output_dir: Path, keep_last: int | None, never: Path | None) -> None:
    """Delete all but the `keep_last` newest checkpoints, and never the one being resumed from."""
    if keep_last is not None:
        for path in find_checkpoints(output_dir)[:-keep_last]:
            if never is None or path.resolve() != never.resolve():
                (
                    path / MANIFEST
                ).unlink()  # incomplete from here on: a half-deleted folder is not taken for a checkpoint
                shutil.rmtree(path)


def make_ready(output_dir: Path) -> None:
    """Make the folder, remove what processes that are gone left half-written, put back what they were replacing.

    Raises:
        UserError: it cannot be written.
    """
    import psutil

    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / f".writable.{os.getpid()}.tmp").write_bytes(b"?" * 4096)
        (output_dir / f".writable.{os.getpid()}.tmp").unlink()
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written: {error.strerror}") from error
    for path in [*output_dir.glob(".*.tmp"), *output_dir.glob(".checkpoint-*.old")]:
        name, pid, kind = path.name[1:].rsplit(".", 2)
        if not pid.isdigit() or psutil.pid_exists(int(pid)):
            continue
        if kind == "old" and not (output_dir / name).exists():
            os.rename(path, output_dir / name)
        else:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def find_resume(asked: str, output_dir: Path) -> Path | None:
    """The checkpoint that `--resume_from_checkpoint` means; None if `auto` finds none.

    Raises:
        UserError: there is none, or it is no checkpoint.
    """
    if asked in ("latest", "auto"):
        found = find_checkpoints(output_dir)
        if not found and asked == "latest":
            raise UserError(
                f"--resume_from_checkpoint latest: {output_dir} holds no checkpoint-<step> folder: drop the flag to start afresh"
            )
        return found[-1] if found else None
    path = Path(asked).expanduser()
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            inside = find_checkpoints(path)
            hint = f": it holds {inside[-1].name}, pass {inside[-1]}" if inside else ": pass a checkpoint-<step> folder"
            raise UserError(f"--resume_from_checkpoint {asked} is no complete checkpoint (it has no {MANIFEST}){hint}")
        return path
    if asked.count("/") == 1 and not path.parent.exists() and not asked.startswith((".", "~")):
        return download_checkpoint(asked)
    names = [p.name for p in find_checkpoints(path.parent)]
    there = f"{nearest(path.name, names)}: {path.parent} has {', '.join(names)}" if names else ""
    raise UserError(f"--resume_from_checkpoint {asked}: there is no such folder{there}")


def download_checkpoint(repo: str) -> Path:
    """The newest checkpoint of a Hub repo (user/name or user/name@revision), on disk."""
    found = find_checkpoints(fetch(repo, "--resume_from_checkpoint", ["checkpoint-*/*"]))
    if not found:
        raise UserError(f"--resume_from_checkpoint {repo}: that Hub repo holds no checkpoint-<step> folder")
    return found[-1]


def verify(path: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        UserError: names the first file that is missing or differs.
    """
    manifest = read_json(path / MANIFEST)
    for name, wanted in manifest.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{path} is damaged: {name} is missing: take another checkpoint")
        if file.stat().st_size != wanted["size"]:
            raise UserError(
                f"{path} is damaged: {name} has {file.stat().st_size} bytes, expected {wanted['size']}: take another checkpoint"
            )
        if sha256(file) != wanted["sha256"]:
            raise UserError(f"{path} is damaged: {name} does not match its sha256: take another checkpoint")


def read_state(path: Path, resume_step: int | None) -> TrainState:
    """What a checkpoint recorded of its run, with the step in its name (or `resume_step`) checked against it.

    Raises:
        UserError: the step in the name is not the step inside.
    """
    state = TrainState(
        *(read_json(path / f"{name}.json") for name in ("trainer_state", "train_config", "training_info"))
    )
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


def load_optimizer(path: Path, optimizer) -> None:
    """Load optimizer_state.pth, which may hold tensors and numbers and no code; rates and decay stay as they are."""
    import torch

    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    try:
        state = torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it would run {code[1]}, and may hold tensors and numbers alone" if code else one_line(error)[:160]
        raise UserError(f"{path / OPTIMIZER} is refused: {why}") from error
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path / OPTIMIZER} does not fit this policy's optimizer: {one_line(error)[:160]}") from error
    for group, mine in zip(optimizer.param_groups, settings, strict=True):
        group.update(mine)


def read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)[:160]}: take another checkpoint") from None
