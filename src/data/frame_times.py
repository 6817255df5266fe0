"""When each frame of a video is shown, by the file's own list.

A frame's number is its place among the frames that the file shows, sorted by presentation time. No rate is involved, so
that a rounded, jittering or shifted clock, a dropped frame, B-frames and edit lists make no difference.

F frames that a file shows.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from data.files import LFS_POINTER, is_lfs_pointer
from data.placeholders import AS_LISTED, is_kept, kept_spans
from errors import one_line
from runtime import frame_cache_dir, progress_interval, thread_count

LAYOUT = 2  # part of a cache file's name
RIGHT_ANGLES = (0, 90, 180, 270)


@dataclass(frozen=True)
class FrameTimes:
    """The frames that a video shows.

    Attributes:
        pts: (F,) int64 presentation times, ascending, in units of `time_base`.
        key_pts: (K,) int64 presentation times of the key frames, ascending, with those that an edit list hides.
        key_dts: (K,) int64 their decoding times, by which a container seeks.
        time_base: seconds.
        height, width: pixels, as the frames are shown.
        rotation: degrees, counter-clockwise, by which the stored pixels are turned to be shown.
        unreadable: how many frames the file lists that cannot be read; 0 if the file is whole and has no edit list.
    """

    pts: np.ndarray
    key_pts: np.ndarray
    key_dts: np.ndarray
    time_base: Fraction
    height: int
    width: int
    rotation: int = 0
    unreadable: int = 0

    @property
    def seconds(self) -> np.ndarray:
        """(F,) float64 presentation times."""
        return self.pts * float(self.time_base)

    def starts(self, number: int) -> list[int]:
        """Where to start decoding for a frame, in units of `time_base`: its key frame, then earlier ones.

        A container seeks by decoding time, and may land after the key frame that was asked for.
        """
        keys = np.searchsorted(self.key_pts, self.pts[number], side="right")
        nearest = self.key_dts[max(0, keys - 3) : keys].tolist()[::-1]
        beginning = self.key_dts if len(self.key_dts) else self.pts
        return [*nearest, int(beginning[0])]

    def mappings(self) -> str:
        """The list as torchcodec's `custom_frame_mappings`, which save it a scan of its own."""
        gaps = np.diff(self.pts)
        last = int(np.median(gaps)) if len(gaps) else 1
        keys = np.isin(self.pts, self.key_pts)
        keys[0] = True  # an edit list may hide the key frame that decoding starts at
        frames = zip(self.pts.tolist(), [*gaps.tolist(), last], keys.tolist(), strict=True)
        return json.dumps({"frames": [{"pts": p, "duration": d, "key_frame": int(k)} for p, d, k in frames]})


def read_frame_times(path: Path) -> FrameTimes:
    """List the frames of a video in one pass over its packets.

    Raises:
        ValueError: it cannot be read as a video, or does not say when its frames are shown.
    """
    import av

    av.logging.set_libav_level(av.logging.PANIC)  # FFmpeg's own messages on a damaged file do not name it
    kept = kept_spans(path)
    try:
        with av.open(str(path), options=AS_LISTED if kept is not None else None) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError("it holds no video")
            listed = list_packets(container, stream, kept)
            time_base = stream.time_base  # freed with the container
        pts = listed.pts
        if not listed.is_complete:
            if kept is not None:
                raise ValueError("its times are known only by decoding it")
            pts = pts_by_decoding(path)
    except (av.FFmpegError, OSError) as error:
        raise ValueError(one_line(error)[:160]) from error
    first = listed.first_frame
    if first is None or len(pts) == 0:
        raise ValueError("none of its frames can be decoded")
    if (np.diff(pts) <= 0).any():
        raise ValueError("several of its frames have the same time")
    rotation = rotation_of(first)
    height = first.height
    width = first.width
    if rotation in (90, 270):
        height, width = width, height
    key_pts = np.array(sorted(listed.key_dts), np.int64)
    key_dts = np.array([listed.key_dts[time] for time in key_pts.tolist()], np.int64)
    return FrameTimes(
        pts=pts,
        key_pts=key_pts,
        key_dts=key_dts,
        time_base=time_base,
        height=height,
        width=width,
        rotation=rotation,
        unreadable=listed.unreadable,
    )


