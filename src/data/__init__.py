"""A LeRobot dataset as batches: `open_dataset` reads and checks it, Frames gives its pixels, Loader its batches."""

from data.dataset import open_dataset

__all__ = ["open_dataset"]
