"""The command line of TrainConfig: flags, help, the README's table of them. Imports nothing heavy: `--help` answers at once."""

import argparse
import functools
import html
import re
import sys
import typing
from dataclasses import MISSING, fields
from typing import List, Optional

import argparse_dataclass

from config import FIELDS, TrainConfig
from errors import UserError, nearest

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


def command(main):
    """Of a script's main(argv): a mistake that the user can mend is one line and status 2, Ctrl-C another and 130."""

    @functools.wraps(main)
    def run(argv: List[str]) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130

    return run


class OneLineParser(argparse.ArgumentParser):
    """A command line whose mistakes are one line."""

    def error(self, message):
        print(f"error: {plain_message(message)} (--help lists what there is)", file=sys.stderr)
        sys.exit(2)


def plain_message(message: str) -> str:
    """argparse's words for a mistake, in ours."""
    message = re.sub(r"^argument (--\w+): expected 2 arguments", r"\1 must be two numbers, height and width", message)
    return re.sub(r"^argument (--\w+): invalid (int|float) value: (.*)", r"\1 must be \2, got \3", message)


class Parser(argparse_dataclass.ArgumentParser):
    """The command line of TrainConfig: grouped help, and one line with the nearest name for a misspelt flag."""

    def __init__(self):
        super().__init__(
            TrainConfig,
            prog="train.py",
            usage="python src/train.py --dataset_id FOLDER_OR_HUB_ID [--name value ...]",
            allow_abbrev=False,
            description="Train a policy on a LeRobot dataset. In brackets: the default.",
        )
        groups = {}
        for action in [a for a in self._actions if a.dest in FIELDS]:
            f = FIELDS[action.dest]
            action.help = f"{f.metadata['help']} [{described_default(f)}]".replace("%", "%%")
            if f.type == Optional[bool]:
                action.nargs, action.const, action.type, action.metavar = "?", True, switch, "on|off"
            if action.metavar is None and action.nargs != 0 and not action.choices:
                action.metavar = {int: "N", float: "X"}.get(action.type, "TEXT")
            name = f.metadata["group"]
            group = groups.get(name) or groups.setdefault(name, self.add_argument_group(name))
            self._optionals._group_actions.remove(action)
            group._group_actions.append(action)

    def error(self, message):
        raise UserError(plain_message(message))

    def given(self, argv: List[str]) -> dict:
        """The settings that `argv` names, and no defaults."""
        argv = [spelt_as_field(word) for word in argv]
        flags = [word.split("=")[0] for word in argv if word.startswith("--")]
        for name, f in FIELDS.items():
            if f.metadata.get("nargs") == "+" and flags.count(f"--{name}") > 1:
                raise UserError(f"--{name} is given more than once: pass all of its values after one")
        namespace, unknown = argparse.ArgumentParser.parse_known_args(self, argv)
        for word in unknown:
            name = word.split("=")[0]
            theirs = next((f for f in OF_LEROBOT if name == f or (f.endswith(".") and name.startswith(f))), None)
            if theirs:
                raise UserError(f"{word} is lerobot-train's: pass {OF_LEROBOT[theirs]}")
            if word.startswith("-"):
                raise UserError(f"unknown flag {word}{nearest(name, ['--' + n for n in FIELDS])}")
            raise UserError(f"{word!r} belongs to no flag: settings are passed as --name value")
        return {name: value for name, value in vars(namespace).items() if value is not MISSING}


def parse_command_line(argv: List[str]) -> dict:
    """The settings in `argv`; a mistake prints one line and exits with status 2."""
    try:
        return Parser().given(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def switch(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"must be on or off, got {text!r}")
    return text == "on"


def spelt_as_field(word: str) -> str:
    """--batch-size as --batch_size; anything else as it is."""
    flag, equals, value = word.partition("=")
    return flag.replace("-", "_").replace("__", "--", 1) + equals + value if flag.startswith("--") else word


def described_default(f) -> str:
    if f.default is None:
        return "unset"
    if f.default is False:
        return "off"
    return str(f.default)


def flags_table() -> str:
    """Every flag in Markdown, a section with a table for each group of them; docs/flags.md holds it."""
    lines = []
    group = None
    for f in FIELDS.values():
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"## {group}", "", "| flag | default | what it does |", "| --- | --- | --- |"]
        lines.append(f"| `--{f.name}` | {described_default(f)} | {html.escape(f.metadata['help'], quote=False)} |")
    return "\n".join(lines[1:]) + "\n"


def parse_overrides(flag: str, config_class, overrides: list[str] | None) -> dict:
    """`name=value` overrides as values of the types that a policy's or environment's config class declares.

    Raises:
        UserError: a name that it does not have, or a value not of its type.
    """
    import draccus
    import yaml

    types = typing.get_type_hints(config_class)
    names = [f.name for f in fields(config_class) if f.init]
    values = {}
    for pair in overrides or []:
        name, equals, text = pair.partition("=")
        kind = config_class.get_choice_name(config_class) if hasattr(config_class, "get_choice_name") else "PEFT"
        whose = f"policy {kind}" if flag == "--policy_args" else kind
        if not equals:
            raise UserError(f"{flag} {pair}: expected NAME=VALUE, such as chunk_size=50")
        if name not in names:
            raise UserError(f"{flag} {name}: {whose} has no such setting{nearest(name, names)}")
        try:
            value = None if text.strip().lower() in ("none", "null") else yaml.safe_load(text)
            if value is None and type(None) not in typing.get_args(types[name]):
                raise ValueError("none is no value of this setting")
            values[name] = draccus.decode(types[name], value)
        except (yaml.YAMLError, draccus.utils.DraccusException, ValueError, TypeError, KeyError):
            wanted = getattr(types[name], "__name__", None) or str(types[name])
            wanted = str(types[name]) if typing.get_args(types[name]) else wanted
            raise UserError(f"{flag} {name}: expected {wanted}, got {text!r}") from None
    return values
