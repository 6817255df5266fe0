"""flow: a small policy of our own that learns in minutes, and an example of how to add yours in one file.

What it is. Each camera goes through a convolutional encoder whose feature maps become keypoints (spatial softmax: where in
the picture each map is active); keypoints, pooled features and the state, of each step of history, make one condition
vector. From it a network predicts a chunk of actions, in two ways at once: in one step, as plain regression, and by flow
matching, which moves noise to actions along straight lines in a few Euler steps and so can represent several ways of doing
a thing. To act, several chunks are drawn. Where there is one way they lie around the plain one, which is taken; where there
are several, the plain one may be between them, and the draw that most others are near is taken instead.

Sources: spatial softmax, Finn et al. "Deep Spatial Autoencoders" (2016); flow matching, Lipman et al. (2023), as pi0 has it for
actions (Black et al. 2024), with the network predicting the actions and not the direction to them, Li and He "Back to Basics"
(2025); adaptive layer norm, Peebles and Xie "DiT" (2023); carrying a chunk over into the next,
Black et al. "Real-Time Execution of Action Chunking Flow Policies" (2025).

How LeRobot finds it: a config class registered under a name and called <X>Config, in the same module <X>Policy and
make_<name>_pre_post_processors. That is all there is to adding a policy.

B samples, S steps of history, T steps of a chunk, A joints, D width, K keypoints.
"""

import math
from collections import deque
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig
from lerobot.policies import PreTrainedPolicy
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from errors import UserError
from policy.adapters import counted_once

SIZES = {  # channels of the encoder's stages, width of the condition and of the head, blocks of the head
    "tiny": ((32, 64, 96), 256, 2),
    "small": ((48, 96, 160), 384, 3),
    "base": ((64, 128, 256, 512), 768, 4),
}
ENDLESS = 10**9  # LeRobot's cosine schedule shrinks to the run's own steps when these are more


@PreTrainedConfig.register_subclass("flow")
@dataclass
class FlowConfig(PreTrainedConfig):
    """Settings of the flow policy.

    Attributes:
        n_obs_steps: S, observations that it looks at.
        chunk_size: T, actions that it predicts.
        n_action_steps: of these, how many are carried out before it is asked again.
        size: tiny, small or base.
        head: flow (one way of doing a thing, or several), or regression (one).
        num_inference_steps: Euler steps of the flow head.
        num_draws: N, chunks that the flow head draws to medoid from.
        blend_steps: actions at a chunk's start that go over smoothly from the chunk before; 0 for none.
        backbone: conv (from scratch), or the name of a torchvision or timm model.
        pretrained_backbone_weights: torchvision's name of weights (DEFAULT), or "timm"; None from scratch.
        num_keypoints: K of each camera.
        gradient_checkpointing: compute the encoders' activations twice instead of keeping them.
        task_embedding: learn which of the dataset's tasks is asked for; `tasks` are their words, filled in from the dataset.
    """

    chunk_size: int = 16
    n_action_steps: int = 8
    size: str = "small"
    head: str = "flow"
    num_inference_steps: int = 3
    num_draws: int = 8
    blend_steps: int = 4
    backbone: str = "conv"
    pretrained_backbone_weights: str | None = None
    num_keypoints: int = 32
    gradient_checkpointing: bool = False
    task_embedding: bool = False
    tasks: list[str] = field(default_factory=list)
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MEAN_STD,
            "ENV": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    optimizer_lr: float = 1e-3
    optimizer_lr_backbone: float | None = None
    optimizer_weight_decay: float = 1e-2

    @staticmethod
    def training_preset(device: str, pictures: list[tuple[int, int]]) -> dict:
        """The trainer's settings that suit this policy, for pictures of (H, W) pixels: small ones, many at a time."""
        preset = {"batch_size": 64 if device == "cpu" else 256, "ema_decay": 0.995, "augment": True}
        largest = max(pictures, key=min, default=(0, 0))
        if min(largest) > 96:
            preset["image_size"] = [8 * max(1, round(96 * pixels / min(largest) / 8)) for pixels in largest]
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
        """Up over a twentieth of the run, and down to nothing at its end."""
        return CosineDecayWithWarmupSchedulerConfig(ENDLESS // 20, ENDLESS, self.optimizer_lr, 0.0)

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """(N, T, A) of the noise that a chunk is made from."""
        return self.num_draws, self.chunk_size, self.action_feature.shape[0]

    @property
    def observation_delta_indices(self) -> list[int] | None:
        return list(range(1 - self.n_obs_steps, 1)) if self.n_obs_steps > 1 else None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self) -> None:
        return None


