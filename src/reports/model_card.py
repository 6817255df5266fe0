"""README.md of a trained policy."""

import json
import shlex
from pathlib import Path

from config import FIELDS, FRESH
from reports.pages import shown


def as_command(config: dict) -> str:
    """The command line of a run's settings, those left at their default left out; `steps` stand for the minutes that fixed them."""
    words = ["python src/train.py"]
    for name, value in config.items():
        if name in (*FRESH, "minutes") or name not in FIELDS or value == FIELDS[name].default:
            continue
        value = {True: [], False: "off"}[value] if isinstance(value, bool) else value
        values = map(str, value if isinstance(value, list) else [value])
        words.append(" ".join([f"--{name}", *map(shlex.quote, values)]))
    return " \\\n    ".join(words)


def model_card(checkpoint: Path) -> str:
    """README.md of a policy, for the Hub: what its checkpoint recorded, and nothing else."""
    info, config = (json.loads((checkpoint / f"{name}.json").read_text()) for name in ("training_info", "train_config"))
    on_hub = [name for name in info["dataset"] if not Path(name).expanduser().exists() and name.count("/") == 1]
    datasets = "".join(f"\n- {name}" for name in on_hub)
    front = f"---\nlibrary_name: lerobot\npipeline_tag: robotics\ntags:\n- robotics\n- lerobot\n- {info['policy']}\n- armature\n"
    front += f"datasets:{datasets}\n---\n" if on_hub else "---\n"
    rows = [
        ("policy", f"{info['policy']}, {info['parameters']:,} parameters"),
        ("dataset", ", ".join(Path(name).name if name not in on_hub else name for name in info["dataset"])),
        ("steps", f"{info['step']:,} of batch {info['batch_size']}, {info['epoch']:.1f} epochs"),
        ("training loss", shown(info["loss"])),
        ("validation loss", shown(info["val_loss"])),
        ("success rate in simulation", shown(info["success_rate"])),
        ("training time", f"{info['train_seconds'] / 60:.1f} minutes on {info['device_name']} ({info['cores']} cores)"),
        ("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())),
    ]
    facts = "\n".join(f"| {name} | {value} |" for name, value in rows if value != "-")
    name = info["dataset"][0].rstrip("/").rpartition("/")[2]
    return f"""{front}
# {info["policy"]} on {name}

Trained with Armature; a LeRobot policy, which `lerobot-eval --policy.path=` and `lerobot-rollout --policy.path=` load as it is.

| | |
| --- | --- |
{facts}

![loss](loss.png)

The same run again:

```sh
{as_command(config)}
```
"""
