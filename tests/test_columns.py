"""What a table may hold: numbers in any form Arrow has, texts, pictures; what cannot be read is refused with its row."""

import base64
import decimal
import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from data.column_checks import misfits
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.source import flat_values, one_piece
from data.union import unite
from errors import UserError
from helpers.dataset_edits import edit_json, rewrite_column
from helpers.runs import small
from infer import compare
from policy.loaded import load_policy
from train import train

TOP = "observation.images.top"


def table_file(root):
    return next((root / "data").glob("*/*.parquet"))


def set_column(root, name, values) -> None:
    """Replace a column, or append it."""
    table = pq.read_table(table_file(root))
    position = table.schema.get_field_index(name)
    table = table.append_column(name, values) if position < 0 else table.set_column(position, name, values)
    pq.write_table(table, table_file(root))


def column(root, name) -> list:
    return pq.read_table(table_file(root))[name].to_pylist()


def set_feature(root, name, **facts) -> None:
    edit_json(root / "meta" / "info.json", lambda info: info["features"].setdefault(name, {}).update(facts))


def problem_of(root) -> str:
    (problem,) = open_source(str(root)).problems
    return problem


# Numbers.


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({17: [1.0, 2.0], 18: [1.0, 2.0, 3.0, 4.0]}, "action: expected shape (3,) in each row by info.json, got 2 numbers in 2 rows, "),
        ({17: None}, "action: expected a number everywhere, got null in episode 1 frame 4"),
        ({17: [1.0, None, 2.0]}, "action: expected a number everywhere, got null in episode 1 frame 4"),
        ({0: [], 32: [1.0]}, "action: expected shape (3,) in each row by info.json, got 0 numbers in 2 rows, first in episode 0 "),
    ],
)  # fmt: skip
def test_rows_that_do_not_fit_are_named(copy_of, rows, message):
    root = copy_of("no_camera")
    values = column(root, "action")
    for row, value in rows.items():
        values[row] = value
    set_column(root, "action", pa.array(values, pa.list_(pa.float32())))
    assert problem_of(root).startswith(message)
    assert "Leave that episode out with --episodes" in problem_of(root)


def test_another_width_in_all_rows(copy_of):
    root = copy_of("no_camera")
    set_column(root, "action", pa.array([[1.0, 2.0]] * 33))
    message = "action: expected shape (3,) in each row by info.json, got 2 numbers. Correct the shape in info.json"
    assert problem_of(root) == message


@pytest.mark.parametrize("name", ["timestamp", "frame_index", "task_index"])
def test_a_null_among_single_numbers(copy_of, name):
    root = copy_of("no_camera")
    rewrite_column(root, name, lambda values: [None if row == 20 else value for row, value in enumerate(values)])
    assert problem_of(root).startswith(f"{name}: expected a number everywhere, got null in episode 1 frame 7")


POSE = {"dtype": "float32", "shape": [2, 3], "names": None}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([[1.0, 2.0], [3.0, 4.0, 5.0, 6.0]], "got 2 numbers in episode 0 frame 5"),
        ([[1.0, 2.0, 3.0]], "got 1 number in episode 0 frame 5"),
        ([[1.0, 2.0, 3.0], None], "expected a number everywhere, got null in episode 0 frame 5"),
    ],
)
def test_lists_of_lists(copy_of, wrong, message):
    root = copy_of("no_camera")
    rows = [[[float(row)] * 3] * 2 for row in range(33)]
    set_feature(root, "observation.pose", **POSE)
    set_column(root, "observation.pose", pa.array(rows))
    source = open_source(str(root))
    assert source.problems == []
    assert source.columns["observation.pose"].tolist() == rows
    rows[5] = wrong
    set_column(root, "observation.pose", pa.array(rows))
    assert message in problem_of(root)


WHOLE = [[float(row), float(row % 7), 1.0] for row in range(33)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([np.array(row, np.float16) for row in WHOLE], pa.list_(pa.float16())), torch.float32),
        (pa.array(WHOLE, pa.list_(pa.float64(), 3)), torch.float32),
        (pa.array(WHOLE, pa.large_list(pa.float32())), torch.float32),
        (pa.array(WHOLE, pa.list_(pa.uint8())), torch.float32),
        (pa.array(WHOLE, pa.list_(pa.int16())), torch.float32),
        (
            pa.array([[decimal.Decimal(int(x)) for x in row] for row in WHOLE], pa.list_(pa.decimal128(9, 3))),
            torch.float32,
        ),
    ],
)
def test_numbers_of_every_type_are_lerobots(copy_of, values, expected):
    """float32 where info.json says so, however the table stores them."""
    root = copy_of("no_camera")
    set_column(root, "action", values)
    (root / "meta" / "stats.json").unlink()
    action = open_source(str(root)).columns["action"]
    assert action.dtype == expected
    assert action.tolist() == WHOLE


