"""flow: a small policy that learns in minutes, and an example of how to write a policy of your own.

What the encoder (flow_encoder.py) sees makes one condition vector. From it, the head predicts a chunk of actions in two ways. In
one step, it regresses the chunk. In a few steps, flow matching moves noise to actions along straight lines, and so can represent
several ways to do a task. To act, the policy draws several chunks and takes the medoid of these and the regressed one: the
regressed chunk where there is one way, a draw of the most common way where there are several (their mean may be none of them).

Sources:
    Flow matching: Lipman et al. "Flow Matching for Generative Modeling" (2023); for actions, as in Black et al. "pi0" (2024).
    The network predicts actions, not the velocity to them: Li and He "Back to Basics: Let Denoising Models Denoise" (2025).
    Adaptive layer norm: Peebles and Xie "Scalable Diffusion Models with Transformers" (2023).
    Blending a chunk into the next: Black et al. "Real-Time Execution of Action Chunking Flow Policies" (2025).

How LeRobot finds a policy: a module has a <Name>Config that is registered under a name, a <Name>Policy, and a function
make_<name>_pre_post_processors. Nothing else is needed to add one.

Shapes: B samples, S steps of history, T steps of a chunk, R planned steps, A joints, D width, N draws, C channels, H and W pixels,
h and w pixels of a feature map. An axis in brackets may be absent.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies import PreTrainedPolicy
from lerobot.processor import make_default_pre_post_processors
from torch import Tensor, nn

from policy.efficientnet import package_is_installed
from policy.flow_encoder import SIZES, Encoder

LONGER_THAN_ANY_RUN = 10**9  # LeRobot's cosine schedule shrinks to the steps of the run


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
        least_pixels: the pyramid sees pictures with a shorter side of at least so many pixels: smaller ones are enlarged. New
            policies have 96.
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
    least_pixels: int = 0
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
    new_policy: ClassVar[dict] = {"task_words": True, "least_pixels": 96}

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
        least = {
            "n_obs_steps": 1,
            "num_inference_steps": 1,
            "num_draws": 2,
            "num_keypoints": 1,
            "blend_steps": 0,
            "least_pixels": 0,
        }
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
