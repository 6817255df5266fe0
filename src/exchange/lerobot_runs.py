"""Checkpoints of lerobot-train: taken over here, and written for lerobot-train to resume.

lerobot-train writes checkpoints/<step>/{pretrained_model,training_state}, Armature writes checkpoint-<step>.
"""

import contextlib
import hashlib
import inspect
import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import reduce
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from checkpoints.contents import is_count
from checkpoints.folder import ADAPTER, TRAINED_WEIGHTS, TrainState, step_of
from checkpoints.tensors import read_optimizer
from checkpoints.writer import Snapshot, write_checkpoint
from config import FIELDS, TrainConfig
from data.opening import open_source
from data.split import split_episodes
from errors import UserError, one_line, read_json, require_files
from policy.adapter_settings import read_peft_config, settings_of_adapters
from policy.factory import build_policy, load_policy_config
from policy.migration import EMA_FOLDER, converted_dir
from policy.presets import optimizer_preset, scheduler_preset
from policy.training_record import trained_depth
from processors.bases import match_statistics
from processors.features import parse_rename
from processors.pipelines import load_processors, resize_of
from trust import OTHER_COPY


def as_pairs(rename: dict[str, str] | None) -> list[str] | None:
    """LeRobot's rename_map as the values of --rename."""
    return [f"{old}={new}" for old, new in (rename or {}).items()] or None


def as_is(value):
    return value


@dataclass(frozen=True)
class Setting:
    """A setting that both trainers have.

    Attributes:
        ours: its field in TrainConfig.
        theirs: its place in LeRobot's train_config.json, levels separated by dots.
        read: LeRobot's value, None where the file has none, to ours; None stands for our default.
        write: our value to LeRobot's.
    """

    ours: str
    theirs: str
    read: Callable = as_is
    write: Callable = as_is


SETTINGS = (
    Setting("revision", "dataset.revision"),
    Setting(
        "imagenet_stats",
        "dataset.use_imagenet_stats",
        read={True: "on", False: "off", None: "on"}.get,
        write={"on": True, "off": False}.get,
    ),
    Setting("augment", "dataset.image_transforms.enable", read=bool, write=bool),
    Setting("rename", "rename_map", read=as_pairs, write=parse_rename),
    Setting("deterministic", "cudnn_deterministic", read=bool, write=bool),
    Setting("seed", "seed", read=lambda seed: seed or 0),
    Setting("batch_size", "batch_size"),
    Setting("steps", "steps"),
    Setting("log_freq", "log_freq", read=lambda steps: steps or None),  # LeRobot's 0 writes no log
    Setting("save_freq", "save_freq", read=lambda steps: max(0, steps or 0)),
)
# Fields of LeRobot's optimizer config that TrainConfig calls by the same names.
OPTIMIZER_SETTINGS = ("lr", "weight_decay", "grad_clip_norm")
# What else is read of LeRobot's train_config.json, and its JSON type; each may be null.
THEIR_TYPES = {
    "dataset": dict,
    "dataset.repo_id": str,
    "dataset.root": str,
    "dataset.revision": str,
    "dataset.episodes": list,
    "dataset.exclude_episodes": list,
    "dataset.eval_split": (int, float),
    "rename_map": dict,
    "optimizer": dict,
    "scheduler": dict,
    "ema": dict,
    "accelerator": dict,
}
# LeRobot's mixed_precision to --precision.
PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
# --lr_schedule to the name in LeRobot's "diffuser" scheduler. LeRobot's own "constant" has no warm-up.
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def value_at(tree: dict, path: str):
    """The value at a dotted path in nested dicts; None where a level is missing or is not a dict."""
    for name in path.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