def test_a_feature_of_no_numbers(copy_of):
    root = copy_of("no_camera")
    set_feature(root, "observation.nothing", dtype="float32", shape=[0], names=None)
    set_column(root, "observation.nothing", pa.array([[]] * 33, pa.list_(pa.float32())))
    source = open_source(str(root))
    assert source.problems == source.warnings == []
    assert source.columns["observation.nothing"].shape == (33, 0)
    with pytest.raises(UserError, match=r"no mean and std of observation\.nothing to normalise by"):
        train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1))


def test_whole_numbers_as_info_json_says(copy_of):
    root = copy_of("no_camera")
    set_feature(root, "observation.count", dtype="uint8", shape=[1], names=None)
    set_column(root, "observation.count", pa.array(range(33), pa.uint8()))
    count = open_source(str(root)).columns["observation.count"]
    assert count.dtype == torch.int64
    assert count.tolist() == list(range(33))


def test_texts_in_a_dictionary_of_arrow(copy_of):
    root = copy_of("no_camera")
    set_feature(root, "observation.note", dtype="string", shape=[1], names=None)
    set_column(root, "observation.note", pa.array(["a", "b", "a"] * 11).dictionary_encode())
    assert pa.types.is_dictionary(pq.read_table(table_file(root))["observation.note"].type)
    source = open_source(str(root))
    assert source.problems == []
    assert source.columns["observation.note"] == ["a", "b", "a"] * 11


def test_numbers_in_a_dictionary_of_arrow():
    """Parquet does not keep these; other formats do."""
    numbers = pa.array([3, 1, None, 3])
    column = pa.chunked_array([numbers.dictionary_encode()])
    assert misfits(one_piece(column), (1,)) == (2, "no value")
    assert flat_values(pa.chunked_array([pa.array([3, 1, 3]).dictionary_encode()])).tolist() == [3, 1, 3]


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (["a"] * 33, "string"),
        ([{"x": 1.0}] * 33, "struct<x: double>"),
        ([b"abc"] * 33, "binary"),
    ],
)
def test_what_is_no_number(copy_of, values, got):
    root = copy_of("no_camera")
    set_column(root, "action", pa.array(values))
    assert problem_of(root) == (
        f"action: expected numbers as info.json says (float32), got {got}. Correct the table or info.json"
    )


def test_rows_without_a_text_are_told(copy_of):
    root = copy_of("no_camera")
    set_feature(root, "observation.note", dtype="string", shape=[1], names=None)
    set_column(root, "observation.note", pa.array(["a"] * 14 + [None] * 2 + ["b"] * 17))
    source = open_source(str(root))
    assert source.problems == []
    assert source.warnings == [
        "observation.note has no text in 2 rows, first in episode 1 frame 1: it is None in a batch"
    ]
    assert train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1)).steps == 1
    set_column(root, "observation.note", pa.array(range(33)))
    assert problem_of(root).startswith("observation.note: expected texts as info.json says, got int64")


def test_a_task_index_of_truth_values(copy_of):
    root = copy_of("no_camera")
    set_column(root, "task_index", pa.array([False] * 33))
    assert problem_of(root) == "task_index: expected whole numbers, got bool. Write the column as int64"


@pytest.mark.parametrize("name", ["timestamp", "frame_index", "index", "task_index"])
def test_two_numbers_where_a_row_has_one(copy_of, name):
    root = copy_of("no_camera")
    set_feature(root, name, shape=[2])
    set_column(root, name, pa.array([[0, 0]] * 33))
    assert problem_of(root).startswith(f"{name}: expected shape (1,) in info.json, got (2,)")


@pytest.mark.parametrize("shape", [[1, 3], [3, 1]])
def test_an_action_that_is_no_plain_list(copy_of, shape):
    """The table may nest it: info.json decides, and what the line says to write there trains."""
    root = copy_of("no_camera")
    nested = np.array(column(root, "action")).reshape(33, *shape)
    set_column(root, "action", pa.array(nested.tolist()))
    set_feature(root, "action", shape=shape)
    settings = small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1)
    with pytest.raises(UserError, match=r"action: expected a list of numbers, of shape \[3\], got shape") as caught:
        train(**settings)
    assert "\n" not in str(caught.value)
    set_feature(root, "action", shape=[3])
    assert train(**settings).steps == 1


