"""What a policy's frozen backbone sees, encoded once for each frame and stored, so that a training step begins behind it.

A policy has such features if it has a method `frozen_features`, from a batch to {name: float16 tensor}, which may then stand in
its batches in place of the pictures. Where pictures are augmented, several versions of each frame are stored: the frame itself,
and others that are drawn once. Each sample takes one of them, a function of (seed, sample).

The store is one of frames (data/frames.py) whose rows are the bytes of all versions of all features of a frame.

N rows, K versions, F numbers of all features of a frame, n rows to read.
"""

import hashlib
import json
import math
import threading
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from data.frame_store import FrameStore
from data.frames import Frames, move_to, room_for
from data.loader import Loader
from data.source import Source
from processors.augment import RANGES, uniform, vary_pictures
from processors.pipelines import to_float_batch
from runtime import MASK, frame_cache_dir, to_device
from training.distributed import Distributed

LAYOUT = 1  # part of the hash
ONE_AT_A_TIME = threading.Lock()  # LeRobot's processing steps keep the batch that they work on in themselves


def frame_cache_mode(config: TrainConfig, source: Source) -> str:
    """--frame_cache as it applies to a dataset: `auto` keeps nothing of a stream, since a store would wait for all of it."""
    if source.is_streamed and config.frame_cache == "auto":
        return "off"
    return config.frame_cache


def can_store_features(policy, config: TrainConfig, source: Source, distributed: Distributed) -> bool:
    """Whether this run can read features from a store, if its policy's backbone is frozen."""
    if frame_cache_mode(config, source) == "off" or config.camera_dropout > 0 or distributed.is_sharded:
        return False
    return hasattr(policy, "frozen_features") and bool(policy.config.image_features)


def encode(policy, preprocess, batch: dict, meta, device, change=None) -> dict[str, Tensor]:
    """{name: feature} of a loader's batch, whose pictures are uint8; none if the policy's backbone is trained.

    Args:
        change: from a batch with pictures in [0, 1] to the one that the policy's preprocessor gets.
    """
    return policy.frozen_features(prepared(preprocess, batch, meta, device, change))


def prepared(preprocess, batch: dict, meta, device, change=None) -> dict:
    """The observations of a loader's batch as the policy gets them."""
    observations = {}
    for key, value in batch.items():
        if (key.startswith("observation.") and not key.endswith(MASK)) or key == "task":
            observations[key] = value
    observations = to_float_batch(observations, meta, device)
    if change is not None:
        observations = change(observations)
    with ONE_AT_A_TIME:
        return preprocess(observations)


class FrameEncoder:
    """Encodes frames by row. It stands where a FrameStore expects a decoder of frames.

    Args:
        frames: the pictures.
        versions: K.
    """

    action = "encoding"  # beside a progress bar

    def __init__(self, policy, preprocess, source: Source, frames: Frames, config: TrainConfig, device, versions: int):
        self.policy = policy
        self.preprocess = preprocess
        self.source = source
        self.rows = Loader(source, frames, deltas={}, batch_size=1, seed=0)
        self.augment_style = config.augment_style
        self.device = device
        self.versions = versions

    @cached_property
    def shapes(self) -> dict[str, tuple]:
        """{name: (C, h, w)} of a frame's features; none if the policy's backbone is trained."""
        first = self.encode(torch.tensor([0]), version=0)
        return {name: tuple(feature.shape[1:]) for name, feature in first.items()}

    def shape(self, key: str) -> tuple[int]:
        """Bytes of a row."""
        return (2 * self.versions * sum(map(math.prod, self.shapes.values())),)

    def read(self, key: str, rows: Tensor) -> Tensor:
        """(n, bytes) uint8."""
        versions = []
        for version in range(self.versions):
            features = self.encode(rows, version)
            versions.append(torch.cat([feature.flatten(1) for feature in features.values()], dim=1).cpu())  # (n, F)
        return torch.stack(versions, dim=1).flatten(1).view(torch.uint8)

    def encode(self, rows: Tensor, version: int) -> dict[str, Tensor]:
        """{name: (n, C, h, w) float16}; version 0 is of the pictures as they are."""
        meta = self.source.meta
        change = None
        if version > 0:
            addresses = (rows * self.versions + version).numpy()
            change = partial(vary_pictures, meta=meta, style=self.augment_style, seed=0, samples=addresses)
        return encode(self.policy, self.preprocess, self.rows.batch_of(rows), meta, self.device, change)

    def store_name(self, names_of_frames: list[str]) -> str:
        """A name with a hash of all that decides the features, given the names of the stores of the pictures."""
        versions = [self.versions, self.augment_style, RANGES] if self.versions > 1 else []
        digest = hashlib.sha256(json.dumps([LAYOUT, names_of_frames, versions]).encode())
        # The preprocessor's settings, by its output for a random picture.
        probe = self.rows.batch_of(torch.tensor([0]))
        for camera in self.source.meta.camera_keys:
            noise = np.random.default_rng(0).integers(0, 256, probe[camera].shape, np.uint8)
            probe[camera] = torch.from_numpy(noise)
        seen = prepared(self.preprocess, probe, self.source.meta, self.device)
        pictures = {camera: seen[camera] for camera in self.policy.config.image_features}
        trained = {name for name, parameter in self.policy.named_parameters() if parameter.requires_grad}
        frozen = {name: tensor for name, tensor in self.policy.state_dict().items() if name not in trained}
        for name, tensor in (pictures | frozen).items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        return f"{self.source.meta.repo_id[:50]}-features-{digest.hexdigest()[:16]}".replace("/", "--")


