"""A dataset's tasks: texts by their own index, which is what the table's column task_index holds."""

import numpy as np
import pyarrow as pa

TASK_INDEX = {"dtype": "int64", "shape": (1,), "names": None}  # the feature, as LeRobot writes it


def set_tasks(meta) -> list[str]:
    """Bring `meta.tasks` into LeRobot's own form, texts as the index and `task_index` as the column, in ascending order.

    Other tools write the texts as a column beside a plain index. A task without a text is left out, and rows that name it
    are reported by `task_problems`.

    Args:
        meta: LeRobot's metadata, which is changed.

    Returns:
        What is wrong with the tasks, one line each.
    """
    import pandas
    from lerobot.datasets.io_utils import load_tasks

    file = tasks_file(meta)
    frame = meta.tasks
    if frame is None and (meta.root / file).is_file():  # LeRobot skips the file where info.json counts no tasks
        frame = load_tasks(meta.root)
    meta.tasks = task_frame({})
    if frame is None or len(frame) == 0:
        return []

    texts = text_values(frame)
    if texts is None:
        return [f"{file} has no texts: expected a column task of texts, got columns {list(frame.columns)}"]
    indices = index_values(frame)
    if indices is None:
        return [f"{file}: expected a column task_index, which the rows of the table name, got {list(frame.columns)}"]

    numbers = pandas.to_numeric(pandas.Series(indices), errors="coerce")
    tasks = {}
    for text, written, number in zip(texts, indices, numbers, strict=True):
        if number % 1 != 0 or abs(number) >= 2**63:  # NaN too, and what int64 cannot hold
            return [f"{file}: expected whole numbers as task_index, got {written!r} of task {text!r}"]
        if pandas.isna(text):
            continue
        if tasks.setdefault(int(number), text) != text:
            return [
                f"{file}: task_index {int(number)} has two texts, {tasks[int(number)]!r} and {text!r}. "
                "Give each task an index of its own, in the column task_index of the table too"
            ]
    meta.tasks = task_frame(dict(sorted(tasks.items())))
    return []


def task_frame(tasks: dict[int, str]):
    """{task_index: text} in the form of LeRobot's `meta.tasks`."""
    import pandas

    texts = pandas.Index(list(tasks.values()), name="task")
    return pandas.DataFrame({"task_index": list(tasks)}, index=texts, dtype=np.int64)


def tasks_file(meta) -> str:
    """The file of a dataset's tasks, within its folder."""
    if (meta.root / "meta" / "tasks.jsonl").is_file() and not (meta.root / "meta" / "tasks.parquet").is_file():
        return "meta/tasks.jsonl"
    return "meta/tasks.parquet"


def text_values(frame) -> list | None:
    """The texts: the column task, else the index, else the only column of texts; None if there is none, or more than one."""
    columns = {name: frame[name].tolist() for name in frame.columns if is_text(frame[name])}
    if "task" in columns:
        return columns["task"]
    if is_text(frame.index):
        return frame.index.tolist()
    columns.pop("task_index", None)
    return next(iter(columns.values())) if len(columns) == 1 else None


def is_text(values) -> bool:
    """Whether values are texts; some of them may be missing."""
    present = [value for value in values.tolist() if value is not None and value == value]
    return bool(present) and all(isinstance(value, str) for value in present)


def index_values(frame) -> list | None:
    """The column task_index, else the index if it was stored as numbers; None for a mere count of the rows."""
    import pandas

    if "task_index" in frame.columns:
        return frame["task_index"].tolist()
    if pandas.api.types.is_integer_dtype(frame.index) and not isinstance(frame.index, pandas.RangeIndex):
        return frame.index.tolist()
    return None


def complete_task_index(meta, table: pa.Table) -> pa.Table:
    """The table with its column task_index, which is added if it is missing and the dataset has a single task.

    Adds the feature to `meta.features` if info.json does not list it.
    """
    if "task_index" not in table.column_names and len(meta.tasks) == 1:
        only = int(meta.tasks["task_index"].iloc[0])
        table = table.append_column("task_index", pa.array(np.full(table.num_rows, only)))
    meta.features.setdefault("task_index", dict(TASK_INDEX))
    return table
