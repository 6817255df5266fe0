"""README.md of a trained policy."""

import json
import os
import shlex
from pathlib import Path

from config import FIELDS, FRESH
from reports.pages import render, shown


def as_command(config: dict) -> str:
    """The command line of a run's settings, without those at their defaults; `steps` stand for the minutes that fixed them."""
    words = ["python src/train.py"]
    for name, value in config.items():
        if name in FRESH or name == "minutes" or name not in FIELDS or value == FIELDS[name].default:
            continue
        if value is True:
            values = []
        elif value is False:
            values = ["off"]
        else:
            values = value if isinstance(value, list) else [value]
        words.append(" ".join([f"--{name}", *(shlex.quote(str(value)) for value in values)]))
    return " \\\n    ".join(words)


def model_card(checkpoint: Path) -> str:
    """README.md of a policy, for the Hub: what its checkpoint recorded, and nothing else."""
    info = json.loads((checkpoint / "training_info.json").read_text())
    config = json.loads((checkpoint / "train_config.json").read_text())
    # A folder's name says something to people, its path only to its owner. Only the Hub's names are links in the card.
    datasets = []
    hub_datasets = []
    names = info.get("dataset", [])
    if isinstance(names, str):  # of older versions
        names = [names]
    for name in names:
        is_on_hub = name.count("/") == 1 and not Path(os.path.expanduser(name)).exists()
        datasets.append(name if is_on_hub else Path(name).name)
        if is_on_hub:
            hub_datasets.append(name)
    policy = info.get("policy", config.get("policy", "?"))
    facts = {"policy": policy, "dataset": ", ".join(datasets)}
    if "parameters" in info:  # a checkpoint that came from lerobot-train lacks these, and the machine
        facts["policy"] += f", {info['parameters']:,} parameters"
    if {"step", "batch_size"} <= info.keys():
        facts["steps"] = f"{info['step']:,} of batch {info['batch_size']}, {info.get('epoch', 0):.1f} epochs"
    facts["training loss"] = shown(info.get("loss"))
    facts["validation loss"] = shown(info.get("val_loss"))
    facts["success rate in simulation"] = shown(info.get("success_rate"))
    facts["training time"] = f"{info['train_seconds'] / 60:.1f} minutes"
    if "device_name" in info:
        facts["training time"] += f" on {info['device_name']} ({info.get('cores', '?')} cores)"
    versions = info.get("versions", {})
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items()) or "-"
    return render(
        "model_card.md",
        policy=policy,
        dataset=", ".join(names[:1]).rstrip("/").rpartition("/")[2],
        hub_datasets=hub_datasets,
        facts={name: value for name, value in facts.items() if value != "-"},
        command=as_command(config),
    )
