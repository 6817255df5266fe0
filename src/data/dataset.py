"""The door for notebooks: `open_dataset(folder_or_hub_id)`, to look at what a run would train on."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.source import Source
from errors import UserError


@dataclass
class Dataset(Source):
    """An open dataset, by rows: `dataset[[0, 7, 9]]` is the batch that training would see. Made by `open_dataset`.

    Close it with `with` or `close()`; garbage collection closes it too. It is a Source: `episodes`, `tasks`, `problems`,
    `warnings` and the columns are described there.

    Attributes:
        image_size: (h, w) that pictures are resized to, None for as recorded.
    """

    image_size: list[int] | None = None
    _loader: Loader | None = field(default=None, init=False, repr=False)
    _loader_pid: int = field(default=0, init=False, repr=False)

    @property
    def stats(self) -> dict:
        """{feature: {statistic: array}} to normalise by."""
        return self.meta.stats or {}

    def __len__(self) -> int:
        """Number of rows, one a frame."""
        return self.rows

    def __getitem__(self, rows) -> dict:
        """The batch of the given rows: a number, a slice, a list, an array of numbers or a mask.

        Returns:
            LeRobot's keys: cameras (B, C, h, w) uint8, columns (B, ...) tensors, `task` a list of B texts.

        Raises:
            UserError: the dataset has problems, or a picture cannot be read.
            IndexError: a row is not within the dataset.
        """
        self.require()
        if not isinstance(rows, slice):
            rows = np.asarray(list(rows) if isinstance(rows, tuple) else rows)
            if rows.size == 0:
                rows = rows.astype(np.int64)
        chosen = np.arange(len(self))[rows].reshape(-1).copy()
        return self._rows_loader().batch_of(torch.from_numpy(chosen))

    def _rows_loader(self) -> Loader:
        """A loader without windows, whose thread is never started; a forked process gets one of its own."""
        if self._loader is None or self._loader_pid != os.getpid():
            self._loader = Loader(self, Frames(self, self.image_size), deltas={}, batch_size=1, seed=0)
            self._loader_pid = os.getpid()
        return self._loader

    def __getstate__(self) -> dict:
        """The state of a copy: everything but open videos."""
        return {**vars(self), "_loader": None}

    def close(self) -> None:
        """Close the videos. Asking for rows opens them again."""
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def open_dataset(
    dataset_id: str | Path,
    episodes: str | int | Iterable[int] | None = None,
    observations: str | list[str] | None = None,
    image_size: list[int] | None = None,
) -> Dataset:
    """Open and check a dataset, to look at its rows, problems and statistics.

    Args:
        dataset_id: a folder, or a Hub id, whose files are downloaded first.
        episodes: which episodes, such as "0:40,45" or [0, 1, 2]; None for all.
        observations: names or patterns of the cameras and states to read, as for --observations; None for all.
        image_size: (h, w) that pictures are resized to; None for as recorded.

    Raises:
        UserError: there is no such dataset, it is in another format, or an episode or observation is not there.
    """
    if episodes is not None and not isinstance(episodes, str):
        episodes = ",".join(str(int(episode)) for episode in np.atleast_1d(np.asarray(episodes)))
    if isinstance(observations, str):
        observations = [observations]
    if image_size is not None and (np.shape(image_size) != (2,) or min(image_size) < 1):
        raise UserError(f"image_size: expected [height, width] in pixels, got {image_size!r}")
    source = open_source(str(dataset_id), episodes=episodes, observations=observations)
    return Dataset(**vars(source), image_size=image_size)
