"""What people see of a run: header, progress, metrics.jsonl, curves, and the result that train() returns."""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from errors import printable, reason_of_disk
from processors.features import policy_features
from reports.figures import curves_figure
from reports.model_card import model_card
from reports.pages import last, read_history, runs_page
from runtime import describe_machine, in_notebook
from training.memory import dtype_name, memory_lines
from training.trackers import Trackers

CURVE = "loss.png"
CURVE_PANELS = ("loss", "val_loss", "eval_success_rate")
DRAW_EVERY = 3.0  # seconds between two pictures in a notebook


@dataclass
class TrainResult:
    """What train() returns.

    Attributes:
        steps: optimizer steps in the run so far.
        final_loss: mean loss of the last log line, None if nothing was logged.
        history: one dict for each line of metrics.jsonl.
        checkpoint: the newest checkpoint folder.
        policy: the trained policy, on its device, in eval mode.
        output_dir: the run's folder.
        stopped_by: the signal that ended the run before its last step, such as "SIGINT"; None if it reached its last step.
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
        """A matplotlib figure of training loss, and of validation loss and success rate where they were measured."""
        return curves_figure({self.output_dir.name: self.history}, CURVE_PANELS)

    def report(self):
        """The run as an HTML page. A notebook shows it; `.save("run.html")` writes it."""
        return runs_page({self.output_dir.name: self.history})


class Report:
    """Shows a run's progress and keeps its metrics. A context manager: entering it starts the trackers.

    Args:
        output_dir: where metrics.jsonl and loss.png go.
        resumed_from: the checkpoint that the run resumes from; its run's folder, or else output_dir, has the metrics so far.
        start_step: the step that this process starts from.
        config: steps, quiet, tracker.
        run_id: the run's id at its trackers; None for a new run.
        is_main: false in a process that only keeps the history, and prints and writes nothing.
        check_folder: called before every change in output_dir; raises LostFolderError if that is not this run's any more.
    """

    def __init__(
        self,
        output_dir: Path,
        *,
        resumed_from: Path | None,
        start_step: int,
        config,
        run_id: str | None,
        is_main=True,
        check_folder: Callable[[], None] = lambda: None,
    ):
        self.output_dir = output_dir
        self.resumed_from = resumed_from
        self.start_step = start_step
        self.steps = config.steps
        self.is_main = is_main
        self.check_folder = check_folder
        self.quiet = config.quiet or not is_main
        self.history: list[dict] = []  # one dict for each line of metrics.jsonl
        self.path = output_dir / "metrics.jsonl"
        self.is_written = False  # whether the file holds the history and nothing else
        self.is_full = False
        self.trackers = Trackers(
            config.tracker if is_main else "none", output_dir, run_id, config.asdict(), start_step, self.warn
        )
        self.bar = None
        self.notebook_display = None
        self.next_drawing = 0.0

    def start(self) -> None:
        """Read the metrics so far, start the trackers, show the progress bar."""
        self.history += self._earlier_metrics()
        self.trackers.start()
        is_watched = sys.stderr.isatty() or in_notebook()
        if is_watched and not self.quiet:
            from tqdm.auto import tqdm  # a widget in a notebook, text in a terminal

            self.bar = tqdm(total=self.steps, initial=self.start_step, unit="step", dynamic_ncols=True)

    def _earlier_metrics(self) -> list[dict]:
        if self.resumed_from is None:
            return []
        # A checkpoint from the Hub comes without metrics: the run's own folder may have them.
        # A checkpoint that is a link to another disk belongs to the folder that has its name.
        for folder in (self.resumed_from.parent, self.resumed_from.resolve().parent, self.output_dir):
            if (folder / self.path.name).is_file():
                # Later lines are of steps that this run repeats.
                return [line for line in read_history(folder, self.warn) if line["step"] <= self.start_step]
        return []

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *error):
        self.trackers.close()
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        if not self.quiet:
            self._print(printable(text))

    def warn(self, *texts: str) -> None:
        for text in texts:
            self._print(f"warning: {printable(text)}")

    def _print(self, text: str) -> None:
        if not self.is_main:
            return
        if self.bar is not None:
            self.bar.write(text)  # above the bar
        else:
            print(text, flush=True)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def log(self, line: dict) -> None:
        """Keep and show a line of metrics."""
        self._keep(line)
        summary = f"loss {line['loss']:.4g}  lr {line['lr']:.3g}  {line['samples_per_s']:.1f} samples/s"
        if self.bar is not None:
            self.bar.set_postfix_str(summary, refresh=False)  # advance() draws it
            self._draw_in_notebook()
        else:
            seconds_left = (self.steps - line["step"]) * line["step_s"]
            self.say(f"step {line['step']}/{self.steps}  {summary}  ETA {clock(seconds_left)}")

    def log_evaluation(self, line: dict, summary: str, make_figure) -> None:
        """Keep and show the metrics of a validation or a simulation.

        Args:
            make_figure: returns a figure for the trackers, or None; called only if there are any.
        """
        self._keep(line)
        if self.trackers.running:
            figure = make_figure()
            if figure is not None:
                self.trackers.picture("error along the chunk", figure, line["step"])
        self.say(f"step {line['step']}/{self.steps}  {summary}")

    def _keep(self, line: dict) -> None:
        self.history.append(line)
        if self.is_main:
            self._write()
            self.trackers.log(line)

    def forget_evaluation(self, step: int) -> None:
        """Drop what was measured at a step before a stop, since all of it is measured again."""
        self.history[:] = [line for line in self.history if line["step"] != step or "loss" in line]

    def rewrite_metrics(self) -> None:
        """Write metrics.jsonl afresh if that was not done: the lines that an earlier run wrote past our checkpoint go."""
        if not self.is_written:
            self._write()
        with contextlib.suppress(OSError):  # the disk does not answer: the next line of metrics is a warning then
            self.check_folder()  # before trackers write there

    def _write(self) -> None:
        """Append the last line to metrics.jsonl, or write all of them the first time and after a disk was full."""
        temporary = self.path.with_name(".metrics.jsonl.tmp")
        try:
            self.check_folder()
            if self.is_written:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.history[-1]) + "\n")
            else:
                # Renamed once it is complete: a run killed here keeps the earlier file.
                temporary.write_text("".join(json.dumps(line) + "\n" for line in self.history))
                temporary.replace(self.path)
            self.is_written = True
            self.is_full = False
        except OSError as error:
            with contextlib.suppress(OSError):  # a read-only disk refuses this too
                temporary.unlink(missing_ok=True)
            if not self.is_full:  # one warning, not one for each line
                self.warn(f"cannot write {self.path}: {reason_of_disk(error)}. Its lines are added once there is room")
            self.is_written = False
            self.is_full = True

    def _draw_in_notebook(self) -> None:
        """Redraw the curves so far in one place, every few seconds."""
        if not in_notebook() or time.monotonic() < self.next_drawing:
            return
        from IPython.display import display

        if self.notebook_display is None:
            self.notebook_display = display(display_id=True)
        self.notebook_display.update(self.curves())
        self.next_drawing = time.monotonic() + DRAW_EVERY

    def curves(self):
        return curves_figure({self.output_dir.name: self.history}, CURVE_PANELS)

    def save_curves(self) -> None:
        """Write loss.png, and send it to the trackers."""
        if not self.history:
            return
        figure = self.curves()
        path = self.output_dir / CURVE
        try:
            with replacing(path) as fresh:
                figure.savefig(fresh, dpi=110, format="png")
        except OSError as error:
            self.warn(f"cannot write {path}: {reason_of_disk(error)}")
        self.trackers.picture("curves", figure, self.history[-1]["step"])

    def save_card(self, checkpoint: Path) -> None:
        """Write the finished policy's model card, README.md."""
        with replacing(self.output_dir / "README.md") as fresh:
            fresh.write_text(model_card(checkpoint), encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a hidden file to write, which takes the place of `path` once it is complete.

    Written in its place, a file would be written through a link, to wherever that leads, and a pipe would wait for a reader.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.unlink(missing_ok=True)
    try:
        yield fresh
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):  # a read-only disk refuses this too
            fresh.unlink(missing_ok=True)
        raise


