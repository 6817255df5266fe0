"""What a resume changes: another value of some settings is refused, of others it makes another run, which is reported."""

import contextlib
import copy
import hashlib
import json
import os
import shlex
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow.compute as pc
import yaml
from torch import Tensor

from checkpoints.folder import TrainState, is_own
from command_line import split_pair
from config import FIELDS, TrainConfig
from data.decode import Decoder
from data.depth import depth_ranges, depth_unit
from data.source import Source
from errors import UserError, find_path
from policy.factory import load_policy_config, policy_config
from policy.presets import optimizer_preset, scheduler_preset
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
    "peft_quantize",
    "freeze",
    "imagenet_stats",
    "weights_dtype",
    "optimizer",
)
# Another value of these makes a resumed run another run: it is reported.
RUN_FIELDS = (
    "dataset_id", "dataset_weights", "pad_datasets", "observations", "rename", "revision", "episodes", "val_fraction", "val_episodes",
    "batch_size", "shuffle", "compile", "deterministic", "ema_decay", "augment", "augment_style",
    "state_noise", "state_dropout", "camera_dropout", "seed", "precision", "grad_accumulation_steps",
)  # fmt: skip
# Of these, a checkpoint records what they chose, which `compare_data` goes by: a dataset may be moved, and 0:3 be all of it.
DATA_FIELDS = ("revision", "episodes", "observations")
SPLIT_FIELDS = ("val_fraction", "val_episodes")
# What these mean depends on the policy's presets: see `compare_optimizers`.
OPTIMIZER_FIELDS = ("lr", "weight_decay", "grad_clip_norm", "warmup_steps", "lr_schedule")
# Settings that send data away or write outside the run's folder: see `settings_taken_over`.
OUTWARD_FIELDS = ("push_to_hub", "push_checkpoints", "tracker", "dataset_root", "cache_dir")
SAMPLES = 100  # pictures of a camera whose bytes `hash_of_pictures` reads
SAMPLE_BYTES = 4096  # that it reads of each file


def settings_taken_over(given: dict, state: TrainState, checkpoint: Path) -> tuple[dict, list[str]]:
    """The settings that a resume takes from its checkpoint, and a line that names those that it ignores.

    A checkpoint that somebody else wrote must not choose where this run sends its data or writes.

    Args:
        given: the settings of this process.
    """
    recorded = state.train_config
    if is_own(checkpoint, state):
        return recorded, []
    left_out = {}
    for name in OUTWARD_FIELDS:
        if recorded[name] != FIELDS[name].default and name not in given:
            left_out[name] = "on" if recorded[name] is True else shlex.quote(str(recorded[name]))
    if not left_out:
        return recorded, []
    flags = " ".join(f"--{name} {value}" for name, value in left_out.items())
    warning = (
        f"{checkpoint.name} was not written by a run in {checkpoint.parent}, so what its settings say of uploads, trackers "
        f"and other folders is not taken over. If you want it, pass {flags}"
    )
    return {name: value for name, value in recorded.items() if name not in left_out}, [warning]


def compare_settings(config: TrainConfig, state: TrainState, checkpoint: Path, processes: int) -> list[str]:
    """One line for each setting that makes the resumed run another run.

    Raises:
        UserError: a setting that cannot change on a resume did.
    """
    now = config.asdict()
    before = state.train_config
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
        is_same = meaning(name, now[name]) == meaning(name, before[name])
        if not is_same and not (name == "policy_args" and is_same_policy(config, before)):
            raise UserError(
                f"--{name}: {checkpoint.name} was trained with {before[name]}, got {now[name]}. "
                "A resumed run keeps its policy: leave the flag out, or start a new run"
            )
    names = [name for name in RUN_FIELDS if before[name] != "auto"]  # --precision of a run that came from lerobot-train
    if state.trainer_state.get("data") is not None:  # `compare_data` compares what these settings chose
        names = [name for name in names if name not in ("dataset_id", *DATA_FIELDS, *SPLIT_FIELDS)]
    changes = changed(names, before, now)
    if "compact" in (before["frame_cache"], now["frame_cache"]):  # the only cache with other pixels
        changes += changed(["frame_cache"], before, now)
    processes_before = state.trainer_state["world_size"]
    if processes != processes_before:
        changes.append(
            f"{processes_before} -> {processes} processes: the batches stay the same, rounding and noise do not"
        )
    unknown = [f"{name}={before[name]!r:.40}" for name in sorted(set(before) - set(FIELDS))]
    if unknown:
        changes.append(
            f"{checkpoint.name} has settings of another version of Armature, which are ignored here: "
            f"{', '.join(unknown[:10])}. "
            "From here on this may be another run: resume it with that version"
        )
    return changes


