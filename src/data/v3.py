"""LeRobot v3.0 datasets: many episodes a file, metadata in Parquet."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from data.episodes import counted
from data.files import check_readable, is_hidden, reading
from data.source import Source
from data.statistics import read_statistics
from errors import UserError, plural


def fill_v3_metadata(meta, info: dict) -> None:
    """Read a v3.0 folder's metadata into LeRobot's class, as the class's constructor does, but with our messages.

    The constructor would look for missing files on the Hub, and read no episodes if info.json counts none.

    Args:
        meta: LeRobot's metadata with its `root`.
        info: content of meta/info.json.

    Raises:
        UserError: a metadata file is missing or damaged.
    """
    from datasets import Dataset
    from lerobot.datasets.io_utils import load_tasks
    from lerobot.datasets.utils import DatasetInfo

    folder = meta.root / "meta"
    meta.info = DatasetInfo(**info)
    tasks = folder / "tasks.parquet"
    check_readable(tasks)
    with reading(tasks):
        meta.tasks = load_tasks(meta.root)
    files = sorted(path for path in folder.glob("episodes/*/*.parquet") if not is_hidden(path))
    if not files:
        raise UserError(f"{folder}/episodes/*/*.parquet is missing. Copy or download the whole dataset again")
    episodes = read_episodes(files, meta.warnings)
    meta.episodes = Dataset.from_dict(episodes.to_pydict()) if episodes.num_rows else None
    meta.stats = {}
    if (folder / "stats.json").exists():
        meta.stats = read_statistics(folder / "stats.json", info["features"])


def read_episodes(files: list[Path], warnings: list[str]) -> pa.Table:
    """The rows of meta/episodes without statistics, by ascending episode.

    The last of several files is left out if it is damaged: an interrupted recording leaves it so.

    Args:
        files: those of meta/episodes, in their order.
        warnings: gets a line for what is left out.

    Raises:
        UserError: another file is damaged or lacks a column, or an episode is described twice.
    """
    folder = files[0].parent.parent
    tables = []
    for file in files:
        check_readable(file)
        try:
            with reading(file):
                names = pa.parquet.read_schema(file).names
                tables.append(pa.parquet.read_table(file, columns=[n for n in names if not n.startswith("stats/")]))
        except UserError as error:
            if file != files[-1] or not any(table.num_rows for table in tables):
                raise
            warnings.append(f"{error}. The episodes that it describes are left out")
            break
        for name in ("episode_index", "length"):
            if name not in names:
                raise UserError(f"{file} has no column {name}. Copy or download the dataset again")
            if tables[-1][name].null_count or not pa.types.is_integer(tables[-1][name].type):
                raise UserError(
                    f"{file}: expected whole numbers in the column {name}. Copy or download the dataset again"
                )
    with reading(folder):
        table = pa.concat_tables(tables, promote_options="permissive")
    index = table["episode_index"].to_pylist()
    if min(index, default=0) < 0:
        raise UserError(f"{folder} describes episode {min(index)}: expected numbers from 0 on. Correct it")
    twice = [episode for episode, count in Counter(index).items() if count > 1]
    if twice:
        raise UserError(
            f"{folder} describes {counted(twice)} more than once, in {plural(len(files), 'file')}. "
            "Remove the file that is left over, or download the dataset again"
        )
    return table if index == sorted(index) else table.sort_by("episode_index")


def placement_warnings(source: Source) -> list[str]:
    """A line for each camera with episodes that begin at another time in their video than from_timestamp says.

    Armature counts frames in the order of from_timestamp. LeRobot looks them up by time, and would read other frames.
    """
    warnings = []
    meta = source.meta
    for key, videos in source.videos.items():
        written = dict(
            zip(meta.episodes["episode_index"][:], meta.episodes[f"videos/{key}/from_timestamp"][:], strict=True)
        )
        begins = {}
        for position, episode in enumerate(source.episodes):
            times = videos.times[int(videos.file_index[position])]
            begins[episode] = float(times.seconds[int(videos.first_frame[position])] - times.seconds[0])
        doubtful = [episode for episode in begins if abs(begins[episode] - written[episode]) > 1.5 / meta.fps]
        if doubtful:
            first = doubtful[0]
            more = f", and so on in {counted(doubtful)}" if len(doubtful) > 1 else ""
            warnings.append(
                f"{key}: episode {first} begins at {begins[first]:.4g} s of its video, counted in frames, but its from_timestamp "
                f"in meta/episodes is {written[first]:.4g} s{more}: frames are read as counted. See whether they are the episode's"
            )
    return warnings
