"""Look at runs, their checkpoints, and the cache of decoded frames.

    python src/runs.py list outputs/my_run
    python src/runs.py verify outputs/my_run
    python src/runs.py show outputs/my_run/checkpoint-5000
    python src/runs.py compare outputs/my_run outputs/another_run
    python src/runs.py cache list

The modules that a command needs are imported inside its function: they take seconds, and `--help` is immediate.
"""

import contextlib
import os
import re
import shutil
import sys
import time
from pathlib import Path

from checkpoints.folder import MANIFEST, best_checkpoint, find_checkpoints, sort_key, verify
from command_line import OneLineParser, command, print_warnings
from config import FIELDS
from errors import UserError, find_path, printable, read_json, reason_of_disk


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at `path`, or those of the run there, the newest last.

    Raises:
        UserError: there is none.
    """
    path = find_path(path, "PATH") or path
    if os.path.isfile(path / MANIFEST):
        return [path]
    found = sorted(find_checkpoints(path), key=sort_key)
    if not found:
        raise UserError(f"{path} is not a checkpoint and holds none. Pass a run's folder or a checkpoint-<step> folder")
    return found


def list_checkpoints(args) -> int:
    checkpoints = checkpoints_at(args.path)
    for checkpoint in checkpoints:
        is_newest = checkpoint == checkpoints[-1] and checkpoint != args.path
        print(printable(describe(checkpoint) + ("  newest" if is_newest else "")))
    return 0


def describe(checkpoint: Path) -> str:
    """One line about a checkpoint: name, size, loss, when it was saved, and whether it is damaged."""
    sizes = {}  # by inode: links are counted once
    for file in checkpoint.iterdir():
        with contextlib.suppress(OSError):  # a link to nothing
            sizes[file.stat().st_ino] = file.stat().st_size
    line = f"{checkpoint.name:<20} {sum(sizes.values()) / 1e6:9.1f} MB"
    try:
        verify(checkpoint)
        info = read_json(checkpoint / "training_info.json")
    except UserError as error:
        return f"{line}  {str(error).removeprefix(f'{checkpoint} is ')}"
    loss = "-" if info.get("loss") is None else f"{info['loss']:.4g}"
    line += f"  loss {loss:>8}  saved {info.get('saved_at', '-')}"
    if best_checkpoint(checkpoint.parent)[0] == checkpoint:
        line += "  best by validation"
    return f"{line}  intact"


def verify_checkpoints(args) -> int:
    """Compare every file with its manifest; status 2 if one differs."""
    status = 0
    for checkpoint in checkpoints_at(args.path):
        try:
            verify(checkpoint)
            print(printable(f"{checkpoint}: intact"))
        except UserError as error:  # the others are looked at as well
            print(f"error: {error}", file=sys.stderr)
            status = 2
    return status


def show_checkpoint(args) -> int:
    """Facts of a checkpoint's run, the settings that are not the defaults, its files."""
    checkpoint = checkpoints_at(args.path)[-1]
    verify(checkpoint)
    for name, value in read_json(checkpoint / "training_info.json").items():
        if not isinstance(value, dict):
            print(printable(f"{name:<15} {value}"))
    for name, value in read_json(checkpoint / "train_config.json").items():
        if name in FIELDS and value != FIELDS[name].default:
            print(printable(f"--{name} {value}"))
    for file in sorted(checkpoint.iterdir()):
        print(printable(f"{file.stat().st_size:>12,}  {file.name}"))
    return 0


def compare_runs(args) -> int:
    """Write a page and a picture of the runs' curves."""
    from reports.figures import curves_figure
    from reports.pages import read_history, runs_page

    runs = [find_path(run, "RUN") or run for run in args.runs]
    names = [run.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in args.runs]
    warnings = []
    histories = {}
    for name, run in zip(names, runs, strict=True):
        histories[name] = read_history(run, warnings.append)
    print_warnings(warnings)
    find_path(args.output, "--output")
    output = Path(os.path.expanduser(args.output.removesuffix(".html")))
    if output.is_dir() or args.output.endswith("/"):
        output = output / "runs"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        page = runs_page(histories).save(output.with_name(f"{output.name}.html"))
        curves_figure(histories).savefig(output.with_name(f"{output.name}.png"), dpi=110)
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written: {reason_of_disk(error)}") from error
    print(page)
    return 0


