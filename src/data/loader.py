"""Batches in an order that is a function of (seed, epoch), assembled ahead of the loop by other threads into reused buffers.

Sample p of a run is position p mod M of the order of epoch p // M, with M trainable rows an epoch. The batch of step s
holds samples s * B to (s + 1) * B - 1, so that one number says where a run is: the samples it has seen.

B samples a batch, T deltas of a window, C channels, h and w pixels.
"""

import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from data.frames import Frames
from data.order import Order, TrainableRows
from data.source import Source
from data.windows import window_rows
from errors import UserError

LOOK_AHEAD = 8  # batches whose streamed bytes are asked for ahead of the one that is being assembled
RING = 3  # buffers for a batch's frames: one that the loop reads, and two that are filled or ready
ASSEMBLED_AT_ONCE = 2  # batches: while one waits for its last frames, those of the next are decoded


class Loader:
    """Endless batches of a source, the same for the same arguments wherever they start.

    `start` runs the threads that `next` takes batches from. `batch_at` and `batch_of` need none.

    Args:
        source: the open dataset.
        frames: its pixels, or what a frozen backbone sees in them (training/feature_store.py); closed with the loader.
        deltas: frames that each key's window reads, such as {"action": [0, 1, 2]}.
        batch_size: B, samples a batch.
        seed: of the order.
        drop_n_last_frames: frames at an episode's end at which no sample starts.
        device: where the batches go. For CUDA the buffers are pinned, so that the loop does not wait for its copies.
        weights: share of each dataset in the samples, if the source has several; None for each row once an epoch.
        shuffle: full, or blocks of episodes (data/order.py).
        episodes: positions in `Source.episodes` of the episodes to read, (E',) int64; None for all.
        rank: this process.
        size: number of processes that share each batch. Each reads its own B / size samples.

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
        *,
        drop_n_last_frames: int = 0,
        device: torch.device | str = "cpu",
        weights: list[float] | None = None,
        shuffle: str = "full",
        episodes: Tensor | None = None,
        rank: int = 0,
        size: int = 1,
    ):
        self.source = source
        self.frames = frames
        self.deltas = {key: torch.tensor(window) for key, window in deltas.items()}
        self.batch_size = batch_size
        self.local_batch_size = batch_size // size
        self.device = torch.device(device)
        self.tasks = source.tasks
        if episodes is None:
            episodes = torch.arange(len(source.episodes))
        self.rows = TrainableRows(source.starts[episodes], source.ends[episodes], drop_n_last_frames)
        if len(self.rows) == 0:
            raise UserError(
                f"dataset {source.name}: no episode is longer than the {drop_n_last_frames} frames that the policy "
                "leaves out at its end: pass --policy_args drop_n_last_frames=0"
            )
        rows_per_dataset = None
        if weights:
            rows_per_dataset = self._rows_per_dataset(episodes, len(weights))
            if not all(rows_per_dataset):
                raise UserError(f"one of the datasets in {source.name} has no frame to start a sample at: leave it out")
        self.order = Order(self.rows, seed, shuffle, weights, rows_per_dataset)

        self._local = slice(rank * self.local_batch_size, (rank + 1) * self.local_batch_size)  # of each batch
        # Streamed batches one by one: two could push each other's pieces out of the cache. It starts its threads at its first batch.
        self._assembler = ThreadPoolExecutor(1 if frames.is_streamed else ASSEMBLED_AT_ONCE, "loader")
        self._pending: deque[Future] = deque()  # batches, each with its buffers
        self._samples_submitted = 0  # where the batch after those starts
        self._in_use: dict[str, Tensor] | None = None  # the buffers of the batch that the loop has
        self._prefetch_thread: threading.Thread | None = None
        self._prefetch_error: BaseException | None = None
        self._assembled = 0  # batches since the start
        self._is_assembled = threading.Condition()  # notified when that changes, and at the end
        self._stop = threading.Event()

    def start(self, samples_seen: int = 0) -> "Loader":
        """Assemble batches ahead in other threads, the first from sample `samples_seen` on."""
        self._samples_submitted = samples_seen
        for _ in range(RING):
            self._submit(self._make_buffers())
        if self.frames.is_streamed:
            self._prefetch_thread = threading.Thread(
                target=self._prefetch, args=(samples_seen,), name="prefetch", daemon=True
            )
            self._prefetch_thread.start()
        return self

    @property
    def samples_per_epoch(self) -> int:
        return len(self.rows)

    def __next__(self) -> dict:
        """The next batch: LeRobot's keys, dtypes and shapes, (B, ...) each, cameras as uint8.

        Cameras are in a reused buffer, which is overwritten after the next call. Of several processes each gets its
        B / size samples. Besides LeRobot's keys a batch has `sample`, (B,) int64 positions p in the run, which addresses
        augmentation, and `weight`, (B,) float32 number of unpadded actions of each sample, divided by the mean over the
        batch of all processes.
        """
        assert self._pending, "start() makes the batches"
        if self._in_use is not None:
            copied = None
            if self.device.type == "cuda":  # copies out of the buffers may still be under way
                copied = torch.cuda.Event(blocking=True)  # the thread that fills them next sleeps until then
                copied.record(torch.cuda.current_stream(self.device))
            self._submit(self._in_use, copied)
            self._in_use = None
        batch, buffers = self._pending[0].result()  # a failed one stays the first: there will be no other batch
        if self._prefetch_error is not None:
            raise self._prefetch_error
        self._pending.popleft()
        self._in_use = buffers
        return batch

    def _rows_per_dataset(self, episodes: Tensor, num_datasets: int) -> list[int]:
        rows = torch.zeros(num_datasets, dtype=torch.int64)
        return rows.index_add(0, self.source.dataset_of_episode[episodes], self.rows.counts).tolist()

    def rows_at(self, samples_seen: int) -> Tensor:
        """(B,) rows of the batch that starts at `samples_seen`. A pure function."""
        return self.order.rows_of(torch.arange(samples_seen, samples_seen + self.batch_size))

    def describe(self, samples_seen: int) -> str:
        """episode:frame of each sample of a batch, for people; of the first 16 if it has more."""
        rows = self.rows_at(samples_seen)
        episode = self.source.episode_of(rows)
        frames = rows - self.source.starts[episode]
        names = [f"{self.source.episodes[e]}:{f}" for e, f in zip(episode.tolist(), frames.tolist(), strict=True)]
        text = ", ".join(names[:16])
        return f"{text}, ... ({len(names)} in all)" if len(names) > 16 else text

    def batch_at(self, samples_seen: int, buffers: dict[str, Tensor] | None = None) -> dict:
        """This process' samples of the batch that starts at `samples_seen`, with cameras in `buffers` if given."""
        rows = self.rows_at(samples_seen)  # (B,) of all processes
        samples = torch.arange(samples_seen, samples_seen + self.batch_size)[self._local]
        batch = self.batch_of(rows[self._local], buffers, samples)
        batch["sample"] = samples
        batch["weight"] = self._weights(rows)[self._local]
        return batch

    def _weights(self, rows: Tensor) -> Tensor:
        """(B,) number of unpadded actions of each sample, divided by the mean over the batch."""
        if "action" not in self.deltas:
            return torch.ones(len(rows))
        _, padded = self._window("action", rows)  # (B, T)
        valid = (~padded).sum(1).float()
        return valid / valid.mean()

    def batch_of(self, rows: Tensor, buffers: dict[str, Tensor] | None = None, samples: Tensor | None = None) -> dict:
        """The batch of any (B,) rows: `default_collate` of `LeRobotDataset[row]`, with cameras as uint8.

        Args:
            samples: (B,) positions in the run, which choose among a frame's versions; None for the first version.
        """
        batch = {}
        for key in [*self.source.columns, *self.frames.keys]:
            wanted = rows  # (B,)
            if key in self.deltas:
                wanted, padded = self._window(key, rows)  # (B, T)
                batch[f"{key}_is_pad"] = padded
            if key in self.frames.keys:
                places = self.frames.places(wanted, samples)
                batch[key] = self._read_frames(key, places, (buffers or {}).get(key))
            else:
                batch[key] = self._read_column(key, wanted)
        batch["task"] = [self.tasks[index] for index in batch["task_index"].tolist()]
        return batch

    def _window(self, key: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) rows that a key's window reads for samples at (B,) rows, and (B, T) bool, true where it leaves the episode."""
        episode = self.source.episode_of(rows)
        return window_rows(rows, self.deltas[key], self.source.starts[episode], self.source.ends[episode])

    def _read_column(self, key: str, rows: Tensor) -> Tensor | list[str]:
        column = self.source.columns[key]
        if isinstance(column, Tensor):
            return column[rows]  # (B, [T,] ...)
        return [column[row] for row in rows.tolist()]

    def _read_frames(self, key: str, rows: Tensor, buffer: Tensor | None) -> Tensor:
        frames = self.frames.read(key, rows.flatten(), buffer)
        frames = frames.reshape(*rows.shape, *frames.shape[1:])  # (B, [T,] C, h, w)
        if rows.shape[1:] == (1,) and key in self.source.videos:
            return frames.squeeze(1)  # as LeRobot does with a window of one frame of a video, though not of pictures
        return frames

    def _make_buffers(self) -> dict[str, Tensor]:
        """A buffer for each camera, (B * T, C, h, w) uint8: fresh memory costs more than the copy into it."""
        buffers = {}
        if not self.frames.on_device:
            for key in self.frames.keys:
                count = self.local_batch_size * len(self.deltas.get(key, [0]))
                shape = (count, *self.frames.shape(key))
                buffers[key] = torch.empty(shape, dtype=self.frames.dtype, pin_memory=self.device.type == "cuda")
        return buffers

    def _submit(self, buffers: dict[str, Tensor], copied: torch.cuda.Event | None = None) -> None:
        """Start to assemble the next batch in `buffers`, which may be overwritten after `copied`."""
        self._pending.append(self._assembler.submit(self._assemble, self._samples_submitted, buffers, copied))
        self._samples_submitted += self.batch_size

    def _assemble(self, samples_seen: int, buffers: dict[str, Tensor], copied: torch.cuda.Event | None) -> tuple:
        if copied is not None:
            copied.synchronize()
        batch = self.batch_at(samples_seen, buffers)
        with self._is_assembled:
            self._assembled += 1
            self._is_assembled.notify()
        return batch, buffers

    def _prefetch(self, samples_seen: int) -> None:
        """The thread that asks for the bytes of streamed videos, in the order of the batches to come."""
        prefetched = 0
        ahead = 1
        try:
            while True:
                with self._is_assembled:
                    while not self._stop.is_set() and prefetched >= self._assembled + ahead:
                        self._is_assembled.wait()
                if self._stop.is_set():
                    return
                rows = self.rows_at(samples_seen)[self._local]
                wanted = {}
                for key in self.frames.keys:
                    wanted[key] = self._window(key, rows)[0].flatten() if key in self.deltas else rows
                share = self.frames.prefetch(wanted)
                # What comes early must not push out what comes first: at most half of the cache is ahead.
                ahead = min(LOOK_AHEAD, max(1, int(0.5 / max(share, 1e-9))))
                samples_seen += self.batch_size
                prefetched += 1
        except BaseException as error:  # raised by the loop's next call
            self._prefetch_error = error

    def close(self) -> None:
        """Stop the threads; safe to call twice and after any error."""
        self._stop.set()
        with self._is_assembled:
            self._is_assembled.notify()
        self.frames.stop_streams()
        if self._prefetch_thread is not None:
            self._prefetch_thread.join()
        self._assembler.shutdown(cancel_futures=True)
        self.frames.close()
