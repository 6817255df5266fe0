"""TrainConfig: every setting of a run, as one flat dataclass that is also the command line.

A setting comes from, in rising order: its default, the checkpoint being resumed, `config_path`, the flag or keyword.
Nothing here imports anything heavy: `--help` must answer at once.
"""

import json
import operator
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin

from errors import UserError, nearest, one_line, reason_of_disk

SCHEDULES = ("constant", "linear", "cosine")
LIMITS = {"at_least": operator.ge, "above": operator.gt, "below": operator.lt}  # of a number
TYPE_NAMES = {int: "an integer", float: "a number", bool: "a boolean", str: "text"}  # in messages
FRESH = ("config_path", "resume_from_checkpoint", "resume_step", "output_dir", "quiet")  # never taken from a checkpoint


def setting(default, help: str, **metadata):
    """A field of TrainConfig.

    Args:
        metadata: group, of this setting and those that follow; nargs (if not any number for a list), choices and metavar
            as argparse has them; limits by the names in LIMITS; needs, settings without which this one means nothing.
    """
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainConfig:
    """Settings of one training run.

    Raises:
        UserError: a value is out of its range, or two settings contradict each other.
    """

    dataset_id: list[str] | None = setting(
        None,
        "dataset folder, Hub id such as lerobot/pusht, or URL (https, s3, gs, hf); several with the same features train together",
        metavar="PATH_OR_ID",
        group="dataset",
    )
    dataset_weights: list[float] | None = setting(
        None,
        "sampling weight of each dataset, such as 3 1 1 (unset: every frame once per epoch)",
        metavar="X",
        above=0,
        below=float("inf"),
    )
    pad_datasets: bool = setting(
        False,
        "let datasets differ in cameras and in the widths of state and action: what one lacks is padded, and each is normalised "
        "by its own statistics",
    )
    dataset_root: str | None = setting(None, "folder to download a Hub dataset to (unset: LeRobot's cache)")
    revision: str | None = setting(None, "branch, tag or commit of a Hub dataset")
    episodes: str | None = setting(None, 'episodes to train on, such as "0:40,45" (unset: all)')
    observations: list[str] | None = setting(
        None,
        'observations to train on, by name or pattern, such as top state or "observation.images.*" (unset: all); '
        "others are not read, so their files may be missing",
        metavar="NAME",
    )
    imagenet_stats: str = setting(
        "on",
        "normalise cameras with ImageNet's mean and std, as lerobot-train does; off: with the dataset's",
        choices=("on", "off"),
    )

    frame_cache: str = setting(
        "auto",
        "keep decoded frames: auto (what fits on the disk), on (on disk), lossless (compressed), compact (as JPEG), "
        "off (decode at each use), device (in GPU memory)",
        choices=("auto", "on", "lossless", "compact", "off", "device"),
    )
    stream: bool = setting(
        False, "do not download the videos of a Hub dataset, but read them over the network; those of a URL always are"
    )
    cache_gb: float | None = setting(
        None,
        "GB of streamed videos that each process keeps on the disk (unset: a quarter of what is free)",
        above=0,
        below=1e6,
    )
    shuffle: str = setting(
        "full",
        "order of the samples: full (any frame of any episode), blocks (of 32 episodes at a time: for streaming)",
        choices=("full", "blocks"),
    )
    cache_dir: str | None = setting(None, "folder of the frame cache (unset: in your user cache folder)")

    rename: list[str] | None = setting(
        None,
        "rename observations to the policy's names, such as observation.image=observation.images.top; "
        "auto pairs the cameras with those of --policy_path; with several datasets also to make them alike",
        metavar="OLD=NEW",
    )

    policy: str = setting(
        "act", "flow (ours), or any policy of LeRobot: act, diffusion, vqbet, smolvla, pi0, ...", group="policy"
    )
    policy_path: str | None = setting(None, "fine-tune from this LeRobot checkpoint: a folder or a Hub id")
    policy_args: list[str] | None = setting(
        None,
        "the policy's own settings, such as chunk_size=50 dim_model=256 pretrained_backbone_weights=none",
        metavar="NAME=VALUE",
    )
    peft: str | None = setting(
        None,
        "train adapters of this kind, such as lora, and keep the weights of --policy_path frozen",
        needs=("policy_path",),
    )
    peft_r: int = setting(16, "rank of the adapters", at_least=1)
    peft_args: list[str] | None = setting(
        None,
        "the adapters' own settings, by PEFT's names, such as lora_alpha=32 target_modules=all-linear use_dora=true",
        metavar="NAME=VALUE",
    )
    peft_quantize: str | None = setting(
        None,
        "round the frozen linear layers of --policy_path to 4 bits (NF4, QLoRA), to train adapters in less memory",
        choices=("4bit",),
        needs=("policy_path",),
    )
    freeze: list[str] | None = setting(
        None, "freeze the parameters whose names match one of these patterns, such as backbone", metavar="REGEX"
    )
    image_size: list[int] | None = setting(
        None,
        "resize every camera, in training and inference (unset: no resize; flow: shorter side at most 96)",
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        at_least=1,
    )

    steps: int = setting(100_000, "optimizer steps of the whole run", at_least=1, group="training")
    minutes: float | None = setting(
        None,
        "train for about this long instead of --steps; speed is measured first, then the steps are fixed",
        above=0,
        below=10**6,
    )
    batch_size: int | None = setting(
        None, "global batch size, over all processes (unset: policy's preset, or 8; flow 64, on a GPU 256)", at_least=1
    )
    grad_accumulation_steps: int = setting(1, "micro-batches per optimizer step (gradient accumulation)", at_least=1)
    lr: float | None = setting(
        None,
        "peak learning rate (unset: policy's preset); groups with their own rate, such as act's backbone, keep it",
        above=0,
        below=float("inf"),
    )
    weight_decay: float | None = setting(None, "weight decay (unset: policy's preset)", at_least=0, below=float("inf"))
    grad_clip_norm: float | None = setting(
        None, "clip gradients to this norm; 0 turns clipping off (unset: policy's preset)", at_least=0
    )
    warmup_steps: int | None = setting(
        None, "steps in which the learning rate rises to its peak (unset: policy's preset)", at_least=0
    )
    lr_schedule: str | None = setting(
        None, "learning rate after the warm-up: constant, linear or cosine (unset: policy's preset)", choices=SCHEDULES
    )
    ema_decay: float | None = setting(
        None,
        "evaluate and save a moving average of the weights, such as 0.999; 0: off (unset: preset, flow 0.995)",
        at_least=0,
        below=1,
    )
    augment: bool | None = setting(
        None, "vary colour, sharpness and position of the images: on or off (unset: policy's preset, flow on)"
    )
    augment_style: str | None = setting(
        None,
        "how --augment varies images: full (as LeRobot's transforms) or fast (position and colour, in a tenth of the time) "
        "(unset: policy's preset, flow fast)",
        choices=("full", "fast"),
    )
    augment_versions: int = setting(
        4,
        "versions of each frame that are stored where what a frozen backbone sees is stored, one of them not augmented",
        at_least=1,
    )
    state_noise: float = setting(0.0, "noise on the state, in standard deviations of the dataset", at_least=0)
    state_dropout: float = setting(
        0.0,
        "share of samples whose state is replaced by its mean, for a policy that goes by the state and not by the images",
        at_least=0,
        below=1,
    )
    camera_dropout: float = setting(
        0.0, "share of samples of which one of several cameras is replaced by its mean colour", at_least=0, below=1
    )
    seed: int = setting(1000, "random seed: every random choice of the run is a function of it", at_least=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    precision: str = setting(
        "auto",
        "compute precision: auto (bf16 if the GPU has it, else fp32), fp32, bf16 or fp16 (see --weights_dtype for the weights)",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    weights_dtype: str = setting(
        "auto",
        "dtype of the weights: auto (as the policy has them), fp32, or bf16, which takes half the memory and is updated in fp32 "
        "with stochastic rounding; the weights that adapters leave frozen become bf16, the adapters stay fp32",
        choices=("auto", "fp32", "bf16"),
    )
    optimizer: str = setting(
        "auto",
        "auto (the policy's preset), or adamw8bit: AdamW whose moments take 8 bits a weight instead of 32 each (needs torchao)",
        choices=("auto", "adamw8bit"),
    )
    compile: bool = setting(False, "torch.compile the policy: slower to start, then faster on a GPU")
    gradient_checkpointing: bool | None = setting(
        None, "recompute activations to save memory, if the policy can (unset: as its config says)"
    )
    deterministic: bool = setting(False, "on a GPU: deterministic kernels and no TF32, so that a resume can be exact")
    num_threads: int | None = setting(
        None, "threads that read batches ahead (unset: one per core, at most 8)", at_least=1
    )

    val_fraction: float | None = setting(
        None, "fraction of the episodes to hold out for validation, such as 0.1", above=0, below=1, group="evaluation"
    )
    val_episodes: str | None = setting(None, 'episodes to hold out for validation, such as "36:40"')
    val_freq: int | None = setting(
        None, "steps between validations (unset: at every save)", at_least=1, needs=("val_fraction", "val_episodes")
    )
    val_samples: int = setting(256, "held-out frames per validation, evenly spread; 0: all", at_least=0)
    eval_env: str | None = setting(
        None,
        "also evaluate in this simulation while training: aloha, metaworld, so101, ogbench, or another of LeRobot's",
    )
    eval_task: str | None = setting(None, "task of the simulation, such as drawer-open-v3", needs=("eval_env",))
    eval_freq: int | None = setting(
        None, "steps between evaluations in simulation (unset: at every save)", at_least=1, needs=("eval_env",)
    )
    eval_episodes: int = setting(10, "simulated episodes per evaluation, from fixed seeds", at_least=1)
    eval_args: list[str] | None = setting(
        None, "the environment's own settings, such as image_size=128", metavar="NAME=VALUE"
    )

    output_dir: str | None = setting(None, "folder of the run (unset: outputs/<dataset>_<policy>)", group="output")
    log_freq: int = setting(50, "steps between lines of metrics.jsonl", at_least=1)
    save_freq: int = setting(5_000, "steps between checkpoints; 0: one at the end", at_least=0)
    save_minutes: float | None = setting(None, "also save when the last checkpoint is this many minutes old", above=0)
    save_async: str = setting(
        "on",
        "write checkpoints in the background, from a copy in memory; off: training waits for the disk",
        choices=("on", "off"),
    )
    keep_last: int | None = setting(None, "keep this many of the newest checkpoints (unset: all)", at_least=1)
    keep_every: int | None = setting(
        None, "with --keep_last: also keep checkpoints at multiples of this step", at_least=1, needs=("keep_last",)
    )
    tracker: str = setting(
        "none", "tensorboard, wandb, trackio, or several with commas; metrics.jsonl is always written"
    )
    push_to_hub: str | None = setting(None, "Hub repo to upload the finished policy to, such as me/my_act")
    push_checkpoints: bool = setting(
        False, "also upload each checkpoint to --push_to_hub, in the background", needs=("push_to_hub",)
    )
    quiet: bool = setting(False, "print only warnings and the last line")

    resume_from_checkpoint: str | None = setting(
        None,
        "checkpoint-<step> folder, Hub repo, latest (newest in --output_dir), or auto (latest, else a fresh start)",
        group="resume",
    )
    resume_step: int | None = setting(None, "step of a checkpoint whose folder was renamed", at_least=0)
    config_path: str | None = setting(None, "JSON or YAML file of these settings; flags override it")

    def __post_init__(self):
        for f in fields(self):
            value = typed(f, getattr(self, f.name))
            check_limits(f, value)
            setattr(self, f.name, value)
        for f in fields(self):
            self._check_needs(f.name, f.metadata.get("needs", ()))
        if self.warmup_steps is not None and self.warmup_steps > self.steps:
            raise UserError(f"--warmup_steps {self.warmup_steps} is more than --steps {self.steps}. Pass fewer")
        if self.val_fraction is not None and self.val_episodes is not None:
            raise UserError("--val_fraction and --val_episodes both choose the held-out episodes. Pass one of them")
        self._check_datasets()

    def _check_needs(self, name: str, needs: tuple[str, ...]) -> None:
        """Refuse a setting that means nothing without at least one of `needs`."""
        is_given = getattr(self, name) not in (None, False)
        if is_given and needs and all(getattr(self, other) is None for other in needs):
            raise UserError(f"--{name} needs --{' or --'.join(needs)}. Pass that as well, or leave --{name} out")

    def _check_datasets(self) -> None:
        if not self.dataset_id:
            raise UserError("no dataset. Pass --dataset_id with a folder or a Hub id, such as lerobot/pusht")
        count = len(self.dataset_id)
        for name in ("episodes", "val_episodes"):
            if count > 1 and getattr(self, name) is not None:
                raise UserError(f"--{name} chooses from one dataset, got {count}. Leave it out")
        if self.pad_datasets and count == 1:
            raise UserError("--pad_datasets makes several datasets alike, got one. Leave it out")
        if self.pad_datasets and self.eval_env is not None:
            raise UserError(
                "--pad_datasets: a simulation has the features of one robot. Leave --eval_env out, and evaluate the checkpoints "
                "with evaluate.py --trained_on"
            )
        if self.dataset_weights is not None and len(self.dataset_weights) != count:
            raise UserError(
                f"--dataset_weights: expected one number per dataset, {count}, got {len(self.dataset_weights)}"
            )
        if self.dataset_weights is not None and self.shuffle == "blocks":
            raise UserError(
                "--shuffle blocks reads every frame once per epoch, --dataset_weights does not. Pass one of them"
            )

    def asdict(self) -> dict:
        return asdict(self)


FIELDS = {f.name: f for f in fields(TrainConfig)}


def value_type(f) -> type:
    """The type of a setting, or of each value of a list: str, int, float or bool."""
    kind = f.type
    while get_args(kind):  # list[str] | None -> list[str] -> str
        kind = get_args(kind)[0]
    return kind


def nargs(f) -> int | str | None:
    """How many values a setting takes, as argparse has it: None for one, "+" or a number for a list."""
    is_list = list in map(get_origin, get_args(f.type))
    return f.metadata.get("nargs", "+" if is_list else None)


def typed(f, value):
    """`value` as the type of field `f`, wherever it came from: a flag, a JSON or YAML file, a keyword argument.

    Raises:
        UserError: it is of another type, or none of the field's choices.
    """
    if value is None and f.default is None:
        return None
    value = as_on_the_command_line(f.name, value)
    count = nargs(f)
    kind = value_type(f)
    expected = TYPE_NAMES[kind]
    try:
        if count is None:
            value = converted(kind, value)
        else:
            expected = "a list of values" if count == "+" else "two numbers, height and width"
            is_complete = len(value) == count or (count == "+" and len(value) > 0)
            if isinstance(value, str) or not is_complete:
                raise ValueError
            value = [converted(kind, item) for item in value]
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"--{f.name} must be {expected}, got {value!r:.80}") from None
    choices = f.metadata.get("choices", (value,))
    if value not in choices:
        raise UserError(f"--{f.name} must be one of {', '.join(choices)}, got {value!r}")
    return value


def as_on_the_command_line(name: str, value):
    """A value that a file or a keyword gives as a mapping or range, in the form that the command line has."""
    if name == "dataset_id" and isinstance(value, (str, Path)):
        return [str(value)]
    if name in ("policy_args", "peft_args", "eval_args") and isinstance(value, dict):
        return [f"{key}={'none' if item is None else item}" for key, item in value.items()]
    if name in ("episodes", "val_episodes") and isinstance(value, (list, tuple, range)):
        return ",".join(str(item) for item in value)
    return value


def converted(kind: type, value):
    """A single value as `kind`.

    Raises:
        TypeError, ValueError: that would change what it says.
    """
    if kind is str and isinstance(value, bool):
        return "on" if value else "off"  # which YAML reads as booleans
    if kind is bool and not isinstance(value, bool):
        raise ValueError
    if kind is int and (isinstance(value, bool) or int(value) != float(value)):
        raise ValueError
    return kind(value)


def check_limits(f, value) -> None:
    """Raise a UserError if a number, or one of a list, is beyond the limits of field `f`; nan is beyond any."""
    limits = {name: f.metadata[name] for name in LIMITS if name in f.metadata}
    if value is None or not limits:
        return
    numbers = value if isinstance(value, list) else [value]
    if not all(LIMITS[name](number, limit) for name, limit in limits.items() for number in numbers):
        expected = " and ".join(f"{name.replace('_', ' ')} {limit}" for name, limit in limits.items())
        raise UserError(f"--{f.name} must be {expected}, got {value}")


def read_config_file(path: str) -> dict:
    """The settings in a JSON or YAML file.

    Raises:
        UserError: the file cannot be read, is not valid, or holds an unknown setting.
    """
    import yaml

    kind = "JSON" if path.endswith(".json") else "YAML"
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
        given = json.loads(text) if kind == "JSON" else yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"--config_path {path} cannot be read: {reason_of_disk(error)}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config_path {path} is not valid {kind}: {one_line(error)}") from None
    if not isinstance(given, dict):
        raise UserError(f"--config_path {path} must hold one mapping of settings, got {type(given).__name__}")
    check_names(given, f"in {path}")
    for name in ("episodes", "val_episodes"):
        if kind == "YAML" and isinstance(given.get(name), (int, float)):  # 1:50 is 110 there, by base 60
            raise UserError(
                f'--config_path {path}: YAML reads {name} as the number {given[name]}. Put it in quotes, such as {name}: "0:40"'
            )
    return given


def check_names(given: dict, where: str) -> None:
    for name in given:
        if name not in FIELDS:
            raise UserError(f"unknown setting {name!r} {where}{nearest(name, FIELDS)}")


def merge(given: dict, resumed: dict | None = None) -> TrainConfig:
    """The whole config: `given` over `resumed` (the train_config.json of a checkpoint) over the defaults."""
    kept = {name: value for name, value in (resumed or {}).items() if name in FIELDS and name not in FRESH}
    return TrainConfig(**{**kept, **given})