def look_at_cache(args) -> int:
    """List the stores of decoded frames that are unused for `args.days`, and delete them if `args.prune`."""
    from data.frame_store import on_disk
    from runtime import user_cache_dir

    cache_dir = user_cache_dir() / "frames"
    if args.cache_dir:
        cache_dir = find_path(args.cache_dir, "--cache_dir") or args.cache_dir
    total = 0
    for folder in sorted(filter(is_store, cache_dir.glob("*"))):  # hidden ones too: they are unfinished
        days_unused = (time.time() - folder.stat().st_mtime) / 86400
        if days_unused < args.days:
            continue
        size = sum(on_disk(file) for file in folder.rglob("*") if file.is_file())
        line = f"{size / 1e9:8.2f} GB {describe_store(folder, days_unused)}"
        if args.prune and not delete(folder):
            continue
        print(line)
        total += size
    print(f"{total / 1e9:8.2f} GB {'freed in' if args.prune else 'in'} {cache_dir}")
    return 0


def is_store(folder: Path) -> bool:
    """Whether a folder holds the frames of a camera, or what is left of them; any other is not ours to delete."""
    is_named_so = re.search(r"-[0-9a-f]{16}(\.gone)?$", folder.name) is not None
    return is_named_so and any((folder / name).is_file() for name in ("frames.u8", "frames.bin", "about.json"))


def describe_store(folder: Path, days_unused: float) -> str:
    """What a store says it holds; its name if its writing or deletion was interrupted."""
    try:
        about = read_json(folder / "about.json")
    except UserError:
        return f"of {folder.name}, interrupted"
    state = "unfinished" if folder.name.startswith(".") else f"used {days_unused:.1f} days ago"
    shape = "x".join(map(str, about["shape"]))
    return f"{about['frames']:>9,} frames of {shape:<12} {state}: {about['camera']} of {about['dataset']}"


def delete(folder: Path) -> bool:
    """Delete a store; False if a process is writing it now, or the disk refuses."""
    from filelock import FileLock, Timeout

    visible_name = folder.name.removeprefix(".")
    try:
        with FileLock(folder.with_name(f".{visible_name}.lock"), timeout=0):
            if folder.suffix != ".gone":  # renamed first: what is half-deleted must not be taken for a store
                gone = folder.with_name(f".{visible_name}.gone")
                shutil.rmtree(gone, ignore_errors=True)
                folder = folder.rename(gone)
            shutil.rmtree(folder)
    except Timeout:
        return False
    except OSError as error:
        print_warnings([f"{folder} could not be deleted ({reason_of_disk(error)})"])
        return False
    return True


def make_parser() -> OneLineParser:
    parser = OneLineParser(prog="runs.py", description="Look at runs, their checkpoints, and the frame cache.")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in (
        ("list", list_checkpoints, "the checkpoints of a run, a line each"),
        ("verify", verify_checkpoints, "compare the files of checkpoints with their manifests"),
        ("show", show_checkpoint, "facts, settings and files of a checkpoint, or of a run's newest"),
    ):
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("path", metavar="PATH", type=Path, help="a run's folder or a checkpoint-<step> folder")
        sub.set_defaults(run=run)

    text = "compare runs by their metrics.jsonl, as a page and a picture"
    compare = commands.add_parser("compare", help=text, description=text)
    compare.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folders of runs")
    compare.add_argument("--output", metavar="FILE", default="outputs/runs", help="for .html and .png [outputs/runs]")
    compare.set_defaults(run=compare_runs)

    text = "list or delete decoded frames"
    cache = commands.add_parser("cache", help=text, description=text)
    actions = cache.add_subparsers(metavar="ACTION", required=True)
    for name, text in (
        ("list", "what is in the frame cache"),
        ("prune", "delete it; frames are decoded again when a run needs them"),
    ):
        sub = actions.add_parser(name, help=text, description=text)
        sub.add_argument("--cache_dir", metavar="FOLDER", type=Path, help="the cache [in your user cache folder]")
        sub.add_argument("--days", metavar="X", type=float, default=0.0, help="only what is unused for so long [0]")
        sub.set_defaults(run=look_at_cache, prune=name == "prune")
    return parser


@command
def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