def changed(names: Iterable[str], before: dict, now: dict) -> list[str]:
    """A line for each of these settings that has another value."""
    return [
        f"--{name}: {before[name]} -> {now[name]}; from here on this is not the run that wrote the checkpoint"
        for name in names
        if meaning(name, before[name]) != meaning(name, now[name])
    ]


def is_same_policy(config: TrainConfig, before: dict) -> bool:
    """Whether other --policy_args make the same policy: they may name its defaults."""
    if config.policy_path is not None:
        return False  # whose own settings may be gone
    with contextlib.suppress(UserError):  # another version's settings
        args = (config.policy_args, before["policy_args"])
        first, second = (policy_config(config.policy, overrides, "cpu") for overrides in args)
        return first == second
    return False


def meaning(name: str, value):
    """A setting's value in a form that is equal for different ways to write the same.

    These are other orders of NAME=VALUE, of patterns and of episodes, `0,1` for `0:2`, weights in the same proportions, and
    another path to the same folder.
    """
    if value is None:
        return None
    if name in ("policy_args", "peft_args", "rename"):
        pairs = {}
        for pair in value:
            key, _, text = split_pair(pair)  # of several with one name, the last one counts
            pairs[key] = text if name == "rename" else plain(text)
        if name == "rename":
            pairs.pop("auto", None)  # it adds to the pairs that the run has
            return {old: new for old, new in pairs.items() if old != new} or None
        return pairs
    if name in ("freeze", "observations"):
        return set(value)
    if name == "dataset_weights":
        return [weight / sum(value) for weight in value]
    if name == "policy_path" and find_path(value, "--policy_path") is not None:
        return os.path.realpath(os.path.expanduser(value))
    if name in ("episodes", "val_episodes"):
        try:
            return episodes_meant(value)
        except ValueError:  # not of that form: refused where the dataset is opened
            return value
    return value


def plain(text: str):
    """The value of a NAME=VALUE text, as `parse_overrides` reads it: 50 and 0x32 are the same, as are none and null."""
    if text.strip().lower() in ("none", "null"):
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # the checkpoint was edited: refused where it is used
        return text


def episodes_meant(text: str) -> list[tuple[int, int]]:
    """The ranges [first, end) of --episodes, in order and joined where they touch."""
    spans: list[tuple[int, int]] = []
    for part in text.split(","):
        first, _, end = part.partition(":")
        spans.append((int(first), int(end) if end else int(first) + 1))
    joined: list[tuple[int, int]] = []
    for first, end in sorted(spans):
        if joined and first <= joined[-1][1]:
            first = joined[-1][0]
            end = max(end, joined.pop()[1])
        joined.append((first, end))
    return joined


def compare_machine(state: TrainState, now: dict) -> list[str]:
    """A line where the resumed run's device or versions are not those that its checkpoint recorded.

    Args:
        now: `describe_machine` of this process.
    """
    before = state.training_info
    changes = []
    for name in ("device", "device_name"):
        if name in before and kind_of_device(before[name]) != kind_of_device(now[name]):
            changes.append(f"{name} {before[name]} -> {now[name]}")
    versions = before.get("versions")
    for package in ("torch", "lerobot"):
        recorded = versions.get(package) if isinstance(versions, dict) else None
        if recorded is not None and recorded != now["versions"][package]:
            changes.append(f"{package} {recorded} -> {now['versions'][package]}")
    if not changes:
        return []
    return [f"{', '.join(changes)}: the batches stay the same, rounding and noise may not"]


def kind_of_device(name) -> str:
    """cuda for cuda:1: which one of several devices changes nothing."""
    return str(name).partition(":")[0]


