"""How flow sees: encoders from observations to one condition vector.

Each camera goes through a small network that was trained on photographs and stays as it is, or through a convolutional encoder
that is trained with the rest. A spatial softmax turns feature maps into keypoints: where in the picture each map is active.
Keypoints, pooled features and the robot's state, over all steps of history, make the condition. Where the dataset has several
tasks, the words of the task change what the encoders look for, and the condition.

Sources:
    Spatial softmax: Finn et al. "Deep Spatial Autoencoders for Visuomotor Learning" (2016).
    Coarse maps added to fine ones: Lin et al. "Feature Pyramid Networks for Object Detection" (2017).
    The task scales and shifts feature maps: Perez et al. "FiLM" (2018).
    Hashed n-grams: Weinberger et al. "Feature Hashing for Large Scale Multitask Learning" (2009).
    The network that stays as it is: Tan and Le "EfficientNet" (2019).

Each `config` is a FlowConfig (flow.py).

Shapes: B samples, S steps of history, D width, K keypoints, E numbers of a task's embedding, C channels, H and W pixels, h and w pixels
of a feature map, F features. An axis in brackets may be absent.
"""

import itertools
import math
import zlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
import torchvision
from lerobot.configs import PreTrainedConfig
from torch import Tensor, nn

from errors import UserError, first_of
from policy.efficientnet import EfficientNetLite0
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
FROZEN_PIXELS = 128  # least shorter side of a picture for the frozen backbone: smaller ones are enlarged
# Keypoints move by some tenths where a normalised state moves by 1. Without this factor the head goes by the state.
KEYPOINT_SCALE = 4.0
FROZEN_SHARPNESS = 2.0  # of maps that are standardised
LEAST_SCORE = -20.0  # of a place, below the highest: e^-20 is a weight of 2e-9
SHARPNESS = 8.0  # starting from 1, the softmax stays flat and keypoints stay in the middle for too long
WORD_BUCKETS = 1024
WORD_WIDTH = 64  # E, of a task's embedding


class Encoder(nn.Module):
    """Encodes all observations into one condition vector (B, D)."""

    def __init__(self, config: PreTrainedConfig):
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
            flat = smoothed(enlarged(pictures.flatten(0, -4), FROZEN_PIXELS))
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

    def __init__(self, config: PreTrainedConfig):
        super().__init__()
        self.least_pixels = config.least_pixels
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
        pictures = enlarged(pictures, self.least_pixels)
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


def enlarged(pictures: Tensor, least: int) -> Tensor:
    """Pictures (B, 3, H, W) with a shorter side of `least` pixels or more."""
    scale = least / min(pictures.shape[-2:])
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

    def __init__(self, config: PreTrainedConfig):
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

    def __init__(self, config: PreTrainedConfig):
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
        queries = self.queries(words).reshape(len(seen), -1, seen.shape[1])  # (B, K, C)
        pixels = seen.flatten(2)  # (B, C, h * w)
        if type(self.maps) is nn.Conv2d:
            # Both are linear in what is seen: one product does for both.
            scores = torch.baddbmm(self.maps.bias[:, None], self.maps.weight.flatten(1) + queries, pixels)
        else:  # with a PEFT adapter around it
            scores = self.maps(seen).flatten(2) + queries @ pixels
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
    # Weights that are nearly 0 have gradients that are subnormal numbers, with which a CPU takes twice as long for a step.
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


def make_backbone(config: PreTrainedConfig) -> tuple[nn.Module, int]:
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