def header(plan, policy, memory, start_step: int) -> str:
    """The lines above a run: what is trained on which data, from where, to where.

    Args:
        plan: the RunPlan.
        memory: what the run takes.
    """
    source = plan.source
    config = plan.config

    # The data.
    lines = [
        f"dataset   {source.name}: {len(source.episodes)} episodes, {source.rows:,} frames at {source.meta.fps:g} fps"
    ]
    if len(plan.held_out):
        lines.append(f"          held out for validation: {episodes_text(source, plan.held_out)}")
    if source.tasks:
        others = len(source.tasks) - 1
        more = f" and {others} more" if others else ""
        lines.append(f"          task {next(iter(source.tasks.values()))!r}{more}")
    lines.append(f"          {features_text(source.meta, config.image_size)}")

    # The policy, and what of it is trained on which devices.
    parameters = sum(p.numel() for p in policy.parameters())
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    frozen = f" ({trained / 1e6:.1f}M of them trained)" if trained < parameters else ""
    devices = str(plan.distributed.device)
    if plan.distributed.size > 1:
        devices = f"{plan.distributed.size} x {plan.distributed.device.type} ({plan.distributed.kind})"
    lines.append(
        f"policy    {policy.name}, {parameters / 1e6:.1f}M parameters{frozen}, {precision_text(policy, config)}, on {devices}"
    )

    lines += [
        f"memory    {line}" if not i else f"          {line}"
        for i, line in enumerate(memory_lines(memory, config, plan.kept))
    ]

    # Where it starts, and where it goes. A resumed run has left its base behind.
    if config.policy_path and plan.checkpoint is None:
        adapters = f", {config.peft} adapters" if config.peft else ""
        lines.append(f"base      weights and processing steps of {config.policy_path}")
        lines.append(f"          new: statistics, optimizer, learning rate schedule{adapters}")
    resumed = f", resumed from {plan.checkpoint.name}" if plan.checkpoint else ""
    steps = f"steps {start_step + 1:,} to {config.steps:,} of batch {config.batch_size}"
    if start_step >= config.steps:
        steps = f"finished: {start_step:,} of {config.steps:,} steps"
    lines.append(f"run       {steps}{resumed}")
    lines.append(f"saves to  {plan.output_dir}")
    return "\n".join(map(printable, lines))


