"""The parts of a run, made from its settings: the data, the policy with its processors, the loader."""

import copy
import os
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import torch

import hub
from checkpoints.folder import verify_policy
from config import TrainConfig
from data.depth import DepthRange, depth_ranges, range_warnings
from data.frames import Frames
from data.loader import Loader
from data.names import joint_names, order_warnings
from data.observations import check_patterns, matches, name_before, observation_names, rename_source
from data.opening import open_metadata, open_source
from data.padding import pad_sources
from data.source import Source
from data.statistics import fill_statistics
from data.union import size_problems, unite
from errors import UserError, as_user_error, first_of
from policy.adapter_settings import adapter_settings
from policy.adapters import add_adapters, freeze
from policy.factory import build_policy, load_policy_config, policy_config
from policy.loaded import check_processors, trained_datasets, trained_depth, trained_joint_names
from policy.migration import resolve_policy_folder
from policy.presets import apply_training_flags, check_presets
from policy.quantize import check_quantize
from policy.weights_dtype import cast_weights
from processors.bases import AUTO, cameras_of, pads, pair_cameras, pairs_line
from processors.features import (
    ENVIRONMENT_STATE,
    feature_problems,
    parse_rename,
    policy_features,
    policy_problems,
    rename_problems,
    shape_problems,
    twice_named,
    window_deltas,
)
from processors.padding import check_records, to_common_units
from processors.pipelines import (
    adapt_processors,
    has_processors,
    load_processors,
    make_processors,
    resize_of,
    saved_rename,
    set_rename,
)
from processors.statistics import IMAGENET, needed_statistics, stats_problems, usable_stats
from runtime import thread_count
from training.distributed import Distributed
from training.feature_store import can_store_features, frame_cache_mode, open_features
from training.memory import Memory, estimate_memory
from trust import read_adapter_config

PICTURES = ("video", "image")  # dtypes of cameras


def build_source(config: TrainConfig) -> Source:
    """The dataset, or several as one, with the episodes to train on and those held out."""
    root = config.dataset_root
    several = len(config.dataset_id) > 1
    if root and all(Path(os.path.expanduser(name)).is_dir() for name in config.dataset_id):
        raise UserError(
            f"--dataset_root {root} is a folder to download Hub datasets to, and {config.dataset_id[0]} is a local folder. "
            "Leave --dataset_root out, or pass the folder you mean as --dataset_id"
        )
    folders = [str(Path(root) / name) if root and several else root for name in config.dataset_id]
    rename = parse_rename(config.rename)
    sources = []
    for name, folder, observations in zip(config.dataset_id, folders, observations_of(config, folders), strict=True):
        source = open_source(
            name,
            folder,
            config.revision,
            config.episodes,
            observations,
            cache_dir=config.cache_dir,
            quiet=config.quiet,
            val_episodes=config.val_episodes,
            action=name_before(rename, "action"),
            copy_tables=True,
            stream=config.stream,
            cache_gb=config.cache_gb,
        )
        sources.append(source)
    rename_apart(sources, rename)
    if not config.pad_datasets:
        return unite(sources, rename)
    lines = pad_sources(sources)
    source = unite(sources, rename)
    source.warnings += lines
    return source


def observations_of(config: TrainConfig, folders: list) -> list[list[str] | None]:
    """The patterns of --observations for each dataset: of several datasets, each gets the patterns that match something in it.

    Args:
        folders: where each dataset is downloaded to.

    Raises:
        UserError: a pattern matches nothing in any of several datasets.
    """
    patterns = config.observations
    if patterns is None or len(config.dataset_id) == 1:
        return [patterns for _ in config.dataset_id]
    names = []
    for dataset_id, folder in zip(config.dataset_id, folders, strict=True):
        meta = open_metadata(
            dataset_id,
            folder,
            config.revision,
            stream=config.stream,
            cache_dir=config.cache_dir,
            cache_gb=config.cache_gb,
            quiet=config.quiet,
        )
        names.append(observation_names(meta))
    check_patterns(patterns, list(dict.fromkeys(chain.from_iterable(names))), "the datasets")
    return [[pattern for pattern in patterns if any(matches(name, pattern) for name in of_one)] for of_one in names]


