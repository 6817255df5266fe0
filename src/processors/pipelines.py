"""From a recorded batch to what the policy takes, and back: LeRobot's processors, and the batch itself.

B samples, T steps of history (an axis that is absent without history), C channels, H and W pixels, D numbers.
"""

from pathlib import Path

import torch
from lerobot.policies import make_pre_post_processors
from lerobot.processor import ImageCropResizeProcessorStep, NormalizerProcessorStep, RenameObservationsProcessorStep
from safetensors import SafetensorError

from errors import UserError, as_user_error, read_json
from processors.features import ENVIRONMENT_STATE, FEATURES
from processors.saved_steps import check_step_settings
from processors.state_only import StateToEnvironmentState
from runtime import to_device
from trust import OTHER_COPY, PIPELINES, no_remote_code, read_pipeline

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
    before = read_pipeline(folder / PIPELINES[0])
    after = read_pipeline(folder / PIPELINES[1])
    check_step_settings(before, folder / PIPELINES[0])
    check_step_settings(after, folder / PIPELINES[1])
    overrides = overrides or {}
    in_preprocessor = {**overrides, "device_processor": {"device": device}}
    invalid = (OSError, ValueError, SafetensorError)
    what = f"the processors in {folder} cannot be loaded"
    policy = None
    if (folder / "config.json").is_file():
        policy = read_json(folder / "config.json", OTHER_COPY).get("type")
    with as_user_error(what, invalid=invalid, policy=policy), no_remote_code(str(folder)):
        is_evo1 = config is not None and config.type == "evo1"
        preprocessor, postprocessor = make_pre_post_processors(
            config if is_evo1 else None,
            pretrained_path=str(folder),
            preprocessor_overrides=settings_of_steps(before, folder, in_preprocessor),
            postprocessor_overrides=settings_of_steps(after, folder, overrides),
        )
        for step in (*preprocessor.steps, *postprocessor.steps):
            getattr(step, "proc", None)  # makes groot load its tokenizer now, where code is refused, not at first use
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
        Cameras in [0, 1] (unless a frozen backbone's features stand in their place), others (B, [T,] D). Cameras' `_is_pad`
        and texts except the task are left out, because LeRobot takes keys that begin with observation.images for pictures.
    """
    unwanted = {f"{key}_is_pad" for key in meta.camera_keys}
    unwanted |= {key for key in batch if key.startswith(FEATURES) and key.endswith("_is_pad")}
    unwanted |= {key for key, feature in meta.features.items() if feature["dtype"] == "string" and key != "task"}
    ready = {key: value for key, value in batch.items() if key not in unwanted}
    for key, feature in meta.features.items():
        if key in meta.camera_keys and key in batch:
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
