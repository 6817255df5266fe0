"""Which run is meant: settings, output folder and checkpoint, settled before anything heavy is loaded."""

import copy
import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import checkpoint as checkpoints
import hub
from config import FIELDS, TrainConfig, UserError, check_names, merge, read_config_file
from convert import from_lerobot, lerobot_checkpoint, policy_folder
from optim import make_schedule
from runtime import pick_precision
from world import World, make_world
from writer import sole_writer

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
    world = held.enter_context(make_world(given.get("device") or "auto"))
    with world.main_first():
        return world, *settle_one(given, held, world)


def together(file: dict, settings: dict) -> dict:
    """The settings over those of a file. Minutes stand instead of steps beside them, and either instead of the file's other."""
    lengths = {"steps", "minutes"}
    if any(settings.get(name) is not None for name in lengths):
        file = {name: value for name, value in file.items() if name not in lengths}
    given = {**file, **settings}
    return {name: value for name, value in given.items() if name != "steps" or given.get("minutes") is None}


def settle_one(given: dict, held: ExitStack, world: World):
    """The same in one of the processes."""
    asked, output_dir = given.get("resume_from_checkpoint"), given.get("output_dir")
    if asked is None or (output_dir is None and asked in ("latest", "auto")):
        given = with_its_policy(given)
    if output_dir is None and asked in (None, "latest", "auto"):
        output_dir = default_output_dir(merge(given))
    elif output_dir is None and checkpoints.is_aside(place := Path(asked).expanduser()):
        output_dir = place.parent  # where it is put back
    if output_dir is not None and world.is_main:
        held.enter_context(sole_writer(Path(output_dir)))
    if theirs := lerobot_checkpoint(asked):
        resumed, changes = from_lerobot(theirs), []
    else:
        resumed, changes = checkpoints.find_resume(asked, output_dir and Path(output_dir)) if asked else (None, [])
    state = None if resumed is None else checkpoints.read_state(resumed, given.get("resume_step"))
    if resumed is None and asked is not None:  # auto, which found none
        given = with_its_policy(given)
    if state is not None:  # what the preset has filled in stays
        given = {name: value for name, value in given.items() if value is not None or name not in PRESET_FIELDS}
    config = merge(given, state and state.train_config)
    config = replace(config, precision=pick_precision(config.precision, world.use(config.device)))
    if state is not None:
        changes += compare(config, state, resumed, world.size)
    if output_dir is None:
        came = Path(asked).expanduser().resolve() != resumed.resolve()  # from the Hub, or from LeRobot
        beside = not came and checkpoints.step_of(resumed) is not None
        output_dir = resumed.parent if beside else default_output_dir(config)
        if world.is_main:
            held.enter_context(sole_writer(output_dir))
    output_dir = Path(output_dir)
    newest = max(checkpoints.find_checkpoints(output_dir), key=checkpoints.place_of, default=None)
    if newest is not None and (resumed is None or resumed.resolve().parent != output_dir.resolve()):
        raise UserError(
            f"--output_dir {output_dir} already holds {newest.name}: pass --resume_from_checkpoint latest to go on "
            "from it, or another --output_dir"
        )
    if newest is not None and newest.resolve() != resumed.resolve():
        state.trainer_state["course"] = 1 + checkpoints.place_of(newest)[0]
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
    name = checkpoints.read_json(policy_folder(hub.fetch(place, "--policy_path")) / "config.json").get("type")
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
        told = f"{before} -> {after}" if before != after else f"{after}, but with other values"
        changes.append(f"dataset: {told}; from here on this is another run")
    elif was.get("picture_bytes", now["picture_bytes"]) != now["picture_bytes"]:
        told = f"{was['picture_bytes']} -> {now['picture_bytes']} bytes"
        changes.append(f"dataset: its videos or pictures are others ({told}); from here on this is another run")
    if not set(now["held_out"]) <= set(was["held_out"]):
        told = f"held-out episodes: {was['held_out']} -> {now['held_out']}"
        changes.append(f"{told}; those that were trained on are not unseen")
    return changes
