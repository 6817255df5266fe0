"""What a person sees of a run: header, progress, metrics.jsonl, curves, and the result that train() returns.

python src/report.py outputs/a outputs/b        # compare runs: a page, and a picture
"""

import contextlib
import json
import shlex
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from errors import one_line
from processors.pipelines import policy_features
from reports.figures import curves_figure
from reports.model_card import model_card
from reports.pages import last, read_history, runs_page
from runtime import describe_machine, in_notebook
from training.trackers import Trackers

CURVE, CURVE_PANELS = "loss.png", ("loss", "val_loss", "eval_success_rate")
DRAW_EVERY = 3.0  # seconds between two pictures in a notebook


@dataclass
class TrainResult:
    """What train() returns.

    Attributes:
        steps: optimizer steps in the run so far.
        final_loss: mean loss over the last logged stretch, None if nothing was logged.
        history: one dict for each line of metrics.jsonl.
        checkpoint: the newest checkpoint folder.
        policy: the trained policy, on its device, in eval mode.
        output_dir: the run's folder.
        stopped_by: the signal that ended the run before its last step, such as "SIGINT"; None if it went to its end.
    """

    steps: int
    final_loss: float | None
    history: list[dict]
    checkpoint: Path
    policy: object = field(repr=False)
    output_dir: Path = field(repr=False)
    stopped_by: str | None = None

    def __repr__(self):
        loss = "-" if self.final_loss is None else f"{self.final_loss:.4g}"
        stopped = f", stopped_by={self.stopped_by!r}" if self.stopped_by else ""
        return f"TrainResult(steps={self.steps}, final_loss={loss}, checkpoint={str(self.checkpoint)!r}{stopped})"

    def plot(self):
        """Training loss, validation loss and success over steps, as far as they were measured, as a matplotlib figure."""
        return curves_figure({self.output_dir.name: self.history}, CURVE_PANELS)

    def report(self):
        """The run as an HTML page, which a notebook shows and `.save("run.html")` writes."""
        return runs_page({self.output_dir.name: self.history})


