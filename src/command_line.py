"""Command lines: the flags of TrainConfig, NAME=VALUE overrides, errors in one line. Imports nothing slow: `--help` is immediate."""

import argparse
import functools
import html
import os
import re
import sys
import traceback
import typing
from dataclasses import fields

import argparse_dataclass

from config import FIELDS, TYPE_NAMES, TrainConfig, nargs, value_type
from errors import UserError, nearest, printable
from printing import command_output

DEBUG = "ARMATURE_DEBUG"  # environment variable; --debug sets it, so that processes started later see it too
OF_LEROBOT = {  # flags of lerobot-train: what to pass here
    "--dataset.repo_id": "--dataset_id REPO_OR_FOLDER",
    "--dataset.root": "--dataset_id FOLDER",
    "--dataset.episodes": "--episodes 0:40",
    "--policy.type": "--policy NAME",
    "--policy.path": "--policy_path FOLDER_OR_HUB_ID",
    "--policy.push_to_hub": "--push_to_hub REPO",
    "--policy.repo_id": "--push_to_hub REPO",
    "--policy.device": "--device NAME",
    "--policy.": "--policy_args NAME=VALUE",
    "--resume": "--resume_from_checkpoint CHECKPOINT, latest or auto",
    "--wandb.": "--tracker wandb",
    "--env.type": "--eval_env NAME",
    "--num_workers": "--num_threads N",
}
REWORDED = {  # argparse's messages: ours
    r"^argument (--\w+): expected 2 arguments": r"\1 must be two numbers, height and width",
    r"^argument (--\w+): invalid int value: (.*)": rf"\1 must be {TYPE_NAMES[int]}, got \2",
    r"^argument (--\w+): invalid float value: (.*)": rf"\1 must be {TYPE_NAMES[float]}, got \2",
    r"^argument (\S+): invalid choice: (.*) \(choose from (.*)\)": r"\1 must be one of \3, got \2",
    r"^argument (--\w+): must be": r"\1 must be",
}


def print_error(error: UserError, prefix: str = "") -> None:
    """Print a UserError in one line; with --debug, its traceback first."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exception(error)
    print(f"error: {prefix}{error}", file=sys.stderr, flush=True)


def print_warnings(warnings: list[str]) -> None:
    """Print warnings, one line each."""
    for warning in warnings:
        print(f"warning: {printable(warning)}", file=sys.stderr, flush=True)


def command(main):
    """Decorate a script's main(argv): a UserError is one line and status 2, Ctrl-C another and status 130.

    Output that nobody reads any more is dropped silently. Output that a full disk could not take is status 1.
    """

    @functools.wraps(main)
    def run(argv: list[str]) -> int:
        with command_output() as output:
            try:
                status = main(argv)
                output.flush()
            except UserError as error:
                print_error(error)
                return 2
            except KeyboardInterrupt:
                print("interrupted", file=sys.stderr)
                return 130
            return status or int(output.failure is not None)

    return run


class DebugFlag(argparse.Action):
    """Sets the environment variable, and nothing among the parsed arguments."""

    def __call__(self, parser, namespace, values, option_string=None):
        os.environ[DEBUG] = "1"


TRAINED_ON = (
    "of a policy trained with --pad_datasets: the dataset whose robot it acts for, by name or number [the first]"
)


class OneLineParser(argparse.ArgumentParser):
    """A parser that answers a mistake in one line, and has --debug."""

    def __init__(self, **options):
        super().__init__(**options)
        text = f"show the traceback of an error, as {DEBUG}=1 does"
        self.add_argument("--debug", action=DebugFlag, nargs=0, dest=argparse.SUPPRESS, help=text)

    def error(self, message):
        print_error(UserError(f"{reworded(message)} (--help lists the options)"))
        sys.exit(2)


def reworded(message: str) -> str:
    for pattern, replacement in REWORDED.items():
        message = re.sub(pattern, replacement, message)
    return message


class Parser(argparse_dataclass.ArgumentParser, OneLineParser):
    """The command line of TrainConfig: help by group, and the nearest name for a misspelt flag."""

    def __init__(self):
        super().__init__(
            TrainConfig,
            prog="train.py",
            usage="python src/train.py --dataset_id FOLDER_OR_HUB_ID [--name value ...]",
            description="Train a policy on a LeRobot dataset. In brackets: the default.",
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,  # a checkpoint's settings are not overridden by defaults
        )

    def add_argument(self, flag: str, *more, **options):
        """Add the flag of a setting to its group, spelt as the setting is: --batch_size, not --batch-size."""
        f = FIELDS.get(flag.removeprefix("--").replace("-", "_"))
        if f is None:  # --help, --debug
            return super().add_argument(flag, *more, **options)
        if "group" in f.metadata:
            self.group = self.add_argument_group(f.metadata["group"])
        return self.group.add_argument(f"--{f.name}", **argument_options(f))

    def error(self, message):
        raise UserError(reworded(message))

    def given(self, argv: list[str]) -> dict:
        """The settings that `argv` names, without defaults.

        Raises:
            UserError: a flag is unknown, or a value is not of its type.
        """
        argv = [spelt_as_field(word) for word in argv]
        flags = [word.split("=")[0] for word in argv if word.startswith("--")]
        for f in FIELDS.values():
            if nargs(f) == "+" and flags.count(f"--{f.name}") > 1:
                raise UserError(f"--{f.name} is given more than once. Pass all of its values after one")
        namespace, unknown = argparse.ArgumentParser.parse_known_args(self, argv)
        if unknown:
            raise UserError(explain_unknown(unknown[0]))
        return vars(namespace)


def argument_options(f) -> dict:
    """What argparse's add_argument takes for field `f` of TrainConfig."""
    options = {name: f.metadata[name] for name in ("choices", "metavar") if name in f.metadata}
    options["nargs"] = nargs(f)
    options["type"] = value_type(f)
    options["help"] = f"{f.metadata['help']} [{described_default(f)}]".replace("%", "%%")
    if value_type(f) is bool:  # --compile, --compile on, --compile off
        options |= {"nargs": "?", "const": True, "type": switch, "metavar": "on|off"}
    elif "choices" not in options and "metavar" not in options:
        options["metavar"] = {int: "N", float: "X", str: "TEXT"}[value_type(f)]
    return options


