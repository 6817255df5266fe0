"""Self-contained HTML pages: one or several runs by their metrics, open-loop and closed-loop evaluations."""

import base64
import html
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import jinja2

from errors import UserError, reason_of_disk, require_file
from reports.figures import curves_figure, horizon_figure, joints_figure, moments_figure, png

EPISODES_DRAWN = 6  # curves of more would make a page that nobody reads to its end


class Page(str):
    """An HTML page that a notebook shows. `str(page)` is its text, `page.save(path)` writes it."""

    def _repr_html_(self):
        return f'<iframe srcdoc="{html.escape(self)}" width="100%" height="620" frameborder="0"></iframe>'

    def save(self, path: str | Path) -> Path:
        Path(path).write_text(self, encoding="utf-8")
        return Path(path)


def shown(value) -> str:
    """A metric for people: four digits, or "-" where it was not measured."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address, so that the page needs no other file."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    undefined=jinja2.StrictUndefined,
)
TEMPLATES.filters["number"] = shown
TEMPLATES.filters["image_data"] = lambda figure: data_uri(png(figure), "image/png")
TEMPLATES.filters["video_data"] = lambda path: data_uri(path.read_bytes(), "video/mp4")


def render(template: str, **values) -> str:
    return TEMPLATES.get_template(template).render(values)


def read_history(output_dir: Path, warn: Callable[[str], None] = lambda text: None) -> list[dict]:
    """The metrics in a run's metrics.jsonl, one dict a line. Other lines are left out.

    Args:
        warn: called with a line if any are left out, except for a last line that a kill cut short.

    Raises:
        UserError: the folder has no such file.
    """
    path = output_dir / "metrics.jsonl"
    require_file(path, "Move it away")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{output_dir} is not a run's folder: its metrics.jsonl cannot be read ({reason_of_disk(error)}). "
            "Pass the --output_dir of a run"
        ) from error
    lines = []
    bad = []
    texts = content.split(b"\n")
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if is_metrics(line):
            lines.append(line)
        elif text.strip() and number < len(texts):
            bad.append(number)
    if bad:
        numbers = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        warn(
            f"{path}: passed over line {numbers}: expected a JSON mapping with a step and numbers. Correct what you edited there"
        )
    return lines


def is_metrics(line) -> bool:
    """Whether a value is what a run writes as a line: a step and numbers, some of them in lists or dicts."""
    if not isinstance(line, dict):
        return False
    step = line.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        return False
    if "eval_success_rate" in line and not {"eval_success_low", "eval_success_high"} <= line.keys():
        return False
    for value in line.values():
        values = [value]
        if isinstance(value, dict):
            values = value.values()
        elif isinstance(value, list):
            values = value
        if not all(isinstance(item, (int, float)) and not isinstance(item, bool) for item in values):
            return False
    return True


def logged(history: list[dict], metric: str) -> list:
    """Every value of a metric."""
    return [line[metric] for line in history if metric in line]


def last(history: list[dict], metric: str):
    """The newest value of a metric, None if it was never logged."""
    return next(reversed(logged(history, metric)), None)


def runs_page(runs: dict[str, list[dict]]) -> Page:
    """Where one or several runs ended, and their curves in common panels.

    Args:
        runs: {name: lines of its metrics.jsonl}.
    """
    summaries = []
    for name, history in runs.items():
        speeds = logged(history, "samples_per_s")
        summary = {
            "run": name,
            "steps": last(history, "step"),
            "loss": last(history, "loss"),
            "lowest validation loss": min(filter(math.isfinite, logged(history, "val_loss")), default=None),
            "success rate": last(history, "eval_success_rate"),
            "samples/s (median)": statistics.median_high(speeds) if speeds else None,
        }
        summaries.append(summary)
    title = ", ".join(runs)
    curves = curves_figure(runs)
    return Page(render("runs.html", title=title, subtitle="from metrics.jsonl", runs=summaries, curves=curves))


def open_loop_page(name: str, dataset: str, numbers: dict, errors, episodes: list, moments: list) -> str:
    """What a policy predicts on recorded episodes, compared with what was recorded.

    Args:
        name, dataset: for the headings.
        numbers: content of numbers.json.
        errors: training.open_loop.OpenLoopErrors.
        episodes: training.open_loop.EpisodeComparison of each episode.
        moments: the worst ones, as moments_figure takes them; none without cameras.
    """
    deviations = numbers["recorded_std_by_joint"]
    moving = [error / deviations[joint] for joint, error in numbers["error_by_joint"].items() if deviations[joint] > 0]
    along_chunk = None
    if errors.error is not None:
        along_chunk = horizon_figure(errors.error, errors.std, errors.names, errors.fps)
    curves = {}
    for episode in episodes[:EPISODES_DRAWN]:
        curves[episode.episode] = joints_figure(episode.predicted, episode.recorded, errors.names, errors.fps)
    subtitle = f"{dataset}, {len(episodes)} episodes at {errors.fps:g} fps"
    if len(episodes) > len(curves):
        subtitle += f" ({len(episodes) - len(curves)} not drawn)"
    return render(
        "open_loop.html",
        title=f"{name} on recorded episodes",
        subtitle=subtitle,
        numbers=numbers,
        relative_error=statistics.fmean(moving or [0]),
        along_chunk=along_chunk,
        worst_moments=moments_figure(moments, errors.names) if moments else None,
        episodes=curves,
    )


def closed_loop_page(name: str, numbers: dict, sheet, videos: dict[str, Path]) -> str:
    """How a policy did in simulation.

    Args:
        numbers: content of numbers.json.
        sheet: contact_sheet of the episodes.
        videos: {caption: mp4 file}.
    """
    title = f"{name} in {numbers['env']}"
    subtitle = f"{numbers['task']}, at most {numbers['max_steps']} steps"
    return render("closed_loop.html", title=title, subtitle=subtitle, numbers=numbers, sheet=sheet, videos=videos)
