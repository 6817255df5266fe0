"""Room on the disk for the checkpoints of a run."""

import math
import shutil
from pathlib import Path

from config import TrainConfig
from errors import UserError


def require_room(output_dir: Path, size: int) -> None:
    """Raise a UserError if the disk of `output_dir` has no room for a checkpoint of `size` bytes."""
    free = free_bytes(output_dir)
    if size > free:
        raise UserError(
            f"--output_dir {output_dir}: a checkpoint takes about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
            "Free some space, or pass another --output_dir"
        )


def warn_of_room(output_dir: Path, size: int, config: TrainConfig) -> list[str]:
    """A warning where the disk has no room for all checkpoints that the run keeps, of `size` bytes each."""
    kept = kept_checkpoints(config)
    free = free_bytes(output_dir)
    if size * kept <= free:
        return []
    return [
        f"the checkpoints to keep take about {kept} x {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
        "pass --keep_last, or a larger --save_freq"
    ]


def kept_checkpoints(config: TrainConfig) -> int:
    """The most checkpoints that the run has on the disk at a time."""
    kept = 1
    if config.save_freq:
        kept = math.ceil(config.steps / config.save_freq)
    if config.keep_last is not None:
        spared = config.steps // config.keep_every if config.keep_every else 0
        kept = min(kept, config.keep_last + spared + 1)  # one more while the oldest waits to be deleted
    return kept


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
