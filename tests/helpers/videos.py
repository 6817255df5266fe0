"""Write small videos whose frames say their number, with clocks as odd as other tools leave them."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

HEIGHT = 64
WIDTH = 96
BITS = 9  # columns of ten pixels, black or white: the frame's number in binary


def numbered_picture(number: int) -> np.ndarray:
    """(HEIGHT, WIDTH, 3) uint8 picture that shows a number below 2**BITS."""
    picture = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    for bit in range(BITS):
        picture[:, 10 * bit : 10 * bit + 10] = 255 * (number >> bit & 1)
    return picture


def shown_number(pixels) -> int:
    """The number that a (3, HEIGHT, WIDTH) picture shows."""
    middles = np.asarray(pixels)[:, 20:44, 5 : 10 * BITS : 10]  # (3, 24, BITS)
    bits = middles.mean(axis=(0, 1)) > 127
    return sum(1 << bit for bit in range(BITS) if bits[bit])


def write_video(
    path: Path,
    numbers: list[int],
    times: list[float],
    *,
    codec: str = "libx264",
    gop: int = 5,
    b_frames: int = 0,
    hidden: int = 0,
    time_base: Fraction = Fraction(1, 16000),
    options: dict | None = None,
) -> None:
    """Write a video of numbered pictures.

    Args:
        path: the suffix chooses the container.
        numbers: what the pictures show.
        times: seconds at which they are shown, ascending.
        codec: FFmpeg's name of the encoder.
        gop: frames from one key frame to the next.
        b_frames: how many B-frames may follow each other.
        hidden: how many frames to put in front that an edit list hides (in .mp4).
        time_base: seconds, the clock's unit.
        options: of the encoder.
    """
    import av

    # Frames before time 0 are kept as they are, so that the muxer writes an edit list.
    step = times[1] - times[0] if len(times) > 1 else 0.1
    times = [times[0] - step * (hidden - i) for i in range(hidden)] + times
    pictures = [numbered_picture(511)] * hidden + [numbered_picture(number) for number in numbers]
    with av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as container:
        stream = container.add_stream(codec, rate=round(1 / step) or 1)
        stream.height = HEIGHT
        stream.width = WIDTH
        stream.pix_fmt = "yuv420p"
        stream.time_base = time_base
        stream.codec_context.time_base = time_base
        stream.codec_context.gop_size = gop
        stream.codec_context.max_b_frames = b_frames
        if codec == "libx264":
            stream.options = options or {"crf": "18", "sc_threshold": "0"}
        for picture, seconds in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = round(seconds / time_base)
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write how an .mp4 is turned to be shown: (0, 1, -1, 0) is a quarter clockwise, (-1, 0, 0, 1) a mirror."""
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
