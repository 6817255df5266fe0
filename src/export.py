"""Take a checkpoint elsewhere: to lerobot-train, or to a runtime without Python.

    python src/export.py outputs/my_run/checkpoint-5000 outputs/lerobot_run --format lerobot
    python src/export.py outputs/my_run/checkpoint-5000 my_policy.onnx --format onnx       # or torchscript, torch-export

The exported network maps the preprocessed observations to the normalised chunk of actions; beside it lies a .json with the names and
shapes of its inputs, and the numbers that normalise before and after it. It is run and compared with the policy before it counts.
Going over smoothly from one chunk to the next (flow's blend_steps, act's temporal ensembling) is left to the program that runs it.
"""

import json
import sys
from pathlib import Path

from command_line import OneLineParser, command
from errors import UserError, one_line
from exchange.lerobot_runs import to_lerobot
from exchange.portable import INT8_TOLERANCE, TOLERANCE, check, describe, export, quantised, require

FORMATS = ("lerobot", "onnx", "torchscript", "torch-export")


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="export.py", description="Take a checkpoint elsewhere.")
    parser.add_argument("checkpoint", help="a checkpoint-<step> folder, or any LeRobot policy folder or Hub id")
    parser.add_argument("output", type=Path, help="a new folder for lerobot, else the file to write")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--int8",
        action="store_true",
        help=f"with onnx: weights in 8 bits, written if they are off by {INT8_TOLERANCE:g} at most",
    )
    args = parser.parse_args(argv)
    try:
        if args.format == "lerobot":
            folder = to_lerobot(Path(args.checkpoint), args.output)
            print(
                f"{folder}\nnext: lerobot-train --resume=true --config_path={folder}/pretrained_model/train_config.json"
            )
        else:
            write(args)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {one_line(error)}") from error
    return 0


def write(args) -> None:
    from policy.factory import quiet_lerobot
    from policy.loaded import load_policy

    about = args.output.parent / f"{args.output.name}.json"
    for path in (args.output, about):
        if path.exists():
            raise UserError(f"{path} is there already: choose another name or remove it")
    if args.int8 and args.format != "onnx":
        raise UserError("--int8 goes with --format onnx")
    loaded = load_policy(args.checkpoint, device="cpu")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = args.output.with_name(f".{args.output.name}.tmp")
    try:
        with quiet_lerobot():  # and onnx's own remarks
            run, core, names, example = export(loaded.policy, fresh, args.format)
        worst, mine, theirs = check(run, core, example)
        require(worst, TOLERANCE, args.format)
        if args.int8:
            with quiet_lerobot():
                run = quantised(fresh)
            worst, mine, theirs = check(run, core, example)
            require(worst, INT8_TOLERANCE, "--int8")
        fresh.replace(args.output)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--format {args.format}: {args.checkpoint} does not export: {one_line(error)[:200]}"
        ) from error
    finally:
        fresh.unlink(missing_ok=True)
    about.write_text(json.dumps(describe(loaded, args.format, names, example, worst), indent=2) + "\n")
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, inputs and normalisation in {about.name}")
    print(f"largest difference from the policy {worst:.1g}; a chunk takes {mine:.1f} ms, of the policy {theirs:.1f} ms")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