def make_flow_pre_post_processors(config: FlowConfig, dataset_stats=None):
    """LeRobot's default pipelines: batch, device, normalise; and back."""
    from lerobot.processor import make_default_pre_post_processors

    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)


class FlowPolicy(PreTrainedPolicy):
    """The flow policy; see the module's docstring."""

    config_class = FlowConfig
    name = "flow"

    def __init__(self, config: FlowConfig, dataset_meta=None, **kwargs):
        super().__init__(config)
        config.validate_features()
        if config.task_embedding and not config.tasks and dataset_meta is not None:
            config.tasks = dataset_meta.tasks.sort_values("task_index").index.tolist()
        self.config = config
        self.encoder = Encoder(config)
        self.head = Head(config)
        self.reset()

    def get_optim_params(self):
        lr = self.config.optimizer_lr_backbone
        if lr is None:
            return self.parameters()
        backbone = [p for name, p in self.named_parameters() if ".backbone." in name]
        others = [p for name, p in self.named_parameters() if ".backbone." not in name]
        return [{"params": others}, {"params": backbone, "lr": lr}]

    def _get_default_peft_targets(self) -> dict:  # what `--peft lora` adapts
        return {"target_modules": r".*\.(mix|mlp)\.[02]|.*\.modulate"}

    def reset(self) -> None:
        self._seen: deque = deque(maxlen=self.config.n_obs_steps)
        self._actions: deque = deque()
        self._rest: Tensor | None = None  # what the last chunk had still planned

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        """The loss of a batch, and its parts; padded steps do not count."""
        actions, condition = batch["action"], self.encoder(batch)  # (B, T, A), (B, D)
        there = ~batch["action_is_pad"].unsqueeze(-1)  # (B, T, 1)
        error = (self.head.regress(condition) - actions).abs()
        if self.config.head == "flow":
            time = torch.rand(len(actions), device=actions.device) ** 1.5  # more often near the noise, where it is hard
            noise = torch.randn_like(actions)
            noisy_actions = torch.lerp(noise, actions, time[:, None, None])
            error = error + (self.head(noisy_actions, time, condition) - actions).abs()
        loss = (error * there).sum() / (there.sum() * actions.shape[-1]).clamp_min(1)
        return loss, {}

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict, rest: Tensor | None = None, settled: int = 0, **kwargs) -> Tensor:
        """(B, T, A) normalised actions from now on; `rest` (B, R, A) is what was planned, and `settled` of it is sure."""
        self.eval()
        condition = self.encoder(batch)
        keep = self._keep(rest, settled, condition)  # how much of it to keep, (T, 1), and it, (B, T, A)
        noise = torch.randn(len(condition), *self.config.noise_shape, device=condition.device)
        return self.denoise(condition, noise, keep)

    def denoise(self, condition: Tensor, noise: Tensor, keep=None) -> Tensor:
        """(B, T, A) from a condition (B, D) and noise (B, N, T, A); `keep` is `_keep`'s, or nothing. Regression uses no noise."""
        plain = self.head.regress(condition)
        if keep is not None:
            plain = torch.lerp(plain, keep[1], keep[0])
        if self.config.head == "regression":
            return plain
        draws, steps = noise, self.config.num_inference_steps
        times = torch.arange(steps, device=noise.device).repeat_interleave(condition.shape[0]) / steps
        modulations = self.head.modulations(times, condition.repeat(steps, 1))  # all steps at once
        modulations = [m.unsqueeze(1).chunk(steps) for m in modulations]  # each (B, 1, 3 D), for every draw
        for step in range(steps):
            draws = draws + (self.head.along(draws, [m[step] for m in modulations]) - draws) / (steps - step)
            if keep is not None:  # where the planned actions would be on their way from this noise
                planned = torch.lerp(noise, keep[1].unsqueeze(1), (step + 1) / steps)
                draws = torch.lerp(draws, planned, keep[0])
        return medoid(plain, draws)

    def _keep(self, rest: Tensor | None, settled: int, condition: Tensor):
        if rest is None:
            return None
        count = min(self.config.blend_steps, rest.shape[1] - settled)
        weight = torch.zeros(self.config.chunk_size, 1, device=condition.device)
        after = torch.arange(1 - settled, count + 1, device=condition.device).clamp_min(0)  # 0 while settled, 1, 2, ...
        weight[: settled + count, 0] = 1 - after / (count + 1)
        return weight, F.pad(rest, (0, 0, 0, self.config.chunk_size - rest.shape[1]))

    @torch.no_grad()
    def select_action(self, batch: dict, **kwargs) -> Tensor:
        """(B, A) the normalised action to carry out now; a chunk is predicted when the last one is used up."""
        self.eval()
        self._seen.append({key: batch[key] for key in self.config.input_features})
        while len(self._seen) < self.config.n_obs_steps:  # an episode's first observation stands for those before it
            self._seen.append(self._seen[-1])
        if not self._actions:
            now = {**batch, **self._seen[-1]}
            if self.config.n_obs_steps > 1:
                now |= {key: torch.stack([seen[key] for seen in self._seen], dim=1) for key in self._seen[-1]}
            chunk, count = self.predict_action_chunk(now, rest=self._rest), self.config.n_action_steps
            self._actions.extend(chunk[:, :count].unbind(1))
            self._rest = chunk[:, count:]
        return self._actions.popleft()