def describe_data(source: Source, held_out: Tensor) -> dict:
    """What a checkpoint records of its run's data.

    Args:
        held_out: (E,) positions in `source.episodes`.

    Returns:
        Counts of episodes, frames and bytes of pictures, hashes of all values, of the videos' sizes and of some pictures, the
        held-out episodes, and the library that decodes the videos.
    """
    tasks = source.tasks
    if list(tasks) == list(range(len(tasks))):  # as older checkpoints recorded them
        tasks = list(tasks.values())
    digest = hashlib.sha256(json.dumps([source.starts.tolist(), tasks]).encode())
    for _, values in sorted(source.columns.items()):
        digest.update(json.dumps(values).encode() if isinstance(values, list) else values.numpy())
    videos = {path for videos in source.videos.values() for path in videos.files if path.is_file()}
    picture_bytes = sum(path.stat().st_size for path in videos)
    picture_bytes += sum(column.nbytes for column in source.images.values())
    data = {
        "episodes": len(source.episodes),
        "frames": source.rows,
        "picture_bytes": picture_bytes,
        "sha256": digest.hexdigest(),
        "videos_sha256": hash_of_videos(source),
        "pictures_sha256": hash_of_pictures(source),
        "held_out": [source.episode_ids[i] for i in held_out.tolist()],
    }
    depth = depth_ranges(source.meta.features)
    data["depth"] = {key: [asdict(depth[key]), depth_unit(source.meta.features[key])] for key in depth}
    if source.videos.keys() - depth.keys():  # depth is always PyAV's
        data["video_decoder"] = Decoder(source, None).library
    return data


def hash_of_videos(source: Source) -> str:
    """A hash of each camera's video files in order, by their sizes: names and dates change when a dataset is moved."""
    sizes = []
    for key, videos in sorted(source.videos.items()):
        sizes.append([key, [path.stat().st_size for path in videos.files if path.is_file()]])
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


def hash_of_pictures(source: Source) -> str:
    """A hash that differs for other files and pictures of the same sizes, without reading all of them.

    It covers some bytes in the middle of each video, the length of each stored picture, and a few whole pictures.
    """
    digest = hashlib.sha256()
    for key, videos in sorted(source.videos.items()):
        digest.update(key.encode())
        for path in filter(Path.is_file, videos.files):
            digest.update(middle_of(path))
    for key, pictures in sorted(source.images.items()):
        digest.update(key.encode())
        for chunk in pictures.chunks:
            lengths = pc.fill_null(pc.binary_length(chunk.field("bytes")), 0)
            digest.update(lengths.to_numpy(zero_copy_only=False).tobytes())
        files = list(filter(Path.is_file, source.picture_files(key)))
        digest.update(json.dumps([path.stat().st_size for path in files]).encode())
        for i in evenly_spread(len(files)):
            digest.update(middle_of(files[i]))
        for row in evenly_spread(len(pictures)):
            digest.update(pictures[row]["bytes"].as_py() or b"")
    return digest.hexdigest()


