"""The parts of a run, made from its settings: the data, the policy with its processors, the loader."""

from pathlib import Path

import hub
from checkpoints.folder import verify_policy
from config import TrainConfig
from data.frames import Frames
from data.loader import Loader
from data.source import open_dataset
from data.union import unite
from errors import UserError, nearest
from policy.adapters import add_adapters, freeze
from policy.factory import build_policy, load_policy_config, policy_config, policy_folder
from policy.presets import apply_flags
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
from runtime import threads


def build_source(config: TrainConfig):
    """The dataset, or several as one, with the episodes to train on and those held out."""
    chosen = ",".join(text for text in (config.episodes, config.val_episodes) if text) if config.episodes else None
    root, several = config.dataset_root, len(config.dataset_id) > 1
    if root and all(Path(name).expanduser().is_dir() for name in config.dataset_id):
        raise UserError(
            f"--dataset_root {root} is where a dataset of the Hub is downloaded into, and {config.dataset_id[0]} is a folder here: "
            "leave the flag out, or pass the folder meant as --dataset_id"
        )
    roots = [str(Path(root) / name) if root and several else root for name in config.dataset_id]
    named = zip(config.dataset_id, roots, strict=True)
    return unite([open_dataset(name, root, config.revision, chosen) for name, root in named])


def build_parts(config: TrainConfig, resumed: Path | None, source, device):
    """(policy, preprocessor, postprocessor), on the device: from the checkpoint, from --policy_path, or afresh.

    Raises:
        UserError: the data do not fit the policy, or the Hub has no such one.
    """
    folder = resumed or (hub.fetch(config.policy_path, "--policy_path") if config.policy_path else None)
    if folder is not None and not resumed:
        folder = policy_folder(folder)
        verify_policy(folder)
    rename = parse_rename(config.rename)
    size = config.image_size
    if size is None and folder and not resumed and has_processors(folder):
        size = resize_of(load_processors(folder, "cpu")[0])
    inputs, outputs = policy_features(source.meta, size)
    if wrong := [
        f"--rename {old}: it has no such observation{nearest(old, inputs)}" for old in rename if old not in inputs
    ]:
        source.require(wrong)
    inputs = {rename.get(key, key): feature for key, feature in inputs.items()}
    if folder is None:
        policy_cfg = policy_config(config.policy, config.policy_args, str(device))
        policy_cfg.input_features, policy_cfg.output_features = inputs, outputs
    else:
        policy_cfg = load_policy_config(folder, None if resumed else config.policy_args, str(device))
        source.require(feature_problems(policy_cfg, inputs, outputs, folder.name))
        known, used = getattr(policy_cfg, "tasks", None), source.columns["task_index"].unique().tolist()
        if new := [source.tasks[i] for i in used if known and source.tasks[i] not in known]:
            message = f"task {new[0]!r} is none that {folder.name} was trained on: {known}"
            source.require([f"{message}: pass --episodes of those, or train afresh"])
        if not resumed:  # pictures may have another size than those it was trained on
            policy_cfg.input_features = {key: inputs.get(key, f) for key, f in policy_cfg.input_features.items()}
    if not resumed:
        tell_names(policy_cfg, source.meta.features)
    apply_flags(policy_cfg, config)
    if not resumed and policy_cfg.use_peft and config.peft:
        raise UserError(f"--peft: {folder.name} holds adapters already: leave the flag out to train those on")
    if resumed:
        source.require()
        preprocess, postprocess = load_processors(folder, str(device))
        if rename:
            set_rename(preprocess, rename)
        return finished(policy_cfg, source.meta, folder, config), preprocess, postprocess
    stats = usable_stats(source.meta, config.imagenet_stats == "on")
    stats = {rename.get(key, key): value for key, value in stats.items()}
    source.require(stats_problems(policy_cfg, stats) + policy_problems(policy_cfg, size))
    policy = finished(policy_cfg, source.meta, folder, config)
    if folder and has_processors(folder):
        return policy, *adapt_processors(folder, policy_cfg, stats, config.image_size, rename)
    return policy, *make_processors(policy_cfg, source.meta, stats, config.image_size, rename)


def tell_names(policy_cfg, features: dict) -> None:
    """Tell a policy's config what else of the dataset it keeps, as LeRobot's make_policy does."""
    names = features.get("action", {}).get("names")
    if hasattr(policy_cfg, "action_feature_names") and names is not None:
        policy_cfg.action_feature_names = list(names)
    if hasattr(policy_cfg, "set_dataset_feature_metadata"):
        policy_cfg.set_dataset_feature_metadata(features)


def finished(policy_cfg, meta, folder: Path | None, config: TrainConfig):
    """The policy with its adapters and what is frozen."""
    policy = build_policy(policy_cfg, meta, folder)
    if config.peft and not policy_cfg.use_peft:
        base = folder.resolve() if Path(config.policy_path).expanduser().exists() else config.policy_path
        policy = add_adapters(policy, str(base), config.peft, config.peft_r, config.peft_args)
    if config.freeze:
        freeze(policy, config.freeze)
    return policy


def build_loader(
    config: TrainConfig, source, episodes, policy, preprocess, samples_seen: int, distributed, say
) -> Loader:
    """The batches of the run from `samples_seen` on, of the given positions in `source.episodes`."""
    workers = threads(config.num_threads)
    cache = (config.frame_cache, config.cache_dir)
    frames = Frames(source, resize_of(preprocess), *cache, workers, distributed.device, config.quiet, say)
    loader = Loader(
        source,
        frames,
        window_deltas(policy.config, source.meta),
        config.batch_size,
        config.seed,
        samples_seen,
        getattr(policy.config, "drop_n_last_frames", 0),
        distributed.device,
        config.dataset_weights,
        episodes,
        distributed.rank,
        distributed.size,
    )
    if loader.samples_per_epoch < config.batch_size:
        say(
            f"a batch of {config.batch_size} is more than the {loader.samples_per_epoch} frames there are to train on: it holds some twice"
        )
    return loader
