"""LeRobot's own checkpoints on their way in: of lerobot-train, and policies of before processors.

Its layout is checkpoints/<step>/{pretrained_model,training_state}; ours is checkpoint-<step> (see checkpoint.py).
export.py has the way out.
"""

import hashlib
import math
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from checkpoint import TrainState, read_json
from config import TrainConfig, UserError, one_line
from processors import FILES

# of its "diffuser" scheduler: ours
LEROBOT_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}


def converted_dir() -> Path:
    """Where checkpoints that were converted on the way in are kept."""
    from data.frames import default_cache_dir

    return default_cache_dir().parent / "converted"


def lerobot_checkpoint(asked: str | None) -> Path | None:
    """The checkpoint of lerobot-train that a path means: checkpoints/<step>, its pretrained_model, or a run's newest; else None."""
    path = Path(asked or "").expanduser()
    places = (path, path.parent, path / "checkpoints" / "last") if asked else ()
    found = (p for p in places if (p / "pretrained_model").is_dir() and (p / "training_state").is_dir())
    return next(found, None)


def from_lerobot(folder: Path) -> Path:
    """A checkpoint of lerobot-train as one of ours, in the user's cache.

    The run goes on at sample step x batch x processes of our order; LeRobot's own resume would repeat its first epoch's in every later one.

    Args:
        folder: checkpoints/<step>, which holds pretrained_model and training_state.

    Raises:
        UserError: something is missing, or has no counterpart here.
    """
    from lerobot.common.train_utils import load_training_step
    from lerobot.optim.optimizers import load_optimizer_state_dict
    from safetensors.torch import load_file

    from policy import load_policy_config
    from processors import load_processors
    from writer import Snapshot, write_checkpoint

    folder = folder.resolve()
    model, training = folder / "pretrained_model", folder / "training_state"
    theirs, counts = read_json(model / "train_config.json"), read_json(training / "training_step.json")
    try:
        step, optimizer = load_training_step(training), load_optimizer_state_dict(training)
        optimizer["state"] = {int(number): entry for number, entry in optimizer["state"].items()}
        weights = load_file(model / "model.safetensors")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} cannot be read as a checkpoint of lerobot-train: {one_line(error)[:200]}") from error
    config = TrainConfig(**settings_of(theirs, folder))
    processes = counts.get("num_processes") or 1
    policy = load_policy_config(model, None, "cpu")
    batch = (counts.get("batch_size") or config.batch_size) * processes
    config.batch_size, config.policy = batch, policy.type
    standing = {"step": step, "samples_seen": step * batch, "batch_size": batch, "seed": config.seed, "world_size": 1}
    state = TrainState(
        trainer_state={**standing, "loss_sums": [0.0], "loss_count": 0, "scaler": {}, "tracker_run_id": None},
        train_config={name: value for name, value in config.asdict().items() if value is not None},
        training_info={
            "policy": policy.type,
            "dataset": config.dataset_id,
            "loss": None,
            "val_loss": None,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "converted_from": str(folder),
            "train_seconds": 0.0,
            **standing,
        },
    )
    facts = [str(folder), (model / "model.safetensors").stat().st_mtime_ns]
    place = converted_dir() / hashlib.sha256(str(facts).encode()).hexdigest()[:16]
    if (place / f"checkpoint-{step}").is_dir():
        return place / f"checkpoint-{step}"
    place.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(
        place, Snapshot(step, weights, {}, optimizer, policy, *load_processors(model, "cpu"), state)
    )