def explain_unknown(word: str) -> str:
    """What is wrong with a word of the command line that no flag takes."""
    name = word.split("=")[0]
    for flag, ours in OF_LEROBOT.items():
        if name == flag or (flag.endswith(".") and name.startswith(flag)):
            return f"{word} is a flag of lerobot-train. Pass {ours}"
    if word.startswith("-"):
        return f"unknown flag {word}{nearest(name, [f'--{known}' for known in FIELDS])}"
    return f"{word!r} belongs to no flag. Pass settings as --name value"


def parse_command_line(argv: list[str]) -> dict:
    """The settings in `argv`; a mistake prints one line and exits with status 2."""
    with command_output():  # for --help too
        try:
            return Parser().given(argv)
        except UserError as error:
            print_error(error)
            sys.exit(2)


def switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text!r}")
    return text == "on"


def spelt_as_field(word: str) -> str:
    """--batch-size as --batch_size; anything else as it is."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def described_default(f) -> str:
    if f.default is None:
        return "unset"
    if f.default is False:
        return "off"
    return str(f.default)


def flags_table() -> str:
    """Every flag in Markdown, a section with a table for each group of them; docs/flags.md holds it."""
    lines = []
    for f in FIELDS.values():
        if "group" in f.metadata:
            lines += ["", f"## {f.metadata['group']}", "", "| flag | default | what it does |", "| --- | --- | --- |"]
        lines.append(f"| `--{f.name}` | {described_default(f)} | {html.escape(f.metadata['help'], quote=False)} |")
    return "\n".join(lines[1:]) + "\n"


def split_pair(text: str) -> tuple[str, str, str]:
    """NAME=VALUE as (name, "=", value), without the spaces around them, with which YAML's users write it; as str.partition."""
    name, equals, value = text.partition("=")
    return name.strip(), equals, value.strip()


def parse_overrides(flag: str, config_class, overrides: list[str] | None) -> dict:
    """NAME=VALUE overrides as values of the types that a config class of LeRobot declares.

    Raises:
        UserError: an unknown name, or a value that is not of its type.
    """
    types = typing.get_type_hints(config_class)
    known = [f.name for f in fields(config_class) if f.init]
    owner = "PEFT"
    if hasattr(config_class, "get_choice_name"):
        owner = config_class.get_choice_name(config_class)
    if flag == "--policy_args":
        owner = f"policy {owner}"
    values = {}
    for override in overrides or []:
        name, equals, text = split_pair(override)
        if not equals:
            raise UserError(f"{flag} {override}: expected {name}=VALUE")
        if name not in known:
            raise UserError(f"{flag} {name}: {owner} has no such setting{nearest(name, known)}")
        values[name] = decoded(text, types[name], f"{flag} {name}")
    return values


def decoded(text: str, kind, what: str):
    """The value of the YAML `text` as type `kind`.

    Raises:
        UserError: it is not of that type.
    """
    import draccus
    import yaml

    try:
        value = None if text.strip().lower() in ("none", "null") else yaml.safe_load(text)
        if value is None and type(None) not in typing.get_args(kind):
            raise ValueError("draccus takes None for any type")
        return draccus.decode(kind, value)
    except Exception as error:  # of any type, even a bare one: draccus checks nothing before it converts
        raise UserError(f"{what}: expected {type_text(kind)}, got {text!r}") from error


def type_text(kind) -> str:
    """A type as messages name it, such as int or list[str]."""
    if typing.get_args(kind):
        return str(kind)
    return getattr(kind, "__name__", str(kind))
