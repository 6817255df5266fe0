"""From a batch as recorded to what the policy takes, and back: LeRobot's pipelines, resize, statistics, augmentation.

B samples, T steps of history (the axis is absent without history), C channels, H and W pixels, D joints.
"""

import json
from pathlib import Path

import torch

from errors import UserError, one_line
from processors.state_only import StateToEnvironmentState
from runtime import sent

FILES = ("policy_preprocessor.json", "policy_postprocessor.json")  # LeRobot's names
EMPTY_CAMERA = ".empty_camera_"  # in the names of those that LeRobot's VLAs add, and fill in themselves
NEED_STATE = ("act", "diffusion", "vqbet", "multi_task_dit")


def policy_features(meta, image_size: list[int] | None) -> tuple[dict, dict]:
    """LeRobot policy features (inputs, outputs) of a dataset, cameras at `image_size` if that is given."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.utils.feature_utils import dataset_to_policy_features

    features = dataset_to_policy_features({k: f for k, f in meta.features.items() if f["dtype"] != "string"})
    if image_size is not None:
        for key, feature in features.items():
            if feature.type is FeatureType.VISUAL:
                features[key] = PolicyFeature(type=feature.type, shape=(feature.shape[0], *image_size))
    outputs = {key: feature for key, feature in features.items() if feature.type is FeatureType.ACTION}
    inputs = {key: feature for key, feature in features.items() if key not in outputs}
    if (
        not any(f.type in (FeatureType.VISUAL, FeatureType.ENV) for f in inputs.values())
        and "observation.state" in inputs
    ):
        # LeRobot's act and diffusion want a camera or an environment state: without either, the state is both
        inputs["observation.environment_state"] = PolicyFeature(FeatureType.ENV, inputs["observation.state"].shape)
    return inputs, outputs


def window_deltas(config, meta) -> dict[str, list[int]]:
    """Frames, relative to the sample's own, that a policy wants of each feature, such as {"action": [0, 1, ..., 99]}.

    Source: LeRobot 0.6.1 `resolve_delta_timestamps`, in frames instead of seconds.
    """
    wanted = {"next.reward": config.reward_delta_indices, "action": config.action_delta_indices}
    deltas = {
        key: wanted.get(key, config.observation_delta_indices if key.startswith("observation.") else None)
        for key in meta.features
    }
    return {key: list(frames) for key, frames in deltas.items() if frames is not None}


def feature_problems(config, inputs: dict, outputs: dict, holder: str) -> list[str]:
    """Where a dataset's features differ from those that a saved policy, kept in `holder`, was trained on."""
    problems, theirs = [], {**inputs, **outputs}
    remedy = "train afresh or pass the dataset it was trained on"
    for key, wanted in {**config.input_features, **config.output_features}.items():
        if EMPTY_CAMERA in key:
            continue
        if key not in theirs:
            problems.append(f"it has no {key}, which {holder} expects: {remedy}")
        elif wanted.type.value != "VISUAL" and tuple(wanted.shape) != tuple(theirs[key].shape):
            problems.append(f"{key} has {theirs[key].shape[0]} dims, {holder} expects {wanted.shape[0]}: {remedy}")
    return problems


def policy_problems(config, image_size: list[int] | None) -> list[str]:
    """What a new policy, or LeRobot's step that resizes for it, would not find among the observations."""
    problems = []
    if config.type in NEED_STATE and config.robot_state_feature is None:
        problems.append(f"it has no observation.state, which policy {config.type} needs: pass --policy flow")
    for key in config.image_features:
        new = f"observation.images.{key.removeprefix('observation.')}"
        if not key.startswith("observation."):
            problems.append(f"camera {key}: LeRobot hands a policy what is called observation. alone: name it {new} "
                            "in meta/ (info.json, stats, episodes), in data/ and as a folder of videos/")  # fmt: skip
        elif image_size is not None and "image" not in key:
            problems.append(f"LeRobot resizes no camera called {key}, only those with image in their name: "
                            f"pass --rename {key}={new}")  # fmt: skip
    return problems


def parse_rename(pairs: list[str] | None) -> dict[str, str]:
    """{old: new} names of observations.

    Raises:
        UserError: a pair that is none.
    """
    for pair in pairs or []:
        if pair.count("=") != 1 or pair.startswith("=") or pair.endswith("="):
            raise UserError(f"--rename {pair}: expected OLD=NEW, such as observation.image=observation.images.top")
        if not pair.split("=")[1].startswith("observation."):
            raise UserError(f"--rename {pair}: the new name has to begin with observation., as those of LeRobot do")
    return dict(pair.split("=") for pair in pairs or [])


def make_processors(config, meta, stats: dict, image_size: list[int] | None, rename: dict[str, str]):
    """LeRobot's (preprocessor, postprocessor) of a policy, with resize and state-only steps where they are needed."""
    from lerobot.policies import make_pre_post_processors

    preprocessor, postprocessor = make_pre_post_processors(config, dataset_stats=stats)
    if rename:
        set_rename(preprocessor, rename)
    if image_size is not None:
        from lerobot.processor import ImageCropResizeProcessorStep

        insert(preprocessor, ImageCropResizeProcessorStep(resize_size=tuple(image_size)))
    if (
        "observation.environment_state" in config.input_features
        and "observation.environment_state" not in meta.features
    ):
        insert(preprocessor, StateToEnvironmentState(), after=True)
    return preprocessor, postprocessor