@dataclass
class PacketList:
    """What the packets of a video say.

    Attributes:
        pts: presentation times of the packets that are shown, ascending.
        key_dts: {presentation time: decoding time} of all key frames.
        unreadable: as in FrameTimes.
        first_frame: the first frame that was decoded.
        is_complete: whether each of `pts` is certainly one frame that is shown.
    """

    pts: np.ndarray
    key_dts: dict[int, int]
    unreadable: int
    first_frame: object
    is_complete: bool


def list_packets(container, stream, kept: list[list[int]] | None) -> PacketList:
    """List the packets that are shown: all but those that an edit list discards and those without data.

    Args:
        kept: what a placeholder of a streamed video holds of it; None for a file that is whole.
    """
    pts = []
    key_dts = {}
    stream.codec_context.thread_count = 1  # for one frame: starting threads takes longer than decoding it
    packets = 0
    unreadable = 0
    first_packet = None
    first_frame = None
    for packet in container.demux(stream):
        if packet.size == 0:  # the end of the file
            continue
        is_here = kept is None or is_kept(kept, packet.pos, packet.pos + packet.size)
        if packet.is_corrupt or (is_here and not any(memoryview(packet)[:8])):  # cut off, or never downloaded
            unreadable += 1
            continue
        packets += 1
        if first_packet is None:
            first_packet = packet
        if first_frame is None and is_here:
            first_frame = next(iter(packet.decode()), None)
        if packet.is_keyframe and packet.pts is not None:
            # Matroska has no decoding times for the first packets, and seeks by presentation time.
            key_dts[packet.pts] = packet.pts if packet.dts is None else packet.dts
        if not packet.is_discard:
            pts.append(packet.pts)
    if first_frame is None:  # still in the decoder
        first_frame = next(iter(stream.decode(None)), None)

    has_times = None not in pts
    pts = np.array(sorted(pts) if has_times else [], np.int64)
    # Packets of VP8 may be hidden frames, and packets that share a time are fields of one frame. Frames before the first key
    # frame may not decode.
    starts_at_key = first_packet is not None and first_packet.is_keyframe and first_packet.pts is not None
    is_complete = has_times and starts_at_key and stream.codec_context.name != "vp8"
    if is_complete and len(pts):
        is_complete = pts[0] >= first_packet.pts and (np.diff(pts) > 0).all()
    unreadable = max(unreadable, stream.frames - packets)  # `frames` is 0 where the container does not count them
    return PacketList(
        pts=pts,
        key_dts=key_dts,
        unreadable=unreadable,
        first_frame=first_frame,
        is_complete=bool(is_complete),
    )