def test_a_state_that_act_cannot_flatten(copy_of):
    root = copy_of("no_camera")
    set_feature(root, "observation.state", shape=[1, 3])
    with pytest.raises(UserError, match=r"observation.state: expected a list of numbers, of shape \[3\]"):
        train(**small("act", dataset_id=str(root), output_dir=str(root / "act"), steps=1))
    assert train(**small("flow", dataset_id=str(root), output_dir=str(root / "flow"), steps=1)).steps == 1


@pytest.mark.parametrize("shape", [[-3], [True], [3, -1]])
def test_a_size_that_cannot_be(copy_of, shape):
    root = copy_of("no_camera")
    set_feature(root, "action", shape=shape)
    with pytest.raises(UserError, match="feature action: expected a shape such as"):
        open_source(str(root))


@pytest.mark.parametrize("shape", [[32, 32], [32], [], [0, 0, 3], [32, 32, 3, 1]])
def test_a_camera_of_another_shape_is_one_line_in_training_too(copy_of, shape):
    root = copy_of("images")
    set_feature(root, TOP, shape=shape)
    expected = f"camera {TOP}: expected shape \\(height, width, 3\\) in info.json"
    with pytest.raises(UserError, match=expected) as caught:
        train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1))
    assert "\n" not in str(caught.value)


def test_what_float32_cannot_hold_is_told_without_a_warning(copy_of, recwarn):
    root = copy_of("no_camera")
    values = np.array(column(root, "action"), np.float64)
    values[14, 1] = 1e39
    set_column(root, "action", pa.array(values.tolist(), pa.list_(pa.float64())))
    assert problem_of(root).startswith("action is not finite in 1 row, first in episode 1 frame 1")
    assert [str(warning.message) for warning in recwarn if warning.category is RuntimeWarning] == []


def test_a_dataset_without_its_column_says_nothing_of_statistics(copy_of):
    root = copy_of("no_camera")
    set_feature(root, "observation.force", dtype="float32", shape=[6], names=None)
    with pytest.raises(UserError, match=r"its table has no column observation\.force") as caught:
        train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1))
    assert "stats.json" not in str(caught.value)


@pytest.mark.parametrize("policy", ["act", "flow"])
def test_nothing_to_act_on(copy_of, policy):
    """No policy is offered that would refuse it too."""
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info["features"].pop("observation.state"))
    with pytest.raises(UserError, match="it has no observation that a policy could act on") as caught:
        train(**small(policy, dataset_id=str(root), output_dir=str(root / "run"), steps=1))
    assert "--policy flow" not in str(caught.value)


def test_a_rename_that_takes_the_state_away(copy_of):
    root = copy_of("images")
    settings = small("act", dataset_id=str(root), output_dir=str(root / "run"), steps=1)
    with pytest.raises(UserError, match="Leave --rename out if that is the state"):
        train(**settings, rename=["observation.state=observation.other"])
    rename = ["observation.state=observation.other", f"{TOP}=observation.images.left"]
    with pytest.raises(UserError) as caught:
        train(**settings, rename=rename)
    assert f"Pass --rename {TOP}=observation.images.left if that is the state, or pass --policy flow" in str(
        caught.value
    )
    flow = small("flow", dataset_id=str(root), output_dir=str(root / "flow"), steps=1)
    assert train(**flow, rename=rename).steps == 1
    assert train(**settings, rename=rename[1:]).steps == 1


# Row order and clock.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda index: [*index[:14], index[15], index[14], *index[16:]],
            "got 2 in 2 rows, first in episode 1 frame 1. Sort each episode's rows by frame_index",
        ),
        (
            lambda index: [frame + 1 for frame in index],
            "got 1 in 33 rows, first in episode 0 frame 0. Count each episode's frames from 0, and not from 1 or",
        ),
        (
            lambda index: list(range(33)),
            "got 13 in 20 rows, first in episode 1 frame 0. Count each episode's frames from 0",
        ),
        (
            lambda index: [index[1] + 5, index[0] + 5, *(frame + 5 for frame in index[2:])],
            "got 6 in 33 rows, first in episode 0 frame 0. Sort each episode's rows by frame_index and count each episode's",
        ),
        (
            lambda index: [*index[:-1], index[-1] + 1],
            "got 11 in episode 2 frame 10. Frames are missing, or there twice",
        ),
    ],
)
def test_rows_that_are_not_in_the_order_of_their_frames(copy_of, change, message):
    root = copy_of("no_camera")
    rewrite_column(root, "frame_index", change)
    expected = f"frame_index: expected 0 to n - 1 in the n rows of each episode, {message}"
    assert problem_of(root).startswith(expected)
    edit_json(root / "meta" / "info.json", lambda info: info["features"].pop("frame_index"))
    assert problem_of(root).startswith(expected)  # the column counts, listed or not


