"""Depth cameras, as LeRobot records them, and the grey picture that a policy gets of them.

LeRobot stores depth as video of 12-bit codes, spread over a range of distances or of their logarithm, or as TIFF images of
millimetres or metres. Here both become pictures of three equal channels: the code, scaled from 0..4095 to 0..255.

H and W pixels.
"""

import functools
import math
from dataclasses import asdict, dataclass, fields

import numpy as np

GREYS = 255  # steps between black and white
CODE_BITS = 12  # of the codes that LeRobot records
UNITS = {"m": 1, "mm": 1000}  # of stored depth images, in a metre
FARTHEST = 1000.0  # metres, of a range that can be
SMALLEST_LOG = 1e-6  # metres whose logarithm is taken
LEAST_SPREAD = 1e-3  # depth_max - depth_min, relative to the largest distance: below it float32 cannot hold all codes


@dataclass(frozen=True)
class DepthRange:
    """The distances that a depth camera's codes are spread over, in metres.

    Attributes:
        depth_min: that of code 0, black. Nearer pixels, and those without a measurement, have code 0 too.
        depth_max: that of the last code, white. Farther pixels have it too.
        shift: added to distances before their logarithm is taken.
        use_log: whether codes are evenly spaced in the logarithm of the distance, rather than in the distance.
    """

    depth_min: float
    depth_max: float
    shift: float
    use_log: bool

    def __str__(self) -> str:
        scale = f"logarithmic with a shift of {self.shift:g} m" if self.use_log else "linear"
        return f"{self.depth_min:g} m to {self.depth_max:g} m, {scale}"

    def step(self, distance: float) -> float:
        """Metres from one grey to the next at a distance."""
        if not self.use_log:
            return (self.depth_max - self.depth_min) / GREYS
        return (distance + self.shift) * math.log((self.depth_max + self.shift) / (self.depth_min + self.shift)) / GREYS

    def picture(self, depth: np.ndarray, unit: str | None = None) -> np.ndarray:
        """(H, W, 3) uint8 picture of a depth frame (H, W) or (H, W, 1), by the codes that LeRobot would record.

        Args:
            unit: one of UNITS; None for metres if the numbers are floats, and millimetres if they are integers.
        """
        from lerobot.datasets.depth_utils import quantize_depth

        if unit is None:
            unit = "m" if np.issubdtype(depth.dtype, np.floating) else "mm"
        # Clipped first: LeRobot's codes of NaN and of negative distances are undefined.
        nearest = self.depth_min * UNITS[unit]
        farthest = self.depth_max * UNITS[unit]
        with np.errstate(over="ignore"):
            depth = depth.astype(np.float32)
        depth = np.nan_to_num(depth, nan=nearest).clip(nearest, farthest)
        return grey_picture(quantize_depth(depth, **asdict(self), video_backend=None, input_unit=unit))