@contextlib.contextmanager
def lerobot_imports(purpose: str):
    """Around imports of functions that LeRobot dropped after 0.6.1."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"{purpose} needs functions that later versions of LeRobot dropped: expected lerobot 0.6.1, "
            f"got {version('lerobot')} ({one_line(error)}). Run `uv pip install lerobot==0.6.1`"
        ) from error


def lerobot_checkpoint(asked: str | None) -> Path | None:
    """The checkpoint of lerobot-train that a path stands for, None if it stands for none.

    Args:
        asked: checkpoints/<step>, its pretrained_model, or a run's folder, which stands for its newest checkpoint.
    """
    if not asked:
        return None
    path = Path(os.path.expanduser(asked))
    for folder in (path, path.parent, path / "checkpoints" / "last"):
        if (folder / "pretrained_model").is_dir() and (folder / "training_state").is_dir():
            return folder
    return None


def from_lerobot(folder: Path) -> Path:
    """Convert a checkpoint of lerobot-train to one of ours, in the user's cache; one that is there already is reused.

    The run resumes at the sample it had reached (step x batch x processes), in our order of samples.

    Args:
        folder: checkpoints/<step>, which holds pretrained_model and training_state.

    Raises:
        UserError: a file is missing or damaged, or the run used what Armature does not have.
    """
    folder = folder.resolve()
    model = folder / "pretrained_model"
    for part in (folder / "training_state", folder / EMA_FOLDER):
        if part.is_dir():
            require_files(part, OTHER_COPY)
    theirs = read_json(model / "train_config.json", OTHER_COPY)
    position = read_json(folder / "training_state" / "training_step.json", OTHER_COPY)
    refuse_theirs(folder, theirs, position)
    policy_config = load_policy_config(model, None, "cpu")
    settings = settings_of(theirs, folder, policy_config)
    # LeRobot counts the batch of one process, Armature that of all of them. After 0.6.1 LeRobot records dp_world_size.
    local_batch_size = position.get("batch_size") or settings["batch_size"]
    processes = position.get("num_processes") or position.get("dp_world_size") or 1
    settings["batch_size"] = local_batch_size * processes
    config = TrainConfig(**settings, policy=policy_config.type)

    adapters = None
    if policy_config.use_peft:
        adapters = read_peft_config(model)
    try:
        weights_file = model / (ADAPTER if adapters else "model.safetensors")
        averages_file = folder / EMA_FOLDER / "model.safetensors"
        # Of every file: people edit train_config.json, and expect the resumed run to go by it.
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        version_of_files = str([(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files])
        output = converted_dir() / hashlib.sha256(version_of_files.encode()).hexdigest()[:16]
        checkpoint = output / f"checkpoint-{position['step']}"
        if checkpoint.is_dir():
            return checkpoint
        weights = load_file(weights_file)
        trained_weights = {}
        if config.ema_decay:
            trained_weights = weights
            if averages_file.is_file():  # else the average starts here, as in lerobot-train
                weights = load_file(averages_file)
        optimizer = read_their_optimizer(folder / "training_state")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read as a checkpoint of lerobot-train: {one_line(error)[:200]}") from error
    preprocessor, postprocessor = load_processors(model, "cpu")
    match_statistics(policy_config, preprocessor)
    snapshot = Snapshot(
        step=position["step"],
        weights=weights,
        trained_weights=trained_weights,
        optimizer=optimizer,
        policy_config=policy_config,
        preprocessor=preprocessor,
        postprocessor=postprocessor,
        state=state_at(position["step"], config, folder),
        adapters=adapters,
    )
    output.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(output, snapshot)


def refuse_theirs(folder: Path, theirs: dict, position: dict) -> None:
    """Refuse a checkpoint of lerobot-train that cannot be resumed here.

    Args:
        folder: checkpoints/<step>.
        theirs: LeRobot's train_config.json.
        position: LeRobot's training_step.json.

    Raises:
        UserError: the run used what Armature does not have, or the files do not have LeRobot's form.
    """
    model = folder / "pretrained_model"
    wrong = [name for name, kind in THEIR_TYPES.items() if not isinstance(value_at(theirs, name), (kind, type(None)))]
    numbers = ("step", "batch_size", "num_processes", "dp_world_size", "grad_accum_steps")
    wrong += [name for name in numbers if position.get(name) is not None and not is_count(position[name])]
    if position.get("step") is None:
        wrong.append("step")
    if not value_at(theirs, "dataset.repo_id"):
        wrong.append("dataset.repo_id")
    if wrong:
        raise UserError(
            f"{folder} cannot be read as a checkpoint of lerobot-train: it has no {wrong[0]} of LeRobot's form in "
            "train_config.json or training_step.json. Resume from another checkpoint"
        )
    if not (model / "model.safetensors").is_file() and any(model.glob("pytorch_model_fsdp_*")):
        raise UserError(
            f"{folder} holds its weights in shards (checkpoint_format dcp), which Armature does not read. Run "
            f"lerobot-convert-dcp --checkpoint_dir={shlex.quote(str(folder))} with the version of LeRobot that wrote it "
            f"(0.6.1 has no such command), which merges them. Then pass --policy_path {shlex.quote(str(folder))} to start a "
            "new run from its weights"
        )
    used = {
        name: value_at(theirs, name) for name in ("sample_weighting", "use_rabc", "dataset.streaming", "reward_model")
    }
    used["sharded optimizer state (FSDP)"] = any((folder / "training_state").glob("optimizer_[0-9]*"))
    used["gradient accumulation, whose steps it counts otherwise"] = (position.get("grad_accum_steps") or 1) > 1
    for what, is_used in used.items():
        if is_used:
            raise UserError(f"{folder} was trained with {what}, which Armature does not resume. {new_run_from(folder)}")


def read_their_optimizer(folder: Path) -> dict:
    """The optimizer's state dict in the training_state of lerobot-train.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: it cannot be read.
    """
    state: dict[int, dict] = {}
    for name, tensor in load_file(folder / "optimizer_state.safetensors").items():
        _, number, key = name.split("/")  # state/0/exp_avg
        state.setdefault(int(number), {})[key] = tensor
    groups = json.loads((folder / "optimizer_param_groups.json").read_text())
    if not isinstance(groups, list):
        raise ValueError(f"expected a list in optimizer_param_groups.json, got {type(groups).__name__}")
    return {"state": state, "param_groups": groups}


def state_at(step: int, config: TrainConfig, folder: Path) -> TrainState:
    """What a checkpoint of ours would record of the run in `folder`."""
    position = {
        "step": step,
        "samples_seen": step * config.batch_size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        "world_size": 1,
    }
    return TrainState(
        trainer_state={**position, "loss_sums": [0.0], "loss_count": 0, "scaler": {}, "tracker_run_id": None},
        train_config={name: value for name, value in config.asdict().items() if value is not None},
        training_info={
            "policy": config.policy,
            "dataset": config.dataset_id,
            "loss": None,
            "val_loss": None,
            "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "converted_from": str(folder),
            "train_seconds": 0.0,
            **position,
        },
    )


def settings_of(theirs: dict, folder: Path, policy_config) -> dict:
    """Settings of TrainConfig for LeRobot's train_config.json, without those that keep our default.

    Raises:
        UserError: the run used what Armature does not have.
    """
    dataset = theirs["dataset"]
    dataset_id = dataset.get("root") or dataset["repo_id"]
    episodes = as_text(dataset.get("episodes"))
    if dataset.get("exclude_episodes"):
        chosen = open_source(dataset_id, None, dataset.get("revision"), episodes).episodes
        episodes = as_text([episode for episode in chosen if episode not in dataset["exclude_episodes"]])
    settings = {
        "dataset_id": [dataset_id],
        "episodes": episodes,
        "val_episodes": held_out(dataset_id, dataset.get("revision"), episodes, dataset.get("eval_split") or 0.0),
    }
    if policy_config.use_peft:
        settings |= settings_of_adapters(read_peft_config(folder / "pretrained_model"))
    for setting in SETTINGS:
        settings[setting.ours] = setting.read(value_at(theirs, setting.theirs))
    for name in OPTIMIZER_SETTINGS:
        settings[name] = value_at(theirs, f"optimizer.{name}")
    if value_at(theirs, "ema.enable"):
        settings["ema_decay"] = value_at(theirs, "ema.decay") or value_at(theirs, "ema.max_decay")
    settings["precision"] = PRECISIONS.get(value_at(theirs, "accelerator.mixed_precision"))
    settings = {name: value for name, value in settings.items() if value is not None}

    schedule = read_schedule(theirs.get("scheduler"), policy_config, TrainConfig(**settings))
    # Another version of LeRobot may describe its policy's own schedule in other fields.
    if schedule is None and theirs.get("use_policy_training_preset", True):
        schedule = {}
    if schedule is None:
        raise UserError(
            f"{folder} was trained with the scheduler {theirs.get('scheduler')}, which Armature does not have. "
            f"{new_run_from(folder)}"
        )
    return settings | schedule


def new_run_from(folder: Path) -> str:
    """The remedy for a run that cannot be resumed here."""
    return f"Pass --policy_path {folder} to start a new run from its weights"


def read_schedule(scheduler: dict | None, policy_config, config: TrainConfig) -> dict | None:
    """The --lr_schedule and --warmup_steps that stand for a scheduler in LeRobot's train_config.json; None if none do."""
    name = value_at(scheduler, "name")
    warmup_steps = value_at(scheduler, "num_warmup_steps") or 0
    if name == "constant":  # LeRobot's schedule without a warm-up, whatever the file says of one
        return {"lr_schedule": "constant", "warmup_steps": 0}
    # The policy's own schedule, the same with another warm-up, or one by name.
    candidates = [{}, {"warmup_steps": warmup_steps}]
    for ours, theirs in SCHEDULES.items():
        if theirs == name:
            candidates.append({"lr_schedule": ours, "warmup_steps": warmup_steps})
    for candidate in candidates:
        built = scheduler_config(policy_config, replace(config, **candidate))
        if scheduler == (built and {"type": built.type, **asdict(built)}):
            return candidate
    return None


