"""What a robot gives, as the tensors that a preprocessor takes.

H and W pixels, C channels, D numbers.
"""

import numpy as np
import torch

from data.depth import DepthRange
from errors import UserError, one_line

FARTHEST_SEEN = 100  # metres: a median beyond that is of millimetres


def to_tensor(observation: dict, key: str, kind: str, shape: tuple, depth: DepthRange | None = None) -> torch.Tensor:
    """One value of an observation: pictures as (1, C, H, W) in [0, 1], others as (1, D), both float32.

    Args:
        depth: of a depth camera, whose value may be distances instead of a picture.

    Raises:
        UserError: it is missing, or not of this kind and shape.
    """
    # None, for any size, is spelt out
    wanted = str(shape).replace("None", "any")
    if key not in observation:
        raise UserError(
            f"the observation has no {key!r}: expected {kind} of shape {wanted}, got keys {sorted(map(str, observation))}"
        )
    value = observation[key]
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.dtype == torch.bfloat16:  # which NumPy lacks
            value = value.float()
    try:
        value = np.asarray(value)
    except ValueError as error:  # a ragged list
        raise UserError(f"{key}: expected {kind} of shape {wanted}: {one_line(error)}") from None
    given = f"{value.dtype} of {value.shape}"
    expected = f"uint8 of shape {wanted} (height, width, channels)"
    if depth is not None:
        of_depth = str((*shape[:2], 1)).replace("None", "any")
        expected = f"depth of shape {of_depth}, integers in millimetres or floats in metres, or its uint8 picture of shape {wanted}"
        if value.dtype != np.uint8:
            check_distances(key, value, expected)
            value = depth.picture(value)
    fits = value.ndim == len(shape) and value.size > 0
    fits = fits and all(size in (None, got) for size, got in zip(shape, value.shape, strict=True))
    if kind == "uint8":
        if value.dtype != np.uint8 or not fits:
            raise UserError(f"{key}: expected {expected}, got {given}")
        picture = torch.from_numpy(np.ascontiguousarray(value)).permute(2, 0, 1)  # (C, H, W)
        return picture.to(torch.float32)[None] / 255.0
    if value.dtype.kind not in "fiub" or not fits:
        raise UserError(f"{key}: expected numbers of shape {wanted}, got {value.dtype} of shape {value.shape}")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"{key}: expected finite numbers, got {value}")
    return torch.from_numpy(value)[None]


def check_distances(key: str, value: np.ndarray, expected: str) -> None:
    """Raise a UserError for what is no frame of a depth camera.

    Args:
        expected: what is one, for the message.
    """
    has_one_channel = value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 1)
    if value.dtype.kind not in "iuf" or not has_one_channel or value.size == 0:
        raise UserError(f"{key}: expected {expected}, got {value.dtype} of {value.shape}")
    if value.dtype.kind == "f":
        some = value[::8, ::8]
        some = some[np.isfinite(some) & (some > 0)]
        if some.size and np.median(some) > FARTHEST_SEEN:
            raise UserError(
                f"{key}: expected metres, since the numbers are floats, got a median of {np.median(some):.4g}. Of millimetres, "
                "pass integers, or divide them by 1000"
            )
