"""flow: a small policy that learns in minutes, and an example of how to write a policy of your own.

Each camera goes through a small network that was trained on photographs and stays as it is, or through a convolutional encoder
that is trained with the rest. A spatial softmax turns feature maps into keypoints: where in the picture each map is active.
Keypoints, pooled features and the robot's state, over all steps of history, make one condition vector. Where the dataset has
several tasks, the words of the task change what the encoders look for, and the condition. From the condition, the head
predicts a chunk of actions in two ways. In one step, it regresses the chunk. In a few steps, flow matching moves noise to
actions along straight lines, and so can represent several ways to do a task. To act, the policy draws several chunks and takes
the medoid of these and the regressed one: the regressed chunk where there is one way, a draw of the most common way where
there are several (their mean may be none of them).

Sources:
    Spatial softmax: Finn et al. "Deep Spatial Autoencoders for Visuomotor Learning" (2016).
    Coarse maps added to fine ones: Lin et al. "Feature Pyramid Networks for Object Detection" (2017).
    The task scales and shifts feature maps: Perez et al. "FiLM" (2018).
    Hashed n-grams: Weinberger et al. "Feature Hashing for Large Scale Multitask Learning" (2009).
    Flow matching: Lipman et al. "Flow Matching for Generative Modeling" (2023); for actions, as in Black et al. "pi0" (2024).
    The network predicts actions, not the velocity to them: Li and He "Back to Basics: Let Denoising Models Denoise" (2025).
    The network that stays as it is: Tan and Le "EfficientNet" (2019).
    Adaptive layer norm: Peebles and Xie "Scalable Diffusion Models with Transformers" (2023).
    Blending a chunk into the next: Black et al. "Real-Time Execution of Action Chunking Flow Policies" (2025).

How LeRobot finds a policy: a module has a <Name>Config that is registered under a name, a <Name>Policy, and a function
make_<name>_pre_post_processors. Nothing else is needed to add one.

Shapes: B samples, S steps of history, T steps of a chunk, R planned steps, A joints, D width, K keypoints, N draws,
C channels, H and W pixels, h and w pixels of a feature map, F features. An axis in brackets may be absent.
"""

import itertools
import math
import zlib
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import make_default_pre_post_processors
from torch import Tensor, nn

from errors import UserError, first_of
from policy.efficientnet import EfficientNetLite0, package_is_installed
from policy.recompute import recomputed
from policy.settings import check_backbone_weights
from processors.features import FEATURES
from runtime import to_device


@dataclass(frozen=True)
class Size:
    channels: tuple[int, ...]  # of each stage of the conv backbone
    maps: int  # channels of the pyramid's fine maps
    width: int  # D, of the condition and the head
    blocks: int  # of the head


SIZES = {
    "tiny": Size(channels=(32, 64, 96), maps=16, width=256, blocks=2),
    "small": Size(channels=(48, 96, 160), maps=32, width=384, blocks=3),
    "base": Size(channels=(64, 128, 256, 512), maps=64, width=768, blocks=4),
}
FROZEN = "efficientnet_lite0"
LEAST_PIXELS = 128  # of the shorter side of a picture for the frozen backbone: smaller ones are enlarged
LONGER_THAN_ANY_RUN = 10**9  # LeRobot's cosine schedule shrinks to the steps of the run
# Keypoints move by some tenths where a normalised state moves by 1. Without this factor the head goes by the state.
KEYPOINT_SCALE = 4.0
FROZEN_SHARPNESS = 2.0  # of maps that are standardised
LEAST_SCORE = -20.0  # of a place, below the highest: e^-20 is a weight of 2e-9
SHARPNESS = 8.0  # starting from 1, the softmax stays flat and keypoints stay in the middle for too long
WORD_BUCKETS = 1024
WORD_WIDTH = 64  # E, of a task's embedding


