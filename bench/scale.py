"""Start-up time, sample order and memory for a synthetic dataset of a million episodes and a billion frames. Only metadata is made.

    python bench/scale.py [--episodes 1000000] [--json]

Each episode has 1,000 frames and two cameras, and each file 100 episodes. Prints the seconds that opening the metadata and finding
the videos take, those of a batch's rows in each kind of order, and the highest memory of the process so far.
"""

import json
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import SHIPPED, benchmark_parser, print_json

from data.loader import Loader
from data.opening import episode_lengths, open_metadata
from data.videos import find_videos

FRAMES = 1000  # of an episode
PER_FILE = 100  # episodes
CAMERAS = ("observation.images.front", "observation.images.wrist")
BATCH_SIZE = 256
BATCHES = 50


def write_metadata(root: Path, episodes: int) -> None:
    """The metadata of a dataset that has no other files."""
    shipped = SHIPPED / "meta"
    folder = root / "meta"
    (folder / "episodes" / "chunk-000").mkdir(parents=True)
    info = json.loads((shipped / "info.json").read_text())
    camera = next(feature for feature in info["features"].values() if feature["dtype"] == "video")
    info["features"] = {key: value for key, value in info["features"].items() if value["dtype"] != "video"}
    info["features"] |= dict.fromkeys(CAMERAS, camera)
    info |= {"total_episodes": episodes, "total_frames": episodes * FRAMES}
    (folder / "info.json").write_text(json.dumps(info))
    for name in ("tasks.parquet", "stats.json"):
        (folder / name).write_bytes((shipped / name).read_bytes())
    number = np.arange(episodes)
    chunk, file = np.divmod(number // PER_FILE, 1000)
    columns = {"episode_index": number, "length": np.full(episodes, FRAMES)}
    columns |= {"data/chunk_index": chunk, "data/file_index": file}
    for key in CAMERAS:
        first_second = number % PER_FILE * (FRAMES / info["fps"])
        columns |= {f"videos/{key}/chunk_index": chunk, f"videos/{key}/file_index": file}
        columns |= {f"videos/{key}/from_timestamp": first_second}
        columns |= {f"videos/{key}/to_timestamp": first_second + FRAMES / info["fps"]}
    pq.write_table(pa.table(columns), folder / "episodes" / "chunk-000" / "file-000.parquet")


def open_all(root: Path) -> None:
    """What opening a dataset does with its metadata."""
    meta = open_metadata(str(root))
    selected = sorted(episode_lengths(meta))
    for key in CAMERAS:
        find_videos(meta, key, selected)


def order_speed(episodes: int, **options) -> float:
    """Seconds to find a batch's rows, all over an epoch."""
    ends = torch.full((episodes,), FRAMES).cumsum(0)
    source = SimpleNamespace(
        name="made up",
        starts=ends - FRAMES,
        ends=ends,
        episodes=range(episodes),
        tasks={},
        episode_of=lambda rows: torch.searchsorted(ends, rows, right=True),
        dataset_of_episode=torch.arange(episodes) // -(-episodes // 2),
    )
    loader = Loader(source, SimpleNamespace(), {}, BATCH_SIZE, seed=1, **options)
    loader.rows_at(0)
    begun = time.perf_counter()
    for batch in range(BATCHES):
        loader.rows_at(batch * (loader.samples_per_epoch // BATCHES))
    return (time.perf_counter() - begun) / BATCHES


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--episodes", type=int, default=1_000_000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="armature-bench-") as folder:
        write_metadata(Path(folder), args.episodes)
        open_metadata(str(SHIPPED))  # imports
        begun = time.perf_counter()
        open_all(Path(folder))
        results = {"open_s": time.perf_counter() - begun}
    for name, options in {"full": {}, "blocks": {"shuffle": "blocks"}, "weights": {"weights": [2.0, 1.0]}}.items():
        results[f"{name}_order_ms"] = 1e3 * order_speed(args.episodes, **options)
    results["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    for name, value in results.items():
        print(f"{name:<20}{value:>10.2f}")
    if args.json:
        print_json({"results": results})


if __name__ == "__main__":
    main()