def precision_text(policy, config) -> str:
    """What the weights are stored in, and what is computed with them, if that differs."""
    dtypes = {dtype_name(parameter) for parameter in policy.parameters()}
    if dtypes == {config.precision}:
        return config.precision
    return f"{' and '.join(sorted(dtypes))} weights computed in {config.precision}"


def features_text(meta, image_size) -> str:
    """What a dataset records: "cameras top 480x640 -> 64x64; state 6, action 6"."""
    features = policy_features(meta, None)[0]
    cameras = []
    for key in meta.camera_keys:
        height, width = features[key].shape[1:]  # (C, H, W)
        cameras.append(f"{key.removeprefix('observation.images.')} {height}x{width}")
    text = "cameras " + (", ".join(cameras) or "none")
    if cameras and image_size:
        text += f" -> {image_size[0]}x{image_size[1]}"
    vectors = []
    for key in ("observation.state", "action"):
        if key in meta.features:
            vectors.append(f"{key.removeprefix('observation.')} {meta.features[key]['shape'][0]}")
    return f"{text}; {', '.join(vectors)}"


def episodes_text(source, positions, most: int = 8) -> str:
    """The episodes at some positions of a dataset: "4 episodes (3, 7, 12, 20)"; of many, the first few."""
    names = [str(source.episodes[i]) for i in positions[:most].tolist()]
    if len(positions) > most:
        names.append("...")
    noun = "episode" if len(positions) == 1 else "episodes"
    return f"{len(positions)} {noun} ({', '.join(names)})"


