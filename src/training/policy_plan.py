"""What a run's policy is built from: a checkpoint, a base or settings, and how the dataset fits it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import hub
from checkpoints.folder import verify_policy
from config import TrainConfig
from data.depth import DepthRange, depth_lines, depth_ranges, range_warnings
from data.names import joint_names, order_warnings
from data.source import Source
from data.statistics import fill_statistics
from data.union import size_problems
from errors import UserError, as_user_error, first_of
from policy.adapter_settings import adapter_settings
from policy.factory import load_policy_config, policy_config
from policy.migration import resolve_policy_folder
from policy.presets import apply_training_flags, check_presets
from policy.quantize import check_quantize
from policy.training_record import trained_datasets, trained_depth, trained_joint_names
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
)
from processors.padding import check_records, to_common_units
from processors.pipelines import (
    has_processors,
    load_processors,
    resize_of,
    saved_rename,
)
from processors.statistics import IMAGENET, needed_statistics, stats_problems, usable_stats
from runtime import thread_count
from training.distributed import Distributed
from trust import read_adapter_config

PICTURES = ("video", "image")  # dtypes of cameras


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


@dataclass
class PolicyData:
    """What the dataset gives a policy, under the names and in the sizes that the policy gets.

    Attributes:
        given: {old: new} names of observations that the user, the base or `--rename auto` gave.
        rename: those of them by which the policy's preprocessor renames.
        image_size: (H, W) to which cameras are resized; None for no resize.
        own_inputs: the dataset's features, under its own names.
        inputs, outputs: its features, under the policy's names.
        notes: how cameras were paired.
    """

    given: dict[str, str]
    rename: dict[str, str]
    image_size: list[int] | None
    own_inputs: dict
    inputs: dict
    outputs: dict
    notes: list[str]


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

    # The policy's features: the dataset's, and cameras that it does without.
    data = data_for_policy(config, source, checkpoint, folder, policy, is_base=base is not None)
    if data.given != parse_rename(config.rename) or AUTO in (config.rename or []):
        config = replace(config, rename=[f"{old}={new}" for old, new in data.given.items()] or None)
    empty = fit_features(policy, data, source, folder, is_base=base is not None)
    features = {data.rename.get(key, key): feature for key, feature in source.meta.features.items()}
    if checkpoint is None:
        set_dataset_names(policy, features)
    apply_training_flags(policy, config)
    check_presets(policy, config)
    if base and policy.use_peft and config.peft:
        raise UserError(f"--peft: {folder.name} holds adapters already. Leave the flag out to train those further")
    check_adapters(policy, folder, config, distributed.kind)

    # Statistics to normalise by; a checkpoint's processors hold their own.
    datasets = bring_to_common_units(policy, source, data, checkpoint)
    stats = None
    if checkpoint is None:
        stats = checked_stats(policy, source, data, empty, config)
    unused = unused_observations(policy, data.own_inputs, data.rename)
    source.require(size_problems(source, data.own_inputs.keys() - set(unused), data.image_size))

    # In what they differ from those that the policy was trained with.
    names = names_of(policy, features)
    depth = {key: recorded for key, recorded in depth_ranges(features).items() if key in policy.input_features}
    warnings = []
    if folder is not None:
        warnings = order_warnings(trained_joint_names(folder, policy), names, folder.name, source.name)
        cameras = {key: features[key] for key in cameras_of(policy.input_features) if key in features}
        warnings += range_warnings(trained_depth(folder), cameras, folder.name, source.name)
    notes = data.notes + depth_lines(depth)
    if empty:
        notes.append(
            f"cameras of the policy that stay empty, since {source.name} has none of that name: {', '.join(empty)}"
        )
    return PolicyPlan(
        config=policy,
        folder=folder,
        resumed=checkpoint is not None,
        base=base,
        stats=stats,
        rename=data.rename,
        settings=config,
        unused=unused,
        empty=empty,
        joint_names=names,
        depth=depth,
        warnings=warnings,
        notes=notes,
        datasets=datasets,
    )


def data_for_policy(
    config: TrainConfig, source: Source, checkpoint: Path | None, folder: Path | None, policy, *, is_base: bool
) -> PolicyData:
    """What the dataset gives the policy.

    Args:
        folder: the policy's; None for a new one.
        policy: its config.
        is_base: whether the run starts from the policy in the folder, rather than resumes it.

    Raises:
        UserError: a name of --rename does not fit the dataset.
    """
    given, notes = names_for_policy(config, source, folder, policy, is_base=is_base)
    rename = {old: new for old, new in given.items() if old not in source.renamed}
    if checkpoint is not None:  # a run on several datasets may be resumed with one that has only the new name
        has = source.meta.features
        rename = {old: new for old, new in rename.items() if old in has or new not in has}
    image_size = config.image_size
    if image_size is None and folder and (is_base or source.recorded_sizes) and has_processors(folder):
        image_size = resize_of(load_processors(folder, "cpu")[0])
    own_inputs, outputs = policy_features(source.meta, image_size)
    wrong_names = rename_problems(own_inputs, rename, source.left_out)
    if checkpoint is None:
        wrong_names += twice_named(own_inputs, rename)
    if wrong_names:  # else the dataset's own problems are reported later, together with those of its statistics
        source.require(wrong_names)
    return PolicyData(
        given=given,
        rename=rename,
        image_size=image_size,
        own_inputs=own_inputs,
        inputs={rename.get(key, key): feature for key, feature in own_inputs.items()},
        outputs=outputs,
        notes=notes,
    )


def bring_to_common_units(policy, source: Source, data: PolicyData, checkpoint: Path | None) -> list[dict]:
    """Bring padded datasets to common units; returns what a checkpoint records of each, nothing if they are not padded.

    Raises:
        UserError: the checkpoint that the run resumes from was trained in other units.
    """
    records = to_common_units(source, policy, data.rename) if source.own_features else []
    if checkpoint is not None:
        check_records(records, trained_datasets(checkpoint), source.name, checkpoint)
    return records


def checked_stats(policy, source: Source, data: PolicyData, empty: list[str], settings: TrainConfig) -> dict:
    """The statistics that a new policy, or a base on new data, normalises by.

    Args:
        policy: its config.
        empty: its cameras that the dataset does not have.

    Raises:
        UserError: something is wrong with the dataset, or it does not fit the policy.
    """
    stats = complete_stats(policy, source, data.rename, settings)
    problems = policy_problems(policy, data.image_size, data.given, source.left_out)
    if not source.problems:  # else statistics may be missing because their columns are, and shapes be wrong
        problems = stats_problems(policy, stats, empty) + shape_problems(policy) + problems
    source.require(problems)
    return stats


def fit_features(policy, data: PolicyData, source: Source, folder: Path | None, *, is_base: bool) -> list[str]:
    """Give a new policy the dataset's features, or a base those that it can take.

    Args:
        policy: the policy's config, whose features are changed.
        data: what the dataset gives.
        folder: the policy's; None for a new one.
        is_base: whether the run starts from the policy in the folder, rather than resumes it.

    Returns:
        Cameras of the policy that the dataset does not have, and that it does without.

    Raises:
        UserError: the dataset's features or tasks do not fit the policy.
    """
    inputs = data.inputs
    if folder is None:
        policy.input_features = inputs
        policy.output_features = data.outputs
        return []
    problems = feature_problems(
        policy, inputs, data.outputs, folder.name, data.given, source.left_out, fine_tune=is_base
    )
    source.require(problems)
    source.require(task_problems(policy, source, folder.name))
    empty = [key for key in cameras_of(policy.input_features) if key not in inputs]
    if is_base:
        taken = policy.input_features or inputs  # LeRobot too gives a base without features those of the dataset
        policy.input_features = {key: inputs.get(key, feature) for key, feature in taken.items()}
        if pads(policy) or not policy.output_features:
            policy.output_features = data.outputs
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