@PreTrainedConfig.register_subclass("flow")
@dataclass
class FlowConfig(PreTrainedConfig):
    """Settings of the flow policy.

    Attributes:
        n_obs_steps: S, observations that the policy sees.
        chunk_size: T, actions that the policy predicts.
        n_action_steps: actions of a chunk to carry out before the next prediction.
        size: tiny, small or base.
        head: flow (several ways to do a task) or regression (one way).
        num_inference_steps: Euler steps of the flow head.
        num_draws: N, chunks that the flow head draws.
        blend_steps: actions at the start of a chunk that blend from the previous chunk; 0 for none.
        backbone: efficientnet_lite0 (trained on ImageNet, frozen: what it sees can be stored), pyramid (trained from scratch),
            conv (the same of older checkpoints), or a torchvision or timm model.
        pretrained_backbone_weights: a name of torchvision's weights such as DEFAULT, or timm; None to start from scratch.
        num_keypoints: K, of each camera.
        gradient_checkpointing: recompute the encoders' activations in the backward pass instead of keeping them.
        task_words: condition on the words of the task, if the dataset has several tasks. New policies do.
        task_embedding: condition on the task by an embedding of each text, which knows no other texts.
        tasks: texts of the tasks, filled in from the dataset.
    """

    chunk_size: int = 16
    n_action_steps: int = 8
    size: str = "small"
    head: str = "flow"
    num_inference_steps: int = 3
    num_draws: int = 8
    blend_steps: int = 4
    backbone: str = "pyramid"
    pretrained_backbone_weights: str | None = None
    num_keypoints: int = 32
    gradient_checkpointing: bool = False
    task_words: bool = False
    task_embedding: bool = False
    tasks: list[str] = field(default_factory=list)
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ENV", "ACTION"), NormalizationMode.MEAN_STD)
    )
    optimizer_lr: float = 2e-3
    optimizer_lr_backbone: float | None = None
    optimizer_weight_decay: float = 1e-2

    # Settings of new policies, where a checkpoint without them means the default above.
    new_policy: ClassVar[dict] = {"task_words": True}

    @staticmethod
    def training_preset(device: str, pictures: list[tuple[int, int]]) -> dict:
        """The trainer's settings that suit this policy: large batches of small pictures. `pictures` has each camera's (H, W)."""
        preset = {"batch_size": 64 if device == "cpu" else 256, "ema_decay": 0.995, "augment": True}
        preset["augment_style"] = "fast"
        largest = max(pictures, key=min, default=(0, 0))
        if min(largest) > 96:
            # the shorter side becomes 96 pixels, the longer one a multiple of 8
            preset["image_size"] = [8 * max(1, round(96 * side / min(largest) / 8)) for side in largest]
        return preset

    def __post_init__(self):
        super().__post_init__()
        if self.size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {self.size!r}")
        if self.head not in ("flow", "regression"):
            raise ValueError(f"head must be flow or regression, got {self.head!r}")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps must be 1 to chunk_size ({self.chunk_size}), got {self.n_action_steps}")
        least = {"n_obs_steps": 1, "num_inference_steps": 1, "num_draws": 2, "num_keypoints": 1, "blend_steps": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name} must be {value} or more, got {getattr(self, name)}")

    def validate_features(self) -> None:
        if not self.input_features or self.action_feature is None:
            raise ValueError("flow needs an observation and an action")

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(lr=self.optimizer_lr, weight_decay=self.optimizer_weight_decay, grad_clip_norm=1.0)

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        """Warm-up over a twentieth of the run, then a cosine to 0 at its end."""
        return CosineDecayWithWarmupSchedulerConfig(
            num_warmup_steps=LONGER_THAN_ANY_RUN // 20,
            num_decay_steps=LONGER_THAN_ANY_RUN,
            peak_lr=self.optimizer_lr,
            decay_lr=0.0,
        )

    @property
    def loss_averages_over_actions(self) -> bool:
        """For Armature: micro-batches are weighted by their numbers of unpadded actions."""
        return True

    @property
    def reads_words(self) -> bool:
        """Whether the words of the task matter: there are several tasks to tell apart."""
        return self.task_words and len(self.tasks) > 1

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(N, T, A) of the noise for one sample."""
        return self.num_draws, self.chunk_size, self.action_feature.shape[0]

    @property
    def observation_delta_indices(self) -> list[int] | None:
        """Frames to observe, relative to the current one; None for observations without an axis for history."""
        return list(range(1 - self.n_obs_steps, 1)) if self.n_obs_steps > 1 else None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None


def make_flow_pre_post_processors(config: FlowConfig, dataset_stats=None):
    """LeRobot's default pipelines: add the batch axis, move to the device, normalise; and back."""
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)


@dataclass
class Blend:
    """How a chunk starts from what was planned before."""

    weight: Tensor  # (T, 1), 1 keeps the planned action, 0 takes the new one
    planned: Tensor  # (B, T, A), padded


