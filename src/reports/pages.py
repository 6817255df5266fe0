"""A run told from its files: the page of one or several runs, and the model card."""

import html
import json
import shlex
from pathlib import Path

from config import FIELDS, FRESH, UserError
from page import CURVES, curves_figure, embed, page, section, table, tiles


class Page(str):
    """An HTML page that a notebook shows; `str(page)` is its text, `page.save(path)` writes it."""

    def _repr_html_(self):
        return f'<iframe srcdoc="{html.escape(self)}" width="100%" height="620" frameborder="0"></iframe>'

    def save(self, path: str | Path) -> Path:
        Path(path).write_text(self)
        return Path(path)


def read_history(output_dir: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; one cut short by a kill is left out.

    Raises:
        UserError: there is none.
    """
    lines = []
    try:
        texts = (output_dir / "metrics.jsonl").read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"{output_dir} is no run's folder: its metrics.jsonl cannot be read: {error.strerror}"
        ) from None
    for text in texts:
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    return lines


def last(history: list[dict], name: str):
    """The newest value of a metric, None if there is none."""
    return next((line[name] for line in reversed(history) if name in line), None)


def shown(value) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def runs_page(runs: dict[str, list[dict]]) -> Page:
    """One or several runs, by their metrics: where each ended, and their curves over each other."""
    rows = []
    for name, lines in runs.items():
        best = min((line["val_loss"] for line in lines if "val_loss" in line), default=None)
        speed = sorted(line["samples_per_s"] for line in lines if "samples_per_s" in line)
        figures = [last(lines, "step"), last(lines, "loss"), best, last(lines, "eval_success_rate")]
        rows.append([name, *map(shown, [*figures, speed[len(speed) // 2] if speed else None])])
    head = ["run", "steps", "loss", "lowest validation loss", "success rate", "samples/s (median)"]
    names = ", ".join(runs)
    top = tiles(dict(zip(head[1:], rows[0][1:], strict=True))) if len(runs) == 1 else table(head, rows)
    return Page(
        page(names, "from metrics.jsonl", top, section("Curves", "", embed(curves_figure(runs, tuple(CURVES)), names)))
    )


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
