"""The door for notebooks: `open_dataset(folder_or_hub_id)`, to look at what a run would train on."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.source import Source


@dataclass
class Dataset(Source):
    """An open dataset, by rows: `dataset[[0, 7, 9]]` is the batch that training would see. Made by `open_dataset`.

    Close it with `with` or `close()`; garbage collection closes it too. It is a Source: `episodes`, `tasks`, `problems`,
    `warnings` and the columns are described there.

    Attributes:
        image_size: (h, w) that pictures are resized to, None for as recorded.
    """

    image_size: list[int] | None = None

    @property
    def stats(self) -> dict:
        """{feature: {statistic: array}} to normalise by."""
        return self.meta.stats or {}

    def __len__(self) -> int:
        """Number of rows, one a frame."""
        return self.rows

    def __getitem__(self, rows) -> dict:
        """The batch of the given rows, which may be a list, a slice or a single number.

        Returns:
            LeRobot's keys: cameras (B, C, h, w) uint8, columns (B, ...) tensors, `task` a list of B texts.

        Raises:
            UserError: the dataset has problems, or a picture cannot be read.
            IndexError: a row is not within the dataset.
        """
        self.require()
        return self._loader.batch_of(torch.arange(len(self))[rows].reshape(-1).contiguous())

    @cached_property
    def _loader(self) -> Loader:
        """A loader without windows; it starts no thread."""
        return Loader(self, Frames(self, self.image_size), deltas={}, batch_size=1, seed=0)

    def close(self) -> None:
        """Close the videos. Safe to call twice."""
        if "_loader" in vars(self):
            self._loader.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def open_dataset(
    dataset_id: str | Path,
    episodes: str | None = None,
    observations: list[str] | None = None,
    image_size: list[int] | None = None,
) -> Dataset:
    """Open and check a dataset, to look at its rows, problems and statistics.

    Args:
        dataset_id: a folder, or a Hub id, whose files are downloaded first.
        episodes: which episodes, such as "0:40,45"; None for all.
        observations: names or patterns of the cameras and states to read, as for --observations; None for all.
        image_size: (h, w) that pictures are resized to; None for as recorded.

    Raises:
        UserError: there is no such dataset, it is in another format, or an episode or observation is not there.
    """
    source = open_source(str(dataset_id), episodes=episodes, observations=observations)
    return Dataset(**vars(source), image_size=image_size)