class FlowPolicy(PreTrainedPolicy):
    """The flow policy. Names of submodules, such as encoder.eyes and head.blocks, are keys in checkpoint files."""

    config_class = FlowConfig
    name = "flow"

    def __init__(self, config: FlowConfig, dataset_meta=None, **kwargs):
        super().__init__(config)
        config.validate_features()
        if (config.task_words or config.task_embedding) and not config.tasks and dataset_meta is not None:
            config.tasks = list(dict.fromkeys(dataset_meta.tasks.sort_values("task_index").index))  # each text once
        self.config = config
        self.encoder = Encoder(config)
        if self.encoder.backbone is not None and (dataset_meta is not None or package_is_installed()):
            self.encoder.backbone.load_package()  # saved weights replace these, where there are any
        self.head = Head(config)
        self.reset()

    def get_optim_params(self):
        """Parameters for the optimizer, in two groups if the backbone has a learning rate of its own."""
        if self.config.optimizer_lr_backbone is None:
            return self.parameters()
        eyes = ".eyes." if self.config.backbone == "pyramid" else ".backbone."
        backbone, others = [], []
        for name, parameter in self.named_parameters():
            group = backbone if eyes in name else others
            group.append(parameter)
        return [{"params": others}, {"params": backbone, "lr": self.config.optimizer_lr_backbone}]

    def _get_default_peft_targets(self) -> dict:
        """The layers that `--peft lora` adapts."""
        return {"target_modules": r".*\.(mix|mlp)\.[02]|.*\.modulate"}

    @torch.no_grad()
    def frozen_features(self, batch: dict) -> dict[str, Tensor]:
        """For Armature: what the frozen backbone sees in a batch's pictures, which may stand in a batch in place of them.

        Returns:
            float16 tensors (B, [S,] C, h, w); none if the backbone is trained, or if there is no camera.
        """
        return self.encoder.frozen_features(batch) if self.encoder.backbone is not None else {}

    def reset(self) -> None:
        """Start an episode: forget past observations and planned actions."""
        self._history: deque[dict] = deque(maxlen=self.config.n_obs_steps)
        self._actions: deque[Tensor] = deque()  # (B, A) each, to carry out before the next prediction
        self._planned: Tensor | None = None  # (B, T - n_action_steps, A), the rest of the last chunk

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        """The loss, and no sub-losses: mean absolute error of the regressed and the denoised actions, without padding."""
        actions = batch["action"]  # (B, T, A)
        condition = self.encoder(batch)  # (B, D)
        valid = ~batch["action_is_pad"].unsqueeze(-1)  # (B, T, 1)

        if self.config.head == "regression":
            error = (self.head.regress(condition) - actions).abs()  # (B, T, A)
        else:
            # Flow matching: predict the actions from a point on the straight line between noise and actions.
            # (B,), more often near the noise, where the prediction is harder
            time = torch.rand(len(actions), device=actions.device) ** 1.5
            noise = torch.randn_like(actions)
            noisy_actions = torch.lerp(noise, actions, time[:, None, None])  # (B, T, A)
            regressed, denoised = self.head.regress_and_denoise(noisy_actions, time, condition)
            error = (regressed - actions).abs() + (denoised - actions).abs()

        num_valid = valid.sum() * actions.shape[-1]
        loss = (error * valid).sum() / num_valid.clamp_min(1)
        return loss, {}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: dict, planned: Tensor | None = None, num_committed: int = 0, **kwargs
    ) -> Tensor:
        """(B, T, A) normalised actions; the first `num_committed` stay as `planned` (B, R, A), the next ones blend."""
        self.eval()
        condition = self.encoder(batch)  # (B, D)
        noise = torch.randn(len(condition), *self.config.noise_shape, device=condition.device)  # (B, N, T, A)
        blend = None if planned is None else self.blend(planned, num_committed)
        return self.denoise(condition, noise, blend)

    def blend(self, planned: Tensor, num_committed: int) -> Blend:
        """Keep the committed actions of `planned` (B, R, A), then blend over `blend_steps` actions."""
        steps = min(self.config.blend_steps, planned.shape[1] - num_committed)
        # 0 while committed, then 1, 2, ..., steps
        index = torch.arange(1 - num_committed, steps + 1, device=planned.device).clamp_min(0)
        weight = torch.zeros(self.config.chunk_size, 1, device=planned.device)  # (T, 1)
        weight[: num_committed + steps, 0] = 1 - index / (steps + 1)
        padded = F.pad(planned, (0, 0, 0, self.config.chunk_size - planned.shape[1]))  # (B, T, A)
        return Blend(weight, padded)

    def denoise(self, condition: Tensor, noise: Tensor, blend: Blend | None = None) -> Tensor:
        """(B, T, A) actions from a condition (B, D) and noise (B, N, T, A), which regression does not use."""
        regressed = self.head.regress(condition)  # (B, T, A)
        if blend is not None:
            regressed = torch.lerp(regressed, blend.planned, blend.weight)
        if self.config.head == "regression":
            return regressed

        # What time and condition do to each block is the same for every draw: compute it once, for all steps together.
        steps = self.config.num_inference_steps
        times = torch.arange(steps, device=noise.device).repeat_interleave(condition.shape[0]) / steps  # (steps * B,)
        modulations = self.head.modulations(times, condition.repeat(steps, 1))  # a (steps * B, 3 D) for each block
        modulations = [modulation.unsqueeze(1).chunk(steps) for modulation in modulations]  # (B, 1, 3 D) for each step

        # Euler steps from noise to actions.
        draws = noise
        for step in range(steps):
            actions = self.head.denoise(draws, [modulation[step] for modulation in modulations])  # (B, N, T, A)
            draws = draws + (actions - draws) / (steps - step)
            if blend is not None:
                # Inpainting: where a line from this noise to the planned actions would be by now.
                on_line = torch.lerp(noise, blend.planned.unsqueeze(1), (step + 1) / steps)
                draws = torch.lerp(draws, on_line, blend.weight)
        return medoid(regressed, draws)

    @torch.no_grad()
    def select_action(self, batch: dict, **kwargs) -> Tensor:
        """(B, A) the normalised action to carry out now. Every n_action_steps calls predict a chunk."""
        self.eval()
        self._history.append({key: batch[key] for key in self.config.input_features})
        while len(self._history) < self.config.n_obs_steps:
            self._history.append(self._history[-1])  # at the start of an episode, repeat the first observation
        if not self._actions:
            if self.config.n_obs_steps > 1:
                for key in self.config.input_features:
                    past = torch.stack([observation[key] for observation in self._history], dim=1)  # (B, S, ...)
                    batch = {**batch, key: past}
            chunk = self.predict_action_chunk(batch, planned=self._planned)  # (B, T, A)
            count = self.config.n_action_steps
            self._actions.extend(chunk[:, :count].unbind(1))
            self._planned = chunk[:, count:]
        return self._actions.popleft()