def scheduler_config(policy_config, config: TrainConfig):
    """LeRobot's scheduler config for the schedule of a run of ours; None for a constant rate without a warm-up."""
    from lerobot.optim import DiffuserSchedulerConfig

    preset = scheduler_preset(policy_config, config)
    if preset is not None:
        return preset
    if config.lr_schedule is None and config.warmup_steps is None:
        return None
    return DiffuserSchedulerConfig(
        name=SCHEDULES[config.lr_schedule or "constant"], num_warmup_steps=config.warmup_steps or 0
    )


def as_text(episodes: list[int] | None) -> str | None:
    """A list of episodes as the value of --episodes."""
    return ",".join(str(episode) for episode in episodes or []) or None


def held_out(dataset_id: str, revision: str | None, episodes: str | None, fraction: float) -> str | None:
    """The episodes that lerobot-train's dataset.eval_split holds out: the last ones of each task, rounded up."""
    if not fraction:
        return None
    source = open_source(dataset_id, None, revision, episodes)
    by_task: dict[str, list[int]] = {}
    described = dict(zip(source.meta.episodes["episode_index"], source.meta.episodes["tasks"], strict=True))
    for episode in source.episodes:
        task = (described[episode] or [""])[0]  # lerobot-train splits by this, not by the table's task_index
        by_task.setdefault(task, []).append(episode)
    chosen = []
    for members in by_task.values():
        chosen += members[len(members) - math.ceil(len(members) * fraction) :]
    return as_text(sorted(chosen))


