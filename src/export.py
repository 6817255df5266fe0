"""Export a checkpoint: to lerobot-train, to a runtime without Python, or with its adapters merged into its weights.

    python src/export.py outputs/my_run/checkpoint-5000 outputs/lerobot_run --format lerobot
    python src/export.py outputs/my_run/checkpoint-5000 my_policy.onnx --format onnx       # or torch-export
    python src/export.py outputs/my_lora_run/checkpoint-5000 outputs/my_policy --merge

An exported network maps preprocessed observations to a chunk of normalised actions. The .json file beside it has the names and
shapes of its inputs, and the numbers that normalise before and after it. Nothing is written unless the network computes the
same actions as the policy. Blending one chunk into the next (flow's blend_steps, act's temporal ensembling) is left to the
program that runs the network.
"""

import argparse
import os
import sys
from pathlib import Path

from checkpoints.folder import MANIFEST, verify
from command_line import OneLineParser, command
from errors import UserError, find_path, one_line

FORMATS = ("lerobot", "onnx", "torch-export")


def format_name(text: str) -> str:
    if text == "torchscript":
        raise argparse.ArgumentTypeError("TorchScript was dropped: pass torch-export or onnx")
    return text


@command
def main(argv: list[str]) -> int:
    parser = OneLineParser(prog="export.py", description="Export a checkpoint.")
    parser.add_argument(
        "checkpoint", help="a checkpoint-<step> folder; except for lerobot also a policy folder or Hub id"
    )
    parser.add_argument("output", type=Path, help="for lerobot and --merge a new folder, otherwise the file to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--format", type=format_name, choices=FORMATS)
    kind.add_argument(
        "--merge", action="store_true", help="write a policy folder with the adapters merged into the weights"
    )
    parser.add_argument("--int8", action="store_true", help="for onnx: store the weights in 8 bits")
    parser.add_argument(
        "--task", default="", help="for onnx and torch-export of a policy that does several tasks: which"
    )
    args = parser.parse_args(argv)
    if args.task and args.format not in ("onnx", "torch-export"):
        raise UserError("--task needs --format onnx or torch-export. Leave --task out")
    if args.int8 and args.format != "onnx":
        given = "--merge" if args.merge else f"--format {args.format}"
        raise UserError(f"--int8 needs --format onnx, got {given}. Leave --int8 out")
    find_path(args.output, "output")
    try:
        if args.merge:
            export_merged(args.checkpoint, args.output)
        elif args.format == "lerobot":
            checkpoint = find_path(args.checkpoint, "checkpoint") or Path(args.checkpoint)
            export_run(checkpoint, args.output)
        else:
            export_network(args.checkpoint, args.output, args.format, args.int8, args.task)
    except OSError as error:
        raise UserError(f"{args.output} cannot be written: {one_line(error)}") from error
    return 0


def export_run(checkpoint: Path, output: Path) -> None:
    from checkpoints.writer import share_weights  # slow: imports torch
    from exchange.lerobot_runs import to_lerobot  # slow: imports torch and LeRobot

    if not os.path.isfile(checkpoint / MANIFEST):
        raise UserError(f"{checkpoint} is no checkpoint: expected a checkpoint-<step> folder for --format lerobot")
    verify(checkpoint)
    folder = to_lerobot(checkpoint, output)
    share_weights(folder, as_file=folder / "pretrained_model" / "train_config.json")
    print(folder)
    print(f"next: lerobot-train --resume=true --config_path={folder}/pretrained_model/train_config.json")


def export_merged(checkpoint: str, output: Path) -> None:
    from exchange.merged import write_merged  # slow: imports torch and LeRobot

    write_merged(checkpoint, output)
    print(f"{output}: a policy without adapters, for train.py --policy_path, infer.py, or LeRobot's --policy.path")


def export_network(checkpoint: str, output: Path, file_format: str, int8: bool, task: str) -> None:
    from exchange.portable import write_network  # slow: imports torch
    from policy.loaded import load_policy  # slow: imports torch and LeRobot

    comparison = write_network(load_policy(checkpoint, device="cpu", task=task), output, file_format, int8)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB; {output.name}.json describes its inputs and normalisation")
    print(
        f"largest difference from the policy: {comparison.difference:.1g}; "
        f"a chunk takes {comparison.export_ms:.1f} ms, with the policy {comparison.policy_ms:.1f} ms"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
