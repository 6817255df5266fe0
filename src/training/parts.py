"""The parts of a run, made from its settings: the data, the policy with its processors, the loader."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch

import hub
from checkpoints.folder import verify_policy
from config import TrainConfig
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.source import Source
from data.union import unite
from errors import UserError, nearest
from policy.adapters import adapter_settings, add_adapters, freeze
from policy.factory import build_policy, load_policy_config, policy_config
from policy.migration import resolve_policy_folder
from policy.presets import apply_training_flags
from processors.pipelines import (
    adapt_processors,
    feature_problems,
    has_processors,
    load_processors,
    make_processors,
    parse_rename,
    policy_features,
    policy_problems,
    resize_of,
    set_rename,
    window_deltas,
)
from processors.statistics import stats_problems, usable_stats
from runtime import thread_count


def build_source(config: TrainConfig) -> Source:
    """The dataset, or several as one, with the episodes to train on and those held out."""
    root = config.dataset_root
    several = len(config.dataset_id) > 1
    if root and all(Path(name).expanduser().is_dir() for name in config.dataset_id):
        raise UserError(
            f"--dataset_root {root} is a folder to download Hub datasets to, and {config.dataset_id[0]} is a local folder. "
            "Leave --dataset_root out, or pass the folder you mean as --dataset_id"
        )
    episodes = None
    if config.episodes:
        episodes = ",".join(text for text in (config.episodes, config.val_episodes) if text)
    sources = []
    for name in config.dataset_id:
        folder = str(Path(root) / name) if root and several else root
        sources.append(open_source(name, folder, config.revision, episodes))
    return unite(sources)


@dataclass
class PolicyPlan:
    """A policy before its weights are built or read.

    Attributes:
        config: LeRobot's config of the policy, with its features and this run's flags.
        folder: folder with its weights; None for a new policy.
        resumed: whether that folder is a checkpoint of this run, whose processors stay as they are.
        base: what a new adapter's config names as its base: folder or Hub id.
        stats: statistics to normalise by, under the policy's names; None when resumed.
        rename: {name in the dataset: name that the policy knows}.
        settings: the run's settings.
    """

    config: object
    folder: Path | None
    resumed: bool
    base: str | None
    stats: dict | None
    rename: dict[str, str]
    settings: TrainConfig


def plan_policy(config: TrainConfig, checkpoint: Path | None, source: Source, device: torch.device) -> PolicyPlan:
    """What the policy is built from: the checkpoint, --policy_path, or settings of its own.

    Raises:
        UserError: the data do not fit the policy, or there is no such policy.
    """
    folder = checkpoint
    base = None
    if checkpoint is None and config.policy_path:
        folder = resolve_policy_folder(hub.fetch(config.policy_path, "--policy_path"))
        verify_policy(folder)
        base = str(folder.resolve()) if Path(config.policy_path).expanduser().exists() else config.policy_path

    # What the dataset gives, under the names and in the sizes that the policy gets.
    rename = parse_rename(config.rename)
    image_size = config.image_size
    if image_size is None and base and has_processors(folder):
        image_size = resize_of(load_processors(folder, "cpu")[0])
    inputs, outputs = policy_features(source.meta, image_size)
    unknown = [old for old in rename if old not in inputs]
    if unknown:  # else the dataset's own problems are reported below, together with those of its statistics
        source.require(f"--rename {old}: it has no such observation{nearest(old, inputs)}" for old in unknown)
    inputs = {rename.get(key, key): feature for key, feature in inputs.items()}

    # The policy's own config.
    if folder is None:
        policy = policy_config(config.policy, config.policy_args, str(device))
        policy.input_features = inputs
        policy.output_features = outputs
    else:
        policy = load_policy_config(folder, config.policy_args if base else None, str(device))
        source.require(feature_problems(policy, inputs, outputs, folder.name))
        source.require(task_problems(policy, source, folder.name))
    if base:  # pictures may have another size than those that the base was trained on
        policy.input_features = {key: inputs.get(key, feature) for key, feature in policy.input_features.items()}
    if checkpoint is None:
        set_dataset_names(policy, source.meta.features)
    apply_training_flags(policy, config)
    if config.peft:
        adapter_settings(config.peft, config.peft_r, config.peft_args)  # refused here, before weights are read
    if base and policy.use_peft and config.peft:
        raise UserError(f"--peft: {folder.name} holds adapters already. Leave the flag out to train those further")

    # Statistics to normalise by; a checkpoint's processors hold their own.
    stats = None
    if checkpoint is None:
        stats = usable_stats(source.meta, config.imagenet_stats == "on")
        stats = {rename.get(key, key): value for key, value in stats.items()}
        source.require(stats_problems(policy, stats) + policy_problems(policy, image_size))
    else:
        source.require()
    return PolicyPlan(
        config=policy,
        folder=folder,
        resumed=checkpoint is not None,
        base=base,
        stats=stats,
        rename=rename,
        settings=config,
    )


def task_problems(policy_config, source: Source, holder: str) -> list[str]:
    """A line where the dataset has a task that a policy with an embedding of tasks does not know."""
    known = getattr(policy_config, "tasks", None)
    if not known:
        return []
    for index in source.columns["task_index"].unique().tolist():
        task = source.tasks[index]
        if task not in known:
            return [
                f"task {task!r} is not one that {holder} was trained on: expected one of {known}. "
                "Pass --episodes of those, or train a new policy"
            ]
    return []


def set_dataset_names(policy_config, features: dict) -> None:
    """Write the names of the dataset's features into a policy's config, as LeRobot's make_policy does."""
    names = features.get("action", {}).get("names")
    if hasattr(policy_config, "action_feature_names") and names is not None:
        policy_config.action_feature_names = list(names)
    if hasattr(policy_config, "set_dataset_feature_metadata"):
        policy_config.set_dataset_feature_metadata(features)