def rename_apart(sources: list[Source], rename: dict[str, str]) -> None:
    """Rename features in the sources that the first step of the policy's processors cannot rename.

    These are features that only some of the datasets have, which renaming makes alike, and features whose name does not
    begin with `observation.`, which LeRobot's step does not see.
    """
    holders = {old: sum(old in source.meta.features for source in sources) for old in rename}
    apart = {old for old in rename if holders[old] < len(sources) or not old.startswith("observation.")}
    if apart:
        for source in sources:
            rename_source(source, {old: rename[old] for old in apart if old in source.meta.features})


@dataclass
class PolicyPlan:
    """A policy before its weights are built or read.

    Attributes:
        config: LeRobot's config of the policy, with its features and this run's flags.
        folder: folder with its weights; None for a new policy.
        resumed: whether that folder is a checkpoint of this run, whose processors stay as they are.
        base: what a new adapter's config names as its base: folder or Hub id.
        stats: statistics to normalise by, under the policy's names; None when resumed.
        rename: {name in the source: name that the policy knows}.
        settings: the run's settings; `--rename auto` is the pairs that it found.
        unused: observations of the source that the policy does not take.
        empty: cameras of the policy that the source does not have, and that it does without.
        joint_names: names of the state's and the action's numbers in the dataset, under the policy's names.
        depth: the range of each depth camera that the policy takes, under the policy's names.
        warnings: how these differ from the names that the policy was trained with, a line each.
        notes: how cameras were paired, and which stay empty, a line each.
        datasets: what a checkpoint records of each of several padded datasets; else empty.
    """

    config: object
    folder: Path | None
    resumed: bool
    base: str | None
    stats: dict | None
    rename: dict[str, str]
    settings: TrainConfig
    unused: list[str]
    empty: list[str]
    joint_names: dict[str, list[str]]
    depth: dict[str, DepthRange]
    warnings: list[str]
    notes: list[str]
    datasets: list[dict]


def plan_policy(config: TrainConfig, checkpoint: Path | None, source: Source, distributed: Distributed) -> PolicyPlan:
    """What the policy is built from: the checkpoint, --policy_path, or settings of its own.

    Raises:
        UserError: the data do not fit the policy, or there is no such policy.
    """
    folder = checkpoint
    base = None
    if checkpoint is None and config.policy_path:
        fetched = hub.fetch(config.policy_path, "--policy_path")
        distributed.on_main(lambda: verify_policy(fetched))  # before a folder within it is chosen
        folder = resolve_policy_folder(fetched)
        base = str(folder.resolve()) if Path(os.path.expanduser(config.policy_path)).exists() else config.policy_path

    # The policy's own config.
    if folder is None:
        policy = policy_config(config.policy, config.policy_args, str(distributed.device))
    else:
        policy = load_policy_config(folder, config.policy_args if base else None, str(distributed.device))

    # What the dataset gives, under the names and in the sizes that the policy gets.
    given, notes = names_for_policy(config, source, folder, policy, is_base=base is not None)
    if given != parse_rename(config.rename) or AUTO in (config.rename or []):
        config = replace(config, rename=[f"{old}={new}" for old, new in given.items()] or None)
    rename = {old: new for old, new in given.items() if old not in source.renamed}
    if checkpoint is not None:  # a run on several datasets may be resumed with one that has only the new name
        has = source.meta.features
        rename = {old: new for old, new in rename.items() if old in has or new not in has}
    image_size = config.image_size
    if image_size is None and folder and (base or source.recorded_sizes) and has_processors(folder):
        image_size = resize_of(load_processors(folder, "cpu")[0])
    own_inputs, outputs = policy_features(source.meta, image_size)
    wrong_names = rename_problems(own_inputs, rename, source.left_out)
    if checkpoint is None:
        wrong_names += twice_named(own_inputs, rename)
    if wrong_names:  # else the dataset's own problems are reported below, together with those of its statistics
        source.require(wrong_names)
    inputs = {rename.get(key, key): feature for key, feature in own_inputs.items()}

    # The policy's features: the dataset's, and cameras that it does without.
    empty = fit_features(policy, inputs, outputs, source, folder, given, is_base=base is not None)
    if empty:
        notes.append(
            f"cameras of the policy that stay empty, since {source.name} has none of that name: {', '.join(empty)}"
        )
    features = {rename.get(key, key): feature for key, feature in source.meta.features.items()}
    names = names_of(policy, features)
    depth = {key: recorded for key, recorded in depth_ranges(features).items() if key in policy.input_features}
    warnings = []
    if folder is not None:
        warnings = order_warnings(trained_joint_names(folder, policy), names, folder.name, source.name)
        warnings += range_warnings(trained_depth(folder), depth, folder.name, source.name)
    if checkpoint is None:
        set_dataset_names(policy, features)
    unused = unused_observations(policy, own_inputs, rename)
    apply_training_flags(policy, config)
    check_presets(policy, config)
    if base and policy.use_peft and config.peft:
        raise UserError(f"--peft: {folder.name} holds adapters already. Leave the flag out to train those further")
    check_adapters(policy, folder, config, distributed.kind)

    # Statistics to normalise by; a checkpoint's processors hold their own.
    datasets = []
    if source.own_features:
        datasets = to_common_units(source, policy, rename)
    if checkpoint is not None:
        check_records(datasets, trained_datasets(checkpoint), source.name, checkpoint)
    stats = None
    if checkpoint is None:
        stats = complete_stats(policy, source, rename, config)
        problems = policy_problems(policy, image_size, given, source.left_out)
        if not source.problems:  # else statistics may be missing because their columns are, and shapes be wrong
            problems = stats_problems(policy, stats, empty) + shape_problems(policy) + problems
        source.require(problems)
    source.require(size_problems(source, own_inputs.keys() - set(unused), image_size))
    return PolicyPlan(
        config=policy,
        folder=folder,
        resumed=checkpoint is not None,
        base=base,
        stats=stats,
        rename=rename,
        settings=config,
        unused=unused,
        empty=empty,
        joint_names=names,
        depth=depth,
        warnings=warnings,
        notes=notes,
        datasets=datasets,
    )


