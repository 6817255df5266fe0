"""Policy folders of older LeRobot versions: which folder holds the policy, and LeRobot's own migration of it."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from errors import UserError
from runtime import user_cache_dir
from trust import PIPELINES, check_policy_folder

EMA_FOLDER = "pretrained_model_ema"  # of LeRobot after 0.6.1
SRC = Path(__file__).parents[1]
# A program. Its first argument is the folder of our modules, the others are those of LeRobot's migration.
MIGRATION = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
import lerobot.policies, trust
with trust.no_remote_code("the policy"):
    runpy.run_module("lerobot.processor.migrate_policy_normalization", run_name="__main__")
"""


def converted_dir() -> Path:
    """The cache folder of checkpoints that were converted to load here."""
    return user_cache_dir() / "converted"


def resolve_policy_folder(folder: Path) -> Path:
    """The folder to load a policy from.

    This is pretrained_model in a checkpoint of lerobot-train, or if there is one pretrained_model_ema beside it: the averaged
    weights, with which LeRobot evaluates too. A policy from before LeRobot had processors keeps its normalisation in its weights: it
    is migrated into the user's cache, once.

    Raises:
        UserError: LeRobot cannot migrate the policy, or its files name something that is not allowed.
    """
    for nested in (folder / EMA_FOLDER, folder / "pretrained_model"):
        if nested.is_dir():
            folder = nested
            break
    check_policy_folder(folder)
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
    # -P: Python files in the working folder, which may be the policy's, are no modules
    command = [sys.executable, "-P", "-c", MIGRATION, str(SRC)]
    command += ["--pretrained-path", str(folder), "--output-dir", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True)
    # not by its exit status: the last thing it does is to write a model card, which fails offline
    if not all((unfinished / name).is_file() for name in ("model.safetensors", *PIPELINES)):
        shutil.rmtree(unfinished, ignore_errors=True)
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise UserError(
            f"{folder} keeps its normalisation in its weights, and LeRobot's migration fails: {lines[-1][:200]}. "
            "Train afresh, or use a policy saved by LeRobot 0.4 or later"
        )
    os.rename(unfinished, target)