class Report:
    """Prints a run's course and keeps its metrics.

    Args:
        output_dir: where metrics.jsonl and loss.png go.
        resumed: the checkpoint that the run goes on from; its folder, or else output_dir, has the metrics so far.
        start: the step that this process starts from.
        config: steps, quiet, tracker.
        run_id: the run's name at its trackers, None for a new run.
        is_main: false in a process that only keeps the history, and prints and writes nothing.
    """

    def __init__(self, output_dir: Path, resumed: Path | None, start: int, config, run_id: str | None, is_main=True):
        self.output_dir, self.start, self.steps, self.is_main = output_dir, start, config.steps, is_main
        self.quiet = config.quiet or not is_main
        self.path = output_dir / "metrics.jsonl"
        places = [resumed.resolve().parent, output_dir] if resumed else []
        written = next((read_history(place) for place in places if (place / self.path.name).exists()), [])
        self.history = [line for line in written if line["step"] <= start]
        self.bar, self.file, self.is_full, self.picture = None, None, False, None
        self.draw_next = 0.0
        self.trackers = Trackers(
            config.tracker if is_main else "none", output_dir, run_id, config.asdict(), start, self.warn
        )
        self.live = sys.stderr.isatty() or in_notebook()

    def __enter__(self):
        if self.live and not self.quiet:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.steps, initial=self.start, unit="step", dynamic_ncols=True)
        return self

    def __exit__(self, *error):
        self._close_file()
        self.trackers.close()
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        if text and not self.quiet:
            self._print(text)

    def warn(self, *texts: str) -> None:
        for text in texts:
            self._print(f"warning: {text}")

    def _print(self, text: str) -> None:
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def set_steps(self, steps: int) -> None:
        """The run's length, where it was not known at first."""
        self.steps = steps
        self.trackers.note("steps", str(steps), self.start)
        if self.bar is not None:
            self.bar.total = steps
            self.bar.refresh()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, line: dict) -> None:
        """One line of metrics, to the file and to the person."""
        self._keep(line)
        shown = f"loss {line['loss']:.4g}  lr {line['lr']:.3g}  {line['samples_per_s']:.1f} samples/s"
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
            self._draw()
        else:
            left = (self.steps - line["step"]) * line["step_s"]
            self.say(f"step {line['step']}/{self.steps}  {shown}  ETA {clock(left)}")

    def examined(self, line: dict, text: str, picture) -> None:
        """A validation's or a simulation's line of metrics; `picture()` gives a figure or None, and is asked if anyone looks."""
        self._keep(line)
        if self.trackers.open and (figure := picture()) is not None:
            self.trackers.picture("error along the chunk", figure, line["step"])
        self.say(f"step {line['step']}/{self.steps}  {text}")

    def _keep(self, line: dict) -> None:
        self.history.append(line)
        if not self.is_main:
            return
        if self.file is None:
            self.begin_file()
        else:
            with self._told_if_full():
                self.file.write(json.dumps(line) + "\n")
                self.file.flush()
        self.trackers.log(line)

    def begin_file(self) -> None:
        """Write the history afresh: lines after the checkpoint gone on from stay until there are others, or a new checkpoint."""
        if self.file is None:
            fresh = self.path.with_name(".metrics.jsonl.tmp")
            with self._told_if_full():
                fresh.write_text("".join(json.dumps(line) + "\n" for line in self.history))
                fresh.replace(self.path)
                self.file = open(self.path, "a")  # noqa: SIM115  (__exit__ closes it)
                self.is_full = False

    @contextlib.contextmanager
    def _told_if_full(self):
        """Lines that cannot be written are kept, and written with a later one."""
        try:
            yield
        except OSError as error:
            self._close_file()
            self.path.with_name(".metrics.jsonl.tmp").unlink(missing_ok=True)
            if not self.is_full:
                self.warn(f"{self.path} cannot be written ({error.strerror}); its lines are added once there is room")
            self.is_full = True

    def _close_file(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what it could not write it tries again
                self.file.close()
        self.file = None

    def _draw(self) -> None:
        """In a notebook, the curve so far, in one place, every few seconds."""
        if not in_notebook() or time.monotonic() < self.draw_next:
            return
        from IPython.display import display

        self.picture = self.picture or display(display_id=True)
        self.picture.update(self.figure())
        self.draw_next = time.monotonic() + DRAW_EVERY

    def figure(self):
        return curves_figure({self.output_dir.name: self.history}, CURVE_PANELS)

    def save_curve(self) -> None:
        if self.history:
            figure = self.figure()
            try:
                figure.savefig(self.output_dir / CURVE, dpi=110)
            except OSError as error:
                self.warn(f"{self.output_dir / CURVE} cannot be written: {one_line(error)}")
            self.trackers.picture("curves", figure, self.history[-1]["step"])

    def save_card(self, checkpoint: Path) -> None:
        """README.md of the finished policy, for the Hub."""
        (self.output_dir / "README.md").write_text(model_card(checkpoint))


def closing_words(result: TrainResult, config, start: int, processes: int) -> str:
    """How the run ended, and what to run next."""
    saved, steps = shlex.quote(str(result.checkpoint)), result.steps
    if result.stopped_by:
        stopped = f"stopped by {result.stopped_by} at step {steps} of {config.steps}; go on with:"
        launcher = "python" if processes == 1 else "accelerate launch ..."
        return f"{stopped}\n{launcher} src/train.py --resume_from_checkpoint {saved}"
    done = f"done: {saved}, loss {result.final_loss:.4g}" if steps > start else ""
    nothing = f"nothing to do: {saved} is already at step {steps}, pass --steps to go on"
    return f"{done or nothing}\nnext: python src/infer.py {saved} --dataset_id {shlex.quote(config.dataset_id[0])} --episode 0"


def numbers(parts: dict | None) -> dict[str, float]:
    """The scalars among a policy's sub-losses."""
    return {k: float(v) for k, v in (parts or {}).items() if isinstance(v, (int, float)) or getattr(v, "ndim", 1) == 0}


def training_info(policy, dataset_id: list[str], history: list[dict], device, step: int) -> dict:
    """Facts of a run for people at a step; train() adds where it stands."""
    return {
        "policy": policy.name,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "dataset": dataset_id,
        "epoch": last(history, "epoch") or 0,
        "loss": last(history, "loss"),
        "val_loss": last([line for line in history if line["step"] == step], "val_loss"),
        "success_rate": last([line for line in history if line["step"] == step], "eval_success_rate"),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(device),
    }


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def header(
    source, held_out, policy, config, distributed, start: int, output_dir: Path, resumed_from: Path | None
) -> str:
    """What is about to be trained, on what, from where, to where."""
    meta = source.meta
    size = " -> {}x{}".format(*config.image_size) if config.image_size else ""
    recorded = policy_features(meta, None)[0]
    cameras = ", ".join(
        "{} {}x{}".format(key.removeprefix("observation.images."), *recorded[key].shape[1:]) for key in meta.camera_keys
    )
    dims = ", ".join(
        f"{key.removeprefix('observation.')} {meta.features[key]['shape'][0]}"
        for key in ("observation.state", "action")
        if key in meta.features
    )
    tasks = source.tasks
    weights = sum(p.numel() for p in policy.parameters())
    moved = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = "" if moved == weights else f", {moved / 1e6:.1f}M of them trained"
    length = (
        f"{config.minutes:g} minutes"
        if config.minutes and not resumed_from
        else f"steps {start + 1:,} to {config.steps:,}"
    )
    where = (
        f"{distributed.size} x {distributed.device.type} ({distributed.kind})"
        if distributed.size > 1
        else distributed.device
    )
    adapters = f", {config.peft} adapters" if config.peft else ""
    came = f", resumed from {resumed_from.name}" if resumed_from else ""
    lines = [
        f"dataset   {source.name}: {len(source.episodes)} episodes, {source.rows:,} frames at {meta.fps:g} fps",
        f"          held out for validation: {episodes_text(source, held_out)}" if len(held_out) else None,
        f"          task {tasks[0]!r}" + (f" and {len(tasks) - 1} more" if len(tasks) > 1 else "") if tasks else None,
        f"          cameras {cameras + size if cameras else 'none'}; {dims}",
        f"policy    {policy.name}, {weights / 1e6:.1f}M parameters{frozen}, {config.precision}, on {where}",
        f"taken     the weights and processing steps of {config.policy_path}; fresh: statistics, optimizer, schedule{adapters}"
        if config.policy_path and not resumed_from
        else None,
        f"run       {length} of batch {config.batch_size}{came}",
        f"saves to  {output_dir}",
    ]
    return "\n".join(line for line in lines if line)


def episodes_text(source, positions, most: int = 8) -> str:
    """The episodes at some positions of a dataset: "4 episodes (3, 7, 12, 20)"; of many, the first few."""
    names = [str(source.episodes[i]) for i in positions[:most].tolist()]
    more = ", ..." if len(positions) > most else ""
    return f"{len(positions)} episode{'s' * (len(positions) > 1)} ({', '.join(names)}{more})"


class Stopwatch:
    """Wall time of the run, and since the last log line how much of it went into waiting for data.

    Args:
        save_minutes: after which a save is due, None for never.
    """

    def __init__(self, save_minutes: float | None):
        self.save_seconds = 60 * save_minutes if save_minutes else float("inf")
        self.start = self.lap = self.last_save = time.perf_counter()
        self.waited, self.left_out, self.steps = 0.0, 0.0, 0

    def wait(self, loader):
        """The loader's next batch, with the wait for it counted."""
        begun = time.perf_counter()
        batch = next(loader)
        self.waited += time.perf_counter() - begun
        self.steps += 1
        return batch

    @contextlib.contextmanager
    def paused(self):
        """What is done within is not training, such as a save or a validation."""
        begun = time.perf_counter()
        yield
        self.left_out += time.perf_counter() - begun

    def save_is_due(self) -> bool:
        return time.perf_counter() - self.last_save >= self.save_seconds

    def since_start(self) -> float:
        return time.perf_counter() - self.start

    def rates(self, batch_size: int) -> dict:
        """Speed since the last call."""
        now = time.perf_counter()
        elapsed = max(now - self.lap - self.left_out, 1e-9)
        rates = {
            "samples_per_s": round(self.steps * batch_size / elapsed, 2),
            "step_s": round(elapsed / self.steps, 5),
            "data_wait": round(self.waited / elapsed, 4),
        }
        self.lap, self.waited, self.left_out, self.steps = now, 0.0, 0.0, 0
        return rates