def fit_features(
    policy, inputs: dict, outputs: dict, source: Source, folder: Path | None, given: dict[str, str], *, is_base: bool
) -> list[str]:
    """Give a new policy the dataset's features, or a base those that it can take.

    Args:
        policy: the policy's config, whose features are changed.
        inputs, outputs: the dataset's features, under the policy's names.
        folder: the policy's; None for a new one.
        given: {old: new} names of observations, for messages.
        is_base: whether the run starts from the policy in the folder, rather than resumes it.

    Returns:
        Cameras of the policy that the dataset does not have, and that it does without.

    Raises:
        UserError: the dataset's features or tasks do not fit the policy.
    """
    if folder is None:
        policy.input_features = inputs
        policy.output_features = outputs
        return []
    source.require(feature_problems(policy, inputs, outputs, folder.name, given, source.left_out, fine_tune=is_base))
    source.require(task_problems(policy, source, folder.name))
    empty = [key for key in cameras_of(policy.input_features) if key not in inputs]
    if is_base:
        taken = policy.input_features or inputs  # LeRobot too gives a base without features those of the dataset
        policy.input_features = {key: inputs.get(key, feature) for key, feature in taken.items()}
        if pads(policy) or not policy.output_features:
            policy.output_features = outputs
    return empty


def adapters_of(policy_config, folder: Path | None, config: TrainConfig) -> dict:
    """The settings of a policy's adapters: those that it was saved with, or new ones by --peft. Empty without adapters."""
    if policy_config.use_peft:
        return read_adapter_config(folder)
    if config.peft:
        return adapter_settings(config.peft, config.peft_r, config.peft_args)
    return {}


def check_adapters(policy_config, folder: Path | None, config: TrainConfig, kind: str) -> None:
    """Raise a UserError for adapters that cannot be trained, before any weights are read.

    Args:
        kind: of the processes, as in Distributed.
    """
    adapters = adapters_of(policy_config, folder, config)
    if not config.peft_quantize:
        return
    if not adapters:
        raise UserError(
            "--peft_quantize rounds the weights below adapters: expected --peft, got none. Pass --peft lora"
        )
    check_quantize(adapters.get("peft_type") or config.peft, adapters, kind)


