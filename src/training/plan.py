"""Which run is meant: settings, output folder and checkpoint, settled before anything heavy is loaded."""

import copy
import hashlib
import json
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

import hub
from checkpoints.folder import (
    find_checkpoints,
    find_resume,
    has_backup,
    read_json,
    read_state,
    sort_key,
    step_of,
)
from checkpoints.writer import sole_writer
from config import FIELDS, TrainConfig, check_names, merge, read_config_file
from errors import UserError
from exchange.lerobot_runs import from_lerobot, lerobot_checkpoint
from policy.factory import policy_folder
from runtime import pick_precision
from training.distributed import Distributed
from training.launch import make_distributed
from training.learner import make_schedule

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
)  # a resumed run keeps its policy
PRESET_FIELDS = ("batch_size", "ema_decay", "augment", "image_size")  # None: as the policy's preset has it
# another value of these is another run
COURSE_FIELDS = (
    "dataset_id", "dataset_weights", "rename", "revision", "episodes", "val_fraction", "val_episodes",
    "batch_size", "lr", "weight_decay", "grad_clip_norm", "compile", "deterministic",
    "warmup_steps", "lr_schedule", "ema_decay", "augment", "seed", "precision", "grad_accumulation_steps",
)  # fmt: skip


def settle(settings: dict, held: ExitStack):
    """What `settings` ask for: processes, config, output folder, checkpoint to go on from, its state, and what to warn of.

    The output folder is this run's alone until `held` is closed.

    Raises:
        UserError: unknown or contradicting settings, no such checkpoint, or an output folder that is in use.
    """
    check_names(settings, "for train()")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    given = together(read_config_file(settings["config_path"]) if settings.get("config_path") else {}, settings)
    given |= {name: os.path.expanduser(given[name]) for name in ("output_dir", "dataset_root") if given.get(name)}
    distributed = held.enter_context(make_distributed(given.get("device") or "auto"))
    with distributed.main_first():
        return distributed, *settle_one(given, held, distributed)


def together(file: dict, settings: dict) -> dict:
    """The settings over those of a file. Minutes stand instead of steps beside them, and either instead of the file's other."""
    lengths = {"steps", "minutes"}
    if any(settings.get(name) is not None for name in lengths):
        file = {name: value for name, value in file.items() if name not in lengths}
    given = {**file, **settings}
    return {name: value for name, value in given.items() if name != "steps" or given.get("minutes") is None}


def settle_one(given: dict, held: ExitStack, distributed: Distributed):
    """The same in one of the processes."""
    asked, output_dir = given.get("resume_from_checkpoint"), given.get("output_dir")
    if asked is None or (output_dir is None and asked in ("latest", "auto")):
        given = with_its_policy(given)
    if output_dir is None and asked in (None, "latest", "auto"):
        output_dir = default_output_dir(merge(given))
    elif output_dir is None and has_backup(place := Path(asked).expanduser()):
        output_dir = place.parent  # where it is put back
    if output_dir is not None and distributed.is_main:
        held.enter_context(sole_writer(Path(output_dir)))
    if theirs := lerobot_checkpoint(asked):
        resumed, changes = from_lerobot(theirs), []
    else:
        resumed, changes = find_resume(asked, output_dir and Path(output_dir)) if asked else (None, [])
    state = None if resumed is None else read_state(resumed, given.get("resume_step"))
    if resumed is None and asked is not None:  # auto, which found none
        given = with_its_policy(given)
    if state is not None:  # what the preset has filled in stays
        given = {name: value for name, value in given.items() if value is not None or name not in PRESET_FIELDS}
    config = merge(given, state and state.train_config)
    config = replace(config, precision=pick_precision(config.precision, distributed.use(config.device)))
    if state is not None:
        changes += compare(config, state, resumed, distributed.size)
    if output_dir is None:
        came = Path(asked).expanduser().resolve() != resumed.resolve()  # from the Hub, or from LeRobot
        beside = not came and step_of(resumed) is not None
        output_dir = resumed.parent if beside else default_output_dir(config)
        if distributed.is_main:
            held.enter_context(sole_writer(output_dir))
    output_dir = Path(output_dir)
    newest = max(find_checkpoints(output_dir), key=sort_key, default=None)
    if newest is not None and (resumed is None or resumed.resolve().parent != output_dir.resolve()):
        raise UserError(
            f"--output_dir {output_dir} already holds {newest.name}: pass --resume_from_checkpoint latest to go on "
            "from it, or another --output_dir"
        )
    if newest is not None and newest.resolve() != resumed.resolve():
        state.trainer_state["course"] = 1 + sort_key(newest)[0]
        changes.append(
            f"{newest} is further on: checkpoints after {resumed.name} are replaced as this run comes to them"
        )
    return config, output_dir, resumed, state, changes


def with_its_policy(given: dict) -> dict:
    """The settings, with --policy as the folder or Hub repo of --policy_path has it if there is one.

    Raises:
        UserError: they name another, or it holds none.
    """
    place = given.get("policy_path")
    if not place:
        return given
    name = read_json(policy_folder(hub.fetch(place, "--policy_path")) / "config.json").get("type")
    if given.get("policy", name) != name:
        raise UserError(f"--policy {given['policy']}: --policy_path {place} holds a policy {name}: leave --policy out")
    return {**given, "policy": name}


def default_output_dir(config: TrainConfig) -> Path:
    names = "+".join(Path(name).expanduser().resolve().name for name in config.dataset_id)
    return Path("outputs") / f"{names}_{config.policy}"