class FeatureStore(FrameStore):
    what = "features"


class Features:
    """The features of every frame by row, for a Loader in place of the pictures.

    Args:
        stored: (N, K * F) float16.
        shapes: {name: shape} of a frame's features, one after the other in a row.
        versions: K.
        frames: closed with this.
    """

    dtype = torch.float16
    is_streamed = False

    def __init__(self, stored: Tensor, shapes: dict[str, tuple], versions: int, frames: Frames, seed: int):
        self.stored = stored.reshape(len(stored) * versions, -1)  # (N * K, F)
        self.shapes = shapes
        self.versions = versions
        self.frames = frames
        self.seed = seed
        self.keys = list(shapes)
        self.on_device = stored.device.type != "cpu"
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()]).tolist()
        starts = [0, *ends[:-1]]
        self.columns = {name: slice(start, end) for name, start, end in zip(shapes, starts, ends, strict=True)}

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def places(self, rows: Tensor, samples: Tensor | None) -> Tensor:
        """Where `read` finds rows (B, ...): at row * K + version, which is a function of (seed, sample); 0 without samples."""
        first = rows * self.versions
        if samples is None:
            return first
        version = (uniform((self.seed, 0xFEA), samples.numpy(), 1)[:, 0] * self.versions).long()  # (B,)
        return first + version.reshape(-1, *[1] * (rows.ndim - 1))

    def read(self, name: str, rows: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, C, h, w) float16 at (n,) `places`, written into `out` if it is given."""
        columns = self.stored[:, self.columns[name]]
        if self.on_device:
            found = columns.index_select(0, to_device(rows, columns.device))
            return found.reshape(len(rows), *self.shapes[name])
        if out is None:
            out = torch.empty(len(rows), *self.shapes[name], dtype=self.dtype)
        self.frames.gather(columns, rows, out.flatten(1))
        return out

    def stop_streams(self) -> None:
        self.frames.stop_streams()

    def close(self) -> None:
        self.frames.close()


def stored_versions(frames: Frames | Features) -> int:
    """Versions of each frame whose features a run reads; 0 if it reads pictures."""
    return frames.versions if isinstance(frames, Features) else 0


def features_change(position: dict, now: int) -> list[str]:
    """A line if a resumed run reads other features than before: `position` is its checkpoint's, `now` the versions of a frame."""
    before = position.get("stored_features", now)  # older checkpoints have none
    if before == now:
        return []
    names = {0: "features computed in each step"}
    was = names.get(before, f"{before} stored versions of each frame")
    becomes = names.get(now, f"{now} stored versions of each frame")
    return [
        f"features of the frozen backbone: {was} -> {becomes}; from here on this is another run. This depends on "
        "--frame_cache, --augment_versions and the room on the disk"
    ]


def open_features(
    policy, preprocess, source: Source, frames: Frames, config: TrainConfig, device, num_threads: int, say
) -> Features | None:
    """The stored features of every frame, encoded now if they are not there; None if the disk has no room for them.

    Raises:
        UserError: there is no room, and --frame_cache is not auto; or the cache cannot be written to.
    """
    versions = config.augment_versions if config.augment else 1
    encoder = FrameEncoder(policy, preprocess, source, frames, config, device, versions)
    if not encoder.shapes:
        return None
    folder = frame_cache_dir(config.cache_dir)
    names = [frames.identity(key, folder) for key in frames.keys]
    store = FeatureStore(encoder, "features", folder / encoder.store_name(names))
    if not store.is_finished:
        room = room_for([store], folder, config.frame_cache)
        if not room.fits:
            say(f"no room for {room.needed}: features are computed as they are needed (--cache_dir, --image_size)")
            return None
        say(f"frame cache: {room.needed}")
        torch_threads = torch.get_num_threads()
        # Each of the store's threads encodes by itself: the bits do not depend on how many there are.
        torch.set_num_threads(1)
        try:
            store.build(1 if device.type != "cpu" else num_threads, config.quiet)
        finally:
            torch.set_num_threads(torch_threads)
    stored = store.open().view(torch.float16)
    if config.frame_cache == "device":
        frames.forget_stores()  # to make room for the features
        stored = move_to(device, {"features": stored})["features"]
    return Features(stored, encoder.shapes, versions, frames, config.seed)
