"""Augment camera pictures and states on the device. Each sample and camera gets its own draw, a function of (seed, sample).

B samples, T steps of history (all steps of a sample get one draw, because one camera saw them), C channels, H, W pixels,
F numbers of the state.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from runtime import to_device

STATE = "observation.state"
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
# Draws that leave a picture's values as they are: those of a depth camera are distances.
SAME_VALUES = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, "sharpness": 1.0}


def augment(batch: dict, meta, config) -> dict:
    """The batch with augmented cameras and state, as the settings say.

    Args:
        batch: pictures in [0, 1], the state in the robot's units; "sample" (B,), positions in the run, address the draws.
        meta: the dataset's metadata, with its statistics.
        config: the run's TrainConfig.
    """
    if not (config.augment or config.state_noise or config.state_dropout or config.camera_dropout):
        return batch
    samples = batch["sample"].numpy()
    cameras = meta.camera_keys
    batch = dict(batch)
    if config.augment:
        batch = vary_pictures(batch, meta, config.augment_style, config.seed, samples)
    if config.camera_dropout and len(cameras) > 1:
        chance, which = uniform((config.seed, 0xCA3), samples, 2).T  # (B,) each
        dropped = torch.where(chance < config.camera_dropout, (which * len(cameras)).long(), -1)  # at most one camera
        for camera, key in enumerate(cameras):
            mean = statistic(meta, key, "mean", batch[key], default=0.5)
            batch[key] = torch.where(like(dropped == camera, batch[key]), mean, batch[key])
    if STATE in batch and (config.state_noise or config.state_dropout):
        batch[STATE] = vary_state(batch[STATE], meta, config, samples)
    return batch


def vary_pictures(batch: dict, meta, style: str, seed: int, samples: np.ndarray) -> dict:
    """Augment the batch's pictures, with one draw for each sample and camera. Depth cameras are turned and shifted only."""
    change = {"full": vary, "fast": vary_fast}[style]
    pictures = {}
    for camera, key in enumerate(meta.camera_keys):
        if key in batch:  # else the batch holds features of its pictures
            drawn = draws(seed, samples, camera)
            if key in meta.depth_keys:
                drawn |= {name: torch.full_like(drawn[name], value) for name, value in SAME_VALUES.items()}
            pictures[key] = change(batch[key], drawn)
    return batch | pictures


def vary_state(state: Tensor, meta, config, samples: np.ndarray) -> Tensor:
    """States (B, [T,] F) with noise, in standard deviations of the dataset, and the mean in place of those that are dropped."""
    drawn = uniform((config.seed, 0x57A), samples, 1 + state.shape[-1])
    if config.state_noise:
        # of a uniform number, the normal one that as many are below of
        normal = torch.special.ndtri(drawn[:, 1:].clamp(1e-6, 1 - 1e-6))  # (B, F)
        normal = to_device(normal, state.device).reshape(len(state), *[1] * (state.ndim - 2), -1)
        state = state + config.state_noise * statistic(meta, STATE, "std", state, default=1.0) * normal
    dropped = like(drawn[:, 0] < config.state_dropout, state)
    return torch.where(dropped, statistic(meta, STATE, "mean", state, default=0.0), state)


def statistic(meta, key: str, name: str, values: Tensor, default: float) -> Tensor:
    """A feature's statistic, to broadcast against its values; `default` where the dataset has none."""
    stats = (meta.stats or {}).get(key, {})
    return torch.as_tensor(stats.get(name, default), dtype=values.dtype, device=values.device)


def like(flags: Tensor, values: Tensor) -> Tensor:
    """(B, 1, ...) flags (B,), to broadcast against values (B, ...)."""
    return to_device(flags, values.device).reshape(-1, *[1] * (values.ndim - 1))


def draws(seed: int, samples: np.ndarray, camera: int) -> dict[str, Tensor]:
    """(B,) float32 draws from each of RANGES, a function of (seed, sample, camera)."""
    unit = uniform((seed, camera, 0xA06), samples, len(RANGES))
    drawn = {}
    for column, (name, (low, high)) in enumerate(RANGES.items()):
        drawn[name] = low + (high - low) * unit[:, column]
    return drawn


def uniform(address: tuple[int, ...], samples: np.ndarray, count: int) -> Tensor:
    """(B, count) float32 in [0, 1), a function of the address and each sample.

    Source: splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), by its counter.
    """
    base = int(np.random.SeedSequence(address).generate_state(1, dtype=np.uint64)[0])
    counter = samples.astype(np.uint64)[:, None] * np.uint64(count) + np.arange(count, dtype=np.uint64)
    with np.errstate(over="ignore"):  # it computes modulo 2**64
        z = np.uint64(base) + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(40)).astype(np.float32) / 2**24)


def together(drawn: dict[str, Tensor], pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The draws (B * T,) on the device of the pictures (B, [T,] C, H, W), and these as (B * T, C, H, W)."""
    stacked = torch.stack(list(drawn.values()))  # (len(RANGES), B)
    # Copy all draws to the device at once, from pinned memory: the copy does not block.
    stacked = to_device(stacked.pin_memory() if pixels.is_cuda else stacked, pixels.device)
    steps = math.prod(pixels.shape[1:-3])  # T
    return dict(zip(drawn, stacked.repeat_interleave(steps, dim=1), strict=True)), pixels.flatten(0, -4)


def vary_fast(pixels: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Pictures (B, [T,] 3, H, W) shifted and changed in colour by each sample's draw, with the edge's colour beyond it.

    Shifts are of whole pixels, which keeps small things as sharp as they are when the policy acts. All changes of colour are
    one matrix for each picture. In `vary`, pictures also turn, brightness adds, hue turns in HSV, sharpness is another
    transform, and black is beyond the edge.
    """
    drawn, pictures = together(drawn, pixels)
    height, width = pictures.shape[-2:]
    right, down = (drawn["shift_x"] * width).round(), (drawn["shift_y"] * height).round()
    # Where each pixel comes from, in units of half the picture.
    zero, one = torch.zeros_like(right), torch.ones_like(right)
    across = torch.stack([one, zero, -2 * right / width], dim=1)
    along = torch.stack([zero, one, -2 * down / height], dim=1)
    grid = functional.affine_grid(torch.stack([across, along], dim=1), list(pictures.shape), align_corners=False)
    pictures = functional.grid_sample(pictures, grid, "nearest", padding_mode="border", align_corners=False)

    # Hue turns colours around grey, saturation moves them away from it, contrast from the mean.
    grey = torch.full((3, 3), 1 / 3, device=pixels.device)
    turn = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]], device=pixels.device) / math.sqrt(3)
    hue = 2 * math.pi * drawn["hue"][:, None, None]
    colour = hue.cos() * (torch.eye(3, device=pixels.device) - grey) + hue.sin() * turn  # (B * T, 3, 3)
    scale = (drawn["brightness"] * drawn["contrast"])[:, None, None]
    matrix = scale * (grey + drawn["saturation"][:, None, None] * colour)
    offset = drawn["brightness"] * (1 - drawn["contrast"]) * pictures.mean((1, 2, 3))
    changed = torch.baddbmm(offset[:, None, None], matrix, pictures.flatten(2)).clamp_(0, 1)
    return changed.reshape(pixels.shape)


def vary(pixels: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """Pictures (B, [T,] C, H, W) transformed by each sample's draw."""
    import kornia.enhance  # slow to import, and needed only with --augment
    import kornia.geometry

    drawn, pictures = together(drawn, pixels)
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
