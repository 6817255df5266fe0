"""Policy folders of older LeRobot versions: which folder holds the policy, and LeRobot's own migration of it."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from errors import UserError
from processors.pipelines import FILES
from runtime import user_cache_dir


def converted_dir() -> Path:
    """The cache folder of checkpoints that were converted to load here."""
    return user_cache_dir() / "converted"


def resolve_policy_folder(folder: Path) -> Path:
    """The folder to load a policy from.

    This is pretrained_model in a checkpoint of lerobot-train. A policy from before LeRobot had processors keeps its
    normalisation in its weights: it is migrated into the user's cache, once.

    Raises:
        UserError: LeRobot cannot migrate the policy.
    """
    nested = folder / "pretrained_model"
    if nested.is_dir():
        folder = nested
    weights = folder / "model.safetensors"
    if not normalises_in_weights(weights):
        return folder
    version = str([str(folder.resolve()), weights.stat().st_mtime_ns])
    migrated = converted_dir() / f"migrated-{hashlib.sha256(version.encode()).hexdigest()[:16]}"
    if not migrated.is_dir():
        migrate(folder, migrated)
    return migrated


def normalises_in_weights(weights: Path) -> bool:
    """Whether a policy's weights are from before LeRobot had processors; False where they cannot be read."""
    try:
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
    except (OSError, SafetensorError):
        return False  # loading the policy reports it
    return any(name.startswith(("normalize_inputs", "unnormalize_outputs")) for name in names)


def migrate(folder: Path, target: Path) -> None:
    """Run LeRobot's migration of a policy folder; `target` is complete or absent.

    Raises:
        UserError: the migration fails.
    """
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    command = [sys.executable, "-m", "lerobot.processor.migrate_policy_normalization"]
    command += ["--pretrained-path", str(folder), "--output-dir", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    # not by its exit status: the last thing it does is to write a model card, which fails offline
    if not all((unfinished / name).is_file() for name in ("model.safetensors", *FILES)):
        shutil.rmtree(unfinished, ignore_errors=True)
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(
            f"{folder} keeps its normalisation in its weights, and LeRobot's migration fails: {lines[-1][:200]}. "
            "Train afresh, or use a policy saved by LeRobot 0.4 or later"
        )
    os.rename(unfinished, target)