def middle_of(path: Path) -> bytes:
    """Some bytes in the middle of a file: encoded pixels, after the headers that files of a kind share."""
    with open(path, "rb") as file:
        file.seek(path.stat().st_size // 2)
        return file.read(SAMPLE_BYTES)


def evenly_spread(count: int) -> list[int]:
    """SAMPLES of the first `count` numbers, or all of them."""
    samples = min(count, SAMPLES)
    return [i * count // samples for i in range(samples)]


def compare_data(state: TrainState | None, now: dict, config: TrainConfig) -> list[str]:
    """A line for each way in which a resumed run's data differ from those that its checkpoint recorded.

    Args:
        now: of `describe_data`.
        config: this run's settings.
    """
    before = state.trainer_state.get("data") if state else None
    if before is None:  # a new run, or a checkpoint of an older version
        return []
    changes = []
    settings = config.asdict()
    change = data_change(before, now)
    if change is not None:
        changes += changed(DATA_FIELDS, state.train_config, settings)
        changes.append(f"dataset: {change}; from here on this is another run")
    decoder_before = before.get("video_decoder")
    decoder = now.get("video_decoder")
    if None not in (decoder_before, decoder) and decoder_before != decoder:
        changes.append(
            f"video decoder {decoder_before} -> {decoder}: they may round a pixel differently, so from here on this may be "
            "another run, unless its frames are in the frame cache"
        )
    if set(now["held_out"]) != set(before["held_out"]):
        changes += changed(SPLIT_FIELDS, state.train_config, settings)
    if not set(now["held_out"]) <= set(before["held_out"]):
        change = f"{before['held_out']} -> {now['held_out']}"
        changes.append(f"held-out episodes: {change}; the run has trained on some of them")
    return changes


def data_change(before: dict, now: dict) -> str | None:
    """How the data differ from those that a checkpoint recorded; None if they do not. Older checkpoints recorded less."""
    counts_before = f"{before['episodes']} episodes of {before['frames']} frames"
    counts_now = f"{now['episodes']} episodes of {now['frames']} frames"
    if before["sha256"] != now["sha256"]:
        if counts_before == counts_now:
            return f"{counts_now}, but with other values"
        return f"{counts_before} -> {counts_now}"
    # The bytes of pictures in a table depend on how Arrow holds them; their hash, which older checkpoints lack, does not.
    same_pictures = before.get("pictures_sha256") == now["pictures_sha256"]
    if not same_pictures and before.get("picture_bytes", now["picture_bytes"]) != now["picture_bytes"]:
        return f"its videos or pictures changed ({before['picture_bytes']} -> {now['picture_bytes']} bytes)"
    if before.get("depth", now["depth"]) != now["depth"]:
        return "the range or the unit of its depth changed"
    if before.get("videos_sha256", now["videos_sha256"]) != now["videos_sha256"]:
        return "its videos changed places or sizes"
    if before.get("pictures_sha256", now["pictures_sha256"]) != now["pictures_sha256"]:
        return "its videos or pictures changed, or changed places"
    return None


def compare_optimizers(state: TrainState | None, checkpoint: Path | None, policy, config: TrainConfig) -> list[str]:
    """A line for each setting of the optimizer and of the learning rate that differs from the run's, with its presets.

    Args:
        policy: LeRobot's config of the policy, with this run's flags.
    """
    if state is None:
        return []
    settings = config.asdict()
    config_before = copy.copy(config)
    for name in OPTIMIZER_FIELDS:
        setattr(config_before, name, state.train_config[name])
    before = optimizer_meant(load_policy_config(checkpoint, None, "cpu"), config_before)
    now = optimizer_meant(policy, config)
    different = [name for name in OPTIMIZER_FIELDS if before[name] != now[name]]
    return changed(different, state.train_config, settings)


def optimizer_meant(policy, config: TrainConfig) -> dict:
    """The values of OPTIMIZER_FIELDS after a policy's presets have filled in those that are unset."""
    optimizer = optimizer_preset(policy, config)
    schedule = scheduler_preset(policy, config)
    if schedule is None:
        schedule = (config.lr_schedule or "constant", config.warmup_steps or 0)
    return {
        "lr": optimizer.lr,
        "weight_decay": getattr(optimizer, "weight_decay", None),
        "grad_clip_norm": optimizer.grad_clip_norm or None,
        "warmup_steps": schedule,
        "lr_schedule": schedule,
    }


def compare_learning_rates(state: TrainState | None, policy_config, config: TrainConfig) -> list[str]:
    """A line where other --steps move a learning rate that ends with the run."""
    steps_before = state.train_config["steps"] if state else config.steps
    if steps_before == config.steps:
        return []
    last_step = min(steps_before, config.steps)
    config_before = copy.copy(config)
    config_before.steps = steps_before  # `replace` would refuse a warm-up that is longer than these
    before = make_schedule(policy_config, config_before)
    now = make_schedule(policy_config, config)
    peak = config.lr or policy_config.get_optimizer_preset().lr
    first_step = min(state.trainer_state["step"], last_step - 1)
    steps = [first_step + i for i in evenly_spread(last_step - first_step)]
    furthest = max(steps, key=lambda step: abs(before(step) - now(step)))
    # Report the last step, or if the rates agree there, the step at which they differ most.
    for step, digits in ((last_step - 1, 3), (furthest, 9)):
        rates = [f"{peak * factor(step):.{digits}g}" for factor in (before, now)]
        if rates[0] != rates[1]:
            return [
                f"--steps: {steps_before} -> {config.steps}: the learning rate ends with the run, at step {step + 1} it is "
                f"{rates[0]} -> {rates[1]}"
            ]
    return []