def set_rename(preprocessor, rename: dict[str, str]) -> None:
    """Have the pipeline rename observations, by its own step where it has one."""
    from lerobot.processor import RenameObservationsProcessorStep

    kept = [step for step in preprocessor.steps if not isinstance(step, RenameObservationsProcessorStep)]
    preprocessor.steps = [RenameObservationsProcessorStep(rename_map=rename), *kept]


def insert(pipeline, step, after: bool = False) -> None:
    """Put `step` right before the normaliser (or right after it), at the end where a policy has none."""
    from lerobot.processor import NormalizerProcessorStep

    places = [i for i, s in enumerate(pipeline.steps) if isinstance(s, NormalizerProcessorStep)] or [
        len(pipeline.steps)
    ]
    pipeline.steps = list(pipeline.steps)
    pipeline.steps.insert(places[0] + after, step)


def load_processors(folder: Path, device: str, overrides: dict | None = None):
    """The (preprocessor, postprocessor) saved in a checkpoint folder, on `device`.

    Args:
        folder: holds both pipelines under LeRobot's names, with their state files.
        device: where the preprocessor puts its batches.
        overrides: settings of single steps by their registered name; a step that a pipeline lacks is passed over.

    Raises:
        UserError: a file is missing or damaged.
    """
    from lerobot.policies import make_pre_post_processors
    from safetensors import SafetensorError

    try:
        wanted = {**(overrides or {}), "device_processor": {"device": device}}
        pre, post = (
            {step.get("registry_name") for step in json.loads((folder / name).read_text())["steps"]} for name in FILES
        )
        return make_pre_post_processors(
            None,
            pretrained_path=str(folder),
            preprocessor_overrides={name: values for name, values in wanted.items() if name in pre},
            postprocessor_overrides={name: values for name, values in (overrides or {}).items() if name in post},
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"the processors in {folder} cannot be loaded: {one_line(error)[:300]}") from error


def has_processors(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def adapt_processors(folder: Path, config, stats: dict, image_size: list[int] | None, rename: dict[str, str]):
    """The pipelines of a policy that is fine-tuned: its own steps, with this dataset's statistics and the asked size."""
    from lerobot.processor import ImageCropResizeProcessorStep

    features = {**config.input_features, **config.output_features}
    overrides = {
        "normalizer_processor": {"features": features, "norm_map": config.normalization_mapping, "stats": stats},
        "unnormalizer_processor": {
            "features": config.output_features,
            "norm_map": config.normalization_mapping,
            "stats": stats,
        },
    }
    if getattr(config, "use_relative_actions", False):  # as lerobot-train does
        overrides["relative_actions_processor"] = {
            "enabled": True,
            "exclude_joints": config.relative_exclude_joints,
            "action_names": getattr(config, "action_feature_names", None),
        }
        overrides["absolute_actions_processor"] = {"enabled": True}
    preprocessor, postprocessor = load_processors(folder, config.device, overrides)
    if rename:
        set_rename(preprocessor, rename)
    if image_size is not None:
        preprocessor.steps = [step for step in preprocessor.steps if not isinstance(step, ImageCropResizeProcessorStep)]
        insert(preprocessor, ImageCropResizeProcessorStep(resize_size=tuple(image_size)))
    return preprocessor, postprocessor


def resize_of(preprocessor) -> list[int] | None:
    """(H, W) that a preprocessor resizes cameras to, None if it does not."""
    from lerobot.processor import ImageCropResizeProcessorStep

    sizes = [s.resize_size for s in preprocessor.steps if isinstance(s, ImageCropResizeProcessorStep)]
    return list(sizes[0]) if sizes and sizes[0] else None


def renamed_from(preprocessor, key: str) -> str:
    """The name under which an observation comes in that the pipeline's rename step turns into `key`."""
    from lerobot.processor import RenameObservationsProcessorStep

    for step in preprocessor.steps:
        if isinstance(step, RenameObservationsProcessorStep):
            key = {new: old for old, new in step.rename_map.items()}.get(key, key)
    return key


def as_floats(batch: dict, meta, device) -> dict:
    """The batch as policies take it: cameras on `device` in [0, 1], (B, [T,] C, h, w), other features as float32 (B, [T,] D).

    LeRobot's batches have features of one number without their last axis. The cameras' `_is_pad` are left out, and texts but
    the task: the pipeline would take them for pictures where they are called so.
    """
    texts = {key for key, feature in meta.features.items() if feature["dtype"] == "string" and key != "task"}
    unwanted = {f"{key}_is_pad" for key in meta.camera_keys} | texts
    ready = {key: value for key, value in batch.items() if key not in unwanted}
    for key, feature in meta.features.items():
        if key in meta.camera_keys:
            ready[key] = on_device(batch[key], device)
        elif key.startswith(("observation.", "action")) and isinstance(batch.get(key), torch.Tensor):
            value = batch[key].float()
            ready[key] = value.unsqueeze(-1) if tuple(feature["shape"]) == (1,) else value
    return ready


def on_device(pixels: torch.Tensor, device) -> torch.Tensor:
    """uint8 pictures as float32 in [0, 1] there; on a GPU with channels last, which its convolutions are faster with."""
    pixels = sent(pixels, device) / 255.0
    return pixels.contiguous(memory_format=torch.channels_last) if pixels.is_cuda and pixels.ndim == 4 else pixels