def compare(config: TrainConfig, state, resumed: Path, processes: int) -> list[str]:
    """One line for each setting that changes the course of the resumed run; what cannot change is refused."""
    now, changes = config.asdict(), []
    was = {name: f.default for name, f in FIELDS.items()} | state.train_config
    if state.trainer_state["step"] > config.steps:
        raise UserError(
            f"{resumed} is at step {state.trainer_state['step']}, past --steps {config.steps}: pass more steps"
        )
    if now["minutes"] != was["minutes"]:
        raise UserError(
            f"--minutes: {resumed.name} is of a run of {was['steps']} steps, which were fixed when it began: pass --steps to change them"
        )
    for name in POLICY_FIELDS:
        if now[name] != was[name]:
            raise UserError(
                f"--{name}: {resumed.name} was trained with {was[name]}, got {now[name]}: "
                "a resumed run keeps its policy, leave the flag out or train afresh"
            )
    for name in COURSE_FIELDS:
        told_by_data = name == "dataset_id" and "data" in state.trainer_state  # which may have been moved
        if now[name] != was[name] and was[name] != "auto" and not told_by_data:  # auto: lerobot-train's --precision
            changes.append(
                f"--{name}: {was[name]} -> {now[name]}; from here on this is another run than the one that wrote {resumed.name}"
            )
    before = state.trainer_state["world_size"]
    if processes != before:
        changes.append(f"{before} -> {processes} processes: the batches stay what they were, rounding and noise do not")
    return changes


def data_of(source, held_out) -> dict:
    """What a checkpoint keeps of its run's data: how much, a hash of all but the pixels, bytes of those, held-out episodes.

    Args:
        held_out: (E,) positions in `source.episodes`.
    """
    digest = hashlib.sha256(json.dumps([source.starts.tolist(), source.tasks]).encode())
    for _, values in sorted(source.columns.items()):
        digest.update(json.dumps(values).encode() if isinstance(values, list) else values.numpy())
    files = {path for videos in source.videos.values() for path in videos.files if path.is_file()}
    pictures = sum(path.stat().st_size for path in files) + sum(column.nbytes for column in source.images.values())
    counts = {"episodes": len(source.episodes), "frames": source.rows, "picture_bytes": pictures}
    return {**counts, "sha256": digest.hexdigest(), "held_out": [source.places[i] for i in held_out.tolist()]}


def compare_rates(state, learner) -> list[str]:
    """A line where other --steps move a learning rate that ends with the run."""
    was = learner.config.steps if state is None else state.train_config["steps"]
    if was == learner.config.steps:
        return []
    old = copy.copy(learner.config)
    old.steps = was
    end = min(was, learner.config.steps)
    before, now = (factor(end - 1) for factor in (make_schedule(learner.policy, old), learner.factor))
    if abs(before - now) <= 0.01 * before:
        return []
    rates = f"{learner.peaks[0] * before:.3g} -> {learner.peaks[0] * now:.3g}"
    return [
        f"--steps: {was} -> {learner.config.steps}: the learning rate ends with the run, at step {end} it is {rates}"
    ]


def compare_data(state, now: dict) -> list[str]:
    """A line for what the data of the resumed run (None of a fresh one) were and are not `now`: of `data_of` both."""
    was = state and state.trainer_state.get("data")  # checkpoints of older versions have none
    if not was:
        return []
    changes = []
    before, after = (f"{data['episodes']} episodes of {data['frames']} frames" for data in (was, now))
    if was["sha256"] != now["sha256"]:
        message = f"{before} -> {after}" if before != after else f"{after}, but with other values"
        changes.append(f"dataset: {message}; from here on this is another run")
    elif was.get("picture_bytes", now["picture_bytes"]) != now["picture_bytes"]:
        message = f"{was['picture_bytes']} -> {now['picture_bytes']} bytes"
        changes.append(f"dataset: its videos or pictures are others ({message}); from here on this is another run")
    if not set(now["held_out"]) <= set(was["held_out"]):
        message = f"held-out episodes: {was['held_out']} -> {now['held_out']}"
        changes.append(f"{message}; those that were trained on are not unseen")
    return changes


def fix_steps(run) -> TrainConfig:
    """The run's settings with --steps such that they take --minutes; the run itself stands where it stood.

    Trains on its first batch for 3 % of the minutes, 20 seconds at most, and takes all of that back.
    """
    batch, config, policy = run.loader.batch_at(run.samples_seen), run.config, run.policy
    weights = copy.deepcopy(policy.state_dict())
    policy.train()
    seconds = seconds_of(lambda: run.learner.step(batch, 0), run.distributed, at_most=min(20.0, 1.8 * config.minutes))
    policy.load_state_dict(weights)
    config = replace(config, steps=max(1, round(60 * config.minutes / seconds)))
    run.learner.start_over(config)
    run.report.set_steps(config.steps)
    run.report.say(f"{config.minutes:g} minutes are {config.steps:,} steps of {seconds:.3f} s")
    return config


def seconds_of(call, distributed: Distributed, at_most: float) -> float:
    """How long a call takes: the median of those within `at_most` seconds, the first two left out; of the slowest process."""
    times, end, enough = [], time.perf_counter() + at_most, 0
    while not enough:
        begun = time.perf_counter()
        call()
        if distributed.device.type == "cuda":
            torch.cuda.synchronize(distributed.device)  # waits for the device
        times.append(time.perf_counter() - begun)
        (enough,) = distributed.all_reduce_max(len(times) >= 3 and time.perf_counter() > end)
    return distributed.all_reduce_max(round(1e9 * statistics.median(times[2:])))[0] / 1e9
