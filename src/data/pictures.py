"""Pictures that are stored in the table: their column, and opening one of them.

N rows.
"""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.files import LFS_POINTER, is_lfs_pointer
from errors import UserError, one_line

FIELDS = (("bytes", pa.binary()), ("path", pa.string()))  # of a picture, as LeRobot stores it
PICTURE = pa.struct(FIELDS)
CLIPPED = ("I", "F")  # Pillow's modes of more than 8 bits begin so: as RGB they would be clipped to white


def read_pictures(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of pictures as LeRobot stores it. Other tools write plain bytes, or paths.

    Raises:
        UserError: it holds something else.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = kind.value_type
    if pa.types.is_struct(kind) and {(field.name, field.type) for field in kind} >= set(FIELDS):
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


def with_full_paths(pictures: pa.ChunkedArray, root: Path) -> pa.ChunkedArray:
    """The same pictures, where those that are files are named by their full path, not from the dataset's folder on."""
    chunks = []
    for chunk in pictures.chunks:
        content = chunk.field("bytes")
        if content.null_count:
            paths = chunk.field("path").to_pylist()
            outside = content.is_null().to_pylist()
            paths = [
                str(root / path) if path and is_file else path for path, is_file in zip(paths, outside, strict=True)
            ]
            chunk = pa.StructArray.from_arrays([content, pa.array(paths, pa.string())], names=["bytes", "path"])
        chunks.append(chunk)
    return pa.chunked_array(chunks)


def rows_without_picture(pictures: pa.ChunkedArray) -> np.ndarray:
    """(n,) rows that hold neither bytes nor a path, of a column by `read_pictures`."""
    empty = []
    for chunk in pictures.chunks:
        size = pc.fill_null(pc.binary_length(pc.struct_field(chunk, "bytes")), 0)
        path = pc.fill_null(pc.binary_length(pc.struct_field(chunk, "path")), 0)
        empty.append(pc.equal(pc.add(size, path), 0).to_numpy(zero_copy_only=False))
    return np.flatnonzero(np.concatenate([np.zeros(0, bool), *empty]))


def open_picture(pictures: pa.ChunkedArray, root: Path, row: int):
    """Pillow's image of a row, whose pixels are not decoded yet.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read, or has more than 8 bits a channel.
    """
    from PIL import Image

    stored = pictures[row].as_py()
    if not stored["bytes"] and is_lfs_pointer(root / stored["path"]):
        raise ValueError(f"{root / stored['path']} {LFS_POINTER}")
    image = Image.open(io.BytesIO(stored["bytes"]) if stored["bytes"] else root / stored["path"])
    if image.mode.startswith(CLIPPED):
        image.close()
        raise ValueError(f"expected 8 bits a channel, got a {image.mode} picture. Convert the pictures to 8-bit RGB")
    return image


def decode_picture(pictures: pa.ChunkedArray, root: Path, row: int) -> np.ndarray:
    """(H, W, 3) uint8 picture of a row: grey, palette and transparent ones as RGB, turned upright as its EXIF data say.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read, or has more than 8 bits a channel.
    """
    from PIL import ExifTags, ImageOps

    with open_picture(pictures, root, row) as image:
        if image.getexif().get(ExifTags.Base.Orientation) is not None:
            image = ImageOps.exif_transpose(image)
        return np.array(image.convert("RGB"))


def picture_problems(source) -> list[str]:
    """The first picture of every episode opens, and has 8 bits a channel: a line for each camera. The rest when decoded."""
    problems = []
    for key, pictures in source.images.items():
        for row in source.starts.tolist():
            try:
                open_picture(pictures, source.meta.root, row).close()
            except (OSError, SyntaxError, ValueError) as error:
                problems.append(f"{key}: the picture of {source.name_row(row)} cannot be read: {one_line(error)}")
                break
    return problems
