"""The rows of the selected episodes, from the table files that hold them.

N rows, E episodes.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch
from torch import Tensor

from data.episodes import counted
from data.files import (
    LFS_POINTER,
    arrow_reason,
    data_paths,
    episodes_by_file,
    file_lines,
    is_hidden,
    is_lfs_pointer,
    without_numbers,
)
from data.source import episode_spans
from data.table_copies import MappedTables, open_or_copy
from errors import UserError, one_line, plural


@dataclass
class EpisodeTable:
    """Rows of the selected episodes that are whole, episode after episode.

    Attributes:
        rows: the table, N rows.
        episodes: indices of the E episodes, ascending.
        starts: (E,) int64 first row of each.
        ends: (E,) int64 row after the last of each.
        files: the files that the rows were read from.
        problems: why selected episodes are not among `episodes`, a line each.
        warnings: what was left out, a line each.
    """

    rows: pa.Table
    episodes: list[int]
    starts: Tensor
    ends: Tensor
    files: list[Path]
    problems: list[str]
    warnings: list[str]


def read_tables(
    meta,
    selected: list[int],
    lengths: dict[int, int],
    *,
    copy_tables: bool,
    cache_dir: str | None,
    quiet: bool,
) -> EpisodeTable:
    """Read the files that hold the selected episodes.

    Args:
        meta: LeRobot's metadata.
        selected: episode indices, ascending.
        lengths: number of rows of every described episode.
        copy_tables: copy large tables with pictures to the cache, so that they are not held in memory.
        cache_dir: where the cache is; None for the user's.
        quiet: no progress bar.

    Raises:
        UserError: there are no episodes, no file can be read, or the rows do not say which episode they belong to.
    """
    if not selected:
        raise UserError(f"dataset {meta.root} has no episodes: record some, or download it again")
    paths = data_paths(meta)
    files, others = table_files(meta, selected, paths)
    mapped = MappedTables({})
    if copy_tables and paths is not None:
        mapped = open_or_copy(meta, files, cache_dir, quiet)
    tables, faults = read_files(files, None if len(selected) == len(lengths) else selected, mapped.tables)
    counts = {path: count_rows(path, table) for path, table in tables.items()}

    # An episode is read from its own file; if its rows are not all in there, from every file that has some.
    spread = selected
    if paths is not None:
        spread = [episode for episode in selected if counts.get(paths[episode], {}).get(episode, 0) != lengths[episode]]
    if spread and others:
        more, _ = read_files(others, spread, {})
        tables |= more
        counts |= {path: count_rows(path, table) for path, table in more.items()}
    totals = Counter()
    for of_file in counts.values():
        totals.update(of_file)
    lacking = [episode for episode in spread if totals[episode] != lengths[episode]]
    spread = set(spread).difference(lacking)
    chosen = set(selected).difference(lacking)
    for path in list(tables):
        wanted = {e for e in counts[path] if e in spread or (e in chosen and paths is not None and paths[e] == path)}
        if len(wanted) < len(counts[path]):  # rows of other episodes
            tables[path] = rows_of(tables[path], wanted)
    tables = {path: table for path, table in tables.items() if table.num_rows}

    if not counts and not faults:
        raise UserError(f"dataset {meta.root} has no readable table: data/*/*.parquet is missing")
    whole = [episode for episode in selected if episode in chosen]
    ends = torch.tensor([lengths[episode] for episode in whole], dtype=torch.int64).cumsum(0)
    warnings = []
    if mapped.reason is not None:
        warnings.append(
            f"the pictures in its table are held in memory: {mapped.reason}. Free some space, or pass another --cache_dir"
        )
    undescribed = set(totals).difference(lengths)
    if undescribed:
        warnings.append(
            f"its table also has rows of {counted(undescribed)}, which its metadata does not describe: they are left out"
        )
    if faults and not lacking:
        lines = file_lines(meta.root, faults, {})
        warnings.append(f"{'; '.join(lines)}. All selected episodes are in other files")
    return EpisodeTable(
        rows=in_order(meta, list(tables.values()), whole),
        episodes=whole,
        starts=torch.cat([torch.zeros(1, dtype=torch.int64), ends])[:-1],
        ends=ends,
        files=list(tables),
        problems=table_lines(meta, lacking, totals, lengths, faults, paths),
        warnings=warnings,
    )


def table_files(meta, selected: list[int], paths: dict[int, Path] | None) -> tuple[list[Path], list[Path]]:
    """The files that the metadata names for the selected episodes, or all files if it names none; and the other files that
    may have rows of them.

    Args:
        paths: {episode: its file}; None if the metadata does not say.
    """
    present = sorted(path for path in (meta.root / "data").glob("*/*.parquet") if not is_hidden(path))
    if paths is None:
        return present, []
    files = {paths[episode] for episode in selected}
    if any(path.is_file() for path in paths.values()):  # a folder of another kind may hold older copies
        places = {without_numbers(path) for path in paths.values()}
        present = [path for path in present if without_numbers(path) in places]
    return sorted(files), sorted(set(present) - files)


def read_files(
    files: list[Path], episodes: list[int] | None, mapped: dict[Path, pa.Table]
) -> tuple[dict[Path, pa.Table], dict[Path, str]]:
    """The rows of `episodes` (None for all) in each file, and why files cannot be read.

    Args:
        mapped: tables of files that need not be read.

    Raises:
        UserError: a file does not say which episode its rows belong to.
    """
    selected = None if episodes is None else pa.dataset.field("episode_index").isin(episodes)
    tables = {}
    faults = {}
    for file in files:
        if not file.is_file():
            faults[file] = "is missing"
        elif is_lfs_pointer(file):
            faults[file] = LFS_POINTER
        else:
            try:
                dataset = pa.dataset.dataset(file, format="parquet")
                check_episode_index(file, dataset.schema)
                if file not in mapped:
                    tables[file] = dataset.to_table(filter=selected)
                elif episodes is None:
                    tables[file] = mapped[file]
                else:
                    tables[file] = rows_of(mapped[file], episodes)
            except (pa.ArrowInvalid, OSError) as error:
                faults[file] = f"cannot be read: {arrow_reason(error)}"
    return tables, faults


def rows_of(table: pa.Table, episodes: Collection[int]) -> pa.Table:
    """The rows of `episodes`, as slices of the table: a filter would copy all pictures."""
    wanted = np.isin(table["episode_index"].to_numpy(), list(episodes))
    edges = np.flatnonzero(
        np.diff(wanted, prepend=False, append=False)
    )  # first row of each slice, and the row after its last
    slices = [table.slice(first, end - first) for first, end in edges.reshape(-1, 2).tolist()]
    return pa.concat_tables(slices) if slices else table.slice(0, 0)


def check_episode_index(file: Path, schema: pa.Schema) -> None:
    """Raise a UserError unless a table has a column of numbers that separates its episodes."""
    if "episode_index" not in schema.names:
        raise UserError(f"{file}: its table has no column episode_index, which separates its episodes")
    kind = schema.field("episode_index").type
    if not pa.types.is_integer(kind):
        raise UserError(f"{file}: expected whole numbers in the column episode_index, got {kind}")


def count_rows(file: Path, table: pa.Table) -> dict[int, int]:
    """Number of rows of each episode in a table."""
    if table["episode_index"].null_count:
        raise UserError(f"{file}: no episode_index in {plural(table['episode_index'].null_count, 'row')}")
    episodes, rows = np.unique(table["episode_index"].to_numpy(), return_counts=True)
    return dict(zip(episodes.tolist(), rows.tolist(), strict=True))


def table_lines(
    meta,
    lacking: list[int],
    counts: dict[int, int],
    lengths: dict[int, int],
    faults: dict[Path, str],
    paths: dict[int, Path] | None,
) -> list[str]:
    """Why some episodes do not have their rows: a file, no rows, or another number of rows than the metadata says."""
    if not lacking:
        return []
    explained: set[int] = set()
    lines = []
    if paths is None:  # any of the files may hold them
        lines += file_lines(meta.root, faults, {})
    else:
        holds = episodes_by_file(paths)
        guilty = {path: fault for path, fault in faults.items() if set(holds[path]) & set(lacking)}
        lines += file_lines(meta.root, guilty, holds)
        explained = {episode for path in guilty for episode in holds[path]}
    absent = [episode for episode in lacking if counts.get(episode, 0) == 0 and episode not in explained]
    differ = [episode for episode in lacking if counts.get(episode, 0) > 0 and episode not in explained]
    if absent:
        lines.append(f"its table has no rows of {counted(absent)}")
    if differ:
        first = differ[0]
        line = f"episode {first} has {plural(counts[first], 'row')} in its table, but {lengths[first]} in its metadata"
        if len(differ) > 1:
            line += f", and so on in {counted(differ)}"
        lines.append(line)
    return lines


def in_order(meta, tables: list[pa.Table], episodes: list[int]) -> pa.Table:
    """One table of the rows of `episodes`, in that order; the rows of an episode keep their order in `tables`.

    Raises:
        UserError: the tables' columns differ.
    """
    if not tables:
        return pa.table({})
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise UserError(f"dataset {meta.root}: its tables differ in their columns: {one_line(error)[:200]}") from error
    if not table.num_rows:
        return table
    found, firsts, ends = episode_spans(table)
    if found == episodes:
        return table
    wanted = set(episodes)
    spans = zip(found, firsts.tolist(), ends.tolist(), strict=True)
    kept = sorted((span for span in spans if span[0] in wanted), key=lambda span: span[0])  # stable
    # Slices of the table: `take` would copy all pictures.
    return pa.concat_tables([table.slice(first, end - first) for _, first, end in kept]) if kept else table.slice(0, 0)