def to_lerobot(checkpoint: Path, output: Path) -> Path:
    """Write a checkpoint-<step> as `output`/checkpoints/<step>, which `lerobot-train --resume=true` continues.

    Raises:
        UserError: `output` exists, or the run used what lerobot-train cannot resume.
    """
    with lerobot_imports("--format lerobot"):
        from lerobot.common.train_utils import get_step_checkpoint_dir, save_checkpoint, update_last_checkpoint

    if output.exists():
        raise UserError(f"{output} exists already. Choose another folder, or remove it")
    if (checkpoint / TRAINED_WEIGHTS).exists():
        print(
            f"note: {checkpoint.name} holds the moving average of its weights (--ema_decay): "
            "lerobot-train continues from the average",
            file=sys.stderr,
        )
    state = TrainState(
        trainer_state=read_json(checkpoint / "trainer_state.json"),
        train_config=read_json(checkpoint / "train_config.json"),
        training_info={},
    )
    config = TrainConfig(**{name: value for name, value in state.train_config.items() if name in FIELDS})
    policy_config = load_policy_config(checkpoint, None, "cpu")
    preprocessor, postprocessor = load_processors(checkpoint, "cpu")
    refuse(checkpoint, config, policy_config, preprocessor)

    step = step_of(checkpoint) or state.trainer_state["step"]
    theirs = their_config(config, state, policy_config, output)
    policy = build_policy(policy_config, None, checkpoint)
    optimizer = theirs.optimizer.build(policy.get_optim_params())
    load_state(optimizer, read_optimizer(checkpoint))
    scheduler = None
    if theirs.scheduler is not None:
        scheduler = theirs.scheduler.build(optimizer, config.steps)
        advance(scheduler, step)
    torch.manual_seed(config.seed)  # save_checkpoint also writes the state of torch's generator
    folder = get_step_checkpoint_dir(output, config.steps, step)
    counts = {}
    if "num_processes" in inspect.signature(save_checkpoint).parameters:  # later versions take them from their config
        counts = {"num_processes": 1, "batch_size": config.batch_size}
    save_checkpoint(
        folder,
        step,
        theirs,
        policy,
        optimizer,
        scheduler,
        preprocessor,
        postprocessor,
        **counts,
    )
    update_last_checkpoint(folder)
    return folder