def medoid(regressed: Tensor, draws: Tensor) -> Tensor:
    """(B, T, A): of the regressed chunk (B, T, A) and the draws (B, N, T, A), the one closest to its nearest N / 2 draws."""
    candidates = torch.cat([regressed.unsqueeze(1), draws], dim=1)  # (B, 1 + N, T, A)
    distances = (candidates.unsqueeze(2) - draws.unsqueeze(1)).pow(2).sum((-1, -2)).sqrt()  # (B, 1 + N, N)
    count = draws.shape[1]
    is_itself = F.pad(torch.eye(count, device=draws.device), (0, 0, 1, 0))  # (1 + N, N)
    nearest = (distances + 1e9 * is_itself).sort(dim=-1).values[..., : count // 2]  # (B, 1 + N, N / 2)
    best = nearest.mean(-1).argmin(1)  # (B,)
    index = best[:, None, None, None].expand(-1, 1, *regressed.shape[1:])  # (B, 1, T, A)
    return candidates.gather(1, index).squeeze(1)


class Encoder(nn.Module):
    """Encodes all observations into one condition vector (B, D)."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.cameras = list(config.image_features)
        self.vectors = [key for key in config.input_features if key not in self.cameras]
        size = SIZES[config.size]
        self.backbone = None  # that all cameras share
        if config.backbone == FROZEN and self.cameras:
            self.backbone = EfficientNetLite0().requires_grad_(False)
        make_eye = {"pyramid": PyramidEncoder, FROZEN: FrozenEncoder}.get(config.backbone, CameraEncoder)
        self.eyes = nn.ModuleList(make_eye(config) for _ in self.cameras)
        features = sum(eye.features for eye in self.eyes)
        features += sum(math.prod(config.input_features[key].shape) for key in self.vectors)
        features *= config.n_obs_steps
        self.words = None
        if config.reads_words:
            self.words = TaskWords()
            features += WORD_WIDTH
        self.mix = nn.Sequential(nn.Linear(features, size.width), nn.SiLU(), nn.Linear(size.width, size.width))
        # Older checkpoints may have a text twice: its first position counts.
        self.task_position = {task: index for index, task in reversed(list(enumerate(config.tasks)))}
        self.task = nn.Embedding(len(config.tasks), size.width) if config.task_embedding and config.tasks else None

    def forward(self, batch: dict) -> Tensor:
        words = None if self.words is None else self.words(batch["task"])
        return self.encode(batch, words)

    def encode(self, batch: dict, words: Tensor | None) -> Tensor:
        """(B, D) from observations and the embedding of each sample's task (B, E), if there are several tasks."""
        words_of_pictures = (
            None if words is None else words.repeat_interleave(self.config.n_obs_steps, dim=0)
        )  # (B * S, E)
        if self.backbone is not None and not any(key.startswith(FEATURES) for key in batch):
            batch = batch | self.frozen_features(batch)
        features = []  # (B, S * F) each
        for number, (key, eye) in enumerate(zip(self.cameras, self.eyes, strict=True)):
            names = [key] if self.backbone is None else feature_names(number)
            seen = [batch[name].flatten(0, -4) for name in names]  # (B * S, C, H, W) each
            recompute = self.config.gradient_checkpointing and self.training
            encoded = recomputed(eye, *seen, words_of_pictures) if recompute else eye(*seen, words_of_pictures)
            features.append(encoded.reshape(len(batch[names[0]]), -1))
        for key in self.vectors:
            vector = batch[key]  # (B, [S,] F), or (B,) for a single number
            features.append(vector.reshape(vector.shape[0], -1))
        if words is not None:
            features.append(words)
        condition = self.mix(torch.cat(features, dim=1))  # (B, D)
        if self.task is None:
            return condition
        return condition + self.task(self._task_indices(batch["task"], condition.device))

    def frozen_features(self, batch: dict) -> dict[str, Tensor]:
        """{name: (B, [S,] C, h, w) float16 maps of the frozen backbone} for all cameras."""
        features = {}
        for number, key in enumerate(self.cameras):
            pictures = batch[key]  # (B, [S,] 3, H, W)
            flat = smoothed(enlarged(pictures.flatten(0, -4)))
            # A few at a time: their largest maps stay in the processor's cache.
            few = flat.split(8) if flat.device.type == "cpu" else [flat]
            maps = []
            for some in few:
                seen = self.backbone(some.to(memory_format=torch.channels_last))
                maps.append([*seen, torch.cat(colours(some, 8), dim=1)])
            for name, parts in zip(feature_names(number), zip(*maps, strict=True), strict=True):
                features[name] = torch.cat(parts).half().reshape(*pictures.shape[:-3], *parts[0].shape[1:])
        return features

    def _task_indices(self, tasks: str | list[str], device) -> Tensor:
        """(B,) positions of the batch's tasks among those that were trained on."""
        if isinstance(tasks, str):
            tasks = [tasks]
        for task in tasks:
            if task not in self.task_position:
                known = first_of(self.config.tasks)
                raise UserError(f"task {task!r} is not one that this policy was trained on: expected one of {known}")
        return torch.tensor([self.task_position[task] for task in tasks], device=device)


class PyramidEncoder(nn.Module):
    """Encodes the pictures of one camera: (B, 3, H, W) to (B, 2 K + channels), keypoints and pooled features.

    Maps at a quarter of the picture's size, to which maps at an eighth add what they see further around, give the keypoints.
    So do the colours themselves, from which a keypoint finds a thing of one colour before the convolutions have learned any.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        channels = SIZES[config.size].maps
        # The largest maps have no norm, which would take longer than their convolutions.
        self.stem = nn.Sequential(nn.Conv2d(3, channels // 2, 5, stride=2, padding=2), nn.ReLU(inplace=True))
        narrow = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.fine = nn.Sequential(narrow, nn.ReLU(inplace=True), Residual(channels))
        self.coarse = nn.Sequential(convolution(channels, 2 * channels, stride=2), Residual(2 * channels))
        self.up = nn.Conv2d(2 * channels, channels, 1)
        self.join = convolution(channels, channels)
        self.keypoints = Keypoints(channels + 9, config.num_keypoints, config.reads_words)
        self.films = (
            nn.ModuleList(FiLM(maps) for maps in (channels, 2 * channels, channels)) if config.reads_words else None
        )
        self.features = 2 * config.num_keypoints + 2 * channels

    def forward(self, pictures: Tensor, words: Tensor | None = None) -> Tensor:
        fine = self.fine(self.stem(pictures.to(memory_format=torch.channels_last)))  # (B, channels, h, w)
        if words is not None:
            fine = self.films[0](fine, words)
        coarse = self.coarse(fine)  # (B, 2 channels, h / 2, w / 2)
        if words is not None:
            coarse = self.films[1](coarse, words)
        around = F.interpolate(self.up(coarse), size=fine.shape[-2:])  # (B, channels, h, w)
        joined = self.join(fine + around)
        if words is not None:
            joined = self.films[2](joined, words)
        keypoints = self.keypoints(torch.cat([joined, *colours(pictures, 4)], dim=1), words)
        return torch.cat([KEYPOINT_SCALE * keypoints, coarse.mean((2, 3))], dim=1)


def feature_names(camera: int) -> list[str]:
    """Names in a batch of the maps that the frozen backbone sees by a camera, given its number."""
    return [f"{FEATURES}{camera}.{depth}" for depth in range(1 + len(EfficientNetLite0.channels))]


def enlarged(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with a shorter side of LEAST_PIXELS or more."""
    scale = LEAST_PIXELS / min(pictures.shape[-2:])
    if scale <= 1:
        return pictures
    return F.interpolate(pictures, size=[round(side * scale) for side in pictures.shape[-2:]], mode="bilinear")


def smoothed(pictures: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) without the detail that compression takes from a video: colours more than brightness.

    A policy learns from decoded videos and acts on pictures that were never encoded; a frozen network sees the difference.
    """
    grey = pictures.mean(1, keepdim=True)  # (B, 1, H, W)
    colour = F.avg_pool2d(F.pad(pictures - grey, (2, 2, 2, 2), mode="replicate"), 5, stride=1)
    kernel = torch.tensor([1.0, 2.0, 1.0], device=pictures.device, dtype=pictures.dtype) / 4
    kernel = (kernel[:, None] * kernel)[None, None]
    return colour + F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel)


class FrozenEncoder(nn.Module):
    """Encodes what the frozen backbone sees by one camera: maps of an eighth and a sixteenth of the picture's size, and its
    colours, (B, C, h, w) to (B, 2 K + channels), keypoints and pooled features."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        fine, coarse = EfficientNetLite0.channels
        self.fine = Scores(fine, config.num_keypoints, config.reads_words)
        self.coarse = Scores(coarse, config.num_keypoints, config.reads_words)
        self.colours = Scores(9, config.num_keypoints, config.reads_words)
        self.sharpness = nn.Parameter(torch.tensor(FROZEN_SHARPNESS))
        self.features = 2 * config.num_keypoints + coarse

    def forward(self, fine: Tensor, coarse: Tensor, colours: Tensor, words: Tensor | None = None) -> Tensor:
        fine, coarse, colours = (maps.to(self.sharpness.dtype) for maps in (fine, coarse, colours))
        # Scoring and then enlarging gives the same as enlarging and then scoring, sooner.
        around = F.interpolate(self.coarse(coarse, words), size=fine.shape[-2:], mode="bilinear")
        scores = self.fine(fine, words) + around + self.colours(colours, words)
        keypoints = spatial_softmax(scores, self.sharpness)
        return torch.cat([KEYPOINT_SCALE * keypoints, coarse.mean((2, 3))], dim=1)


class CameraEncoder(nn.Module):
    """Encodes the pictures of one camera by a backbone: (B, C, H, W) to (B, 2 K + channels), keypoints and pooled features."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.backbone, num_maps = make_backbone(config)
        self.maps = nn.Conv2d(num_maps, config.num_keypoints, 1)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))
        self.features = 2 * config.num_keypoints + num_maps

    def forward(self, pictures: Tensor, words: Tensor | None = None) -> Tensor:
        seen = self.backbone(pictures.to(memory_format=torch.channels_last))  # (B, channels, h, w)
        keypoints = spatial_softmax(self.maps(seen), self.sharpness)
        return torch.cat([keypoints, seen.mean((2, 3))], dim=1)


def colours(pictures: Tensor, side: int) -> list[Tensor]:
    """The mean, the brightest and the darkest of each square of `side` pixels of pictures (B, 3, H, W), (B, 3, h, w) each."""
    mean = F.avg_pool2d(pictures, side, ceil_mode=True)
    return [mean, F.max_pool2d(pictures, side, ceil_mode=True), -F.max_pool2d(-pictures, side, ceil_mode=True)]


class Scores(nn.Module):
    """How much each place of feature maps (B, C, h, w) is what each keypoint looks for, which depends on the task's embedding
    (B, E): (B, K, h, w)."""

    def __init__(self, channels: int, num_keypoints: int, reads_words: bool):
        super().__init__()
        self.maps = nn.Conv2d(channels, num_keypoints, 1)
        self.queries = None
        if reads_words:
            # From the start, tasks look for different things: each learns from its own samples what to look for.
            self.queries = nn.Linear(WORD_WIDTH, num_keypoints * channels, bias=False)
            nn.init.normal_(self.queries.weight, std=1 / math.sqrt(WORD_WIDTH * channels))

    def forward(self, seen: Tensor, words: Tensor | None = None) -> Tensor:
        if words is None:
            return self.maps(seen)
        weight = self.maps.weight.flatten(1) + self.queries(words).reshape(len(seen), -1, seen.shape[1])  # (B, K, C)
        scores = torch.baddbmm(self.maps.bias[:, None], weight, seen.flatten(2))
        return scores.reshape(len(seen), -1, *seen.shape[-2:])


class Keypoints(Scores):
    """Keypoints (B, 2 K) of feature maps (B, C, h, w)."""

    def __init__(self, channels: int, num_keypoints: int, reads_words: bool):
        super().__init__(channels, num_keypoints, reads_words)
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))

    def forward(self, seen: Tensor, words: Tensor | None = None) -> Tensor:
        return spatial_softmax(super().forward(seen, words), self.sharpness)


def spatial_softmax(maps: Tensor, sharpness: Tensor) -> Tensor:
    """(B, 2 K): the mean position in [-1, 1] under each of the maps (B, K, h, w), all x before all y."""
    height, width = maps.shape[-2:]
    scores = maps.flatten(2) * sharpness
    # Weights and their gradients that are nearly 0 would be subnormal numbers, with which a processor takes twice as long.
    scores = (scores - scores.amax(-1, keepdim=True).detach()).clamp_min(LEAST_SCORE)
    weight = F.softmax(scores, dim=-1).reshape(maps.shape)  # (B, K, h, w)
    x = weight.sum(2) @ torch.linspace(-1, 1, width, device=maps.device)  # (B, K)
    y = weight.sum(3) @ torch.linspace(-1, 1, height, device=maps.device)  # (B, K)
    return torch.cat([x, y], dim=1)


class TaskWords(nn.Module):
    """Embeds tasks by the hashes of their words, pairs of words, and letters by three: a text that is new gets what it shares."""

    def __init__(self):
        super().__init__()
        self.buckets = nn.EmbeddingBag(WORD_BUCKETS, WORD_WIDTH, mode="sum")

    def forward(self, tasks: str | list[str]) -> Tensor:
        """(B, E)"""
        if isinstance(tasks, str):
            tasks = [tasks]
        known = {task: hashed_words(task) for task in dict.fromkeys(tasks)}
        hashes = [known[task] for task in tasks]
        counts = torch.tensor([len(row) for row in hashes])
        flat = torch.tensor([bucket for row in hashes for bucket in row], dtype=torch.long)
        weights = counts.rsqrt().repeat_interleave(counts)  # sums of any number of hashes have the same scale
        table = self.buckets.weight
        flat, offsets, weights = (to_device(x, table.device) for x in (flat, counts.cumsum(0) - counts, weights))
        return self.buckets(flat, offsets, per_sample_weights=weights.to(table.dtype))


def hashed_words(task: str) -> list[int]:
    """Buckets of a text's words, pairs of words and letters by three; none for a text without words."""
    words = "".join(c if c.isalnum() else " " for c in task.casefold()).split()
    pairs = [" ".join(pair) for pair in itertools.pairwise(words)]
    letters = [f"<{word}>"[i : i + 3] for word in words for i in range(len(word))]
    return [zlib.crc32(feature.encode()) % WORD_BUCKETS for feature in (*words, *pairs, *letters)]


class FiLM(nn.Module):
    """Scales and shifts feature maps (B, C, h, w) by a task's embedding (B, E); initially the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.modulate = nn.Linear(WORD_WIDTH, 2 * channels)
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, maps: Tensor, words: Tensor) -> Tensor:
        scale, shift = self.modulate(words)[:, :, None, None].chunk(2, dim=1)
        return maps * (1 + scale) + shift


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(before, after, 3, stride=stride, padding=1)
    return nn.Sequential(conv, nn.GroupNorm(8, after), nn.SiLU())


def make_backbone(config: FlowConfig) -> tuple[nn.Module, int]:
    """A module from pictures (B, 3, H, W) to feature maps (B, C, h, w), and C.

    Raises:
        UserError, ValueError: there is no such backbone, or it gives no feature maps.
    """
    if config.backbone == "conv":
        channels = SIZES[config.size].channels
        return make_conv_backbone(channels), channels[-1]
    if config.backbone in torchvision.models.list_models(torchvision.models):
        check_backbone_weights("--policy_args", config.backbone, config.pretrained_backbone_weights)
        model = torchvision.models.get_model(config.backbone, weights=config.pretrained_backbone_weights)
        if hasattr(model, "fc"):
            backbone = nn.Sequential(*list(model.children())[:-2])  # a ResNet without its pooling and classifier
        elif hasattr(model, "features"):
            backbone = nn.Sequential(model.features)
        else:
            raise ValueError(
                f"backbone {config.backbone} has no feature maps. Choose a convolutional one, such as resnet18"
            )
    else:
        backbone = make_timm_backbone(config.backbone, config.pretrained_backbone_weights)
    # Two sizes of pictures tell channels from pixels: some models put channels last.
    with torch.no_grad():
        seen, larger = (backbone.eval()(torch.zeros(1, 3, pixels, pixels)) for pixels in (64, 96))
    if seen.ndim != 4 or seen.shape[1] != larger.shape[1]:
        raise ValueError(
            f"backbone {config.backbone}: expected feature maps (B, C, h, w), got {tuple(seen.shape)}. Choose resnet18"
        )
    return backbone, seen.shape[1]


def make_conv_backbone(channels: tuple[int, ...]) -> nn.Sequential:
    """Stages that each halve the picture."""
    stages = []
    before = 3
    for stage, width in enumerate(channels):
        kernel = 5 if stage == 0 else 3
        stages.append(nn.Conv2d(before, width, kernel, stride=2, padding=kernel // 2))
        stages += [nn.GroupNorm(8, width), nn.SiLU()]
        if stage > 0:
            stages.append(Residual(width))
        before = width
    return nn.Sequential(*stages)


def make_timm_backbone(name: str, weights: str | None) -> nn.Module:
    expected = f"backbone {name}: expected conv, a torchvision model or a timm model"
    try:
        import timm
    except ImportError:
        raise UserError(f"{expected}, and timm is not installed. Install it with: uv pip install timm") from None
    if ":" not in name and not timm.is_model(name):  # local-dir: and hf-hub: name a model of the Hub or a folder
        raise ValueError(expected)
    model = timm.create_model(name, pretrained=weights is not None, num_classes=0, global_pool="")
    if model.pretrained_cfg.get("fixed_input_size"):
        raise ValueError(
            f"backbone {name} takes pictures of one size only. Choose a convolutional one, such as resnet18"
        )
    return model


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Head(nn.Module):
    """Predicts actions (B, T, A) from noisy actions, their time between noise (0) and actions (1), and the condition."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        size = SIZES[config.size]
        self.shape = config.noise_shape[1:]  # (T, A)
        self.enter = nn.Linear(math.prod(self.shape), size.width)
        self.time = nn.Sequential(nn.Linear(64, size.width), nn.SiLU(), nn.Linear(size.width, size.width))
        self.blocks = nn.ModuleList(AdaLNBlock(size.width) for _ in range(size.blocks))
        self.actions = nn.Sequential(nn.LayerNorm(size.width), nn.Linear(size.width, math.prod(self.shape)))

    def forward(self, noisy_actions: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """(B, T, A) from noisy actions (B, T, A), time (B,) and condition (B, D)."""
        return self.denoise(noisy_actions, self.modulations(time, condition))

    def modulations(self, time: Tensor, condition: Tensor) -> list[Tensor]:
        """How time (B,) and condition (B, D) modulate each block, (B, 3 D) each."""
        # sines of 32 frequencies, from 1 to 1000
        waves = time[:, None] * torch.exp(torch.linspace(0, math.log(1000), 32, device=time.device))  # (B, 32)
        embedded = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))  # (B, D)
        condition = F.silu(condition + embedded)
        return [block.modulate(condition) for block in self.blocks]

    def denoise(self, noisy_actions: Tensor, modulations: list[Tensor]) -> Tensor:
        """(..., T, A) from noisy actions (..., T, A) and each block's modulation (..., 3 D)."""
        x = self.enter(noisy_actions.flatten(-2))  # (..., D)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation)
        # reshape, because torch.compile breaks its graph at unflatten
        return self.actions(x).reshape(*x.shape[:-1], *self.shape)

    def regress(self, condition: Tensor) -> Tensor:
        """(B, T, A) in one step: from zeros in place of noise, at time 0."""
        zeros = condition.new_zeros(condition.shape[0], *self.shape)
        return self(zeros, condition.new_zeros(condition.shape[0]), condition)

    def regress_and_denoise(self, noisy_actions: Tensor, time: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """`regress` and `forward` at once: a batch twice as large takes less than twice as long."""
        x = torch.cat([torch.zeros_like(noisy_actions), noisy_actions])
        times = torch.cat([torch.zeros_like(time), time])
        return self(x, times, condition.repeat(2, 1)).chunk(2)


class AdaLNBlock(nn.Module):
    """A residual block whose layer norm is scaled, shifted and gated by the condition; initially the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        nn.init.zeros_(self.modulate.weight)
        nn.init.zeros_(self.modulate.bias)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        scale, shift, gate = modulation.chunk(3, dim=-1)
        return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)
