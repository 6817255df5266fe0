"""Break a dataset: edit its JSON files and its tables."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def edit_json(path: Path, change) -> None:
    """Apply `change` to what a JSON file holds."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_column(root: Path, column: str, change) -> None:
    """Replace a column of a dataset's first table by `change(values)`, whose vectors are numpy arrays."""
    path = next((root / "data").glob("*/*.parquet"))
    table = pq.read_table(path)
    values = [np.array(value) if isinstance(value, list) else value for value in table[column].to_pylist()]
    values = [value.tolist() if isinstance(value, np.ndarray) else value for value in change(values)]
    position = table.schema.get_field_index(column)
    field = table.schema.field(position)
    pq.write_table(table.set_column(position, field, pa.array(values, field.type)), path)
