"""From a recorded batch to what the policy takes, and back: features, LeRobot's processors, and the batch itself.

B samples, T steps of history (an axis that is absent without history), C channels, H and W pixels, D numbers.
"""

import math
from pathlib import Path

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import make_pre_post_processors
from lerobot.processor import ImageCropResizeProcessorStep, NormalizerProcessorStep, RenameObservationsProcessorStep
from lerobot.utils.feature_utils import dataset_to_policy_features
from safetensors import SafetensorError

from command_line import split_pair
from errors import UserError, as_user_error, likeliest_pairs, plural, read_json, rename_flag, rename_remedy
from processors.bases import AUTO, camera_problems, pads, width_problems
from processors.saved_steps import check_step_settings
from processors.state_only import StateToEnvironmentState
from runtime import to_device
from trust import OTHER_COPY, PIPELINES, no_remote_code, read_pipeline

NEED_STATE = ("act", "diffusion", "vqbet", "multi_task_dit")
ENVIRONMENT_STATE = "observation.environment_state"


# Features: what the dataset has and the policy needs.


def policy_features(meta, image_size: list[int] | None) -> tuple[dict, dict]:
    """LeRobot's policy features (inputs, outputs) of a dataset.

    Args:
        meta: LeRobot's metadata of the dataset.
        image_size: (H, W) to which cameras are resized; None for no resize.
    """
    described = {}
    for key, feature in meta.features.items():
        if key in meta.camera_keys and len(feature["shape"]) != 3:
            feature = {**feature, "shape": (1, 1, 3)}  # one of the dataset's problems, which LeRobot would raise here
        if feature["dtype"] != "string":
            described[key] = feature
    features = dataset_to_policy_features(described)
    inputs, outputs = {}, {}
    for key, feature in features.items():
        if feature.type is FeatureType.VISUAL and image_size is not None:
            feature = PolicyFeature(type=feature.type, shape=(feature.shape[0], *image_size))
        side = outputs if feature.type is FeatureType.ACTION else inputs
        side[key] = feature
    # LeRobot's act and diffusion need a camera or an environment state: without either, the state is both.
    sees = any(feature.type in (FeatureType.VISUAL, FeatureType.ENV) for feature in inputs.values())
    if not sees and "observation.state" in inputs:
        inputs[ENVIRONMENT_STATE] = PolicyFeature(FeatureType.ENV, inputs["observation.state"].shape)
    return inputs, outputs


def window_deltas(config, meta) -> dict[str, list[int]]:
    """The frames of each feature that a sample holds, relative to its own, such as {"action": [0, 1, ..., 99]}.

    Source: LeRobot 0.6.1 `resolve_delta_timestamps`, in frames instead of seconds.
    """
    deltas = {}
    for key in meta.features:
        frames = None
        if key == "action":
            frames = config.action_delta_indices
        elif key == "next.reward":
            frames = config.reward_delta_indices
        elif key.startswith("observation."):
            frames = config.observation_delta_indices
        if frames is not None:
            deltas[key] = list(frames)
    return deltas


