"""Pictures and self-contained HTML pages: loss curves, overlays of runs, open-loop and closed-loop reports."""

import base64
import html
import io
from pathlib import Path

import numpy as np

INK, BLUE, ORANGE, GREEN, RED, GREY = "#22303c", "#2a6fbb", "#e2622b", "#2a9d4a", "#d1343f", "#8a97a3"
COLOURS = [BLUE, ORANGE, GREEN, "#8e5bb5", "#b08900", "#128a8a", RED, GREY]
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


def new_figure(width: float, height: float):
    """A matplotlib figure that shows itself once in a notebook: pyplot's would show twice, a bare one not at all."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self):
            return png(self)

    return Picture(figsize=(width, height), layout="constrained")


def png(figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


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
    told = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<h2>{html.escape(title)}</h2>{told}" + "".join(f'<div class="card">{part}</div>' for part in parts)


CURVES = {  # metric of metrics.jsonl: (what the axis says, logarithmic)
    "loss": ("training loss", True),
    "val_loss": ("validation loss", True),
    "val_action_error": ("action error, standard deviations", False),
    "eval_success_rate": ("success rate", False),
    "samples_per_s": ("samples/s", False),
}


def curves_figure(runs: dict[str, list[dict]], wanted=tuple(CURVES)):
    """What the runs logged, over steps: a panel for each of the wanted metrics that any of them has.

    Args:
        runs: name -> lines of metrics.jsonl.
    """
    names = [name for name in wanted if any(name in line for lines in runs.values() for line in lines)] or ["loss"]
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(7 if columns == 1 else 10.5, 3.4 * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, name in zip(panels, names, strict=False):
        label, logarithmic = CURVES[name]
        values = []
        for (run, lines), colour in zip(runs.items(), COLOURS * len(runs), strict=False):
            points = [(line["step"], line[name]) for line in lines if name in line]
            values += [value for _, value in points]
            dots = {"marker": "o", "markersize": 3} if len(points) < 40 else {}
            axes.plot(*zip(*points, strict=True), color=colour, label=run, linewidth=1.4, **dots) if points else None
            if name == "eval_success_rate" and points:
                low, high = ([line[f"eval_success_{end}"] for line in lines if name in line] for end in ("low", "high"))
                axes.fill_between([step for step, _ in points], low, high, color=colour, alpha=0.15, linewidth=0)
        if logarithmic and values and min(values) > 0:
            axes.set_yscale("log")
        if name == "eval_success_rate":
            axes.set_ylim(-0.03, 1.03)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25, which="both")
    for axes in panels[len(names) :]:
        axes.axis("off")
    if len(runs) > 1:
        figure.axes[0].legend(fontsize=8)
    return figure


def joints_figure(predicted: np.ndarray, recorded: np.ndarray, names: list[str], fps: float):
    """(N, A) predicted and recorded actions of one episode, a panel for each joint, over seconds."""
    columns = 2 if len(names) > 1 else 1
    rows = -(-len(names) // columns)
    figure = new_figure(10, 1.7 * rows + 0.4)
    seconds = np.arange(len(recorded)) / fps
    panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for joint, (axes, name) in enumerate(zip(panels, names, strict=False)):
        axes.plot(seconds, recorded[:, joint], color=INK, linewidth=1.6, label="recorded")
        axes.plot(seconds, predicted[:, joint], color=ORANGE, linewidth=1.1, label="predicted")
        axes.set_title(name, fontsize=9, loc="left", pad=2)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        low, high = axes.get_ylim()
        if high - low < 0.05 * max(abs(low), abs(high)):  # a joint that does not move: do not blow up its noise
            axes.set_ylim(low - 0.1 * abs(low), high + 0.1 * abs(high))
    for axes in panels[len(names) :]:
        axes.axis("off")
    panels[0].legend(fontsize=7, loc="best", framealpha=0.7)
    for axes in panels[max(0, len(names) - columns) : len(names)]:
        axes.set_xlabel("seconds", fontsize=8)
    return figure


def horizon_figure(grid: np.ndarray, spread: np.ndarray, names: list[str], fps: float):
    """(T, A) mean absolute errors by step of the chunk, each joint in its own standard deviations."""
    figure = new_figure(8, 3.3)
    axes = figure.add_subplot()
    ahead = np.arange(len(grid)) / fps
    moving = [joint for joint in range(len(names)) if spread[joint] > 0]
    for joint in moving:
        axes.plot(
            ahead,
            grid[:, joint] / spread[joint],
            color=COLOURS[joint % len(COLOURS)],
            label=names[joint],
            linewidth=1.2,
        )
    if moving:
        axes.plot(ahead, (grid[:, moving] / spread[moving]).mean(1), color=INK, linewidth=2.4, label="mean")
        axes.legend(fontsize=7, ncols=2)
    axes.set(xlabel="seconds ahead of the observation", ylabel="error / standard deviation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    return figure


def moments_figure(moments: list[dict], names: list[str]):
    """The worst moments: what the cameras saw, and recorded against predicted actions.

    Args:
        moments: dicts of title, pictures ((H, W, 3) uint8 each), recorded (A,) and predicted (A,), spread (A,).
    """
    cameras = max((len(moment["pictures"]) for moment in moments), default=0)
    figure = new_figure(3.1 * (cameras + 1), 2.5 * len(moments))
    panels = figure.subplots(len(moments), cameras + 1, squeeze=False)
    for row, moment in zip(panels, moments, strict=True):
        for axes, picture in zip(row, moment["pictures"], strict=False):
            axes.imshow(picture)
            axes.axis("off")
        row[0].set_title(moment["title"], fontsize=8, loc="left")
        axes, places = row[-1], np.arange(len(names))
        scale = np.where(moment["spread"] > 0, moment["spread"], 1)
        axes.barh(places - 0.2, moment["recorded"] / scale, 0.36, color=INK, label="recorded")
        axes.barh(places + 0.2, moment["predicted"] / scale, 0.36, color=ORANGE, label="predicted")
        axes.set_yticks(places, names, fontsize=7)
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.6)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("standard deviations", fontsize=7)
    panels[0, -1].legend(fontsize=6)
    return figure
