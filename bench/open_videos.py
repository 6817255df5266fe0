"""How long opening a dataset of many short videos takes: the first time, when every file is listed, and the second.

    python bench/open_videos.py [--files 1000] [--frames 150] [--video FILE] [--json]

Prints the seconds of each, of the same listing in one thread, and the ratios.
"""

import shutil
import tempfile
from pathlib import Path

import av
import numpy as np
from common import benchmark_parser, print_json, seconds_of

from data import frame_times

FPS = 30


def write_video(path: Path, frames: int) -> None:
    """A grey video of 64x96, with key frames as close as LeRobot records them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"g": "2"})
        stream.height = 64
        stream.width = 96
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            picture = np.full((64, 96, 3), number % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--frames", type=int, default=150)
    parser.add_argument("--video", type=Path, help="copy this video instead of making one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if args.video:
            shutil.copy(args.video, root / "0.mp4")
        else:
            write_video(root / "0.mp4", args.frames)
        files = [root / f"{number}.mp4" for number in range(args.files)]
        for path in files[1:]:
            shutil.copy(files[0], path)

        def open_all():
            frame_times.frame_times_of(files, root, "bench", root, quiet=True)

        serial = seconds_of(lambda: [frame_times.times_or_problem(path) for path in files])
        first = seconds_of(open_all)
        second = seconds_of(open_all)
    print(f"{args.files} copies of {args.video or f'a video of {args.frames} frames'}")
    print(f"  one thread  {serial:6.2f} s")
    print(f"  first time  {first:6.2f} s  ({serial / first:.1f}x)")
    print(f"  second time {second:6.2f} s  ({serial / second:.0f}x)")
    if args.json:
        print_json({"files": args.files, "one_thread": serial, "first": first, "second": second})


if __name__ == "__main__":
    main()
