"""Figures: metrics over steps, predicted against recorded actions, error along a chunk, how episodes ended."""

import io
import math

import numpy as np

INK = "#22303c"
BLUE = "#2a6fbb"
ORANGE = "#e2622b"
GREEN = "#2a9d4a"
RED = "#d1343f"
GREY = "#8a97a3"
COLOURS = [BLUE, ORANGE, GREEN, "#8e5bb5", "#b08900", "#128a8a", RED, GREY]
AXIS_LABELS = {  # metrics of metrics.jsonl that are drawn
    "loss": "training loss",
    "val_loss": "validation loss",
    "val_action_error": "action error, standard deviations",
    "eval_success_rate": "success rate",
    "samples_per_s": "samples/s",
}


def new_figure(width: float, height: float):
    """A matplotlib figure that a notebook shows once: pyplot's would show twice, a bare Figure not at all."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self):
            return png(self)

    return NotebookFigure(figsize=(width, height), layout="constrained")


def png(figure, dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def figure_of_panels(count: int, columns: int, width: float, row_height: float, extra_height: float = 0.0, **options):
    """(figure, `count` axes in rows of `columns`); panels left over in the last row are blank."""
    rows = math.ceil(count / columns)
    figure = new_figure(width, row_height * rows + extra_height)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axes in panels[count:]:
        axes.axis("off")
    return figure, panels[:count]


def curves_figure(runs: dict[str, list[dict]], metrics=tuple(AXIS_LABELS)):
    """What runs logged over steps, with a panel for each of the metrics that any of them logged.

    Args:
        runs: name of a run -> lines of its metrics.jsonl.
    """
    logged = set()
    for lines in runs.values():
        logged.update(*lines)
    shown = [metric for metric in metrics if metric in logged] or ["loss"]
    if len(shown) == 1:
        figure, panels = figure_of_panels(1, columns=1, width=7, row_height=3.4)
    else:
        figure, panels = figure_of_panels(len(shown), columns=2, width=10.5, row_height=3.4)
    for axes, metric in zip(panels, shown, strict=True):
        draw_metric(axes, runs, metric)
    if len(runs) > 1:
        panels[0].legend(fontsize=8)
    return figure


def draw_metric(axes, runs: dict[str, list[dict]], metric: str) -> None:
    """Draw one metric of each run over steps."""
    lowest = math.inf
    for number, (run, lines) in enumerate(runs.items()):
        lines = [line for line in lines if metric in line]
        if not lines:
            continue
        colour = COLOURS[number % len(COLOURS)]
        steps = [line["step"] for line in lines]
        values = [line[metric] for line in lines]
        lowest = min(lowest, *values)
        marker = "o" if len(lines) < 40 else None
        axes.plot(steps, values, color=colour, label=run, linewidth=1.4, marker=marker, markersize=3)
        if metric == "eval_success_rate":
            low = [line["eval_success_low"] for line in lines]
            high = [line["eval_success_high"] for line in lines]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    if metric in ("loss", "val_loss") and 0 < lowest < math.inf:
        axes.set_yscale("log")
    if metric == "eval_success_rate":
        axes.set_ylim(-0.03, 1.03)
    axes.set(xlabel="step", ylabel=AXIS_LABELS[metric])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25, which="both")


def joints_figure(predicted: np.ndarray, recorded: np.ndarray, names: list[str], fps: float):
    """(N, A) predicted and recorded actions of one episode over seconds, with a panel for each joint."""
    columns = min(2, len(names))
    figure, panels = figure_of_panels(len(names), columns, width=10, row_height=1.7, extra_height=0.4, sharex=True)
    seconds = np.arange(len(recorded)) / fps
    for joint, axes in enumerate(panels):
        axes.plot(seconds, recorded[:, joint], color=INK, linewidth=1.6, label="recorded")
        axes.plot(seconds, predicted[:, joint], color=ORANGE, linewidth=1.1, label="predicted")
        axes.set_title(names[joint], fontsize=9, loc="left", pad=2)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        low, high = axes.get_ylim()
        if high - low < 0.05 * max(abs(low), abs(high)):  # a joint that does not move: do not magnify its noise
            axes.set_ylim(low - 0.1 * abs(low), high + 0.1 * abs(high))
    panels[0].legend(fontsize=7, loc="best", framealpha=0.7)
    for axes in panels[-columns:]:
        axes.set_xlabel("seconds", fontsize=8)
    return figure


def horizon_figure(error: np.ndarray, std: np.ndarray, names: list[str], fps: float):
    """How the action error grows along a chunk.

    Args:
        error: (T, A) mean absolute error of each step and joint.
        std: (A,) standard deviations of the recorded actions, the unit that errors are drawn in; 0 for a joint that is still.
    """
    figure = new_figure(8, 3.3)
    axes = figure.add_subplot()
    seconds = np.arange(len(error)) / fps
    moving = np.flatnonzero(std > 0)
    relative = error[:, moving] / std[moving]  # (T, moving joints)
    for column, joint in enumerate(moving):
        colour = COLOURS[joint % len(COLOURS)]
        axes.plot(seconds, relative[:, column], color=colour, label=names[joint], linewidth=1.2)
    if len(moving):
        axes.plot(seconds, relative.mean(1), color=INK, linewidth=2.4, label="mean")
        axes.legend(fontsize=7, ncols=2)
    axes.set(xlabel="seconds after the observation", ylabel="error / standard deviation")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    return figure


def moments_figure(moments: list, names: list[str]):
    """Moments of recorded episodes, one a row: what the cameras saw, and recorded against predicted actions.

    Args:
        moments: objects with title, images ((H, W, 3) uint8 each), recorded and predicted (A,) in standard deviations.
    """
    cameras = len(moments[0].images)
    figure = new_figure(3.1 * (cameras + 1), 2.5 * len(moments))
    rows = figure.subplots(len(moments), cameras + 1, squeeze=False)
    joints = np.arange(len(names))
    for row, moment in zip(rows, moments, strict=True):
        for axes, image in zip(row[:cameras], moment.images, strict=True):
            axes.imshow(image)
            axes.axis("off")
        row[0].set_title(moment.title, fontsize=8, loc="left")
        axes = row[-1]
        axes.barh(joints - 0.2, moment.recorded, 0.36, color=INK, label="recorded")
        axes.barh(joints + 0.2, moment.predicted, 0.36, color=ORANGE, label="predicted")
        axes.set_yticks(joints, names, fontsize=7)
        axes.invert_yaxis()
        axes.axvline(0, color=GREY, linewidth=0.6)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("standard deviations", fontsize=7)
    rows[0, -1].legend(fontsize=6)
    return figure


def contact_sheet(images: list, labels: list[str], successes: list[bool], title: str):
    """Images (H, W, 3) uint8, each under its label, framed green for a success and red for a failure."""
    columns = min(10, len(images))
    lines = 1 + max(label.count("\n") for label in labels)
    figure, panels = figure_of_panels(
        len(images), columns, width=max(1.25 * columns + 0.2, 4.5), row_height=1.35 + 0.1 * lines, extra_height=0.5
    )
    for axes, image, label, success in zip(panels, images, labels, successes, strict=True):
        colour = GREEN if success else RED
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        for side in axes.spines.values():
            side.set(color=colour, linewidth=2.5)
        axes.set_title(label, fontsize=7, color=colour, pad=3)
    figure.suptitle(title, fontsize=10)
    return figure
