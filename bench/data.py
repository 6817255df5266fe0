"""Samples a second of the data path: LeRobot's DataLoader as lerobot-train sets it up, and Armature's loader.

    python bench/data.py [--dataset_id FOLDER ...] [--batch_size 64] [--decoder pyav] [--quick] [--json]

Every loader gives act's samples: all cameras at one frame, and a chunk of 100 actions. LeRobot's DataLoader has one spawned worker
a core (at least two) and is timed once they run.

Prints samples/s and memory of
    LeRobot        LeRobotDataset behind a DataLoader
    Lance reader   LanceDBDataset behind a DataLoader (with `uv pip install lerobot-lancedb`; it needs torchcodec)
    off            frames decoded at every use
    first epoch    the first epoch, in which frames are decoded and kept
    second epoch   the next epoch, in which some frames are read from the disk
    cold           the first epoch of a run whose store is complete and on the disk only
    warm           frames read from the store, which the system has in memory by now
    lossless       frames read from a store that is compressed without loss
    compact        frames read from a store of JPEGs
    from Lance     frames decoded at every use, out of Lance tables
    streamed       frames fetched by ranges from an HTTP server in another process, which waits before each answer, and decoded
with the bytes of each store, and how warm compares with copying batches between memory that no cache holds and buffers that are
used again. Memory is anonymous memory (without the page cache) above what the process had before; LeRobot's is that of its
workers.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from common import CORES, LEROBOT_WORKERS, ROOT, SHIPPED, benchmark_parser, print_json
from lerobot.datasets import EpisodeAwareSampler
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.utils.utils import cycle

from data import decode
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source

REAL = Path(os.environ.get("ARMATURE_REAL_DATA", ROOT.parent / "shared" / "datasets")) / "cr5_banana"
CHUNK = 100  # actions
LATENCIES = (10, 100)  # milliseconds


@dataclass
class Speed:
    """Samples a second of a loader, its peak memory in MB, samples a second of its first epochs, and bytes of its store."""

    samples_per_s: float
    peak_mb: float
    first_epoch_samples_per_s: float = 0.0
    second_epoch_samples_per_s: float = 0.0
    store_bytes: int = 0


class PeakMemory:
    """Highest anonymous memory in MB, above that at the start, of this process or of its children, while entered."""

    def __init__(self, of_children: bool = False):
        self.of_children = of_children
        self.mb = 0.0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)

    def now(self) -> float:
        process = psutil.Process()
        if not self.of_children:
            return anonymous_mb(process.pid)
        return sum(anonymous_mb(child.pid) for child in process.children(recursive=True))

    def watch(self) -> None:
        while not self.stop.wait(0.05):
            self.mb = max(self.mb, self.now() - self.start)

    def __enter__(self):
        self.start = self.now()
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.stop.set()
        self.thread.join()


def anonymous_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # a worker that has just ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def samples_per_second(batches, batch_size: int, seconds: float) -> float:
    """Speed of an endless iterator over `seconds`."""
    count = 0
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - begun)


def median_speed(batches, batch_size: int, seconds: float) -> float:
    """The median of three measurements, after a few batches."""
    for _ in range(4):
        next(batches)
    return statistics.median(samples_per_second(batches, batch_size, seconds / 3) for _ in range(3))


def lerobot_speed(root: Path, batch_size: int, seconds: float) -> Speed:
    """LeRobot 0.6.1's loader."""
    dataset = LeRobotDataset(
        "bench",
        root=root,
        delta_timestamps=chunk_of_actions(root),
        video_backend="torchcodec" if decode.load_torchcodec()[0] else "pyav",
        return_uint8=True,
    )
    return data_loader_speed(dataset, batch_size, seconds)


def lance_reader_speed(root: Path, tables: Path, batch_size: int, seconds: float) -> Speed:
    """LeRobot's reader of Lance tables, as lerobot-lancedb 0.3.1 has it."""
    from lerobot_lancedb import LanceDBDataset

    dataset = LanceDBDataset(root=tables, delta_timestamps=chunk_of_actions(root), return_uint8=True)
    return data_loader_speed(dataset, batch_size, seconds)


def chunk_of_actions(root: Path) -> dict[str, list[float]]:
    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    return {"action": [i / fps for i in range(CHUNK)]}


def data_loader_speed(dataset, batch_size: int, seconds: float) -> Speed:
    """A DataLoader, built as in LeRobot's scripts/lerobot_train.py."""
    episodes = dataset.meta.episodes
    sampler = EpisodeAwareSampler(episodes["dataset_from_index"], episodes["dataset_to_index"], shuffle=True, seed=1000)
    # the options of lerobot-train
    with PeakMemory(of_children=True) as peak:
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=LEROBOT_WORKERS,
            prefetch_factor=4,
            persistent_workers=True,
            multiprocessing_context="spawn",
        )
        batches = cycle(loader)
        for _ in range(5 * LEROBOT_WORKERS):  # until the workers run, and what they fetched while starting is used up
            next(batches)
        speed = samples_per_second(batches, batch_size, seconds)
        # LeRobot's workers abort when the interpreter ends them, and now and then here. The speed is measured by now.
        with contextlib.suppress(RuntimeError):
            loader._iterator._shutdown_workers()
    return Speed(speed, peak.mb)