def test_rows_without_a_frame_index_are_read_in_their_order(copy_of):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info["features"].pop("frame_index"))
    pq.write_table(pq.read_table(table_file(root)).drop(["frame_index"]), table_file(root))
    source = open_source(str(root))
    assert source.problems == []
    assert "frame_index" not in source.columns
    assert train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1)).steps == 1


def clock(start: float, step: float = 0.1) -> pa.Array:
    """Timestamps of the made dataset in float64, from `start` on in each episode."""
    return pa.array(np.concatenate([start + step * np.arange(length) for length in (13, 9, 11)]))


def test_unix_seconds_keep_their_fractions(copy_of):
    root = copy_of("no_camera")
    set_column(root, "timestamp", clock(1.75e9))
    source = open_source(str(root))
    assert source.problems == source.warnings == []
    times = source.columns["timestamp"]
    assert times.dtype == torch.float64
    assert torch.allclose(times[1:13] - times[:12], torch.tensor(0.1, dtype=torch.float64), atol=1e-6)
    loader = Loader(source, Frames(source), {}, 4, seed=1)
    assert torch.equal(loader.batch_of(torch.tensor([3, 14]))["timestamp"], times[[3, 14]])
    loader.close()
    assert train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1)).steps == 1


def test_a_clock_that_float32_holds_is_lerobots(copy_of):
    root = copy_of("no_camera")
    set_column(root, "timestamp", clock(0.0))
    source = open_source(str(root))
    assert source.columns["timestamp"].dtype == torch.float32
    assert source.problems == source.warnings == []


@pytest.mark.parametrize(("start", "step", "off"), [(1.75e9, 0.11, "0.12"), (5.0, 0.09, "0.12")])
def test_a_clock_that_runs_off_is_told_with_its_size(copy_of, start, step, off):
    root = copy_of("no_camera")
    set_column(root, "timestamp", clock(start, step))
    source = open_source(str(root))
    assert source.problems == []
    assert source.warnings == [
        f"timestamps are up to {off} s off frame_index / fps: frames are read by row, not by timestamp"
    ]


def test_unix_seconds_at_another_rate(copy_of):
    root = copy_of("no_camera")
    set_column(root, "timestamp", clock(1.75e9, 0.05))
    assert "timestamps advance by 0.05 s a frame: expected 0.1 s at fps 10" in problem_of(root)


# info.json.


@pytest.mark.parametrize("fps", [0, -10, "30", True, [10], float("nan")])
def test_a_rate_that_cannot_be(copy_of, fps):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info.update(fps=fps))
    with pytest.raises(UserError, match=r"info\.json: fps: expected a number above 0, got"):
        open_source(str(root))


@pytest.mark.parametrize("fps", ["missing", None])
def test_no_rate(copy_of, fps):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info.pop("fps") if fps else info.update(fps=None))
    with pytest.raises(UserError, match=r"info\.json has no fps"):
        open_source(str(root))


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"shape": None}, "feature action: expected a shape such as [6] or [480, 640, 3], got None"),
        ({"shape": 3}, "feature action: expected a shape such as [6] or [480, 640, 3], got 3"),
        ({"shape": ["3"]}, "feature action: expected a shape such as [6] or [480, 640, 3], got ['3']"),
        ({"dtype": None}, "feature action: expected a dtype such as float32, image, video or string, got None"),
        ({"dtype": "floaty"}, "feature action: expected a dtype such as float32, image, video or string, got 'floaty'"),
    ],
)
def test_a_feature_that_is_not_described(copy_of, facts, message):
    root = copy_of("no_camera")
    set_feature(root, "action", **facts)
    with pytest.raises(UserError) as caught:
        open_source(str(root))
    assert message in str(caught.value)


# Pictures.