def feature_problems(
    config, inputs: dict, outputs: dict, holder: str, rename: dict[str, str], left_out=(), *, fine_tune: bool = True
) -> list[str]:
    """What of a dataset's features a saved policy cannot take, a line each.

    Args:
        config: the policy's config.
        inputs, outputs: the dataset's features, under the policy's names.
        holder: name of the policy's folder.
        rename: {old: new} names that the user gave.
        left_out: the dataset's observations that --observations leaves out.
        fine_tune: whether a new run starts from the policy, with statistics of this dataset: then a policy that pads its
            vectors takes those of other widths.
    """
    names_of_left_out = {rename.get(old, old): old for old in left_out}
    features = {**inputs, **outputs}
    takes_any_width = fine_tune and pads(config)
    vectors = {
        key: feature
        for key, feature in {**config.input_features, **config.output_features}.items()
        if feature.type is not FeatureType.VISUAL
    }
    lacking = [key for key in vectors if key not in features and key in config.input_features]
    missing = {key: kind_of(vectors[key]) for key in lacking}
    unused = {key: kind_of(feature) for key, feature in inputs.items() if key not in config.input_features}
    pairs = likeliest_pairs(missing, unused)
    problems = camera_problems(config, inputs, holder, rename, names_of_left_out)
    for key, wanted in vectors.items():
        if key not in features:
            remedy = "Pass a dataset that has it, or train a new policy"
            if key in names_of_left_out:
                remedy = f"Add {names_of_left_out[key]} to --observations"
            elif key in pairs.values():
                remedy = f"{rename_remedy(pairs, rename)} if it has another name here, or train a new policy"
            problems.append(f"it has no {key}, which {holder} was trained on. {remedy}")
        elif tuple(wanted.shape) != tuple(features[key].shape) and not takes_any_width:
            problems.append(
                f"{key}: expected {size_text(wanted)}, as in {holder}, got {size_text(features[key])}. "
                "Pass the dataset it was trained on, or train a new policy"
            )
    return problems


def size_text(feature: PolicyFeature) -> str:
    """How many numbers a feature has: `3 numbers`, or its shape where that is not a plain list."""
    shape = list(feature.shape)
    return plural(shape[0], "number") if len(shape) == 1 else f"shape {shape}"


def kind_of(feature: PolicyFeature) -> str | tuple:
    """What a feature must share with another to stand for it: both are pictures, or have the same shape."""
    return "picture" if feature.type is FeatureType.VISUAL else tuple(feature.shape)


def ignored_states(config) -> list[str]:
    """States among a policy's inputs that its network ignores: some of LeRobot's read only observation.state."""
    if config.type not in NEED_STATE:
        return []
    states = [key for key, feature in config.input_features.items() if feature.type is FeatureType.STATE]
    return [key for key in states if key != "observation.state"]


def rename_problems(inputs: dict, rename: dict[str, str], left_out=()) -> list[str]:
    """A line for each name of --rename that the dataset does not have.

    Args:
        inputs: the dataset's features, under its own names.
        rename: {old: new} names that the user gave.
        left_out: the dataset's observations that --observations leaves out.
    """
    known = {old: new for old, new in rename.items() if old in inputs}
    unknown = {old: "image" in new for old, new in rename.items() if old not in inputs}  # and whether it is a picture
    taken = {*known, *rename.values()}
    free = {key: feature.type is FeatureType.VISUAL for key, feature in inputs.items() if key not in taken}
    meant = {old: likeliest for likeliest, old in likeliest_pairs(unknown, free).items()}
    flag = rename_flag({likeliest: rename[old] for old, likeliest in meant.items()}, known)
    problems = []
    for old in unknown:
        remedy = f"It has {', '.join(inputs) or 'none'}"
        if old in left_out:
            remedy = f"Add {old} to --observations"
        elif old in meant:
            remedy = f"Did you mean {meant[old]}? Pass {flag}"
        problems.append(f"--rename {old}: it has no such observation. {remedy}")
    return problems


def twice_named(inputs: dict, rename: dict[str, str]) -> list[str]:
    """A line for each new name of --rename that another observation of the dataset has too.

    Args:
        inputs: the dataset's features, under its own names.
        rename: {old: new} names that the user gave.
    """
    names = [rename.get(key, key) for key in inputs]
    return [
        f"--rename {old}={new}: two of its observations would be {new}. Pass another new name, or leave one of them out "
        "with --observations"
        for old, new in rename.items()
        if names.count(new) > 1
    ]


