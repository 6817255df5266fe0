"""The first batches of a dataset, to compare with those of another copy of it."""

import torch

from data.frames import Frames
from data.loader import Loader


def batches(source, count=3, size=None, **options) -> list[dict]:
    """`count` batches of 8 samples, each with 4 actions; `size` and `options` are those of Frames and Loader."""
    loader = Loader(source, Frames(source, size), {"action": list(range(4))}, 8, seed=3, **options).start()
    try:
        return [own_copy(next(loader)) for _ in range(count)]
    finally:
        loader.close()


def own_copy(batch: dict) -> dict:
    """A batch whose pictures are not in the loader's buffers."""
    copied = {}
    for key, value in batch.items():
        copied[key] = value.clone() if isinstance(value, torch.Tensor) else value
    return copied


def assert_same(first: list[dict], second: list[dict]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, other[key]), key
                assert value.dtype == other[key].dtype, key
            else:
                assert value == other[key], key
