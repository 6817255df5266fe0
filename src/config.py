"""TrainConfig: every setting of a run, as one flat dataclass that is also the command line.

A setting comes from, in rising order: its default, the checkpoint being resumed, `config_path`, the flag or keyword.
Nothing here imports anything heavy: `--help` must answer at once.
"""

import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import List, Optional, get_args

from errors import UserError, nearest, one_line

SCHEDULES = ("constant", "linear", "cosine")
FRESH = ("config_path", "resume_from_checkpoint", "resume_step", "output_dir", "quiet")  # never taken from a checkpoint


def setting(group: str, default, help: str, **metadata):
    return field(default=default, metadata={"group": group, "help": help, **metadata})


@dataclass
class TrainConfig:
    """Settings of one training run.

    Raises:
        UserError: a value is out of its range, or two settings contradict each other.
    """

    # argparse-dataclass reads these annotations as they are: Optional[int], not int | None.
    dataset_id: Optional[List[str]] = setting(
        "dataset",
        None,
        "dataset folder or Hub id, such as lerobot/pusht; several with the same features train together",
        nargs="+",
        type=str,
        metavar="PATH_OR_ID",
    )
    dataset_weights: Optional[List[float]] = setting(
        "dataset",
        None,
        "sampling weight of each dataset, such as 3 1 1 (unset: every frame once per epoch)",
        nargs="+",
        type=float,
        metavar="X",
    )
    dataset_root: Optional[str] = setting(
        "dataset", None, "folder to download a Hub dataset to (unset: LeRobot's cache)"
    )
    revision: Optional[str] = setting("dataset", None, "branch, tag or commit of a Hub dataset")
    episodes: Optional[str] = setting("dataset", None, 'episodes to train on, such as "0:40,45" (unset: all)')
    imagenet_stats: str = setting(
        "dataset",
        "on",
        "normalise cameras with ImageNet's mean and std, as lerobot-train does; off: with the dataset's",
        choices=("on", "off"),
    )

    frame_cache: str = setting(
        "dataset",
        "auto",
        "keep decoded frames: auto (on disk if they fit), on (on disk), off (decode at each use), device (in GPU memory)",
        choices=("auto", "on", "off", "device"),
    )
    cache_dir: Optional[str] = setting("dataset", None, "folder of the frame cache (unset: in your user cache folder)")

    rename: Optional[List[str]] = setting(
        "dataset",
        None,
        "rename observations to the policy's names, such as observation.image=observation.images.top",
        nargs="+",
        type=str,
        metavar="OLD=NEW",
    )

    policy: str = setting(
        "policy", "act", "flow (ours), or any policy of LeRobot: act, diffusion, vqbet, smolvla, pi0, ..."
    )
    policy_path: Optional[str] = setting("policy", None, "fine-tune from this LeRobot checkpoint: a folder or a Hub id")
    policy_args: Optional[List[str]] = setting(
        "policy",
        None,
        "the policy's own settings, such as chunk_size=50 dim_model=256 pretrained_backbone_weights=none",
        nargs="+",
        type=str,
        metavar="NAME=VALUE",
    )
    peft: Optional[str] = setting(
        "policy", None, "train adapters of this kind, such as lora, and keep the weights of --policy_path frozen"
    )
    peft_r: int = setting("policy", 16, "rank of the adapters")
    peft_args: Optional[List[str]] = setting(
        "policy",
        None,
        "the adapters' own settings, such as lora_alpha=32 target_modules=all-linear",
        nargs="+",
        type=str,
        metavar="NAME=VALUE",
    )
    freeze: Optional[List[str]] = setting(
        "policy",
        None,
        "freeze the parameters whose names match one of these patterns, such as backbone",
        nargs="+",
        type=str,
        metavar="REGEX",
    )
    image_size: Optional[List[int]] = setting(
        "policy",
        None,
        "resize every camera, in training and inference (unset: no resize; flow: shorter side at most 96)",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
    )

    steps: int = setting("training", 100_000, "optimizer steps of the whole run")
    minutes: Optional[float] = setting(
        "training",
        None,
        "train for about this long instead of --steps; speed is measured first, then the steps are fixed",
    )
    batch_size: Optional[int] = setting(
        "training",
        None,
        "global batch size, over all processes (unset: policy's preset, or 8; flow 64, on a GPU 256)",
    )
    grad_accumulation_steps: int = setting("training", 1, "micro-batches per optimizer step (gradient accumulation)")
    lr: Optional[float] = setting(
        "training",
        None,
        "peak learning rate (unset: policy's preset); groups with their own rate, such as act's backbone, keep it",
    )
    weight_decay: Optional[float] = setting("training", None, "weight decay (unset: policy's preset)")
    grad_clip_norm: Optional[float] = setting(
        "training", None, "clip gradients to this norm; 0 turns clipping off (unset: policy's preset)"
    )
    warmup_steps: Optional[int] = setting(
        "training", None, "steps in which the learning rate rises to its peak (unset: policy's preset)"
    )
    lr_schedule: Optional[str] = setting(
        "training",
        None,
        "learning rate after the warm-up: constant, linear or cosine (unset: policy's preset)",
        choices=SCHEDULES,
    )
    ema_decay: Optional[float] = setting(
        "training",
        None,
        "evaluate and save a moving average of the weights, such as 0.999; 0: off (unset: preset, flow 0.995)",
    )
    augment: Optional[bool] = setting(
        "training",
        None,
        "vary colour, sharpness and position of the images: on or off (unset: policy's preset, flow on)",
    )
    seed: int = setting("training", 1000, "random seed: every random choice of the run is a function of it")
    device: str = setting("training", "auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = setting(
        "training",
        "auto",
        "compute precision: auto (bf16 if the GPU has it, else fp32), fp32, bf16 or fp16 (weights stay fp32)",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compile: Optional[bool] = setting(
        "training", False, "torch.compile the policy: slower to start, then faster on a GPU"
    )
    gradient_checkpointing: Optional[bool] = setting(
        "training",
        None,
        "recompute activations to save memory, if the policy can (unset: as its config says)",
    )
    deterministic: Optional[bool] = setting(
        "training", False, "on a GPU: deterministic kernels and no TF32, so that a resume can be exact"
    )
    num_threads: Optional[int] = setting(
        "training", None, "threads that read batches ahead (unset: one per core, at most 8)"
    )

    val_fraction: Optional[float] = setting(
        "evaluation", None, "fraction of the episodes to hold out for validation, such as 0.1"
    )
    val_episodes: Optional[str] = setting("evaluation", None, 'episodes to hold out for validation, such as "36:40"')
    val_freq: Optional[int] = setting("evaluation", None, "steps between validations (unset: at every save)")
    val_samples: int = setting("evaluation", 256, "held-out frames per validation, evenly spread; 0: all")
    eval_env: Optional[str] = setting(
        "evaluation", None, "also evaluate in this simulation while training: metaworld, or any environment of LeRobot"
    )
    eval_task: Optional[str] = setting("evaluation", None, "task of the simulation, such as drawer-open-v3")
    eval_freq: Optional[int] = setting(
        "evaluation", None, "steps between evaluations in simulation (unset: at every save)"
    )
    eval_episodes: int = setting("evaluation", 10, "simulated episodes per evaluation, from fixed seeds")
    eval_args: Optional[List[str]] = setting(
        "evaluation",
        None,
        "the environment's own settings, such as image_size=128",
        nargs="+",
        type=str,
        metavar="NAME=VALUE",
    )

    output_dir: Optional[str] = setting("output", None, "folder of the run (unset: outputs/<dataset>_<policy>)")
    log_freq: int = setting("output", 50, "steps between lines of metrics.jsonl")
    save_freq: int = setting("output", 5_000, "steps between checkpoints; 0: one at the end")
    save_minutes: Optional[float] = setting(
        "output", None, "also save when the last checkpoint is this many minutes old"
    )
    save_async: str = setting(
        "output",
        "on",
        "write checkpoints in the background, from a copy in memory; off: training waits for the disk",
        choices=("on", "off"),
    )
    keep_last: Optional[int] = setting("output", None, "keep this many of the newest checkpoints (unset: all)")
    keep_every: Optional[int] = setting(
        "output", None, "with --keep_last: also keep checkpoints at multiples of this step"
    )
    tracker: str = setting(
        "output", "none", "tensorboard, wandb, trackio, or several with commas; metrics.jsonl is always written"
    )
    push_to_hub: Optional[str] = setting("output", None, "Hub repo to upload the finished policy to, such as me/my_act")
    push_checkpoints: Optional[bool] = setting(
        "output", False, "also upload each checkpoint to --push_to_hub, in the background"
    )
    quiet: Optional[bool] = setting("output", False, "print only warnings and the last line")

    resume_from_checkpoint: Optional[str] = setting(
        "resume",
        None,
        "checkpoint-<step> folder, Hub repo, latest (newest in --output_dir), or auto (latest, else a fresh start)",
    )
    resume_step: Optional[int] = setting("resume", None, "step of a checkpoint whose folder was renamed")
    config_path: Optional[str] = setting("resume", None, "JSON or YAML file of these settings; flags override it")

    def __post_init__(self):
        for f in fields(self):
            setattr(self, f.name, typed(f, getattr(self, f.name)))
        at_least = {
            "steps": 1,
            "batch_size": 1,
            "num_threads": 1,
            "grad_accumulation_steps": 1,
            "peft_r": 1,
            "log_freq": 1,
            "keep_last": 1,
            "keep_every": 1,
            "val_freq": 1,
            "val_samples": 0,
            "eval_freq": 1,
            "eval_episodes": 1,
            "save_freq": 0,
            "warmup_steps": 0,
            "resume_step": 0,
            "seed": 0,
            "weight_decay": 0,
            "grad_clip_norm": 0,
        }
        for name, low in at_least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise UserError(f"--{name} must be at least {low}, got {value}")
        if self.lr is not None and not 0 < self.lr < float("inf"):
            raise UserError(f"--lr must be above 0, got {self.lr}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UserError(f"--ema_decay must be 0 or more and below 1, got {self.ema_decay}")
        if self.minutes is not None and not 0 < self.minutes < 10**6:
            raise UserError(f"--minutes must be above 0, got {self.minutes}")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise UserError(f"--save_minutes must be above 0, got {self.save_minutes}")
        self._check_evaluation()
        if self.keep_every is not None and self.keep_last is None:
            raise UserError("--keep_every keeps checkpoints besides the newest: pass --keep_last as well")
        if self.image_size is not None and min(self.image_size) < 1:
            raise UserError(f"--image_size must be two positive numbers (height width), got {self.image_size}")
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise UserError(f"--warmup_steps {self.warmup_steps} is more than --steps {self.steps}")
        if self.push_checkpoints and not self.push_to_hub:
            raise UserError("--push_checkpoints needs a repo: pass --push_to_hub me/my_policy")
        if self.peft is not None and self.policy_path is None:
            raise UserError(f"--peft {self.peft} adapts a trained policy: pass it with --policy_path")
        if not self.dataset_id:
            raise UserError("no dataset: pass --dataset_id with a folder or a Hub id such as lerobot/pusht")
        if len(self.dataset_id) > 1 and self.episodes:
            raise UserError(f"--episodes chooses from one dataset, got {len(self.dataset_id)}")
        if self.dataset_weights and len(self.dataset_weights) != len(self.dataset_id):
            raise UserError(
                f"--dataset_weights needs one number a dataset: {len(self.dataset_id)}, got {len(self.dataset_weights)}"
            )
        if self.dataset_weights and not 0 < min(self.dataset_weights) <= max(self.dataset_weights) < float("inf"):
            raise UserError(f"--dataset_weights must be above 0, got {self.dataset_weights}")

    def _check_evaluation(self):
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction must be between 0 and 1, got {self.val_fraction}")
        if self.val_fraction is not None and self.val_episodes is not None:
            raise UserError("--val_fraction and --val_episodes both choose the held-out episodes: pass one of them")
        if self.val_episodes is not None and len(self.dataset_id or []) > 1:
            raise UserError(f"--val_episodes chooses from one dataset, got {len(self.dataset_id)}: pass --val_fraction")
        if self.val_freq is not None and self.val_fraction is None and self.val_episodes is None:
            raise UserError("--val_freq needs episodes to validate on: pass --val_fraction 0.1 or --val_episodes")
        if self.eval_env is None and (self.eval_task is not None or self.eval_freq is not None):
            raise UserError("--eval_task and --eval_freq need a simulation: pass --eval_env metaworld")

    def asdict(self) -> dict:
        return asdict(self)


FIELDS = {f.name: f for f in fields(TrainConfig)}
for _field in FIELDS.values():  # flags are spelt as the fields are: --batch_size, not --batch-size
    _field.metadata = MappingProxyType({**_field.metadata, "args": [f"--{_field.name}"]})


def typed(f, value):
    """`value` as the type of field `f`, from wherever it came: a flag, a JSON or YAML file, a keyword argument."""
    kinds = (
        [kind for kind in get_args(f.type) if kind is not type(None)]
        if f.type not in (int, str, bool, float)
        else [f.type]
    )
    kind, optional = kinds[0], f.default is None
    if value is None and optional:
        return None
    if f.name == "dataset_id" and isinstance(value, (str, Path)):
        return [str(value)]
    if f.name in ("policy_args", "peft_args", "eval_args") and isinstance(value, dict):
        return [f"{name}={'none' if item is None else item}" for name, item in value.items()]
    if f.name in ("episodes", "val_episodes") and isinstance(value, (list, tuple, range)):
        return ",".join(str(item) for item in value)
    try:
        if f.metadata.get("nargs") is not None:
            if isinstance(value, str) or len(value) == 0 or f.metadata["nargs"] not in ("+", len(value)):
                raise ValueError
            return [f.metadata["type"](item) for item in value]
        if kind is bool and not isinstance(value, bool):
            raise ValueError
        value = ("off", "on")[value] if kind is str and isinstance(value, bool) else value  # YAML's on and off
        if kind is int and (isinstance(value, bool) or int(value) != float(value)):
            raise ValueError
        value = kind(value)
    except (TypeError, ValueError):
        wanted = {"+": "a list of values", 2: "two numbers, height and width"}.get(
            f.metadata.get("nargs"), kind.__name__
        )
        raise UserError(f"--{f.name} must be {wanted}, got {value!r}") from None
    if f.metadata.get("choices") and value not in f.metadata["choices"]:
        raise UserError(f"--{f.name} must be one of {', '.join(f.metadata['choices'])}, got {value!r}")
    return value


def read_config_file(path: str) -> dict:
    """The settings in a JSON or YAML file, as a dict of those given there."""
    try:
        text = Path(path).expanduser().read_text()
    except OSError as error:
        raise UserError(f"--config_path {path} cannot be read: {error.strerror}") from None
    kind, read = ("JSON", json.loads) if path.endswith(".json") else ("YAML", read_yaml)
    try:
        given = read(text)
    except ValueError as error:
        raise UserError(f"--config_path {path} is not valid {kind}: {one_line(error)}") from None
    if not isinstance(given, dict):
        raise UserError(f"--config_path {path} must hold one mapping of settings, got {type(given).__name__}")
    check_names(given, f"in {path}")
    return given


def read_yaml(text: str):
    """YAML in which 1:50 and 010 are text, as in YAML 1.2; by 1.1, which is PyYAML's, they are 110 and 8.

    Raises:
        ValueError: it is none.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def resolve(self, kind, value, implicit):
            plain = kind is yaml.ScalarNode and implicit[0]
            if plain and re.fullmatch(r".*:.*|[-+]?0[\d_]+", value):
                return self.DEFAULT_SCALAR_TAG
            return super().resolve(kind, value, implicit)

    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(one_line(error)) from None


def check_names(given: dict, where: str) -> None:
    for name in given:
        if name not in FIELDS:
            raise UserError(f"unknown setting {name!r} {where}{nearest(name, FIELDS)}")


def merge(given: dict, resumed: Optional[dict] = None) -> TrainConfig:
    """The whole config: `given` over `resumed` (the train_config.json of a checkpoint) over the defaults."""
    kept = {name: value for name, value in (resumed or {}).items() if name in FIELDS and name not in FRESH}
    return TrainConfig(**{**kept, **given})