def policy_problems(config, image_size: list[int] | None, rename: dict[str, str], left_out=()) -> list[str]:
    """What a new policy, or LeRobot's resize step, cannot use about the observations, a line each.

    Args:
        config: the policy's config.
        image_size: (H, W) to which cameras are resized; None for no resize.
        rename: {old: new} names that the user gave.
        left_out: the dataset's observations that --observations leaves out.
    """
    lacks_state = config.type in NEED_STATE and config.robot_state_feature is None
    pairs = {}
    if lacks_state:
        states = [key for key, feature in config.input_features.items() if feature.type is FeatureType.STATE]
        pairs = likeliest_pairs({"observation.state": "state"}, dict.fromkeys(states, "state"))
    is_state_offered = bool(pairs)
    for key in config.image_features:
        if not key.startswith("observation.") or (image_size is not None and "image" not in key):
            pairs[key] = f"observation.images.{key.removeprefix('observation.')}"
    remedy_of_names = rename_remedy(pairs, rename)

    problems = []
    if not config.input_features:
        remedy = "Pass a dataset with a camera or a state"
        if left_out:
            remedy = f"Add some of {', '.join(left_out)} to --observations"
        problems.append(f"it has no observation that a policy could act on. {remedy}")
    elif lacks_state:
        remedy = "Pass --policy flow"
        if "observation.state" in left_out:
            remedy = "Add observation.state to --observations, or pass --policy flow"
        elif is_state_offered:
            remedy = f"{remedy_of_names} if that is the state, or pass --policy flow"
        problems.append(f"it has no observation.state, which policy {config.type} needs. {remedy}")
    for key in config.image_features:
        if not key.startswith("observation."):
            problems.append(
                f"camera {key}: expected a name that begins with observation., got {key}. {remedy_of_names}"
            )
        elif key in pairs:
            problems.append(
                f"camera {key}: expected a name with image in it, without which LeRobot does not resize, got {key}. "
                f"{remedy_of_names}"
            )
    return problems


def shape_problems(config) -> list[str]:
    """A line for an action, or a state that only flow would flatten, that is not a plain list of numbers."""
    features = dict(config.output_features)
    if config.type != "flow" and "observation.state" in config.input_features:
        features["observation.state"] = config.input_features["observation.state"]
    problems = []
    for key, feature in features.items():
        shape = list(feature.shape)
        count = math.prod(shape)
        if feature.type is not FeatureType.VISUAL and (len(shape) != 1 or count < 1):
            remedy = f"Write the shape [{count}] into info.json" if count > 0 else "Pass a dataset that records it"
            problems.append(
                f"{key}: expected a list of numbers, of shape [{count or 'n'}], got shape {shape}. {remedy}"
            )
    return problems or width_problems(config)


def parse_rename(pairs: list[str] | None) -> dict[str, str]:
    """{old: new} names of observations, from OLD=NEW; `auto` among them stands for pairs that are chosen later.

    Raises:
        UserError: a pair has another form, its new name is neither an observation's nor `action`, or its old name is
            `action` or that of another pair.
    """
    names = {}
    for pair in pairs or []:
        if pair == AUTO:
            continue
        old, _, new = split_pair(pair)
        if not old or not new or "=" in new:
            raise UserError(f"--rename {pair}: expected OLD=NEW, such as observation.image=observation.images.top")
        if not new.startswith("observation.") and new != "action":
            raise UserError(f"--rename {pair}: expected a new name that begins with observation., or action, got {new}")
        if old == "action" and new != "action":
            raise UserError(f"--rename {pair}: a policy learns the feature action, by that name. Leave the pair out")
        if names.get(old, new) != new:
            raise UserError(f"--rename {pair}: {old} is renamed twice, to {names[old]} too. Leave one of the pairs out")
        names[old] = new
    return names


# Processors: LeRobot's pipelines before and after the policy.


def make_processors(config, meta, stats: dict, image_size: list[int] | None, rename: dict[str, str]):
    """LeRobot's (preprocessor, postprocessor) of a new policy.

    Args:
        config: the policy's config.
        meta: LeRobot's metadata of the dataset.
        stats: statistics to normalise by, under the policy's names.
        image_size: (H, W) to resize cameras to; None for no resize.
        rename: {old: new} names of observations.

    Raises:
        UserError: a package is missing, a tokenizer cannot be downloaded, or the policy refuses the statistics.
    """
    with as_user_error(f"policy {config.type}", invalid=ValueError, offline="Go online once", policy=config.type):
        preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=stats)
    set_rename(preprocessor, rename)
    set_resize(preprocessor, image_size)
    if ENVIRONMENT_STATE in config.input_features and ENVIRONMENT_STATE not in meta.features:
        insert_at_normalizer(preprocessor, StateToEnvironmentState(), after=True)
    return preprocessor, postprocessor


