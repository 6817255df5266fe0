"""What a resume changes: another value of some settings is refused, of others it makes another run, which is reported."""

import copy
import hashlib
import json
from pathlib import Path

from torch import Tensor

from checkpoints.folder import TrainState
from config import FIELDS, TrainConfig
from data.source import Source
from errors import UserError
from training.learner import make_schedule

# A resumed run keeps its policy: another value of these is refused.
POLICY_FIELDS = (
    "policy",
    "policy_path",
    "policy_args",
    "image_size",
    "peft",
    "peft_r",
    "peft_args",
    "freeze",
    "imagenet_stats",
)
# Another value of these makes a resumed run another run: it is reported.
RUN_FIELDS = (
    "dataset_id", "dataset_weights", "observations", "rename", "revision", "episodes", "val_fraction", "val_episodes",
    "batch_size", "lr", "weight_decay", "grad_clip_norm", "compile", "deterministic",
    "warmup_steps", "lr_schedule", "ema_decay", "augment", "seed", "precision", "grad_accumulation_steps",
)  # fmt: skip


def compare_settings(config: TrainConfig, state: TrainState, checkpoint: Path, processes: int) -> list[str]:
    """One line for each setting that makes the resumed run another run.

    Raises:
        UserError: a setting that cannot change on a resume did.
    """
    changes = []
    now = config.asdict()
    before = {name: field.default for name, field in FIELDS.items()} | state.train_config
    if state.trainer_state["step"] > config.steps:
        raise UserError(
            f"{checkpoint} is at step {state.trainer_state['step']}, past --steps {config.steps}. Pass more --steps"
        )
    if now["minutes"] != before["minutes"]:
        raise UserError(
            f"--minutes: {checkpoint.name} belongs to a run of {before['steps']} steps, fixed when it began. "
            "Pass --steps to change them"
        )
    for name in POLICY_FIELDS:
        if now[name] != before[name]:
            raise UserError(
                f"--{name}: {checkpoint.name} was trained with {before[name]}, got {now[name]}. "
                "A resumed run keeps its policy: leave the flag out, or start a new run"
            )
    for name in RUN_FIELDS:
        if name == "dataset_id" and "data" in state.trainer_state:
            continue  # a dataset may be moved: its content is compared
        if before[name] == "auto":
            continue  # --precision of a run that came from lerobot-train
        if now[name] != before[name]:
            changes.append(
                f"--{name}: {before[name]} -> {now[name]}; from here on this is not the run that wrote {checkpoint.name}"
            )
    processes_before = state.trainer_state["world_size"]
    if processes != processes_before:
        changes.append(
            f"{processes_before} -> {processes} processes: the batches stay the same, rounding and noise do not"
        )
    return changes


def describe_data(source: Source, held_out: Tensor) -> dict:
    """What a checkpoint records of its run's data.

    Args:
        held_out: (E,) positions in `source.episodes`.

    Returns:
        Counts of episodes, frames and bytes of pictures, a hash of all values, and the held-out episodes.
    """
    tasks = source.tasks
    if list(tasks) == list(range(len(tasks))):  # as checkpoints recorded them before
        tasks = list(tasks.values())
    digest = hashlib.sha256(json.dumps([source.starts.tolist(), tasks]).encode())
    for _, values in sorted(source.columns.items()):
        digest.update(json.dumps(values).encode() if isinstance(values, list) else values.numpy())
    videos = {path for videos in source.videos.values() for path in videos.files if path.is_file()}
    picture_bytes = sum(path.stat().st_size for path in videos)
    picture_bytes += sum(column.nbytes for column in source.images.values())
    return {
        "episodes": len(source.episodes),
        "frames": source.rows,
        "picture_bytes": picture_bytes,
        "sha256": digest.hexdigest(),
        "held_out": [source.episode_ids[i] for i in held_out.tolist()],
    }


def compare_data(state: TrainState | None, now: dict) -> list[str]:
    """A line for each way in which the data of a resumed run differ from those that its checkpoint recorded."""
    before = state.trainer_state.get("data") if state else None
    if before is None:  # a new run, or a checkpoint of an older version
        return []
    changes = []
    counts_before, counts_now = (f"{data['episodes']} episodes of {data['frames']} frames" for data in (before, now))
    if before["sha256"] != now["sha256"]:
        change = f"{counts_before} -> {counts_now}"
        if counts_before == counts_now:
            change = f"{counts_now}, but with other values"
        changes.append(f"dataset: {change}; from here on this is another run")
    elif before.get("picture_bytes", now["picture_bytes"]) != now["picture_bytes"]:
        change = f"{before['picture_bytes']} -> {now['picture_bytes']} bytes"
        changes.append(f"dataset: its videos or pictures changed ({change}); from here on this is another run")
    if not set(now["held_out"]) <= set(before["held_out"]):
        change = f"{before['held_out']} -> {now['held_out']}"
        changes.append(f"held-out episodes: {change}; the run has trained on some of them")
    return changes


def compare_learning_rates(state: TrainState | None, policy_config, config: TrainConfig) -> list[str]:
    """A line where other --steps move a learning rate that ends with the run."""
    steps_before = state.train_config["steps"] if state else config.steps
    if steps_before == config.steps:
        return []
    last_step = min(steps_before, config.steps)
    config_before = copy.copy(config)
    config_before.steps = steps_before  # `replace` would refuse a warm-up that is longer than these
    before = make_schedule(policy_config, config_before)(last_step - 1)
    now = make_schedule(policy_config, config)(last_step - 1)
    if abs(before - now) <= 0.01 * before:
        return []
    peak = config.lr or policy_config.get_optimizer_preset().lr
    rates = f"{peak * before:.3g} -> {peak * now:.3g}"
    return [
        f"--steps: {steps_before} -> {config.steps}: the learning rate ends with the run, at step {last_step} it is {rates}"
    ]
