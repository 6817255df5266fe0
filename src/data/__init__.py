"""A LeRobot dataset as batches. The door for notebooks is `open_dataset`; training goes through the modules beside it."""

from data.dataset import open_dataset

__all__ = ["open_dataset"]