def adapt_processors(folder: Path, config, stats: dict, image_size: list[int] | None, rename: dict[str, str]):
    """The saved (preprocessor, postprocessor) of a policy to fine-tune, with this dataset's statistics, see make_processors."""
    outputs = config.output_features
    normalization = {"norm_map": config.normalization_mapping, "stats": stats}
    overrides = {
        "normalizer_processor": {"features": {**config.input_features, **outputs}, **normalization},
        "unnormalizer_processor": {"features": outputs, **normalization},
    }
    if getattr(config, "use_relative_actions", False):  # pi0's family, as lerobot-train does it
        overrides["relative_actions_processor"] = {
            "enabled": True,
            "exclude_joints": config.relative_exclude_joints,
            "action_names": getattr(config, "action_feature_names", None),
        }
        overrides["absolute_actions_processor"] = {"enabled": True}
    preprocessor, postprocessor = load_processors(folder, config.device, overrides, config)
    set_rename(preprocessor, rename)
    set_resize(preprocessor, image_size)
    return preprocessor, postprocessor


def load_processors(folder: Path, device: str, overrides: dict | None = None, config=None):
    """The saved (preprocessor, postprocessor) of a policy.

    Args:
        folder: holds both pipelines under LeRobot's names, with their state files.
        device: where the preprocessor puts its batches.
        overrides: {registered name of a step: its settings}; steps that a pipeline does not have are skipped.
        config: the policy's, to train or act with it: EVO1's pipelines have parts that are in no file.

    Raises:
        UserError: a file is missing or damaged, or names a step that is not allowed.
    """
    before, after = (read_pipeline(folder / name) for name in PIPELINES)
    for name, steps in zip(PIPELINES, (before, after), strict=True):
        check_step_settings(steps, folder / name)
    overrides = overrides or {}
    in_preprocessor = {**overrides, "device_processor": {"device": device}}
    invalid = (OSError, ValueError, SafetensorError)
    what = f"the processors in {folder} cannot be loaded"
    policy = None
    if (folder / "config.json").is_file():
        policy = read_json(folder / "config.json", OTHER_COPY).get("type")
    with as_user_error(what, invalid=invalid, policy=policy), no_remote_code(str(folder)):
        preprocessor, postprocessor = make_pre_post_processors(
            config if config is not None and config.type == "evo1" else None,
            pretrained_path=str(folder),
            preprocessor_overrides=settings_of_steps(before, folder, in_preprocessor),
            postprocessor_overrides=settings_of_steps(after, folder, overrides),
        )
        for step in (*preprocessor.steps, *postprocessor.steps):
            getattr(step, "proc", None)  # groot loads its tokenizer at first use: here, where code is refused
    return preprocessor, postprocessor


def settings_of_steps(steps: list[dict], folder: Path, overrides: dict) -> dict:
    """The overrides for the steps of a pipeline, with the paths of the files that later LeRobots' steps keep in the folder.

    Args:
        steps: the pipeline's steps, as `read_pipeline` returns them.
    """
    settings = {}
    for step in steps:
        name = step.get("registry_name") or step["class"].rpartition(".")[2]  # LeRobot's key of overrides
        files = {key: str(folder / path) for key, path in step.get("artifacts", {}).items()}
        if files or name in overrides:
            settings[name] = files | overrides.get(name, {})
    return settings