def settings_of(theirs: dict, folder: Path) -> dict:
    """Our settings for LeRobot's train_config.json."""
    dataset = theirs["dataset"]
    for what, asked in (("sample_weighting", theirs), ("use_rabc", theirs), ("streaming", dataset)):
        if asked.get(what):
            raise UserError(
                f"{folder}: its {what} has no counterpart here: pass --policy_path to start from its weights"
            )
    name, episodes = dataset.get("root") or dataset["repo_id"], as_text(dataset.get("episodes"))
    settings = {
        "dataset_id": [name],
        "revision": dataset.get("revision"),
        "episodes": episodes,
        "val_episodes": held_out(name, dataset.get("revision"), episodes, dataset.get("eval_split") or 0.0),
        "rename": [f"{old}={new}" for old, new in (theirs.get("rename_map") or {}).items()] or None,
        "imagenet_stats": "on" if dataset.get("use_imagenet_stats", True) else "off",
        "augment": bool((dataset.get("image_transforms") or {}).get("enable")),
        "deterministic": bool(theirs.get("cudnn_deterministic")),
        **{name: theirs[name] for name in ("batch_size", "steps", "seed", "log_freq", "save_freq") if theirs.get(name)},
    }
    settings = {"seed": 0, **settings, "save_freq": max(0, theirs.get("save_freq", 0))}
    if not theirs.get("use_policy_training_preset", True):
        optimizer, scheduler = theirs["optimizer"], theirs.get("scheduler") or {"type": "diffuser", "name": "constant"}
        if scheduler["type"] != "diffuser" or scheduler["name"] not in LEROBOT_SCHEDULES:
            name = scheduler.get("name", scheduler["type"])
            raise UserError(
                f"{folder}: its scheduler {name} has no counterpart here: pass --policy_path to start from its weights"
            )
        settings |= {name: optimizer[name] for name in ("lr", "weight_decay", "grad_clip_norm") if name in optimizer}
        settings |= {
            "lr_schedule": LEROBOT_SCHEDULES[scheduler["name"]],
            "warmup_steps": 0 if scheduler["name"] == "constant" else scheduler.get("num_warmup_steps") or 0,
        }
    return settings


def as_text(episodes: list[int] | None) -> str | None:
    return ",".join(map(str, episodes)) if episodes else None


def held_out(name: str, revision: str | None, episodes: str | None, fraction: float) -> str | None:
    """The episodes that lerobot-train's dataset.eval_split holds out: the last of each task."""
    if not fraction:
        return None
    from data.source import open_dataset

    source, by_task = open_dataset(name, None, revision, episodes), {}
    for episode in source.episodes:
        by_task.setdefault(source.meta.episodes["tasks"][episode][0], []).append(episode)
    return as_text(sorted(e for some in by_task.values() for e in some[len(some) - math.ceil(len(some) * fraction) :]))


def policy_folder(folder: Path) -> Path:
    """The folder that holds a policy: pretrained_model of a LeRobot checkpoint, or what LeRobot's own migration makes of an old one.

    Old ones, from before processors, have their normalisation in their weights.

    Raises:
        UserError: the migration fails.
    """
    from safetensors import SafetensorError, safe_open

    folder = folder / "pretrained_model" if (folder / "pretrained_model").is_dir() else folder
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            old = any(name.startswith(("normalize_inputs", "unnormalize_outputs")) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return folder  # told where it is loaded
    if not old:
        return folder
    facts = [str(folder.resolve()), (folder / "model.safetensors").stat().st_mtime_ns]
    place = converted_dir() / f"migrated-{hashlib.sha256(str(facts).encode()).hexdigest()[:16]}"
    if not place.is_dir():
        fresh = place.with_name(f".{place.name}.{os.getpid()}")
        command = [sys.executable, "-m", "lerobot.processor.migrate_policy_normalization"]
        done = subprocess.run(
            [*command, "--pretrained-path", str(folder), "--output-dir", str(fresh)], capture_output=True, text=True
        )
        made = all((fresh / name).is_file() for name in ("model.safetensors", *FILES))
        if not made:  # it ends with a model card, which fails offline
            shutil.rmtree(fresh, ignore_errors=True)
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"{folder} keeps its normalisation in its weights, and LeRobot's migration of it fails: {why[:200]}"
            )
        os.rename(fresh, place)
    return place