def closing_message(result: TrainResult, plan, start_step: int) -> str:
    """How the run ended, and the command to run next."""
    config = plan.config
    checkpoint = printable(shlex.quote(str(result.checkpoint)))
    if result.stopped_by:
        # How several processes were launched is not known here.
        launcher = "python" if plan.distributed.size == 1 else "accelerate launch ..."
        return (
            f"stopped by {result.stopped_by} at step {result.steps} of {config.steps}. To resume:\n"
            f"{launcher} src/train.py --resume_from_checkpoint {checkpoint}"
        )
    end = f"nothing to do: {checkpoint} is already at step {result.steps}. Pass a larger --steps to train on"
    if result.steps > start_step:
        end = f"done: {checkpoint}, loss {result.final_loss:.4g}"
    dataset = printable(shlex.quote(config.dataset_id[0]))
    episode = str(plan.source.episodes[0]).rpartition("#")[2]  # of several datasets, the first one's
    return f"{end}\nnext: python src/infer.py {checkpoint} --dataset_id {dataset} --episode {episode}"


def training_info(policy, dataset_id: list[str], history: list[dict], device, step: int) -> dict:
    """What a checkpoint records of a run for people."""
    # An evaluation of an earlier step says nothing about these weights.
    of_this_step = [line for line in history if line["step"] == step]
    return {
        "policy": policy.name,
        "parameters": sum(p.numel() for p in policy.parameters()),
        "dataset": dataset_id,
        "epoch": last(history, "epoch") or 0,
        "loss": last(history, "loss"),
        "val_loss": last(of_this_step, "val_loss"),
        "success_rate": last(of_this_step, "eval_success_rate"),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **describe_machine(device),
    }


def clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Stopwatch:
    """Wall time of the run, and how much of it since the last log line went into waiting for data.

    Args:
        save_minutes: minutes after which a save is due; None for never.
    """

    def __init__(self, save_minutes: float | None):
        self.save_seconds = 60 * save_minutes if save_minutes else float("inf")
        now = time.perf_counter()
        self.run_started = now
        self.last_save = now
        self._start_stretch(now)

    def _start_stretch(self, now: float) -> None:
        """Begin to measure towards the next log line."""
        self.stretch_started = now
        self.waiting_seconds = 0.0
        self.paused_seconds = 0.0
        self.steps = 0

    def wait(self, loader):
        """The loader's next batch, with the wait for it counted."""
        begun = time.perf_counter()
        batch = next(loader)
        self.waiting_seconds += time.perf_counter() - begun
        self.steps += 1
        return batch

    @contextlib.contextmanager
    def paused(self):
        """Leave out what is done inside, such as a save or a validation."""
        begun = time.perf_counter()
        yield
        self.paused_seconds += time.perf_counter() - begun

    def save_is_due(self) -> bool:
        return time.perf_counter() - self.last_save >= self.save_seconds

    def since_start(self) -> float:
        return time.perf_counter() - self.run_started

    def rates(self, batch_size: int) -> dict:
        """Speed since the last call."""
        now = time.perf_counter()
        # Not 0, by which the rates are divided.
        elapsed = max(now - self.stretch_started - self.paused_seconds, 1e-9)
        rates = {
            "samples_per_s": round(self.steps * batch_size / elapsed, 2),
            "step_s": round(elapsed / self.steps, 5),
            "data_wait": round(self.waiting_seconds / elapsed, 4),
        }
        self._start_stretch(now)
        return rates
