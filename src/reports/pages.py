"""A run message from its files: the page of one or several runs, and the model card."""

import base64
import html
import json
from pathlib import Path

import numpy as np

from errors import UserError
from reports.figures import CURVES, curves_figure, png


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


STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #22303c; background: #f5f6f8; margin: 0; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 25px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 34px 0 8px; }
p { margin: 4px 0 10px; } .dim { color: #66737f; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; }
.tile { background: #fff; border: 1px solid #e1e5e9; border-radius: 8px; padding: 10px 16px; min-width: 110px; }
.tile b { display: block; font-size: 22px; }
.card { background: #fff; border: 1px solid #e1e5e9; border-radius: 8px; padding: 12px; margin: 10px 0; }
img { max-width: 100%; display: block; margin: auto; }
.row { display: flex; flex-wrap: wrap; gap: 12px; } figure { margin: 0; } figcaption { font-size: 13px; color: #66737f; }
table { border-collapse: collapse; background: #fff; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 8px; border-bottom: 1px solid #e1e5e9; text-align: right; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
"""


def embed(figure, alt: str) -> str:
    """A figure as an HTML image that needs no other file."""
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(png(figure)).decode()}">'


def embed_video(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    video = f'<video controls muted loop width="240" src="data:video/mp4;base64,{data}"></video>'
    return f"<figure>{video}<figcaption>{html.escape(caption)}</figcaption></figure>"


def tiles(figures: dict[str, str]) -> str:
    """Large numbers side by side."""
    shown = "".join(f'<div class="tile"><b>{html.escape(v)}</b>{html.escape(k)}</div>' for k, v in figures.items())
    return f'<div class="tiles">{shown}</div>'


def table(head: list[str], rows: list[list]) -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def page(title: str, subtitle: str, *parts: str) -> str:
    """A whole HTML page of `parts`."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    )
    top = f'<h1>{html.escape(title)}</h1><p class="dim">{html.escape(subtitle)}</p>'
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body><main>{top}{''.join(parts)}</main></body></html>\n"


def section(title: str, text: str, *parts: str) -> str:
    message = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<h2>{html.escape(title)}</h2>{message}" + "".join(f'<div class="card">{part}</div>' for part in parts)


SHOWN = 6  # episodes whose curves a page shows, and worst moments


def worst_moments(result: dict, source) -> list[dict]:
    """The frames at which the action is furthest off, at least a second apart, with what the cameras saw."""
    from data.frames import Frames

    errors, fps = result["errors"], source.meta.fps
    scale = np.where(errors.spread > 0, errors.spread, np.inf)
    off = [(np.abs(e["predicted"] - e["recorded"]) / scale).mean(1) for e in result["episodes"]]
    order = sorted(((value, e, f) for e, values in enumerate(off) for f, value in enumerate(values)), reverse=True)
    picked: list[tuple] = []
    for value, e, f in order:
        if len(picked) < SHOWN and all(e != other or abs(f - g) >= fps for _, other, g in picked):
            picked.append((value, e, f))
    import torch

    frames, moments = Frames(source), []
    try:
        for value, e, f in picked:
            episode, row = result["episodes"][e], torch.tensor([int(source.starts[e]) + f])
            pictures = [frames.read(key, row)[0].permute(1, 2, 0).numpy() for key in frames.keys]
            title = f"episode {episode['episode']}, frame {f} ({f / fps:.1f} s): off by {value:.2f} standard deviations"
            actions = {name: episode[name][f] for name in ("recorded", "predicted")}
            moments.append({"title": title, "pictures": pictures, "spread": errors.spread, **actions})
    finally:
        frames.close()
    return moments


def open_loop_page(result: dict, numbers: dict, source, name: str) -> str:
    """The HTML report of `open_loop`."""
    from reports.figures import horizon_figure, joints_figure, moments_figure

    errors, fps = result["errors"], source.meta.fps
    spread = errors.spread
    mean = np.mean([v / s for v, s in zip(numbers["error_by_joint"].values(), spread, strict=True) if s > 0] or [0])
    top = {
        "action error, in standard deviations": f"{mean:.3f}",
        "loss": "-" if errors.loss is None else f"{errors.loss:.4g}",
        "frames": f"{numbers['frames']:,}",
        **{f"latency {p}, ms": f"{ms:.1f}" for p, ms in numbers["latency_ms"].items()},
    }
    rows = [
        [joint, f"{error:.4g}", f"{s:.4g}", f"{error / s:.3f}" if s > 0 else "does not move"]
        for (joint, error), s in zip(numbers["error_by_joint"].items(), spread, strict=True)
    ]
    head = ["joint", "mean |error|, robot units", "recorded standard deviation", "error / standard deviation"]
    parts = [
        tiles(top),
        section("By joint", "Each action as it would have been carried out, chunk by chunk.", table(head, rows)),
    ]
    if errors.grid is not None:
        text = "How the error grows along a predicted chunk; a policy that carries out fewer of its actions sees less of it."
        parts.append(
            section("By step of the chunk", text, embed(horizon_figure(errors.grid, spread, errors.names, fps), text))
        )
    if source.meta.camera_keys:
        moments = worst_moments(result, source)
        parts.append(section("Worst moments", "", embed(moments_figure(moments, errors.names), "worst moments")))
    if result["permutation_importance"]:
        text = (
            "How far the predicted actions move, in standard deviations of the recorded ones, when one observation is taken from another "
            "moment of these episodes and the others stay. Of one that is near 0 the policy makes no use."
        )
        rows = [[key, f"{moved:.3g}"] for key, moved in result["permutation_importance"].items()]
        parts.append(section("What the actions depend on", text, table(["observation", "actions move by"], rows)))
    shown = result["episodes"][:SHOWN]
    for episode in shown:
        curves = joints_figure(episode["predicted"], episode["recorded"], errors.names, fps)
        parts.append(
            section(f"Episode {episode['episode']}", "", embed(curves, f"actions of episode {episode['episode']}"))
        )
    left_out = len(result["episodes"]) - len(shown)
    subtitle = f"{source.name}, {len(result['episodes'])} episodes at {fps:g} fps" + (
        f" ({left_out} not drawn)" if left_out else ""
    )
    return page(f"{name} against the recording", subtitle, *parts)


def closed_loop_page(result: dict, sheet, videos: list[tuple[Path, str]], name: str) -> str:
    """The HTML report of episodes in simulation."""

    steps = result["median_steps_of_successes"]
    top = {
        f"{result['successes']} of {result['num_episodes']} episodes": f"{result['success_rate']:.0%}",
        "95 % interval": f"{result['success_low']:.0%} to {result['success_high']:.0%}",
        "median steps of a success": "-" if steps is None else f"{steps:g}",
    }
    rows = [[e["seed"], "yes" if e["success"] else "no", e["steps"], f"{e['reward']:.1f}"] for e in result["episodes"]]
    shown = '<div class="row">' + "".join(embed_video(path, caption) for path, caption in videos) + "</div>"
    return page(
        f"{name} in {result['env']}", f"{result['task']}, at most {result['max_steps']} steps",
        tiles(top), section("Last picture of every episode", "Seed and steps above each.", embed(sheet, "episodes")),
        section("Videos", "", shown) if videos else "", section("Episodes", "", table(["seed", "success", "steps", "reward"], rows)),
    )  # fmt: skip
