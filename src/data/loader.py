"""Batches in an order that is a function of (seed, epoch), assembled ahead of the loop by one thread.

Sample p of a run is position p mod M of the order of epoch p // M, M trainable rows an epoch, and the batch of step s
holds samples s * B to (s + 1) * B - 1: where a run stands is one number, the samples seen.
"""

import queue
import threading

import torch
from torch import Tensor

from config import UserError
from data.frames import Frames
from data.source import Source
from data.windows import epoch_order, trainable_rows, window_rows

AHEAD = 2  # batches that wait for the loop


class Loader:
    """Endless batches of a source, the same for the same arguments however often it is started.

    Args:
        source: the open dataset.
        deltas: frames that each key's window looks at, such as {"action": [0, 1, 2]}.
        batch_size: B, samples a batch.
        seed: the order's.
        samples_seen: samples that the run has trained on already; the next batch starts there.
        drop_n_last_frames: frames at an episode's end at which no sample starts.
        num_threads: decoders that work at once.

    Raises:
        UserError: no frame is left to start a sample at.
    """

    def __init__(
        self,
        source: Source,
        deltas: dict[str, list[int]],
        batch_size: int,
        seed: int,
        samples_seen: int = 0,
        drop_n_last_frames: int = 0,
        num_threads: int = 1,
    ):
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.deltas = {key: torch.tensor(frames) for key, frames in deltas.items()}
        self.rows = trainable_rows(source.starts, source.ends, drop_n_last_frames)  # (M,)
        if len(self.rows) == 0:
            raise UserError(
                f"dataset {source.name}: no episode is longer than the {drop_n_last_frames} frames that the policy "
                "leaves out at its end: pass --policy_args drop_n_last_frames=0"
            )
        self.frames = Frames(source, num_threads)
        self.tasks = source.tasks
        self._orders: dict[int, Tensor] = {}
        self._ahead: queue.Queue = queue.Queue(maxsize=AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(samples_seen,), name="loader", daemon=True)
        self._thread.start()

    @property
    def samples_per_epoch(self) -> int:
        return len(self.rows)

    def __next__(self) -> dict:
        """The next batch: LeRobot's keys, dtypes and shapes, (B, ...) each, cameras as uint8.

        Besides those, `sample` holds (B,) int64 positions p in the run, which augmentation is a function of.
        """
        batch = self._ahead.get()
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def rows_at(self, samples_seen: int) -> Tensor:
        """(B,) rows of the batch that starts at `samples_seen`. Pure."""
        samples = torch.arange(samples_seen, samples_seen + self.batch_size)
        epochs, positions = samples // len(self.rows), samples % len(self.rows)
        rows = torch.empty_like(samples)
        for epoch in torch.unique(epochs).tolist():
            if epoch not in self._orders:
                self._orders = {e: order for e, order in self._orders.items() if e >= epoch - 1}
                self._orders[epoch] = epoch_order(len(self.rows), self.seed, epoch)
            mine = epochs == epoch
            rows[mine] = self.rows[self._orders[epoch][positions[mine]]]
        return rows

    def describe(self, samples_seen: int) -> str:
        """Which episode and frame each sample of a batch comes from, for people."""
        rows = self.rows_at(samples_seen)
        episode = self.source.episode_of(rows)
        frames = rows - self.source.starts[episode]
        names = [f"{self.source.episodes[e]}:{f}" for e, f in zip(episode.tolist(), frames.tolist(), strict=True)]
        return ", ".join(names[:16]) + (f", ... ({len(names)} in all)" if len(names) > 16 else "")

    def batch_of(self, rows: Tensor) -> dict:
        """The batch of any (B,) rows: what `default_collate` makes of `LeRobotDataset[row]`, with cameras as uint8."""
        episode = self.source.episode_of(rows)
        starts, ends = self.source.starts[episode], self.source.ends[episode]
        batch = {}
        for key in [*self.source.columns, *self.frames.keys]:
            if key in self.deltas:
                where, batch[f"{key}_is_pad"] = window_rows(rows, self.deltas[key], starts, ends)  # (B, T)
            else:
                where = rows  # (B,)
            batch[key] = self._gather(key, where)
        batch["task"] = [self.tasks[i] for i in batch["task_index"].tolist()]
        return batch

    def _gather(self, key: str, where: Tensor):
        if key in self.frames.keys:
            frames = self.frames.read(key, where.flatten())
            frames = frames.reshape(*where.shape, *frames.shape[1:])  # (B, [T,] C, H, W)
            return frames.squeeze(1) if where.shape[1:] == (1,) and key in self.source.meta.video_keys else frames
        column = self.source.columns[key]
        return column[where] if isinstance(column, Tensor) else [column[i] for i in where.tolist()]

    def _fill(self, samples_seen: int) -> None:
        try:
            while not self._stop.is_set():
                batch = self.batch_of(self.rows_at(samples_seen))
                batch["sample"] = torch.arange(samples_seen, samples_seen + self.batch_size)
                self._hand_over(batch)
                samples_seen += self.batch_size
        except BaseException as error:  # reaches the loop at its next batch
            self._hand_over(error)

    def _hand_over(self, item) -> None:
        while not self._stop.is_set():
            try:
                return self._ahead.put(item, timeout=0.1)
            except queue.Full:
                continue

    def close(self) -> None:
        """Stop the threads; safe to call twice and from any error."""
        self._stop.set()
        self._thread.join()
        self.frames.close()
