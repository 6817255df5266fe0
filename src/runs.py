"""Look at runs, checkpoints and the frame cache: list, verify, show, compare, cache."""

import json
import re
import shutil
import sys
import time
from pathlib import Path

from checkpoints.folder import MANIFEST, best_checkpoint, find_checkpoints, read_json, sort_key, verify
from command_line import OneLineParser, command
from config import FIELDS
from data.frames import on_disk
from errors import UserError
from reports.figures import curves_figure
from reports.pages import read_history, runs_page
from runtime import user_cache_dir


def describe(path: Path) -> str:
    """One line about a checkpoint: name, bytes, when and with what loss it was saved, and whether it is whole."""
    try:
        verify(path)
        info, state = read_json(path / "training_info.json"), "whole"
        loss = "-" if info["loss"] is None else f"{info['loss']:.4g}"
        said = f"loss {loss:>8}  saved {info['saved_at']}"
        said += "  best by validation" if best_checkpoint(path.parent)[0] == path else ""
    except UserError as error:
        said, state = "", str(error).removeprefix(f"{path} is ")
    inodes = {file.stat().st_ino: file.stat().st_size for file in path.iterdir()}  # links counted once
    return f"{path.name:<20} {sum(inodes.values()) / 1e6:9.1f} MB  {said}  {state}"


def show(path: Path) -> str:
    """What a checkpoint is: facts of its run, the settings that are not the defaults, its files."""
    info, config = read_json(path / "training_info.json"), read_json(path / "train_config.json")
    lines = [f"{name:<15} {value}" for name, value in info.items() if not isinstance(value, dict)]
    lines += [f"--{name} {value}" for name, value in config.items() if name in FIELDS and value != FIELDS[name].default]
    return "\n".join([*lines, *(f"{file.stat().st_size:>12,}  {file.name}" for file in sorted(path.iterdir()))])


@command
def look(argv: list[str]) -> int:
    parser = OneLineParser(prog="runs.py", description="Look at checkpoints.")
    parser.add_argument("what", choices=("list", "verify", "show"), help="list or verify a run's, or show one")
    parser.add_argument("path", type=Path, help="a run's folder or a checkpoint-<step> folder")
    args = parser.parse_args(argv)
    found = [args.path] if (args.path / MANIFEST).is_file() else sorted(find_checkpoints(args.path), key=sort_key)
    if not found:
        raise UserError(f"{args.path} is no checkpoint and holds none")
    damaged = 0
    for path in found if args.what == "verify" else found[-1:] if args.what == "show" else []:
        try:
            verify(path)
            print(show(path) if args.what == "show" else f"{path}: whole")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            damaged = 2
    if args.what == "list":
        print("\n".join(describe(path) + ("  newest" if path == found[-1] != args.path else "") for path in found))
    return damaged


@command
def compare(argv: list[str]) -> int:
    parser = OneLineParser(prog="runs.py compare", description="Compare runs by their metrics.jsonl.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--output", default="outputs/runs", help="where .html and .png go [outputs/runs]")
    args = parser.parse_args(argv)
    names = [run.resolve().name for run in args.runs]
    names = names if len(set(names)) == len(names) else [str(run) for run in args.runs]
    try:
        runs = {name: read_history(run) for name, run in zip(names, args.runs, strict=True)}
        output = Path(args.output.removesuffix(".html")).expanduser()
        output = output / "runs" if output.is_dir() or args.output.endswith("/") else output
        output.parent.mkdir(parents=True, exist_ok=True)
        page = runs_page(runs).save(output.with_name(f"{output.name}.html"))
        curves_figure(runs).savefig(output.with_name(f"{output.name}.png"), dpi=110)
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {error.strerror}") from error
    print(page)
    return 0


@command
def cache(argv: list[str]) -> int:
    parser = OneLineParser(prog="runs.py cache", description="Show or clear the cache of decoded frames.")
    parser.add_argument("command", choices=("list", "prune"))
    parser.add_argument("--cache_dir", type=Path, default=user_cache_dir() / "frames", help="[%(default)s]")
    parser.add_argument(
        "--days", type=float, default=0.0, help="prune only what was not used for this many days [%(default)s]"
    )
    args = parser.parse_args(argv)
    total = 0
    for place in sorted(filter(is_store, args.cache_dir.glob("*"))):  # hidden ones too, which are unfinished
        size = sum(map(on_disk, place.iterdir()))
        age = (time.time() - place.stat().st_mtime) / 86400
        message = content_of(place, "unfinished" if place.name.startswith(".") else f"used {age:.1f} days ago")
        if args.command == "prune" and (age < args.days or not delete(place)):
            continue
        print(f"{size / 1e9:8.2f} GB {message}")
        total += size
    print(f"{total / 1e9:8.2f} GB {'freed in' if args.command == 'prune' else 'in'} {args.cache_dir}")
    return 0


def is_store(place: Path) -> bool:
    """Whether a folder is a camera's store, or what is left of one, and nobody else's."""
    named = re.search(r"-[0-9a-f]{16}(\.gone)?$", place.name)
    return bool(named) and any((place / name).is_file() for name in ("frames.u8", "about.json"))


def content_of(place: Path, state: str) -> str:
    """What a store says it holds; its name where its building or deletion was broken off before or after it could."""
    try:
        facts = json.loads((place / "about.json").read_text())
    except (OSError, ValueError):
        return f"of {place.name}, broken off"
    shape = "x".join(map(str, facts["shape"]))
    return f"{facts['frames']:>9,} frames of {shape:<12} {state}: {facts['camera']} of {facts['dataset']}"


def delete(place: Path) -> bool:
    """Delete a store; false if a process is building it just now."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(place.with_name(f".{place.name.removeprefix('.')}.lock"), timeout=0):
            if place.suffix != ".gone":  # a half-deleted store has no store's name
                gone = place.with_name(f".{place.name.removeprefix('.')}.gone")
                shutil.rmtree(gone, ignore_errors=True)
                place = place.rename(gone)
            shutil.rmtree(place)
    except Timeout:
        return False
    return True


def main(argv: list[str]) -> int:
    commands = {"compare": compare, "cache": cache}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    return look(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
