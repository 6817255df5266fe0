"""NAME=VALUE settings of LeRobot's own config classes, as the command line gives them."""

import typing
from dataclasses import fields

from config import UserError, nearest


def parse_pairs(flag: str, config_class, pairs: list[str] | None) -> dict:
    """`name=value` pairs as values of the types that a policy's or environment's config class declares.

    Raises:
        UserError: a name that it does not have, or a value not of its type.
    """
    import draccus
    import yaml

    types = typing.get_type_hints(config_class)
    names = [f.name for f in fields(config_class) if f.init]
    values = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        kind = config_class.get_choice_name(config_class) if hasattr(config_class, "get_choice_name") else "PEFT"
        whose = f"policy {kind}" if flag == "--policy_args" else kind
        if not equals:
            raise UserError(f"{flag} {pair}: expected NAME=VALUE, such as chunk_size=50")
        if name not in names:
            raise UserError(f"{flag} {name}: {whose} has no such setting{nearest(name, names)}")
        try:
            value = None if text.strip().lower() in ("none", "null") else yaml.safe_load(text)
            values[name] = draccus.decode(types[name], value)
        except (yaml.YAMLError, draccus.utils.DraccusException, ValueError, TypeError, KeyError):
            wanted = getattr(types[name], "__name__", None) or str(types[name])
            wanted = str(types[name]) if typing.get_args(types[name]) else wanted
            raise UserError(f"{flag} {name}: expected {wanted}, got {text!r}") from None
    return values