def names_for_policy(
    config: TrainConfig, source: Source, folder: Path | None, policy, *, is_base: bool
) -> tuple[dict[str, str], list[str]]:
    """{old: new} names of the dataset's observations that the policy gets, and a line for what the user did not give.

    These are the pairs of --rename, those by which the base itself renames what it was trained on, and those that
    `--rename auto` finds.

    Args:
        folder: the policy's; None for a new one.
        policy: its config.
        is_base: whether the run starts from it.

    Raises:
        UserError: `auto` has no policy whose cameras to pair with.
    """
    names = parse_rename(config.rename)
    notes = []
    has = source.meta.features
    if is_base and has_processors(folder):
        taken = {*names, *names.values(), *has}
        known = {
            old: new
            for old, new in saved_rename(folder).items()
            if old in has and old not in names and new not in taken
        }
        if known:
            names |= known
            pairs = ", ".join(f"{old} -> {new}" for old, new in known.items())
            notes.append(f"renamed as the base was trained: {pairs}")
    if AUTO not in (config.rename or []):
        return names, notes

    if folder is None:
        raise UserError(
            "--rename auto pairs the cameras with those of a base: expected --policy_path. Pass one, or OLD=NEW"
        )
    wanted = cameras_of(policy.input_features)
    cameras = [key for key in source.meta.camera_keys if key not in names and key not in wanted]
    present = {names.get(key, key) for key in has}
    pairs = pair_cameras(cameras, [key for key in wanted if key not in present])
    notes.append(pairs_line(pairs))
    return names | {old: new for old, (new, _) in pairs.items()}, notes


def complete_stats(policy_config, source: Source, rename: dict[str, str], settings: TrainConfig) -> dict:
    """The statistics that a policy normalises by, under its names. What the dataset lacks is computed from its data."""
    imagenet = settings.imagenet_stats == "on"
    lacking = lacking_statistics(policy_config, source, rename, imagenet)
    source.warnings += fill_statistics(source, lacking, thread_count(settings.num_threads))
    stats = usable_stats(source.meta, imagenet)
    return {rename.get(key, key): value for key, value in stats.items()}


def lacking_statistics(policy_config, source: Source, rename: dict[str, str], imagenet: bool) -> dict[str, list[str]]:
    """{feature of the dataset: statistics} that a policy normalises by and the dataset does not have.

    Args:
        rename: {name in the source: name that the policy knows}.
        imagenet: whether cameras get ImageNet's mean and std.
    """
    if source.problems:  # some columns may be missing, and the run is refused anyway
        return {}
    needed = needed_statistics(policy_config)
    lacking = {}
    for key in source.meta.features:
        names = needed.get(rename.get(key, key), ())
        if key == "observation.state":
            # The environment state may be a copy of it.
            names = dict.fromkeys([*names, *needed.get(ENVIRONMENT_STATE, ())])
        known = set(source.meta.stats.get(key, {}))
        if imagenet and key in source.meta.camera_keys:
            known |= set(IMAGENET)
        missing = [name for name in names if name not in known]
        if missing:
            lacking[key] = missing
    return lacking


def names_of(policy_config, features: dict) -> dict[str, list[str]]:
    """{feature: joint names} of a policy's inputs and outputs, for those that have names in the dataset.

    Args:
        features: the dataset's, under the policy's names.
    """
    names = {}
    for key in (*policy_config.input_features, *policy_config.output_features):
        if key in features and features[key]["dtype"] not in PICTURES:
            names_of_key = joint_names(features[key])
            if names_of_key is not None:
                names[key] = names_of_key
    return names


def unused_observations(policy_config, inputs: dict, rename: dict[str, str]) -> list[str]:
    """Observations that a policy does not take, under the dataset's names.

    Args:
        inputs: the dataset's features, under its own names.
        rename: {name in the dataset: name that the policy knows}.
    """
    taken = set(policy_config.input_features)
    if not taken:
        return []  # a base may leave it to its processors
    if ENVIRONMENT_STATE in taken and ENVIRONMENT_STATE not in rename.values():
        taken.add("observation.state")  # which the preprocessor copies
    return [key for key in inputs if rename.get(key, key) not in taken and key != ENVIRONMENT_STATE]


def task_problems(policy_config, source: Source, holder: str) -> list[str]:
    """A line where the dataset has a task that a policy with an embedding of tasks does not know."""
    known = getattr(policy_config, "tasks", None)
    if not known:
        return []
    tasks = source.tasks
    known_texts = set(known)
    for index in source.columns["task_index"].unique().tolist():
        if tasks[index] not in known_texts:
            return [
                f"task {tasks[index]!r} is not one that {holder} was trained on: expected one of {first_of(known)}. "
                "Pass --episodes of those, or train a new policy"
            ]
    return []


def set_dataset_names(policy_config, features: dict) -> None:
    """Write the names of the dataset's features into a policy's config, as LeRobot's make_policy does."""
    names = joint_names(features["action"]) if "action" in features else None
    if hasattr(policy_config, "action_feature_names") and names is not None:
        policy_config.action_feature_names = names
    if hasattr(policy_config, "set_dataset_feature_metadata"):
        with as_user_error(f"policy {policy_config.type}", invalid=ValueError):
            policy_config.set_dataset_feature_metadata(features)