def armature_speed(root: Path, batch_size: int, seconds: float, mode: str, cache: str) -> Speed:
    """Armature's loader, with frames from a store (lossless and compact are built first, `on` fills) or decoded at every use."""
    source = open_source(str(root), cache_dir=cache)
    source.require()
    with PeakMemory() as peak:
        frames = Frames.open_or_build(source, mode=mode, cache_dir=cache, num_threads=CORES, grow=True)
        loader = Loader(source, frames, {"action": list(range(CHUNK))}, batch_size, seed=1000).start()
        epochs = []
        if mode == "on":
            epochs = [epoch_speed(loader) for _ in range(2)]
        speed = median_speed(loader, batch_size, seconds)
    loader.close()
    store_bytes = sum(path.stat().st_size for path in Path(cache).glob("*/frames.*"))
    return Speed(speed, peak.mb, *epochs or (0.0, 0.0), store_bytes)


def cold_speed(root: Path, batch_size: int, cache: str) -> Speed:
    """Armature's loader on a complete store, for an epoch, after the system has dropped it from the page cache."""
    for path in Path(cache).glob("*/frames.u8"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    source = open_source(str(root), cache_dir=cache)
    with PeakMemory() as peak:
        frames = Frames.open_or_build(source, mode="on", cache_dir=cache, num_threads=CORES)
        loader = Loader(source, frames, {"action": list(range(CHUNK))}, batch_size, seed=1000).start()
        speed = epoch_speed(loader)
    loader.close()
    return Speed(speed, peak.mb)


def lance_speeds(root: Path, batch_size: int, seconds: float) -> dict[str, Speed]:
    """LeRobot's reader and Armature's loader on a copy of the dataset in Lance tables; none where the first is not installed."""
    try:
        from lerobot_lancedb.convert import convert
    except ImportError:
        return {}
    folder = tempfile.mkdtemp(prefix="armature-bench-")
    try:
        tables = Path(folder) / "tables"
        convert(tables, root=root)
        speeds = {"lance": armature_speed(tables, batch_size, seconds, "off", folder)}
        if decode.load_torchcodec()[0]:
            speeds["lance_reader"] = lance_reader_speed(root, tables, batch_size, seconds)
        return speeds
    finally:
        shutil.rmtree(folder)


def epoch_speed(loader: Loader) -> float:
    """Samples a second of about an epoch."""
    count = -(-loader.samples_per_epoch // loader.batch_size)
    begun = time.perf_counter()
    for _ in range(count):
        next(loader)
    return count * loader.batch_size / (time.perf_counter() - begun)


def streamed_speed(root: Path, batch_size: int, seconds: float, latency: float) -> Speed:
    """Armature's loader on a URL whose server answers after `latency` seconds; nothing of the videos is there at first."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "range_server.py"), str(root), str(latency)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    cache = tempfile.mkdtemp(prefix="armature-bench-")
    try:
        source = open_source(server.stdout.readline().strip(), cache_dir=cache, quiet=True)
        source.require()
        with PeakMemory() as peak:
            frames = Frames(source, num_threads=CORES)
            loader = Loader(source, frames, {"action": list(range(CHUNK))}, batch_size, seed=1000).start()
            next(loader)
            speed = samples_per_second(loader, batch_size, seconds)
            loader.close()
    finally:
        server.stdin.close()
        server.wait()
        shutil.rmtree(cache)
    return Speed(speed, peak.mb)


def memcpy_speed(frame_bytes: int, batch_size: int, seconds: float) -> float:
    """Samples a second if a batch were only copied: from 2 GB, which no cache holds, into three buffers in turns."""
    batch_bytes = frame_bytes * batch_size
    batches = max(4, 2**31 // batch_bytes)
    source = torch.randint(0, 255, (batches, batch_bytes), dtype=torch.uint8)
    buffers = torch.zeros(3, batch_bytes, dtype=torch.uint8)

    def copies():
        number = 0
        while True:
            buffers[number % 3].copy_(source[number % batches])
            yield
            number += 1

    return median_speed(copies(), batch_size, seconds)


def measure(root: Path, batch_size: int, seconds: float) -> dict:
    info = json.loads((root / "meta" / "info.json").read_text())
    # (H, W, C) of each camera, one byte a value
    shapes = [feature["shape"] for feature in info["features"].values() if feature["dtype"] in ("video", "image")]
    frame_bytes = sum(height * width * channels for height, width, channels in shapes)
    speeds = {}
    for mode in ("off", "on", "lossless", "compact"):
        cache = tempfile.mkdtemp(prefix="armature-bench-")
        try:
            speeds[mode] = armature_speed(root, batch_size, seconds, mode, cache)
            if mode == "on":
                speeds["cold"] = cold_speed(root, batch_size, cache)
        finally:
            shutil.rmtree(cache)
    if any(feature["dtype"] == "video" for feature in info["features"].values()):
        speeds |= lance_speeds(root, batch_size, seconds)
        for milliseconds in LATENCIES:
            speeds[f"streamed_{milliseconds}"] = streamed_speed(root, batch_size, seconds, milliseconds / 1000)
    off = speeds["off"]
    warm = speeds["on"]
    memcpy = memcpy_speed(frame_bytes, batch_size, seconds)
    lerobot = lerobot_speed(root, batch_size, seconds)
    return {
        "lerobot_samples_per_s": lerobot.samples_per_s,
        "warm_samples_per_s": warm.samples_per_s,
        "first_epoch_samples_per_s": warm.first_epoch_samples_per_s,
        "second_epoch_samples_per_s": warm.second_epoch_samples_per_s,
        "off_samples_per_s": off.samples_per_s,
        **{f"{mode}_samples_per_s": speed.samples_per_s for mode, speed in speeds.items() if mode not in ("off", "on")},
        **{f"{mode}_peak_mb": speed.peak_mb for mode, speed in speeds.items() if mode not in ("off", "on")},
        **{f"{mode}_mb": speeds[mode].store_bytes / 1e6 for mode in ("on", "lossless", "compact")},
        "memcpy_samples_per_s": memcpy,
        "memcpy_gb_per_s": memcpy * frame_bytes / 1e9,
        "memcpy_share": warm.samples_per_s / memcpy,
        "peak_mb": warm.peak_mb,
        "off_peak_mb": off.peak_mb,
        "lerobot_peak_mb": lerobot.peak_mb,
    }


def print_table(name: str, batch_size: int, result: dict) -> None:
    print(f"{name}, batch {batch_size}, {CORES} cores")
    print(f"{'':<38}{'samples/s':>12}{'x LeRobot':>11}{'peak MB':>9}{'store MB':>10}")
    for label, speed, memory, store in (
        ("LeRobot's DataLoader", "lerobot_samples_per_s", "lerobot_peak_mb", None),
        ("LeRobot's Lance reader", "lance_reader_samples_per_s", "lance_reader_peak_mb", None),
        ("Armature, off", "off_samples_per_s", "off_peak_mb", None),
        ("Armature, first epoch", "first_epoch_samples_per_s", None, None),
        ("Armature, second epoch", "second_epoch_samples_per_s", None, None),
        ("Armature, cold", "cold_samples_per_s", "cold_peak_mb", None),
        ("Armature, warm", "warm_samples_per_s", "peak_mb", "on_mb"),
        ("Armature, lossless", "lossless_samples_per_s", "lossless_peak_mb", "lossless_mb"),
        ("Armature, compact", "compact_samples_per_s", "compact_peak_mb", "compact_mb"),
        ("Armature, from Lance", "lance_samples_per_s", "lance_peak_mb", None),
        *(
            (f"Armature, streamed, {n} ms", f"streamed_{n}_samples_per_s", f"streamed_{n}_peak_mb", None)
            for n in LATENCIES
        ),
    ):
        if speed not in result:  # pictures in tables are not streamed, and a package may be missing
            continue
        row = f"{label:<38}{result[speed]:>12,.1f}{result[speed] / result['lerobot_samples_per_s']:>11.1f}"
        for name, width in ((memory, 9), (store, 10)):
            row += f"{result[name]:>{width},.0f}" if name else " " * width
        print(row.rstrip())
    print(f"memcpy {result['memcpy_gb_per_s']:.1f} GB/s; warm reaches {result['memcpy_share']:.0%} of it\n", flush=True)


def main() -> None:
    parser = benchmark_parser(__doc__)
    there = [str(path) for path in (REAL, SHIPPED) if path.is_dir()]
    parser.add_argument("--dataset_id", nargs="+", default=there, help="dataset folders")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--decoder", choices=("torchcodec", "pyav"), help="for both loaders (else torchcodec if it loads)"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds for each figure")
    args = parser.parse_args()
    if args.decoder == "pyav":
        decode.load_torchcodec = lambda: (None, None)
    results = {}
    for folder in args.dataset_id:
        name = Path(folder).name
        results[name] = measure(Path(folder), args.batch_size, seconds=6 if args.quick else 20)
        print_table(name, args.batch_size, results[name])
    if args.json:
        first = next(iter(results.values()))
        print_json({**first, "all": results})


if __name__ == "__main__":
    main()