def medoid(plain: Tensor, draws: Tensor) -> Tensor:
    """Of a plain chunk (B, T, A) and draws (B, N, T, A), the one that is nearest to the nearest half of the (other) draws."""
    every = torch.cat([plain.unsqueeze(1), draws], dim=1)  # (B, 1 + N, T, A)
    apart = (every.unsqueeze(2) - draws.unsqueeze(1)).pow(2).sum((-1, -2)).sqrt()  # (B, 1 + N, N)
    count = draws.shape[1]
    itself = F.pad(torch.eye(count, device=draws.device), (0, 0, 1, 0))
    near = (apart + 1e9 * itself).sort(dim=-1).values[..., : count // 2].mean(-1)  # (B, 1 + N)
    best = near.argmin(1)[:, None, None, None].expand(-1, 1, *plain.shape[1:])
    return every.gather(1, best).squeeze(1)


class Encoder(nn.Module):
    """Observations to one condition vector (B, D)."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        channels, width, _ = SIZES[config.size]
        self.config, self.cameras = config, list(config.image_features)
        self.vectors = [key for key in config.input_features if key not in self.cameras]
        self.eyes = nn.ModuleList(CameraEncoder(config, channels) for _ in self.cameras)
        features = sum(eye.features for eye in self.eyes)
        features += sum(math.prod(config.input_features[key].shape) for key in self.vectors)
        self.mix = nn.Sequential(nn.Linear(features * config.n_obs_steps, width), nn.SiLU(), nn.Linear(width, width))
        self.task = nn.Embedding(len(config.tasks), width) if config.task_embedding and config.tasks else None

    def forward(self, batch: dict) -> Tensor:
        parts = []  # each (B, S * features)
        for key, eye in zip(self.cameras, self.eyes, strict=True):
            pictures = batch[key]  # (B, [S,] C, H, W)
            pictures, count = pictures.flatten(0, -4), pictures.shape[0]
            twice = self.config.gradient_checkpointing and self.training
            seen = checkpoint(eye, pictures, use_reentrant=False, **counted_once(eye)) if twice else eye(pictures)
            parts.append(seen.reshape(count, -1))
        # a vector of one number comes as (B,)
        parts += [batch[key].reshape(batch[key].shape[0], -1) for key in self.vectors]
        condition = self.mix(torch.cat(parts, dim=1))
        return condition if self.task is None else condition + self.task(self._which(batch, condition.device))

    def _which(self, batch: dict, device) -> Tensor:
        words = batch["task"] if isinstance(batch["task"], list) else [batch["task"]]
        for word in words:
            if word not in self.config.tasks:
                raise UserError(f"task {word!r} is none that this policy was trained on: {self.config.tasks}")
        return torch.tensor([self.config.tasks.index(word) for word in words], device=device)


class CameraEncoder(nn.Module):
    """One camera's pictures (N, C, H, W) to features (N, 2 K + channels): where its maps are active, and how much."""

    def __init__(self, config: FlowConfig, channels: tuple[int, ...]):
        super().__init__()
        self.backbone, last = make_backbone(config, channels)
        self.maps = nn.Conv2d(last, config.num_keypoints, 1)
        # from 1 the maps stay flat, and points in the middle, for too long
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.features = 2 * config.num_keypoints + last

    def forward(self, pictures: Tensor) -> Tensor:
        seen = self.backbone(pictures.to(memory_format=torch.channels_last))  # (N, channels, h, w)
        maps = self.maps(seen)  # (N, K, h, w)
        height, width = maps.shape[-2:]
        weight = F.softmax(maps.flatten(2) * self.sharpness, dim=-1).reshape(maps.shape)
        x = weight.sum(2) @ torch.linspace(-1, 1, width, device=maps.device)  # (N, K)
        y = weight.sum(3) @ torch.linspace(-1, 1, height, device=maps.device)
        return torch.cat([x, y, seen.mean((2, 3))], dim=1)


def make_backbone(config: FlowConfig, channels: tuple[int, ...]) -> tuple[nn.Module, int]:
    """A module from pictures to feature maps, and how many maps it gives."""
    if config.backbone == "conv":
        stages, before = [], 3
        for stage, width in enumerate(channels):
            kernel = 5 if stage == 0 else 3
            stages += [
                nn.Conv2d(before, width, kernel, stride=2, padding=kernel // 2),
                nn.GroupNorm(8, width),
                nn.SiLU(),
            ]
            stages += [Residual(width)] if stage else []
            before = width
        return nn.Sequential(*stages), before
    weights = config.pretrained_backbone_weights
    import torchvision

    if config.backbone in torchvision.models.list_models(torchvision.models):
        model = torchvision.models.get_model(config.backbone, weights=weights)
        layers = list(model.children())[:-2] if hasattr(model, "fc") else [model.features]
        backbone = nn.Sequential(*layers)
    else:
        import timm

        backbone = timm.create_model(config.backbone, pretrained=weights is not None, num_classes=0, global_pool="")
    with torch.no_grad():
        seen, larger = (backbone.eval()(torch.zeros(1, 3, pixels, pixels)) for pixels in (64, 96))
    if seen.ndim != 4 or seen.shape[1] != larger.shape[1]:  # or channels last
        raise ValueError(f"backbone {config.backbone} gives no (N, C, h, w) feature maps, but {tuple(seen.shape)}")
    return backbone, seen.shape[1]


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


class Head(nn.Module):
    """A chunk on its way from noise to actions, the time of the way in [0, 1], and the condition: to the actions at its end."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        _, width, blocks = SIZES[config.size]
        self.shape = config.noise_shape[1:]  # (T, A)
        self.enter = nn.Linear(math.prod(self.shape), width)
        self.time = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(AdaLNBlock(width) for _ in range(blocks))
        self.actions = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, math.prod(self.shape)))

    def forward(self, chunk: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        return self.along(chunk, self.modulations(time, condition))

    def modulations(self, time: Tensor, condition: Tensor) -> list[Tensor]:
        """What the time (B,) and the condition (B, D) do to each block, (B, 3 D)."""
        waves = time[:, None] * torch.exp(torch.linspace(0, math.log(1000), 32, device=time.device))  # (B, 32)
        condition = F.silu(condition + self.time(torch.cat([waves.sin(), waves.cos()], dim=1)))
        return [block.modulate(condition) for block in self.blocks]

    def along(self, chunk: Tensor, modulations: list[Tensor]) -> Tensor:
        x = self.enter(chunk.flatten(-2))  # (..., D)
        for block, modulation in zip(self.blocks, modulations, strict=True):
            x = block(x, modulation)
        return self.actions(x).reshape(*x.shape[:-1], *self.shape)  # (..., T, A)  (torch.compile breaks at unflatten)

    def regress(self, condition: Tensor) -> Tensor:
        """The chunk in one step, from no noise at all."""
        nothing = condition.new_zeros(condition.shape[0], *self.shape)
        return self(nothing, condition.new_zeros(condition.shape[0]), condition)


class AdaLNBlock(nn.Module):
    """A residual block whose normalisation the condition scales, shifts and gates; at first it does nothing."""

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