def build_training_policy(plan: PolicyPlan, meta, quiet: bool = True):
    """The policy on its device, with the adapters of --peft, the frozen weights of --freeze, and in --weights_dtype."""
    settings = plan.settings
    adapters = adapters_of(plan.config, plan.folder, settings)
    quantized = None
    if settings.peft_quantize:
        quantized = adapters.get("modules_to_save") or []
    policy = build_policy(plan.config, meta, plan.folder, quantized, quiet)
    if settings.peft and not plan.config.use_peft:
        policy = add_adapters(policy, plan.base, settings.peft, adapters)
    if settings.freeze:
        freeze(policy, settings.freeze)
    cast_weights(policy, plan.config, settings.weights_dtype)
    return policy


def build_processors(plan: PolicyPlan, meta):
    """(preprocessor, postprocessor): a checkpoint's unchanged, a base's with this dataset's statistics, or new ones."""
    image_size = plan.settings.image_size
    if plan.resumed:
        preprocess, postprocess = load_processors(plan.folder, plan.config.device, config=plan.config)
        if plan.rename:
            set_rename(preprocess, plan.rename)
    elif plan.folder and has_processors(plan.folder):
        preprocess, postprocess = adapt_processors(plan.folder, plan.config, plan.stats, image_size, plan.rename)
    else:
        return make_processors(plan.config, meta, plan.stats, image_size, plan.rename)
    check_processors(plan.config, preprocess, postprocess, plan.folder)
    return preprocess, postprocess


def plan_memory(plan: PolicyPlan, meta, distributed: Distributed) -> Memory | None:
    """What the run takes, from a copy of the policy without values; None if only the built policy shows it."""
    if plan.settings.peft or plan.config.use_peft:
        return None  # adapters need the weights that they are added to
    trial = replace_values(plan)
    try:
        with torch.device("meta"):
            policy = build_training_policy(trial, meta)
    except UserError:
        if plan.folder is None:
            raise
        return None  # a new policy may need what a saved one does not
    except Exception:  # whatever a policy's code does with values that are not there
        return None
    return estimate_memory(policy, plan.settings, distributed.kind, distributed.size)


def replace_values(plan: PolicyPlan) -> PolicyPlan:
    """A plan of the same policy on the meta device, with nothing to download or read."""
    config = copy.deepcopy(plan.config)
    config.device = "meta"
    for name in ("pretrained_backbone_weights", "load_vlm_weights"):
        if hasattr(config, name):
            setattr(config, name, None)
    return replace(plan, config=config, folder=None)


def open_loader(
    config: TrainConfig, source: Source, episodes, policy, preprocess, samples_seen: int, distributed, say
) -> Loader:
    """The batches of the run from `samples_seen` on, of the given positions in `source.episodes`."""
    num_threads = thread_count(config.num_threads)
    mode = frame_cache_mode(config, source)
    if mode != config.frame_cache:
        say(
            "streaming: frames are decoded as they are needed (--frame_cache lossless keeps them: the dataset is read once first)"
        )
    frames = Frames.open_or_build(
        source,
        resize_of(preprocess),
        mode=mode,
        cache_dir=config.cache_dir,
        num_threads=num_threads,
        device=distributed.device,
        quiet=config.quiet,
        grow=True,
        say=say,
    )
    deltas = window_deltas(policy.config, source.meta)
    features = None
    if can_store_features(policy, config, source, distributed):
        features = open_features(policy, preprocess, source, frames, config, distributed.device, num_threads, say)
    if features is not None:
        window = next((deltas[key] for key in frames.keys if key in deltas), None)  # the same for every camera
        if window is not None:
            deltas |= dict.fromkeys(features.keys, window)
    loader = Loader(
        source,
        features or frames,
        deltas,
        config.batch_size,
        config.seed,
        drop_n_last_frames=getattr(policy.config, "drop_n_last_frames", 0),
        device=distributed.device,
        weights=config.dataset_weights,
        shuffle=config.shuffle,
        episodes=episodes,
        rank=distributed.rank,
        size=distributed.size,
    )
    if loader.samples_per_epoch < config.batch_size:
        say(
            f"a batch of {config.batch_size} is larger than the {loader.samples_per_epoch} frames to train on: "
            "it holds some of them twice"
        )
    return loader.start(samples_seen)
