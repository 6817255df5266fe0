"""Batches in an order that is a function of (seed, epoch), assembled ahead of the loop by one thread into reused buffers.

Sample p of a run is position p mod M of the order of epoch p // M, M trainable rows an epoch, and the batch of step s
holds samples s * B to (s + 1) * B - 1: where a run stands is one number, the samples seen.
"""

import queue
import threading

import torch
from torch import Tensor

from data.frames import Frames
from data.source import Source
from data.windows import epoch_order, trainable_rows, weighted_order, window_rows
from errors import UserError

RING = 3  # buffers for a batch's frames: one that the loop holds, one that waits, one that is being filled


class Loader:
    """Endless batches of a source, the same for the same arguments however often it is started.

    Args:
        source: the open dataset.
        frames: where its pixels come from; closed with the loader.
        deltas: frames that each key's window looks at, such as {"action": [0, 1, 2]}.
        batch_size: B, samples a batch.
        seed: the order's.
        samples_seen: samples that the run has trained on already; the next batch starts there.
        drop_n_last_frames: frames at an episode's end at which no sample starts.
        device: where the batches go: pinned buffers for CUDA, whose copies then need not wait.
        weights: share of each dataset in the samples, where the source has several; None for each row once an epoch.
        episodes: (E',) positions in `source.episodes` whose rows samples start at; None for all.
        rank, size: this process and how many share each batch; it reads its own part.

    Raises:
        UserError: no frame is left to start a sample at.
    """

    def __init__(
        self,
        source: Source,
        frames: Frames,
        deltas: dict[str, list[int]],
        batch_size: int,
        seed: int,
        samples_seen: int = 0,
        drop_n_last_frames: int = 0,
        device: torch.device | str = "cpu",
        weights: list[float] | None = None,
        episodes: Tensor | None = None,
        rank: int = 0,
        size: int = 1,
    ):
        self.source, self.frames, self.batch_size, self.seed = source, frames, batch_size, seed
        self.deltas = {key: torch.tensor(window) for key, window in deltas.items()}
        kept = torch.arange(len(source.episodes)) if episodes is None else episodes
        self.rows = trainable_rows(source.starts[kept], source.ends[kept], drop_n_last_frames)  # (M,)
        if len(self.rows) == 0:
            raise UserError(
                f"dataset {source.name}: no episode is longer than the {drop_n_last_frames} frames that the policy "
                "leaves out at its end: pass --policy_args drop_n_last_frames=0"
            )
        self.weights, self.share = weights, batch_size // size
        self.own = slice(rank * self.share, (rank + 1) * self.share)  # of each batch
        if weights:  # trainable rows of each dataset
            dataset = torch.arange(len(weights)).repeat_interleave(torch.tensor(source.parts))  # of each episode
            self.counts = torch.bincount(dataset[source.episode_of(self.rows)], minlength=len(weights)).tolist()
            if not all(self.counts):
                raise UserError(f"one of the datasets in {source.name} has no frame to start a sample at: leave it out")
        self.tasks = source.tasks
        self.device = torch.device(device)
        self._orders: dict[int, Tensor] = {}
        self._ahead: queue.Queue = queue.Queue()  # (batch, slot of the ring) that wait for the loop
        self._free: queue.Queue = queue.Queue()  # (slot, event after which it may be written)
        for slot in range(RING):
            self._free.put((slot, None))
        self._held = None  # slot that the loop has
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(samples_seen,), name="loader", daemon=True)
        self._thread.start()

    @property
    def samples_per_epoch(self) -> int:
        return len(self.rows)

    def __next__(self) -> dict:
        """The next batch: LeRobot's keys, dtypes and shapes, (B, ...) each, cameras as uint8.

        Cameras lie in a reused buffer, which is good until the next call. Of several processes each gets its B / size
        samples. Besides LeRobot's keys, `sample` holds (B,) int64 positions p in the run, which augmentation is a function
        of, and `weight` (B,) how many actions within its episode each sample has, the whole batch's mean being 1.
        """
        if self._held is not None:
            copied = None
            if self.device.type == "cuda":  # copies out of the buffer may still be under way
                copied = torch.cuda.Event(blocking=True)  # to sleep until then
                copied.record(torch.cuda.current_stream(self.device))
            self._free.put((self._held, copied))
        batch, self._held = self._ahead.get()
        if isinstance(batch, BaseException):
            self._ahead.put((batch, None))  # and again to whoever asks after that: there will be no other batch
            raise batch
        return batch

    def rows_at(self, samples_seen: int) -> Tensor:
        """(B,) rows of the batch that starts at `samples_seen`. Pure."""
        samples = torch.arange(samples_seen, samples_seen + self.batch_size)
        epochs, positions = samples // len(self.rows), samples % len(self.rows)
        rows = torch.empty_like(samples)
        for epoch in torch.unique(epochs).tolist():
            order = self._orders.get(epoch)
            if order is None:  # put there at once: the loop asks as well, beside the loader's thread
                order = self._order(epoch)
                self._orders = {**{e: known for e, known in self._orders.items() if e >= epoch - 1}, epoch: order}
            mine = epochs == epoch
            rows[mine] = self.rows[order[positions[mine]]]
        return rows

    def _order(self, epoch: int) -> Tensor:
        if self.weights:
            return weighted_order(self.counts, self.weights, self.seed, epoch)
        return epoch_order(len(self.rows), self.seed, epoch)

    def describe(self, samples_seen: int) -> str:
        """Which episode and frame each sample of a batch comes from, for people."""
        rows = self.rows_at(samples_seen)
        episode = self.source.episode_of(rows)
        frames = rows - self.source.starts[episode]
        names = [f"{self.source.episodes[e]}:{f}" for e, f in zip(episode.tolist(), frames.tolist(), strict=True)]
        return ", ".join(names[:16]) + (f", ... ({len(names)} in all)" if len(names) > 16 else "")

    def batch_at(self, samples_seen: int, buffers: dict[str, Tensor] | None = None) -> dict:
        """This process' part of the batch that starts at `samples_seen`."""
        rows = self.rows_at(samples_seen)
        batch = self.batch_of(rows[self.own], buffers)
        batch["sample"] = torch.arange(samples_seen, samples_seen + self.batch_size)[self.own]
        batch["weight"] = self._weights(rows)[self.own]
        return batch

    def _weights(self, rows: Tensor) -> Tensor:
        if "action" not in self.deltas:
            return torch.ones(len(rows))
        episode = self.source.episode_of(rows)
        starts, ends = self.source.starts[episode], self.source.ends[episode]
        padded = window_rows(rows, self.deltas["action"], starts, ends)[1]  # (B, T)
        valid = (~padded).sum(1).float()
        return valid / valid.mean()

    def batch_of(self, rows: Tensor, buffers: dict[str, Tensor] | None = None) -> dict:
        """The batch of any (B,) rows: what `default_collate` makes of `LeRobotDataset[row]`, with cameras as uint8."""
        episode = self.source.episode_of(rows)
        starts, ends = self.source.starts[episode], self.source.ends[episode]
        batch = {}
        for key in [*self.source.columns, *self.frames.keys]:
            where = rows  # (B,)
            if key in self.deltas:
                where, batch[f"{key}_is_pad"] = window_rows(rows, self.deltas[key], starts, ends)  # (B, T)
            batch[key] = self._gather(key, where, (buffers or {}).get(key))
        batch["task"] = [self.tasks[i] for i in batch["task_index"].tolist()]
        return batch

    def _gather(self, key: str, where: Tensor, buffer: Tensor | None):
        if key in self.frames.keys:
            frames = self.frames.read(key, where.flatten(), buffer)
            frames = frames.reshape(*where.shape, *frames.shape[1:])  # (B, [T,] C, h, w)
            return frames.squeeze(1) if where.shape[1:] == (1,) and key in self.source.videos else frames
        column = self.source.columns[key]
        return column[where] if isinstance(column, Tensor) else [column[i] for i in where.tolist()]

    def _make_buffers(self) -> list[dict[str, Tensor]]:
        """RING times a buffer of each camera, (B * T, C, h, w) uint8: fresh memory costs more than the copy into it."""
        if self.frames.on_device:
            return [{}] * RING
        size = {key: self.share * len(self.deltas.get(key, [0])) for key in self.frames.keys}
        pinned = self.device.type == "cuda"
        shape = self.frames.decoder.shape
        return [
            {key: torch.empty(n, *shape(key), dtype=torch.uint8, pin_memory=pinned) for key, n in size.items()}
            for _ in range(RING)
        ]

    def _fill(self, samples_seen: int) -> None:
        slot = None
        try:
            ring = self._make_buffers()
            while not self._stop.is_set():
                slot, copied = self._free.get()
                if slot is None:
                    return
                if copied is not None:
                    copied.synchronize()
                self._ahead.put((self.batch_at(samples_seen, ring[slot]), slot))
                samples_seen += self.batch_size
        except BaseException as error:  # reaches the loop at its next batch
            self._ahead.put((error, None))

    def close(self) -> None:
        """Stop the threads; safe to call twice and from any error."""
        self._stop.set()
        self._free.put((None, None))
        self._thread.join()
        self.frames.close()