def grey_picture(codes: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 picture of codes (H, W)."""
    return np.repeat(grey_of_codes()[codes][..., None], 3, axis=-1)


@functools.cache
def grey_of_codes() -> np.ndarray:
    """(4096,) uint8 grey of each code."""
    from lerobot.configs.video import DEPTH_QMAX

    return np.rint(np.arange(DEPTH_QMAX + 1) * (GREYS / DEPTH_QMAX)).astype(np.uint8)


# What info.json says.


def info_of(feature: dict) -> dict:
    """What a camera's entry in info.json says of its encoding; older versions of LeRobot wrote it as video_info."""
    info = {}
    for name in ("video_info", "info"):
        if isinstance(feature.get(name), dict):
            info |= feature[name]
    return info


def is_depth(feature: dict) -> bool:
    """Whether an entry of info.json is a depth camera's."""
    info = info_of(feature)
    return bool(info.get("is_depth_map") or info.get("video.is_depth_map"))


def range_of(feature: dict) -> DepthRange:
    """The range of a depth camera by its entry in info.json, into which LeRobot writes none for images.

    Raises:
        ValueError: says what is wrong with it.
    """
    from lerobot.configs import video

    defaults = {
        "depth_min": video.DEFAULT_DEPTH_MIN,
        "depth_max": video.DEFAULT_DEPTH_MAX,
        "shift": video.DEFAULT_DEPTH_SHIFT,
        "use_log": video.DEFAULT_DEPTH_USE_LOG,
    }
    info = info_of(feature)
    given = {name: info.get(f"video.{name}") for name in defaults}
    return read_range(defaults | {name: value for name, value in given.items() if value is not None})


def depth_ranges(features: dict) -> dict[str, DepthRange]:
    """The range of each depth camera among the features of an open dataset."""
    return {key: range_of(feature) for key, feature in features.items() if is_depth(feature)}


def depth_unit(feature: dict) -> str | None:
    """The unit of stored depth images; None where their numbers say it, as in `DepthRange.picture`."""
    return info_of(feature).get("depth_unit")


def bits_of_codes(feature: dict) -> int | None:
    """Bits of a pixel in a depth camera's video, if info.json says that it has fewer than a code needs."""
    from av import VideoFormat

    name = info_of(feature).get("video.pix_fmt")
    try:
        bits = VideoFormat(name).components[0].bits
    except (TypeError, ValueError):  # none, or one that FFmpeg does not know
        return None
    return bits if bits < CODE_BITS else None


def read_range(settings) -> DepthRange:
    """The range that a JSON file describes by the names of its fields.

    Raises:
        ValueError: says what is wrong with it.
    """
    if not isinstance(settings, dict):
        raise ValueError(f"expected depth_min, depth_max, shift and use_log, got {settings!r:.80}")
    for name in ("depth_min", "depth_max", "shift"):
        value = settings.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) <= FARTHEST:
            raise ValueError(f"expected a number of metres as {name}, {FARTHEST:g} at most, got {value!r:.80}")
    if not isinstance(settings.get("use_log"), bool):
        raise ValueError(f"expected true or false as use_log, got {settings.get('use_log')!r:.80}")
    recorded = DepthRange(**{field.name: settings[field.name] for field in fields(DepthRange)})
    if recorded.depth_min >= recorded.depth_max:
        raise ValueError(f"expected depth_min below depth_max, got {recorded.depth_min:g} and {recorded.depth_max:g}")
    largest = recorded.depth_max
    if recorded.use_log:
        if recorded.depth_min + recorded.shift < SMALLEST_LOG:
            raise ValueError(
                f"expected depth_min + shift of {SMALLEST_LOG:g} or more to take its logarithm, got {recorded.depth_min:g} + "
                f"{recorded.shift:g}"
            )
        largest += recorded.shift
    if recorded.depth_max - recorded.depth_min < LEAST_SPREAD * largest:
        raise ValueError(
            f"expected depth_min farther below depth_max, got {recorded.depth_min!r} and {recorded.depth_max!r}"
        )
    return recorded


def depth_problems(key: str, feature: dict) -> list[str]:
    """What is wrong with a depth camera in info.json, a line each."""
    shape = tuple(feature["shape"])
    no_depth = "If it holds no depth, remove is_depth_map from its info"
    if feature["dtype"] not in ("video", "image"):
        return [f"depth camera {key}: expected dtype video or image, got {feature['dtype']!r}. {no_depth}"]
    if len(shape) != 3 or 1 not in (shape[0], shape[2]):
        return [f"depth camera {key}: expected shape (height, width, 1), got {shape}. {no_depth}"]
    try:
        range_of(feature)
    except ValueError as error:
        remedy = "Write what it was recorded with into its info, as video.depth_min and so on"
        return [f"depth camera {key}: {error}. {remedy}"]
    unit = depth_unit(feature)
    if unit not in (None, *UNITS):
        return [f"depth camera {key}: expected depth_unit {' or '.join(UNITS)}, got {unit!r}. Correct it"]
    return []


# What to report.


def depth_lines(ranges: dict[str, DepthRange]) -> list[str]:
    """How each depth camera is read, a line each."""
    lines = []
    for key, recorded in ranges.items():
        steps = f"{100 * recorded.step(recorded.depth_min):.2g} cm"
        if recorded.use_log:
            steps += f" (near) to {100 * recorded.step(recorded.depth_max):.2g} cm (far)"
        covered = f"{recorded.depth_min:g} m to {recorded.depth_max:g} m"
        lines.append(f"{key}: depth from {covered} as a grey picture, in steps of {steps}")
    return lines


def range_warnings(trained: dict, now: dict, holder: str, dataset: str) -> list[str]:
    """A line for each camera whose pictures mean something else than those that a policy was trained with.

    Args:
        trained: {camera: DepthRange} of the depth cameras that the policy was trained with.
        now: {camera: its entry in info.json} of a dataset's cameras that the policy takes, under the policy's names.
        holder, dataset: what to call the policy and the dataset.
    """
    ranges = depth_ranges(now)
    warnings = []
    for key in sorted(now):
        before = trained.get(key)
        recorded = ranges.get(key)
        if before == recorded:
            continue
        if before is None or recorded is None:
            kinds = ["depth" if one else "colour" for one in (before, recorded)]
            warnings.append(f"{key}: {holder} was trained with pictures of {kinds[0]}, {dataset} has {kinds[1]}")
        else:
            warnings.append(
                f"the depth of {key} has another range: {holder} was trained with {before}, {dataset} has {recorded}. "
                "Equal greys mean other distances"
            )
    return warnings
