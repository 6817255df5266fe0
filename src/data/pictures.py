"""Pictures that are stored in the table: their column, and opening one of them.

N rows.
"""

import io
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.depth import is_depth
from data.files import LFS_POINTER, is_lfs_pointer
from errors import UserError, one_line, plural

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # as LeRobot stores one
LONGEST_NAME = 80  # characters of a file's name in a message
TURNED = (5, 6, 7, 8)  # orientations in EXIF data by which height and width change places
DEEP = re.compile(r";16[BLN]")  # in Pillow's raw modes of 16 bits a channel: converting to RGB would drop 8 of them
CLIPPED = ("I", "F")  # first letters of Pillow's modes of more than 8 bits: converting to RGB would clip them to white


def read_pictures(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of pictures as LeRobot stores it. Other tools write plain bytes, or paths.

    Raises:
        UserError: it holds something else.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if kind == PICTURE:
        return column
    chunks = []
    for chunk in column.chunks:
        nothing = pa.nulls(len(chunk))
        if pa.types.is_struct(kind):
            stored = {field.name: pc.struct_field(chunk, field.name) for field in kind}
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            stored = {"path": chunk}
        else:
            stored = {"bytes": chunk}
        try:
            parts = [stored.get(field.name, nothing).cast(field.type) for field in PICTURE]
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise UserError(f"expected encoded pictures in each row, got {kind}") from error
        chunks.append(pa.StructArray.from_arrays(parts, fields=list(PICTURE)))
    return pa.chunked_array(chunks, type=PICTURE)


def is_empty(chunk: pa.StructArray, field: str) -> pa.BooleanArray:
    """(n,) whether each picture has no `bytes`, or no `path`. One without bytes is a file of its own, named by its path."""
    return pc.equal(pc.fill_null(pc.binary_length(pc.struct_field(chunk, field)), 0), 0)


def with_full_paths(pictures: pa.ChunkedArray, root: Path) -> pa.ChunkedArray:
    """The same pictures, with full paths of those that are files of their own instead of paths within the dataset."""
    chunks = []
    for chunk in pictures.chunks:
        outside = is_empty(chunk, "bytes").to_pylist()
        if any(outside):
            named = zip(chunk.field("path").to_pylist(), outside, strict=True)
            paths = pa.array([str(root / path) if is_file else path for path, is_file in named], pa.string())
            chunk = pa.StructArray.from_arrays([chunk.field("bytes"), paths], fields=list(PICTURE))
        chunks.append(chunk)
    return pa.chunked_array(chunks)


def rows_without_picture(pictures: pa.ChunkedArray) -> np.ndarray:
    """(n,) rows that hold neither bytes nor a path, of a column by `read_pictures`."""
    empty = [pc.and_(is_empty(chunk, "bytes"), is_empty(chunk, "path")) for chunk in pictures.chunks]
    return np.flatnonzero(pa.chunked_array(empty, pa.bool_()).to_numpy())


def open_picture(pictures: pa.ChunkedArray, root: Path, row: int, depth: bool = False):
    """Pillow's image of a row, whose pixels are not decoded yet.

    Args:
        depth: whether it is a depth camera's, with one channel of more than 8 bits.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read, or has more than 8 bits a channel, or not if it should.
    """
    from PIL import Image

    stored = pictures[row].as_py()
    if not stored["bytes"] and is_lfs_pointer(root / stored["path"]):
        raise ValueError(f"{root / stored['path']} {LFS_POINTER}")
    image = Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else root / stored["path"])
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", [])]
    if depth:
        if not image.mode.startswith(CLIPPED):
            image.close()
            raise ValueError(
                f"expected depth in 16 bits or floats, got a {image.mode} picture. Record it as LeRobot does"
            )
        return image
    if image.mode.startswith(CLIPPED) or any(DEEP.search(mode) for mode in raw_modes):
        image.close()
        bits = image.mode if image.mode.startswith(CLIPPED) else f"16-bit {image.mode}"
        raise ValueError(f"expected 8 bits a channel, got a {bits} picture. Convert the pictures to 8-bit RGB")
    return image


def picture_size(image) -> tuple[int, int]:
    """(height, width) of Pillow's image once it is turned upright."""
    from PIL import ExifTags

    width, height = image.size
    return (width, height) if image.getexif().get(ExifTags.Base.Orientation) in TURNED else (height, width)


def decode_picture(pictures: pa.ChunkedArray, root: Path, row: int, depth: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 picture of a row: grey, palette and transparent ones as RGB, turned upright as its EXIF data say.

    A depth camera's is (H, W), in the numbers that are stored. Arguments and errors as for `open_picture`.
    """
    from PIL import ExifTags, ImageOps

    with open_picture(pictures, root, row, depth) as image:
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return np.array(image if depth else image.convert("RGB"))


def picture_problems(source) -> list[str]:
    """What is wrong with the pictures, a line for each camera: files that are missing, or an episode's first picture.

    The first picture of each episode must open, and have 8 bits a channel and the size in info.json. The others are checked
    when they are decoded.
    """
    problems = []
    for key in source.images:
        problem = missing_files(source, key) or first_picture_problem(source, key)
        if problem is not None:
            problems.append(problem)
    return problems


def missing_files(source, key: str) -> str | None:
    """A line if pictures that are files of their own are missing."""
    missing = []  # (row, path)
    first = 0
    for chunk in source.images[key].chunks:
        outside = np.flatnonzero(is_empty(chunk, "bytes").to_numpy(zero_copy_only=False))
        paths = chunk.field("path").take(pa.array(outside)).to_pylist()
        for row, path in zip(outside.tolist(), paths, strict=True):
            if not os.path.isfile(source.meta.root / path):
                missing.append((first + row, path))
        first += len(chunk)
    if not missing:
        return None
    row, path = missing[0]
    if len(path) > LONGEST_NAME:
        path = f"{path[:LONGEST_NAME]}..."
    return (
        f"{key}: {plural(len(missing), 'picture file')} missing, first {path} of {source.name_row(row)}. "
        "Copy them again, or leave those episodes out with --episodes"
    )


def first_picture_problem(source, key: str) -> str | None:
    """A line for the first episode whose first picture cannot be read, or has another size than info.json says."""
    feature = source.meta.features[key]
    expected = tuple(feature["shape"][:2])
    depth = is_depth(feature)
    for row in source.starts.tolist():
        try:
            with open_picture(source.images[key], source.meta.root, row, depth) as image:
                height, width = picture_size(image)
        except (OSError, SyntaxError, ValueError) as error:
            return f"{key}: the picture of {source.name_row(row)} cannot be read: {one_line(error)[:300]}"
        if (height, width) != expected:
            return (
                f"{key}: expected pictures of height and width {expected[0]}x{expected[1]} by info.json, got "
                f"{height}x{width} in {source.name_row(row)}. If all are of that size, write the shape "
                f"[{height}, {width}, {1 if depth else 3}] into info.json"
            )
    return None
