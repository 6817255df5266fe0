"""Samples a second of the data path: LeRobot's DataLoader as lerobot-train sets it up, and ours, in one run.

    python bench/data.py [--dataset_id FOLDER ...] [--batch_size 64] [--quick] [--json]

LeRobot: LeRobotDataset behind a DataLoader with one spawned worker a core (two at least), timed once the workers run.
Ours: `off` (decoded at every use), the first epoch with the frame store built in it, and warm (from the store). All
give act's samples: every camera at the frame, a chunk of 100 actions. The share is warm against copying batches from
memory that no cache holds into reused buffers. Memory is anonymous memory (the page cache is not counted) above what
the process had before, for LeRobot that of its workers.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "src")  # this file is called data.py as well
REAL = Path(os.environ.get("ARMATURE_REAL_DATA", ROOT.parent / "shared" / "datasets")) / "cr5_banana"
SHIPPED = ROOT / "examples" / "datasets" / "metaworld_drawer_open"
CHUNK = 100


def anonymous_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:  # a worker that has just ended
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


class Peak:
    """Highest anonymous memory in MB, above the start, of this process or of its children, while entered."""

    def __init__(self, children: bool = False):
        self.children, self.mb, self._stop = children, 0.0, threading.Event()

    def now(self) -> float:
        import psutil

        me = psutil.Process()
        return sum(anonymous_mb(p.pid) for p in me.children(recursive=True)) if self.children else anonymous_mb(me.pid)

    def __enter__(self):
        start = self.now()

        def watch():
            while not self._stop.wait(0.05):
                self.mb = max(self.mb, self.now() - start)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()


def rate(batches, batch_size: int, seconds: float) -> float:
    """Samples a second of an endless iterator over `seconds`."""
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        next(batches)
        count += batch_size
    return count / (time.perf_counter() - begun)


def lerobot(root: Path, batch_size: int, seconds: float) -> tuple[float, float]:
    """(samples a second, MB of the workers) of LeRobot 0.6.1's loader (scripts/lerobot_train.py)."""
    import torch
    from lerobot.datasets import EpisodeAwareSampler
    from lerobot.datasets.lerobot_dataset import LeRobotDataset
    from lerobot.utils.utils import cycle

    from data import decode

    backend = "torchcodec" if decode.load_torchcodec()[0] else "pyav"
    fps = json.loads((root / "meta" / "info.json").read_text())["fps"]
    times = {"action": [i / fps for i in range(CHUNK)]}
    dataset = LeRobotDataset("bench", root=root, delta_timestamps=times, video_backend=backend, return_uint8=True)
    episodes = dataset.meta.episodes
    sampler = EpisodeAwareSampler(episodes["dataset_from_index"], episodes["dataset_to_index"], shuffle=True, seed=1000)
    workers = max(2, len(os.sched_getaffinity(0)))
    with Peak(children=True) as peak:
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=batch_size, sampler=sampler, num_workers=workers, prefetch_factor=4,
            persistent_workers=True, multiprocessing_context="spawn",
        )  # fmt: skip
        batches = cycle(loader)
        for _ in range(5 * workers):  # until the workers have started, and what they fetched ahead meanwhile is used up
            next(batches)
        result = rate(batches, batch_size, seconds)
        loader._iterator._shutdown_workers()  # LeRobot's workers abort where the interpreter ends them
    return result, peak.mb