def encoded(pixels: np.ndarray, mode: str | None = None, kind: str = "PNG", **options) -> bytes:
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


def pictures_of(source, rows) -> torch.Tensor:
    frames = Frames(source)
    try:
        return frames.read(TOP, torch.tensor(rows))
    finally:
        frames.close()


def stored(root) -> list[bytes]:
    return [picture["bytes"] for picture in column(root, TOP)]


@pytest.mark.parametrize("form", ["binary", "large_binary", "only bytes", "dictionary", "paths", "path structs"])
def test_pictures_in_every_form_are_read(copy_of, made, form):
    root = copy_of("images")
    content = stored(root)
    names = [f"pictures/{row}.png" for row in range(len(content))]
    if "path" in form:
        (root / "pictures").mkdir()
        for name, data in zip(names, content, strict=True):
            (root / name).write_bytes(data)
    values = {
        "binary": lambda: pa.array(content, pa.binary()),
        "large_binary": lambda: pa.array(content, pa.large_binary()),
        "only bytes": lambda: pa.array([{"bytes": data} for data in content]),
        "dictionary": lambda: pa.array(content, pa.binary()).dictionary_encode(),
        "paths": lambda: pa.array(names),
        "path structs": lambda: pa.array([{"path": name} for name in names]),
    }[form]()
    set_column(root, TOP, values)
    source = open_source(str(root))
    assert source.problems == []
    rows = [0, 13, 32]
    assert torch.equal(pictures_of(source, rows), pictures_of(open_source(str(made("images"))), rows))


@pytest.mark.parametrize("missing", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": ""}])
def test_a_row_without_a_picture_is_named(copy_of, missing):
    root = copy_of("images")
    pictures = column(root, TOP)
    pictures[15] = missing
    set_column(root, TOP, pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())])))
    assert problem_of(root).startswith(f"{TOP}: expected a picture in each row, got none in episode 1 frame 2")


PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_pictures_of_another_size_are_told_before_training(copy_of):
    root = copy_of("images")
    frames = stored(root)
    frames[13] = encoded(np.zeros((24, 32, 3), np.uint8))  # the first of episode 1
    set_column(root, TOP, pa.array([{"bytes": frame, "path": None} for frame in frames], PICTURE))
    problem = problem_of(root)
    assert "by info.json, got 24x32 in episode 1 frame 0" in problem
    assert "write the shape [24, 32, 3] into info.json" in problem
    assert open_source(str(root), episodes="0,2").problems == []


def test_axes_in_another_order_are_told(copy_of):
    root = copy_of("images")
    height, width = pictures_of(open_source(str(root)), [0]).shape[-2:]
    frames = [encoded(np.zeros((height - 8, width, 3), np.uint8)) for _ in range(33)]
    set_column(root, TOP, pa.array([{"bytes": frame, "path": None} for frame in frames], PICTURE))
    set_feature(root, TOP, shape=[width, height - 8, 3], names=["width", "height", "channels"])
    assert f"write the shape [{height - 8}, {width}, 3] into info.json" in problem_of(root)
    set_feature(root, TOP, shape=[height - 8, width, 3])  # the remedy
    assert open_source(str(root)).problems == []


@pytest.mark.parametrize("content", [None, b""])
def test_picture_files_that_are_missing_are_named(copy_of, content):
    root = copy_of("images")
    rows = []
    for row, frame in enumerate(stored(root)):
        path = f"pictures/{row:03d}.png"
        (root / path).parent.mkdir(exist_ok=True)
        if row not in (14, 20):
            (root / path).write_bytes(frame)
        rows.append({"bytes": content, "path": path})
    set_column(root, TOP, pa.array(rows, PICTURE))
    expected = f"{TOP}: 2 picture files missing, first pictures/014.png of episode 1 frame 1."
    assert problem_of(root).startswith(expected)
    assert open_source(str(root), episodes="0,2").problems == []  # the remedy


def test_base64_instead_of_pictures_is_a_short_line(copy_of):
    root = copy_of("images")
    set_column(root, TOP, pa.array([base64.b64encode(frame * 20).decode() for frame in stored(root)]))
    assert len(problem_of(root)) < 300