def refuse(checkpoint: Path, config: TrainConfig, policy_config, preprocessor) -> None:
    """Raise UserError for a checkpoint that lerobot-train would not resume, or would resume as another run."""
    resized_history = resize_of(preprocessor) and policy_config.observation_delta_indices
    reasons = {
        "several datasets": len(config.dataset_id) > 1,
        "a base of 4 bits": config.peft_quantize,
        "resized pictures and a history of them, which LeRobot's resize step does not take": resized_history,
        "frozen weights": config.freeze,
        "depth cameras as grey pictures, which LeRobot reads as millimetres": trained_depth(checkpoint),
        f"--optimizer {config.optimizer}, whose moments lerobot-train does not have": config.optimizer != "auto",
        "a --rename of names that do not begin with observation.": any(
            not old.startswith("observation.") for old in parse_rename(config.rename)
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(
                f"{checkpoint.name} was trained with {reason}: lerobot-train cannot resume it. "
                f"Resume it with src/train.py --resume_from_checkpoint {checkpoint}"
            )


def load_state(optimizer, saved: dict) -> None:
    """Load a saved state into LeRobot's optimizer, which keeps its own rates and other settings."""
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        saved_group.update({name: value for name, value in group.items() if name != "params"})
    optimizer.load_state_dict(saved)


def advance(scheduler, step: int) -> None:
    """Bring a new LambdaLR of LeRobot's to where `step` calls of its step() would have brought it."""
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    factors = [factor(step) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, lr in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def their_config(config: TrainConfig, state: TrainState, policy_config, output: Path):
    """LeRobot's TrainPipelineConfig for a run of ours."""
    from lerobot.configs.default import DatasetConfig, PeftConfig
    from lerobot.configs.train import TrainPipelineConfig

    dataset_id = config.dataset_id[0]
    repo_id = dataset_id
    root = config.dataset_root
    local = Path(os.path.expanduser(dataset_id))
    if local.is_dir():
        root = str(local.resolve())
    if root:
        repo_id = "/".join(Path(dataset_id).parts[-2:])
    theirs = TrainPipelineConfig(
        dataset=DatasetConfig(repo_id=repo_id, root=root, episodes=train_episodes(config, state)),
        policy=policy_config,
        output_dir=output,
        job_name=f"armature_{policy_config.type}",
        # lerobot-train resumes with these two as they are here. Without its policy's preset it would put all
        # parameters into one group, which the state of an optimizer with several does not fit.
        use_policy_training_preset=True,
        optimizer=optimizer_preset(policy_config, config),
        scheduler=scheduler_config(policy_config, config),
    )
    for setting in SETTINGS:
        *parents, name = setting.theirs.split(".")
        setattr(reduce(getattr, parents, theirs), name, setting.write(getattr(config, setting.ours)))
    if policy_config.use_peft:
        # lerobot-train takes the adapters' settings from their own file, but asks this whether it is to save any.
        method = config.peft or "lora"
        theirs.peft = PeftConfig(method_type=method.upper(), r=config.peft_r)
    return theirs


def train_episodes(config: TrainConfig, state: TrainState) -> list[int] | None:
    """The episodes that a run trains on, None for all of its dataset; lerobot-train is not to see the held-out ones."""
    source = open_source(
        config.dataset_id[0],
        config.dataset_root,
        config.revision,
        config.episodes,
        config.observations,
        val_episodes=config.val_episodes,
    )
    split = split_episodes(source, config, state)
    episodes = [source.episodes[i] for i in split.train]
    return episodes if len(episodes) < len(source.meta.episodes) else None
