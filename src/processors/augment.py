"""Augment camera pictures on the device. Each sample and camera gets its own draw, a function of (seed, sample).

B samples, T steps of history (all steps of a sample get one draw, because one camera saw them), C channels, H, W pixels.
"""

import math

import numpy as np
import torch
from torch import Tensor

from runtime import to_device

# LeRobot's default ranges (ImageTransformsConfig); all six transforms act on every picture here
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
    """The batch with augmented cameras, pictures in [0, 1]. batch["sample"] (B,), positions in the run, address the draws."""
    samples = batch["sample"].numpy()
    augmented = {key: vary(batch[key], draws(seed, samples, camera)) for camera, key in enumerate(cameras)}
    return {**batch, **augmented}


def draws(seed: int, samples: np.ndarray, camera: int) -> dict[str, Tensor]:
    """(B,) float32 draws from each of RANGES, a function of (seed, sample, camera).

    Source: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), by its counter.
    """
    base = int(np.random.SeedSequence([seed, camera, 0xA06]).generate_state(1, dtype=np.uint64)[0])
    counter = samples.astype(np.uint64)[:, None] * np.uint64(len(RANGES)) + np.arange(len(RANGES), dtype=np.uint64)
    with np.errstate(over="ignore"):  # it computes modulo 2**64
        z = np.uint64(base) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / 2**24)  # (B, len(RANGES)) in [0, 1)
    drawn = {}
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        drawn[name] = low + (high - low) * unit[:, column]
    return drawn


def vary(pixels: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Pictures (B, [T,] C, H, W) transformed by each sample's draw."""
    import kornia.enhance  # slow to import, and needed only with --augment
    import kornia.geometry

    # Copy all draws to the device at once, from pinned memory: the copy does not block.
    together = torch.stack(list(drawn.values()))  # (len(RANGES), B)
    together = to_device(together.pin_memory() if pixels.is_cuda else together, pixels.device)
    steps = math.prod(pixels.shape[1:-3])  # T
    drawn = dict(zip(drawn, together.repeat_interleave(steps, dim=1), strict=True))  # (B * T,) each
    pictures = pixels.flatten(0, -4)  # (B * T, C, H, W)
    height, width = pictures.shape[-2:]

    # Rotate around the middle and shift, in one warp.
    middle = torch.stack([torch.full_like(drawn["rotation"], (size - 1) / 2) for size in (width, height)], dim=1)
    shift = torch.stack([drawn["shift_x"] * width, drawn["shift_y"] * height], dim=1)  # (B * T, 2)
    affine = kornia.geometry.get_affine_matrix2d(shift, middle, torch.ones_like(shift), drawn["rotation"])[:, :2]
    pictures = kornia.geometry.warp_affine(pictures, affine, (height, width))

    # Change the colours.
    pictures = kornia.enhance.adjust_brightness_accumulative(pictures, drawn["brightness"])
    pictures = kornia.enhance.adjust_contrast_with_mean_subtraction(pictures, drawn["contrast"])
    pictures = kornia.enhance.adjust_saturation_with_gray_subtraction(pictures, drawn["saturation"])
    pictures = kornia.enhance.adjust_hue(pictures, drawn["hue"] * 2 * math.pi)
    pictures = kornia.enhance.sharpness(pictures, drawn["sharpness"]).clamp(0.0, 1.0)
    return pictures.reshape(pixels.shape)