def saved_rename(folder: Path) -> dict[str, str]:
    """{old: new} names by which the preprocessor in a policy's folder renames observations.

    Raises:
        UserError: the file is not a pipeline, or names a step that is not allowed.
    """
    names = {}
    for step in read_pipeline(folder / PIPELINES[0]):
        if step.get("registry_name") == "rename_observations_processor":
            names = step.get("config", {}).get("rename_map")
    return names if isinstance(names, dict) else {}


def has_processors(folder: Path) -> bool:
    """Whether a policy's folder has both pipelines.

    Raises:
        UserError: it has one of them.
    """
    missing = [name for name in PIPELINES if not (folder / name).is_file()]
    if len(missing) == 1:
        raise UserError(f"{folder} has no {missing[0]}, one of the policy's two pipelines. {OTHER_COPY}")
    return not missing


def set_rename(preprocessor, rename: dict[str, str]) -> None:
    """Rename observations {old: new} in the first step, instead of the pipeline's own renaming; {} leaves that as it is."""
    if rename:
        kept = [step for step in preprocessor.steps if not isinstance(step, RenameObservationsProcessorStep)]
        preprocessor.steps = [RenameObservationsProcessorStep(rename_map=rename), *kept]


def set_resize(preprocessor, image_size: list[int] | None) -> None:
    """Resize cameras to (H, W), instead of the pipeline's own resize; None leaves that as it is."""
    if image_size is not None:
        preprocessor.steps = [step for step in preprocessor.steps if not isinstance(step, ImageCropResizeProcessorStep)]
        insert_at_normalizer(preprocessor, ImageCropResizeProcessorStep(resize_size=tuple(image_size)))


def insert_at_normalizer(pipeline, step, after: bool = False) -> None:
    """Insert a step before or after the normaliser, at the end of a pipeline without one."""
    steps = list(pipeline.steps)
    normalizers = [index for index, other in enumerate(steps) if isinstance(other, NormalizerProcessorStep)]
    index = normalizers[0] + after if normalizers else len(steps)
    pipeline.steps = [*steps[:index], step, *steps[index:]]


def resize_of(preprocessor) -> list[int] | None:
    """(H, W) to which a preprocessor resizes cameras; None without resize."""
    for step in preprocessor.steps:
        if isinstance(step, ImageCropResizeProcessorStep):
            return list(step.resize_size) if step.resize_size else None
    return None


def name_before_rename(preprocessor, key: str) -> str:
    """The name of an observation before the preprocessor renames it to `key`."""
    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            key = {new: old for old, new in step.rename_map.items()}.get(key, key)
    return key


# Batches.


def to_float_batch(batch: dict, meta, device) -> dict:
    """A loader's batch as LeRobot's processors take it: cameras on `device`, all features as float32.

    Args:
        batch: cameras as uint8 (B, [T,] C, H, W), other features (B, [T,] D), those of one number (B, [T]).
        meta: LeRobot's metadata of the dataset.
        device: where cameras go; the processors move the rest.

    Returns:
        Cameras in [0, 1], others (B, [T,] D). Cameras' `_is_pad` and texts except the task are left out, because LeRobot
        takes keys that begin with observation.images for pictures.
    """
    unwanted = {f"{key}_is_pad" for key in meta.camera_keys}
    unwanted |= {key for key, feature in meta.features.items() if feature["dtype"] == "string" and key != "task"}
    ready = {key: value for key, value in batch.items() if key not in unwanted}
    for key, feature in meta.features.items():
        if key in meta.camera_keys:
            ready[key] = to_float_pictures(batch[key], device)
        elif key.startswith(("observation.", "action")) and isinstance(batch.get(key), torch.Tensor):
            value = batch[key].float()
            ready[key] = value.unsqueeze(-1) if tuple(feature["shape"]) == (1,) else value
    return ready


def to_float_pictures(pixels: torch.Tensor, device) -> torch.Tensor:
    """uint8 pictures as float32 in [0, 1] on `device`."""
    pictures = to_device(pixels, device) / 255.0
    if pictures.is_cuda and pictures.ndim == 4:
        return pictures.contiguous(memory_format=torch.channels_last)  # faster for a GPU's convolutions
    return pictures
