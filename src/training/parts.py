"""The parts of a run, made from its settings: the data, the policy with its processors, the loader."""

import copy
import os
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch

from config import TrainConfig
from data.frames import Frames
from data.loader import Loader
from data.observations import check_patterns, matches, name_before, observation_names, rename_source
from data.opening import open_metadata, open_source
from data.padding import pad_sources
from data.source import Source
from data.union import unite
from errors import UserError
from policy.adapters import add_adapters, freeze
from policy.factory import build_policy
from policy.loaded import check_processors
from policy.weights_dtype import cast_weights
from processors.features import parse_rename, window_deltas
from processors.pipelines import (
    adapt_processors,
    has_processors,
    load_processors,
    make_processors,
    resize_of,
    set_rename,
)
from runtime import thread_count
from training.distributed import Distributed
from training.feature_store import can_store_features, frame_cache_mode, open_features
from training.memory import Memory, estimate_memory
from training.policy_plan import PolicyPlan, adapters_of


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