def test_16_bit_colours_are_not_halved(copy_of):
    root = copy_of("images")

    def part(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    lines = b"".join(b"\0" + bytes(6 * 32) for _ in range(32))
    png = b"\x89PNG\r\n\x1a\n" + part(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
    png += part(b"IDAT", zlib.compress(lines)) + part(b"IEND", b"")
    set_column(root, TOP, pa.array([{"bytes": png, "path": None}] * 33, PICTURE))
    assert "expected 8 bits a channel, got a 16-bit RGB picture" in problem_of(root)


def test_numbers_instead_of_pictures(copy_of):
    root = copy_of("images")
    set_column(root, TOP, pa.array([[1, 2, 3]] * 33))
    assert problem_of(root).startswith(f"{TOP}: expected encoded pictures in each row, got list<")


DEEP = np.full((64, 96), 40_000, np.uint16)


@pytest.mark.parametrize(
    "deep",
    [encoded(DEEP), encoded(DEEP, kind="TIFF"), encoded(DEEP.astype(np.int32), kind="TIFF"), encoded(DEEP.astype(np.float32), kind="TIFF")],
)  # fmt: skip
def test_pictures_of_more_than_8_bits_are_not_clipped(copy_of, deep):
    root = copy_of("images")
    content = stored(root)
    set_column(root, TOP, pa.array([deep] * 33))
    message = f"{TOP}: the picture of episode 0 frame 0 cannot be read: expected 8 bits a channel, got a"
    assert problem_of(root).startswith(message)
    content[5] = deep  # not the first of its episode: when it is decoded
    set_column(root, TOP, pa.array(content))
    source = open_source(str(root))
    assert source.problems == []
    with pytest.raises(UserError, match="expected 8 bits a channel"):
        pictures_of(source, [5])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_other_pictures_are_rgb(copy_of, mode):
    root = copy_of("images")
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[10:20, 30:50] = 255
    kind = "TIFF" if mode == "CMYK" else "PNG"
    set_column(root, TOP, pa.array([encoded(pixels, mode, kind)] * 33))
    source = open_source(str(root))
    assert source.problems == []
    assert torch.equal(pictures_of(source, [3])[0].permute(1, 2, 0), torch.from_numpy(pixels))


def test_a_picture_is_turned_as_its_exif_data_say(copy_of):
    """As LeRobot does."""
    root = copy_of("images")
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:20, :30] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = encoded(np.rot90(upright, 1).copy(), exif=exif)
    set_column(root, TOP, pa.array([turned] * 33))
    assert torch.equal(pictures_of(open_source(str(root)), [3])[0].permute(1, 2, 0), torch.from_numpy(upright))


# Names.


@pytest.mark.parametrize("rename", [None, "observation.images.front_left"])
def test_a_name_with_a_slash_trains_saves_and_loads(copy_of, rename):
    """LeRobot's reader splits the names in stats.json there."""
    root, name = copy_of("images"), "observation.images.front/left"
    table = pq.read_table(table_file(root))
    pq.write_table(table.rename_columns({TOP: name}), table_file(root))
    for file in ("info.json", "stats.json"):
        edit_json(
            root / "meta" / file,
            lambda content: content.get("features", content).update({name: content.get("features", content).pop(TOP)}),
        )
    settings = small("act", dataset_id=str(root), output_dir=str(root / "run"), steps=1, imagenet_stats="off")
    if rename:
        settings["rename"] = [f"{name}={rename}"]
    loaded = load_policy(train(**settings).checkpoint, "cpu")
    assert compare(loaded, open_source(str(root)), 0).predicted.shape == (13, 3)


def test_a_clock_in_whole_nanoseconds_is_told_with_its_rate(copy_of):
    root = copy_of("no_camera")
    nanoseconds = np.concatenate([10**18 + 10**8 * np.arange(length) for length in (13, 9, 11)])
    set_column(root, "timestamp", pa.array(nanoseconds))
    assert "timestamps advance by 1e+08 s a frame: expected 0.1 s at fps 10" in problem_of(root)


@pytest.mark.parametrize("no_bytes", [None, b""])
def test_picture_files_of_several_datasets_are_found(made, copy_of, no_bytes):
    """Their paths are within their own dataset."""
    root = copy_of("images")
    (root / "pictures").mkdir()
    for row, data in enumerate(stored(root)):
        (root / "pictures" / f"{row}.png").write_bytes(data)
    set_column(root, TOP, pa.array([{"bytes": no_bytes, "path": f"pictures/{row}.png"} for row in range(33)]))
    both = unite([open_source(str(made("images"))), open_source(str(root))])
    assert torch.equal(pictures_of(both, [20]), pictures_of(both, [33 + 20]))
    assert [path.is_file() for path in both.picture_files(TOP)] == [True] * 33
