"""Augmentation of camera pictures on the device: each sample and camera its own draw, a function of (seed, sample).

B samples, T steps of history (all of a sample's steps get one draw, as one camera saw them), C channels, H, W pixels.
"""

import math

import kornia.enhance
import kornia.geometry
import numpy as np
import torch
from torch import Tensor

from runtime import sent

# The ranges that LeRobot's ImageTransformsConfig has by default; all six act on every picture here.
RANGES = {
    "brightness": (0.8, 1.2),
    "contrast": (0.8, 1.2),
    "saturation": (0.5, 1.5),
    "hue": (-0.05, 0.05),  # turns
    "sharpness": (0.5, 1.5),
    "rotation": (-5.0, 5.0),  # degrees
    "shift_x": (-0.05, 0.05),  # of the width
    "shift_y": (-0.05, 0.05),  # of the height
}


def augment(batch: dict, cameras: list[str], seed: int) -> dict:
    """The batch with its float pictures in [0, 1] varied; `batch["sample"]`, (B,) positions in the run, addresses the draws."""
    samples = batch["sample"].numpy()
    return {**batch, **{key: vary(batch[key], draws(seed, samples, camera)) for camera, key in enumerate(cameras)}}


def draws(seed: int, samples: np.ndarray, camera: int) -> dict[str, Tensor]:
    """(B,) float32 of each of RANGES, a function of (seed, sample, camera) alone.

    Source: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), counter by counter.
    """
    base = int(np.random.SeedSequence([seed, camera, 0xA06]).generate_state(1, dtype=np.uint64)[0])
    counter = samples.astype(np.uint64)[:, None] * np.uint64(len(RANGES)) + np.arange(len(RANGES), dtype=np.uint64)
    with np.errstate(over="ignore"):  # wrapping is the point
        z = np.uint64(base) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / 2**24)  # (B, len(RANGES)) in [0, 1)
    return {name: low + (high - low) * unit[:, i] for i, (name, (low, high)) in enumerate(RANGES.items())}


def vary(pixels: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """(B, [T,] C, H, W) pictures under each sample's draw."""
    steps = math.prod(pixels.shape[1:-3])
    together = torch.stack(list(drawn.values()))  # one copy that nobody waits for
    together = sent(together.pin_memory() if pixels.is_cuda else together, pixels.device)
    drawn = dict(zip(drawn, together.repeat_interleave(steps, dim=1), strict=True))  # (B * T,) each
    flat = pixels.flatten(0, -4)  # (B * T, C, H, W)
    height, width = flat.shape[-2:]
    middle = torch.stack([torch.full_like(drawn["rotation"], (size - 1) / 2) for size in (width, height)], dim=1)
    shift = torch.stack([drawn["shift_x"] * width, drawn["shift_y"] * height], dim=1)
    affine = kornia.geometry.get_affine_matrix2d(shift, middle, torch.ones_like(shift), drawn["rotation"])[:, :2]
    flat = kornia.geometry.warp_affine(flat, affine, (height, width))
    flat = kornia.enhance.adjust_brightness_accumulative(flat, drawn["brightness"])
    flat = kornia.enhance.adjust_contrast_with_mean_subtraction(flat, drawn["contrast"])
    flat = kornia.enhance.adjust_saturation_with_gray_subtraction(flat, drawn["saturation"])
    flat = kornia.enhance.adjust_hue(flat, drawn["hue"] * 2 * math.pi)
    return kornia.enhance.sharpness(flat, drawn["sharpness"]).clamp(0.0, 1.0).reshape(pixels.shape)
