"""Pictures and self-contained HTML pages: loss curves, overlays of runs, open-loop and closed-loop reports."""

import io
import math

import numpy as np

from sim.rollout import Episode

INK, BLUE, ORANGE, GREEN, RED, GREY = "#22303c", "#2a6fbb", "#e2622b", "#2a9d4a", "#d1343f", "#8a97a3"
COLOURS = [BLUE, ORANGE, GREEN, "#8e5bb5", "#b08900", "#128a8a", RED, GREY]


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


def contact_sheet(episodes: list[Episode], title: str):
    """The last picture of every episode as a figure, framed green where it succeeded and red where not."""
    columns = min(10, len(episodes))
    rows = math.ceil(len(episodes) / columns)
    figure = new_figure(1.25 * columns + 0.2, 1.45 * rows + 0.5)
    for i, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.set(xticks=[], yticks=[])
        if i >= len(episodes):
            axes.axis("off")
            continue
        episode = episodes[i]
        axes.imshow(episode.frames[-1])
        colour = GREEN if episode.success else RED
        for side in axes.spines.values():
            side.set(color=colour, linewidth=2.5)
        axes.set_title(f"{episode.seed}: {episode.steps}", fontsize=7, color=colour, pad=3)
    figure.suptitle(title, fontsize=10)
    return figure
