"""Videos of a streamed dataset without most of their bytes: files of the full size with holes, and a list of what they hold.

An MP4 lists its frames in its moov box, at the file's beginning or end. With that box in place, a reader finds the times, the sizes
and the positions of all frames; only decoding needs the rest.
"""

import contextlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path

MOST_BOXES = 64  # at the top level of a file
HEAD = 256 * 2**10  # bytes at the beginning: the boxes' headers and the first frames
FIRST_FRAMES = 8  # that are kept, since one of them says how large the pictures are
MIDDLE = 4096  # bytes in the middle, by which a checkpoint recognises its data
AS_LISTED = {"fflags": "noparse+nofillin"}  # FFmpeg would correct the list by the packets' bytes, which are holes


def list_path(path: Path) -> Path:
    """Where the list of what a placeholder holds is: a hidden file beside it."""
    return path.with_name(f".{path.name}.kept.json")


def kept_spans(path: Path) -> list[list[int]] | None:
    """[start, end) of the bytes that a placeholder holds; None for a file that is whole."""
    try:
        return json.loads(list_path(path).read_text())
    except FileNotFoundError:
        return None


def is_kept(kept: list[list[int]], start: int, end: int) -> bool:
    """Whether a placeholder holds the bytes [start, end)."""
    return any(first <= start and end <= last for first, last in kept)


def first_packets(path: Path) -> list[tuple[int, int]]:
    """[start, end) of the bytes of a video's first frames, as far as the file lists them."""
    import av

    av.logging.set_libav_level(av.logging.PANIC)
    spans = []
    with contextlib.suppress(av.FFmpegError, OSError), av.open(str(path), options=AS_LISTED) as container:
        stream = container.streams.best("video")
        if stream is not None:
            for packet in itertools.islice(container.demux(stream), FIRST_FRAMES):
                if packet.size and packet.pos is not None:
                    spans.append((packet.pos, packet.pos + packet.size))
    return spans


def listing_spans(read: Callable[[int, int], bytes], size: int) -> dict[int, bytes] | None:
    """{position: bytes} of what lists a video's frames; None if the file is no MP4, or one whose list is spread over it.

    Args:
        read: the bytes [start, end) of the file.
        size: of the file.
    """
    spans = {0: read(0, min(size, HEAD))}
    middle = size // 2
    if middle + MIDDLE > HEAD:
        spans[middle] = read(middle, min(size, middle + MIDDLE))
    has_list = False
    position = 0
    for _ in range(MOST_BOXES):
        if position + 16 > size:
            break
        header = spans[0][position : position + 16] if position + 16 <= HEAD else read(position, position + 16)
        length = int.from_bytes(header[:4], "big")
        kind = header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        elif length == 0:  # up to the end of the file
            length = size - position
        if length < 8:
            break
        # Of the frames' own box, only the header; of all others everything.
        end = min(size, position + (16 if kind == b"mdat" else length))
        content = spans[0][position:end]
        if end > HEAD:
            content = spans[position] = read(position, end)
        if kind == b"moov":
            has_list = b"mvex" not in content  # fragments follow, with lists of their own
        position += length
    return spans if has_list else None
