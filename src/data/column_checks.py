"""What is wrong with the columns of a table: each check returns a line for each problem.

N rows.
"""

import math

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.observations import observation_names, observations_flag
from data.pictures import read_pictures, rows_without_picture
from data.source import episode_spans, flat_values, is_list, one_piece, table_features
from errors import UserError, nearest, plural

NO_VALUE = "no value"
SINGLE = ("timestamp", "frame_index", "index", "task_index")  # columns with one number in each row
REMEDY = "Leave that episode out with --episodes, or correct the table"


def column_problems(meta, table: pa.Table) -> list[str]:
    """Every feature has its column, and every row the numbers, the text or the picture that info.json describes."""
    problems = []
    if "task_index" not in table.column_names:  # a dataset with a single task was given the column
        problems.append(
            f"its table has no column task_index, which says which of the {len(meta.tasks)} tasks a row belongs to"
        )
    present = [key for key in observation_names(meta) if key in table.column_names or key in meta.video_keys]
    for key, feature in table_features(meta).items():
        problem = None
        if key not in table.column_names:
            if key != "task_index":
                hint = nearest(key, table.column_names) or "."
                problem = f"its table has no column {key}, which info.json lists{hint} Remove it from info.json"
                if key in observation_names(meta) and present:
                    problem += f", or leave it out: {observations_flag(present, {})}"
        elif feature["dtype"] == "image":
            problem = picture_problem(key, table)
        elif feature["dtype"] == "string":
            problem = text_problem(key, table)
        else:
            problem = number_problem(key, feature, table)
        if problem is not None:
            problems.append(problem)
    if not problems:
        problem = order_problem(table)
        if problem is not None:
            problems.append(problem)
    return problems


def picture_problem(key: str, table: pa.Table) -> str | None:
    """Every row has an encoded picture."""
    try:
        rows = rows_without_picture(read_pictures(table[key]))
    except UserError as error:
        return f"{key}: {error}. Record it again as pictures or video"
    if len(rows) == 0:
        return None
    return f"{key}: expected a picture in each row, got none in {name_rows(table, rows)}. {REMEDY}"


def text_problem(key: str, table: pa.Table) -> str | None:
    """The column holds texts. A row may have none."""
    kind = one_piece(table[key]).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return None
    return f"{key}: expected texts as info.json says, got {kind}. Correct its dtype in info.json"


def number_problem(key: str, feature: dict, table: pa.Table) -> str | None:
    """Every row has as many numbers as the feature's shape says, none of them null."""
    values = one_piece(table[key])
    kind = leaf_type(values.type)
    if not is_number(kind):
        return f"{key}: expected numbers as info.json says ({feature['dtype']}), got {kind}. Correct the table or info.json"
    shape = tuple(feature["shape"])
    if key in SINGLE and math.prod(shape) != 1:
        return f"{key}: expected shape (1,) in info.json, got {shape}. Correct info.json, and the table if it has more"
    if key == "task_index" and pa.types.is_boolean(kind):
        return f"{key}: expected whole numbers, got {kind}. Write the column as int64"
    rows, got = misfits(values, shape)
    if len(rows) == 0:
        return None
    if got == NO_VALUE:
        return f"{key}: expected a number everywhere, got null in {name_rows(table, rows)}. {REMEDY}"
    expected = f"{key}: expected shape {shape} in each row by info.json"
    if len(rows) == table.num_rows:
        return f"{expected}, got {got}. Correct the shape in info.json"
    return f"{expected}, got {got} in {name_rows(table, rows)}. {REMEDY}"


def is_number(kind: pa.DataType) -> bool:
    """Whether a type is of numbers. A column of nulls passes: its nulls are reported instead."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    return any(test(kind) for test in tests)


def leaf_type(kind: pa.DataType) -> pa.DataType:
    """The type of the numbers within lists."""
    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif is_list(kind) or pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def order_problem(table: pa.Table) -> str | None:
    """frame_index is 0 to n - 1 within each episode. Without that column, rows are frames in the order of the table.

    The remedy is to sort, to count from 0, or both; where frames are missing or repeated, to leave episodes out.
    """
    if "frame_index" not in table.column_names:
        return None
    frame_index = flat_values(table["frame_index"])  # (N,)
    if frame_index.dtype == bool:
        frame_index = frame_index.astype(np.int64)
    _, starts, ends = episode_spans(table)
    expected = np.arange(len(frame_index)) - np.repeat(starts, ends - starts)
    wrong = np.flatnonzero(frame_index != expected)
    if len(wrong) == 0:
        return None
    firsts = np.repeat(starts, ends - starts)  # (N,) row
    in_order = frame_index[np.lexsort((frame_index, firsts))]  # (N,) sorted within each episode
    remedies = []
    if (in_order != frame_index).any():
        remedies.append("sort each episode's rows by frame_index")
    if (in_order[firsts] != 0).any():
        remedies.append("count each episode's frames from 0, and not from 1 or over the whole dataset")
    if (in_order - in_order[firsts] != expected).any():
        remedies = ["frames are missing, or there twice: leave out those episodes with --episodes"]
    remedy = " and ".join(remedies)
    return (
        f"frame_index: expected 0 to n - 1 in the n rows of each episode, got {frame_index[wrong[0]]} in "
        f"{name_rows(table, wrong)}. {remedy[0].upper()}{remedy[1:]}"
    )


def misfits(values: pa.Array, shape: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """(n,) rows of a column that hold nulls or are not of `shape`, and what the first of them has.

    Lists of lists may have fewer axes than the feature's shape: then only the number of values in a row counts.
    """
    count = len(values)
    rows = np.arange(count)  # of each value
    sizes = shape if depth(values.type) == len(shape) else (None,) * depth(values.type)
    for size in sizes:
        null = values.is_null().to_numpy(zero_copy_only=False)
        if null.any():
            return np.unique(rows[null]), NO_VALUE
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        if size is not None and (lengths != size).any():
            wrong = lengths != size
            return np.unique(rows[wrong]), plural(lengths[wrong][0], "number")
        rows = np.repeat(rows, lengths)
        values = one_piece(values.flatten())
    null = values.is_null().to_numpy(zero_copy_only=False)
    if null.any():
        return np.unique(rows[null]), NO_VALUE
    per_row = np.bincount(rows, minlength=count)
    wrong = np.flatnonzero(per_row != math.prod(shape))
    return wrong, plural(per_row[wrong[0]], "number") if len(wrong) else ""


def depth(kind: pa.DataType) -> int:
    """How many lists are around a column's numbers."""
    levels = 0
    while is_list(kind):
        levels += 1
        kind = kind.value_type
    return levels


def name_rows(table: pa.Table, rows: np.ndarray) -> str:
    """Rows of a table for people, by the episode and frame of the first."""
    episodes, starts, _ = episode_spans(table)
    position = np.searchsorted(starts, rows[0], side="right") - 1
    first = f"episode {episodes[position]} frame {rows[0] - starts[position]}"
    return first if len(rows) == 1 else f"{len(rows)} rows, first in {first}"