def pts_by_decoding(path: Path) -> np.ndarray:
    """(F,) int64 presentation times of the frames that a file decodes to: slower, for files whose packets do not say."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.best("video")
        return np.array(sorted(frame.pts for frame in container.decode(stream) if frame.pts is not None), np.int64)


def rotation_of(frame) -> int:
    """Degrees, counter-clockwise, by which a decoded frame is turned to be shown.

    Raises:
        ValueError: it is mirrored, or turned by an angle that is not one of RIGHT_ANGLES.
    """
    rotation = round(frame.rotation) % 360
    matrix = [side_data for side_data in frame.side_data if side_data.type.name == "DISPLAYMATRIX"]
    if matrix:
        a, b, _, c, d = np.frombuffer(matrix[0], np.int32)[:5].astype(float)
        if a * d - b * c < 0:
            raise ValueError("its display matrix mirrors the frames, which is not supported")
    if rotation not in RIGHT_ANGLES:
        raise ValueError(f"its rotation flag is {rotation} degrees: expected 0, 90, 180 or 270")
    return rotation


# The cache of frame times.


def frame_times_of(
    files: list[Path], root: Path, name: str, cache_dir: str | Path | None = None, quiet: bool = False
) -> list[FrameTimes | str]:
    """The frame times of every file, or why it has none: read in parallel, and cached until the file changes.

    Args:
        files: videos, which may be missing.
        root: the dataset's folder.
        name: what the files are, for the bar; a part of the cache file's name.
        cache_dir: folder of the frame cache; None for the user's.
    """
    from tqdm.auto import tqdm

    cache = cache_path(root, name, cache_dir)
    remembered = read_cache(cache)
    identities = [file_identity(path) for path in files]
    times = [remembered.get(identity) for identity in identities]
    unknown = [i for i, of_file in enumerate(times) if of_file is None]
    if unknown:
        bar = tqdm(
            desc=f"reading the times of {name}",
            total=len(unknown),
            unit="file",
            disable=quiet,
            delay=1,
            mininterval=progress_interval(),
        )
        with bar, ThreadPoolExecutor(thread_count(None), thread_name_prefix="times") as pool:
            for i, result in zip(unknown, pool.map(lambda i: times_or_problem(files[i]), unknown), strict=True):
                times[i] = result
                bar.update()
        fresh = {identities[i]: times[i] for i in unknown if isinstance(times[i], FrameTimes)}
        if fresh:
            write_cache(cache, remembered | fresh)
    return times


def times_or_problem(path: Path) -> FrameTimes | str:
    """The frame times of a file, or why it has none."""
    if not path.is_file():
        return "is missing"
    if is_lfs_pointer(path):
        return LFS_POINTER
    try:
        return read_frame_times(path)
    except ValueError as error:
        return f"cannot be read as a video: {one_line(error)}"


def file_identity(path: Path) -> tuple[str, int, int] | None:
    """A file's path, size in bytes, and time of its last change in nanoseconds; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path.resolve()), stat.st_size, stat.st_mtime_ns


def cache_path(root: Path, name: str, cache_dir: str | Path | None) -> Path:
    digest = hashlib.sha256(json.dumps([LAYOUT, str(root.resolve()), name]).encode()).hexdigest()
    return frame_cache_dir(cache_dir) / "times" / f"{digest[:16]}.npz"


def read_cache(path: Path) -> dict[tuple, FrameTimes]:
    """{file identity: frame times} that an earlier run wrote; empty if it cannot be read."""
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as stored:
            files = json.loads(stored["files"].item())
            ends = np.cumsum([file["frames"] for file in files])[:-1]
            pts = np.split(stored["pts"], ends)
            key_ends = np.cumsum([file["keys"] for file in files])[:-1]
            key_pts = np.split(stored["key_pts"], key_ends)
            key_dts = np.split(stored["key_dts"], key_ends)
            return {
                tuple(file["identity"]): FrameTimes(
                    pts=pts[i],
                    key_pts=key_pts[i],
                    key_dts=key_dts[i],
                    time_base=Fraction(*file["time_base"]),
                    height=file["height"],
                    width=file["width"],
                    rotation=file["rotation"],
                    unreadable=file["unreadable"],
                )
                for i, file in enumerate(files)
            }
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return {}


def write_cache(path: Path, times: dict[tuple, FrameTimes]) -> None:
    """Write what `read_cache` reads, complete or not at all. An error of the disk is ignored: the cache only saves time."""
    files = [
        {
            "identity": identity,
            "frames": len(of_file.pts),
            "keys": len(of_file.key_pts),
            "time_base": of_file.time_base.as_integer_ratio(),
            "height": of_file.height,
            "width": of_file.width,
            "rotation": of_file.rotation,
            "unreadable": of_file.unreadable,
        }
        for identity, of_file in times.items()
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            fresh = Path(folder) / path.name
            np.savez_compressed(
                fresh,
                files=json.dumps(files),
                pts=np.concatenate([of_file.pts for of_file in times.values()]),
                key_pts=np.concatenate([of_file.key_pts for of_file in times.values()]),
                key_dts=np.concatenate([of_file.key_dts for of_file in times.values()]),
            )
            os.replace(fresh, path)
    except OSError:
        pass