def ours(root: Path, batch_size: int, seconds: float, mode: str, cache: Path):
    """(samples a second, MB) and, with the store built first, samples a second of the first epoch with the build in it."""
    from data.frames import Frames
    from data.loader import Loader
    from data.source import open_dataset

    source = open_dataset(str(root))
    source.require()
    with Peak() as peak:
        begun = time.perf_counter()
        frames = Frames(source, None, mode, cache, num_threads=len(os.sched_getaffinity(0)))
        loader = Loader(source, frames, {"action": list(range(CHUNK))}, batch_size, seed=1000)
        if mode == "on":  # one epoch: the build, and each frame once
            for _ in range(-(-source.rows // batch_size)):
                next(loader)
        first = source.rows / (time.perf_counter() - begun)
        for _ in range(4):
            next(loader)
        rates = [rate(loader, batch_size, seconds / 3) for _ in range(3)]
    loader.close()
    return statistics.median(rates), peak.mb, first


def memcpy(frame_bytes: int, batch_size: int, seconds: float) -> float:
    """Samples a second if a batch were only copied, from memory that no cache holds into three reused buffers."""
    import torch

    block = frame_bytes * batch_size
    blocks = max(4, 2**31 // block)
    source = torch.randint(0, 255, (blocks, block), dtype=torch.uint8)
    buffers = torch.zeros(3, block, dtype=torch.uint8)

    def copies():
        i = 0
        while True:
            buffers[i % 3].copy_(source[i % blocks])
            yield
            i += 1

    run = copies()
    for _ in range(4):
        next(run)
    return statistics.median(rate(run, batch_size, seconds / 3) for _ in range(3))


def measure(root: Path, batch_size: int, seconds: float) -> dict:
    info = json.loads((root / "meta" / "info.json").read_text())
    shapes = [f["shape"] for f in info["features"].values() if f["dtype"] in ("video", "image")]
    frame_bytes = sum(h * w * c for h, w, c in shapes)
    cache = Path(tempfile.mkdtemp(prefix="armature-bench-"))
    try:
        off, off_mb, _ = ours(root, batch_size, seconds, "off", cache)
        warm, warm_mb, first = ours(root, batch_size, seconds, "on", cache)
    finally:
        shutil.rmtree(cache)
    copied = memcpy(frame_bytes, batch_size, seconds)
    peer, peer_mb = lerobot(root, batch_size, seconds)
    result = {
        "lerobot_samples_per_s": peer, "warm_samples_per_s": warm, "first_epoch_samples_per_s": first, "off_samples_per_s": off,
        "memcpy_samples_per_s": copied, "memcpy_gb_per_s": copied * frame_bytes / 1e9, "memcpy_share": warm / copied,
        "peak_mb": warm_mb, "off_peak_mb": off_mb, "lerobot_peak_mb": peer_mb,
    }  # fmt: skip
    return {name: round(value, 3) for name, value in result.items()}


def table(name: str, batch_size: int, result: dict) -> str:
    peer = result["lerobot_samples_per_s"]
    rows = [
        ("LeRobot's DataLoader", "lerobot_samples_per_s", "lerobot_peak_mb"),
        ("ours, off", "off_samples_per_s", "off_peak_mb"),
        ("ours, first epoch, store built in it", "first_epoch_samples_per_s", None),
        ("ours, warm", "warm_samples_per_s", "peak_mb"),
    ]
    lines = [
        f"{name}, batch {batch_size}, {len(os.sched_getaffinity(0))} cores",
        f"{'':<38}{'samples/s':>12}{'x LeRobot':>11}{'peak MB':>9}",
    ]
    for label, speed, memory in rows:
        lines.append(
            f"{label:<38}{result[speed]:>12,.1f}{result[speed] / peer:>11.1f}{f'{result[memory]:,.0f}' if memory else '':>9}"
        )
    lines.append(
        f"memcpy {result['memcpy_gb_per_s']:.1f} GB/s, of which warm reaches {100 * result['memcpy_share']:.0f} %"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = [str(path) for path in (REAL, SHIPPED) if path.is_dir()]
    parser.add_argument("--dataset_id", nargs="+", default=default, help="dataset folders")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--decoder", choices=("torchcodec", "pyav"), help="for both [torchcodec where it can be loaded]"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds for each figure")
    parser.add_argument(
        "--json", action="store_true", help="a last line with the figures of the first dataset, and of all"
    )
    args = parser.parse_args()
    if args.decoder == "pyav":
        from data import decode

        decode.load_torchcodec = lambda: (None, ["decoding video with PyAV, as asked"])
    results = {}
    for name in args.dataset_id:
        results[Path(name).name] = measure(Path(name), args.batch_size, 6 if args.quick else 20)
        print(table(Path(name).name, args.batch_size, results[Path(name).name]), "\n", flush=True)
    if args.json:
        print(json.dumps({**next(iter(results.values())), "all": results}))


if __name__ == "__main__":
    main()
