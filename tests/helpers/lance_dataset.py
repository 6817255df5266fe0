"""Write LeRobot's Lance layout, as `lerobot-lance-convert` of lerobot-lancedb 0.3.1 does, with Lance's own library."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def to_lance(root: Path, out: Path) -> Path:
    """Convert a v3.0 dataset."""
    import lance

    shutil.copytree(root / "meta", out / "meta")
    info_file = out / "meta" / "info.json"
    info = json.loads(info_file.read_text())
    info_file.write_text(json.dumps(info | {"storage_format": "lance"}))

    def write(name: str, table: pa.Table) -> None:
        lance.write_dataset(table, str(out / f"{name}.lance"), mode="overwrite", data_storage_version="2.2")

    files = [path for path in sorted((out / "meta").rglob("*")) if path.is_file()]
    names = [path.relative_to(out / "meta").as_posix() for path in files]
    write(
        "meta",
        pa.table({"path": names, "data": pa.array([path.read_bytes() for path in files], pa.large_binary())}),
    )

    frames = pa.concat_tables(pq.read_table(path) for path in sorted((root / "data").rglob("*.parquet")))
    columns = {}
    for name in frames.column_names:
        column = frames[name].combine_chunks()
        if isinstance(column, pa.ExtensionArray):
            column = column.storage
        if pa.types.is_list(column.type):
            column = pa.FixedSizeListArray.from_arrays(column.flatten(), len(column[0]))
        columns[name.replace(".", "_")] = column
    write("frames", pa.table(columns))

    videos = sorted((root / "videos").rglob("*.mp4"))
    write(
        "videos",
        pa.table(
            {
                "video_key": pa.array([path.parts[-3] for path in videos], pa.string()),
                "chunk_index": pa.array([int(path.parent.name[-3:]) for path in videos], pa.int64()),
                "file_index": pa.array([int(path.stem[-3:]) for path in videos], pa.int64()),
                "video_bytes": lance.blob_array([path.read_bytes() for path in videos]),
            }
        ),
    )
    return out
