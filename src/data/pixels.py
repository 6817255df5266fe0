"""Copies of pictures: decoders give the channels of a pixel side by side, batches hold each channel by itself."""

import torch
from torch import Tensor


def copy_picture(pixels: Tensor, out: Tensor) -> None:
    """Copy (C, h, w) uint8 pixels into a contiguous tensor. OpenCV separates channels several times as fast as torch."""
    import cv2  # takes a while, and not every command reads pictures

    side_by_side = pixels.permute(1, 2, 0)  # (h, w, C)
    if side_by_side.is_contiguous() and not pixels.is_contiguous():
        cv2.split(side_by_side.numpy(), list(out.numpy()))  # into these arrays
    else:
        out.copy_(pixels)


def contiguous_pictures(frames: Tensor, out: Tensor | None = None) -> Tensor:
    """(n, C, h, w) uint8 frames, contiguous.

    Args:
        out: memory for them, of their size.
    """
    if out is None:
        if frames.is_contiguous():
            return frames
        out = torch.empty(frames.shape, dtype=frames.dtype)
    out = out.view(frames.shape)
    for pixels, copy in zip(frames, out, strict=True):
        copy_picture(pixels, copy)
    return out
