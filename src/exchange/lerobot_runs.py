"""LeRobot's own checkpoints on their way in: of lerobot-train, and policies of before processors.

Its layout is checkpoints/<step>/{pretrained_model,training_state}; ours is checkpoint-<step> (see checkpoint.py).
export.py has the way out.
"""

import hashlib
import math
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from checkpoints.folder import TRAINED_WEIGHTS, TrainState, load_optimizer, read_json, step_of
from config import FIELDS, TrainConfig
from errors import UserError, one_line
from policy.factory import converted_dir

# of its "diffuser" scheduler: ours
LEROBOT_SCHEDULES = {"constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine"}


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

    from checkpoints.writer import Snapshot, write_checkpoint
    from policy.factory import load_policy_config
    from processors.pipelines import load_processors

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


def to_lerobot(checkpoint: Path, output: Path) -> Path:
    """A checkpoint-<step> as `output`/checkpoints/<step>, which `lerobot-train --resume=true` continues.

    Raises:
        UserError: `output` is there already, or the checkpoint holds what LeRobot has no place for.
    """
    import torch
    from lerobot.common.train_utils import get_step_checkpoint_dir, save_checkpoint, update_last_checkpoint

    from policy.factory import build_policy, load_policy_config
    from processors.pipelines import load_processors, resize_of
    from training.distributed import Distributed
    from training.learner import make_schedule

    if output.exists():
        raise UserError(f"{output} is there already: choose another folder or remove it")
    if (checkpoint / TRAINED_WEIGHTS).exists():
        print(
            f"note: {checkpoint.name} has averaged weights (--ema_decay): LeRobot goes on from the average",
            file=sys.stderr,
        )
    state = TrainState(*(read_json(checkpoint / f"{name}.json") for name in ("trainer_state", "train_config")), {})
    config = TrainConfig(**{name: value for name, value in state.train_config.items() if name in FIELDS})
    policy_config, processors = load_policy_config(checkpoint, None, "cpu"), load_processors(checkpoint, "cpu")
    size = resize_of(processors[0])
    for refused, why in (
        (len(config.dataset_id) > 1, "several datasets"),
        (policy_config.use_peft, "adapters"),
        (
            size and policy_config.observation_delta_indices,
            "pictures resized and a history, which LeRobot's step does not go with",
        ),
        (config.freeze, "frozen weights"),
    ):
        if refused:
            raise UserError(f"{checkpoint.name} was trained with {why}: lerobot-train cannot resume it")
    policy = build_policy(policy_config, None, checkpoint)
    step, theirs = (
        step_of(checkpoint) or state.trainer_state["step"],
        their_config(config, state, policy_config, output),
    )
    optimizer = theirs.optimizer.build(policy.get_optim_params())
    load_optimizer(checkpoint, Distributed(), policy, optimizer)
    scheduler = theirs.scheduler.build(optimizer, config.steps) if theirs.scheduler else None
    if scheduler is not None:  # where its own stepping would have brought it
        factor = make_schedule(policy, config)
        scheduler.last_epoch, scheduler._step_count = step, step + 1
        scheduler._last_lr = [peak * factor(step) for peak in scheduler.base_lrs]
        for group, lr in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = lr
    torch.manual_seed(config.seed)
    folder = get_step_checkpoint_dir(output, config.steps, step)
    save_checkpoint(
        folder, step, theirs, policy, optimizer, scheduler, *processors, num_processes=1, batch_size=config.batch_size
    )
    update_last_checkpoint(folder)
    return folder


def their_config(config: TrainConfig, state: TrainState, policy_config, output: Path):
    """LeRobot's TrainPipelineConfig for a run of ours."""
    from lerobot.configs.default import DatasetConfig
    from lerobot.configs.train import TrainPipelineConfig
    from lerobot.transforms import ImageTransformsConfig

    from data.split import split
    from processors.pipelines import parse_rename
    from training.parts import build_source

    name, source = config.dataset_id[0], build_source(config)
    root = str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else config.dataset_root
    kept = [source.episodes[i] for i in split(source, config, state)[0]]  # LeRobot holds out the last ones, if any
    return TrainPipelineConfig(
        dataset=DatasetConfig(
            repo_id="/".join(Path(name).parts[-2:]) if root else name,
            root=root,
            episodes=kept if len(kept) < source.meta.total_episodes else None,
            revision=config.revision,
            use_imagenet_stats=config.imagenet_stats == "on",
            image_transforms=ImageTransformsConfig(enable=bool(config.augment)),
        ),
        policy=policy_config,
        rename_map=parse_rename(config.rename),
        output_dir=output,
        job_name=f"armature_{policy_config.type}",
        seed=config.seed,
        batch_size=config.batch_size,
        steps=config.steps,
        log_freq=config.log_freq,
        save_freq=config.save_freq or config.steps,
        **own_optimizer(policy_config, config),
    )


def own_optimizer(policy_config, config: TrainConfig) -> dict:
    """LeRobot's settings for a run whose schedule is not the policy's own."""
    if config.lr_schedule is None and config.warmup_steps is None and config.grad_clip_norm is None:
        return {"optimizer": policy_config.get_optimizer_preset(), "scheduler": policy_config.get_scheduler_preset()}
    from lerobot.optim import DiffuserSchedulerConfig

    from policy.presets import preset_schedule

    optimizer = policy_config.get_optimizer_preset()
    given = {name: getattr(config, name) for name in ("lr", "weight_decay", "grad_clip_norm")}
    optimizer = replace(optimizer, **{name: value for name, value in given.items() if value is not None})
    scheduler, warmup = preset_schedule(policy_config, config), config.warmup_steps or 0
    if scheduler is None:
        name = config.lr_schedule or "constant"
        name = "constant_with_warmup" if name == "constant" and warmup else name  # its constant has none
        scheduler = DiffuserSchedulerConfig(name=name, num_warmup_steps=warmup)
    return {"use_policy_training_preset": False, "optimizer": optimizer, "scheduler": scheduler}