def build_training_policy(plan: PolicyPlan, meta):
    """The policy on its device, with its adapters, and frozen where --freeze says so."""
    settings = plan.settings
    policy = build_policy(plan.config, meta, plan.folder)
    if settings.peft and not plan.config.use_peft:
        policy = add_adapters(policy, plan.base, settings.peft, settings.peft_r, settings.peft_args)
    if settings.freeze:
        freeze(policy, settings.freeze)
    return policy


def build_processors(plan: PolicyPlan, meta):
    """(preprocessor, postprocessor): a checkpoint's as they are, a base's with this dataset's statistics, or new ones."""
    if plan.resumed:
        preprocess, postprocess = load_processors(plan.folder, plan.config.device)
        if plan.rename:
            set_rename(preprocess, plan.rename)
        return preprocess, postprocess
    image_size = plan.settings.image_size
    if plan.folder and has_processors(plan.folder):
        return adapt_processors(plan.folder, plan.config, plan.stats, image_size, plan.rename)
    return make_processors(plan.config, meta, plan.stats, image_size, plan.rename)


def checkpoint_bytes(plan: PolicyPlan, meta) -> int | None:
    """Bytes of one checkpoint, estimated without building the policy; None where its code needs real weights to be built."""
    if plan.settings.peft or plan.config.use_peft:
        return 0  # adapters take a few MB
    if plan.folder is not None:
        weights = (plan.folder / "model.safetensors").stat().st_size
    else:
        weights = weight_bytes_on_meta_device(plan.config, meta)
    return None if weights is None else with_optimizer(weights, plan.settings)


def with_optimizer(weights: int, settings: TrainConfig) -> int:
    """Bytes of a checkpoint from those of its weights: Adam keeps two moments of each, and --ema_decay a second copy."""
    copies = 4 if settings.ema_decay else 3
    return copies * weights


def weight_bytes_on_meta_device(policy_config, meta) -> int | None:
    """Bytes of a new policy's weights, from a copy of it that holds none."""
    trial = copy.deepcopy(policy_config)
    trial.device = "meta"
    if hasattr(trial, "pretrained_backbone_weights"):
        trial.pretrained_backbone_weights = None  # nothing to download
    try:
        with torch.device("meta"):
            policy = build_policy(trial, meta)
    except (
        NotImplementedError,
        RuntimeError,
    ):  # torch's, about tensors without values: some policies compute in __init__
        return None
    return weight_bytes(policy)


def weight_bytes(policy) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in policy.parameters())


def open_loader(
    config: TrainConfig, source: Source, episodes, policy, preprocess, samples_seen: int, distributed, say
) -> Loader:
    """The batches of the run from `samples_seen` on, of the given positions in `source.episodes`."""
    num_threads = thread_count(config.num_threads)
    frames = Frames.open_or_build(
        source,
        resize_of(preprocess),
        mode=config.frame_cache,
        cache_dir=config.cache_dir,
        num_threads=num_threads,
        device=distributed.device,
        quiet=config.quiet,
        say=say,
    )
    loader = Loader(
        source,
        frames,
        window_deltas(policy.config, source.meta),
        config.batch_size,
        config.seed,
        drop_n_last_frames=getattr(policy.config, "drop_n_last_frames", 0),
        device=distributed.device,
        weights=config.dataset_weights,
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
