"""Experiment trackers: TensorBoard, Weights & Biases, Trackio. A resumed run continues as the same run there.

accelerate.tracking has these three, but its classes log through accelerate's process state. A run of one process has none, and
creating one picks a device. They also write no notes and no figures, and start a new set of settings at every resume.
"""

import contextlib
import importlib.util
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from errors import UserError, nearest, one_line

PROJECT = "armature"


@dataclass
class Tracker:
    """One tracker of a run.

    Attributes:
        output_dir: the run's folder.
        run_id: the run's id at its trackers, the same after every resume.
        config: every setting.
        start_step: the step that the run starts from, 0 for a new one.
    """

    output_dir: Path
    run_id: str
    config: dict
    start_step: int


class TensorBoard(Tracker):
    """An event file in output_dir/tensorboard. Steps that a resumed run repeats replace the earlier ones.

    Torch's SummaryWriter opens its file by name for every event, from a thread, and so writes into whatever folder has that
    name by then. Here it is opened once: a run whose folder was moved follows it, and touches nothing of another run.
    """

    def start(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder = self.output_dir / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The form of name that TensorBoard looks for; it reads files in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self.file = RecordWriter((folder / name).open("xb", buffering=0))
        self._write(Event(file_version="brain.Event:2"))
        if self.start_step:
            self._write(Event(session_log=SessionLog(status=SessionLog.START), step=self.start_step + 1))
        # Indented by four spaces, TensorBoard's Markdown shows the settings as they are.
        lines = [f"    {name}: {value}" for name, value in self.config.items()]
        self.note("config", "\n".join(lines), self.start_step)

    def log(self, values: dict, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._add(scalar(name, value), step)

    def note(self, name: str, text: str, step: int) -> None:
        from torch.utils.tensorboard.summary import text as text_summary

        self._add(text_summary(name, text), step)

    def picture(self, name: str, figure, step: int) -> None:
        from torch.utils.tensorboard.summary import image

        self._add(image(name, pixels_of(figure), dataformats="HWC"), step)

    def close(self) -> None:
        self.file.close()

    def _add(self, summary, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._write(Event(summary=summary, step=step))

    def _write(self, event) -> None:
        event.wall_time = time.time()
        self.file.write(event.SerializeToString())


class Wandb(Tracker):
    """Weights & Biases; offline with WANDB_MODE=offline."""

    def start(self) -> None:
        import wandb

        try:
            self.run = wandb.init(
                project=PROJECT,
                id=self.run_id,
                name=self.output_dir.name,
                dir=str(self.output_dir),
                config=self.config,
                resume="allow",  # continue the run of this id, or begin one
            )
        except (wandb.Error, OSError) as error:
            reason = one_line(error)[:160].rstrip(".")
            raise UserError(
                f"--tracker wandb does not start: {reason}. Set WANDB_MODE=offline, or leave wandb out"
            ) from error
        # W&B's own step counter refuses steps that a resumed run repeats.
        self.run.define_metric("*", step_metric="train_step")

    def log(self, values: dict, step: int) -> None:
        self.run.log({**values, "train_step": step})

    def note(self, name: str, text: str, step: int) -> None:
        self.run.summary[name] = text

    def picture(self, name: str, figure, step: int) -> None:
        import wandb

        self.log({name: wandb.Image(pixels_of(figure))}, step)

    def close(self) -> None:
        self.run.finish()


class Trackio(Tracker):
    """Trackio, Hugging Face's local tracker: `trackio show --project armature`."""

    def start(self) -> None:
        import trackio

        self.module = trackio
        name = f"{self.output_dir.name}-{self.run_id}"  # by which a resumed run finds itself again
        trackio.init(project=PROJECT, name=name, config=self.config, resume="allow", embed=False)

    def log(self, values: dict, step: int) -> None:
        self.module.log(values, step=step)

    def note(self, name: str, text: str, step: int) -> None:
        self.log({name: text}, step)

    def picture(self, name: str, figure, step: int) -> None:
        self.log({name: self.module.Image(pixels_of(figure))}, step)

    def close(self) -> None:
        self.module.finish()


def pixels_of(figure):
    """A matplotlib figure as (H, W, 3) uint8."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]  # without the alpha channel


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


def tracker_names(setting: str) -> list[str]:
    """The trackers that --tracker names: "tensorboard,wandb"; "none" names none."""
    names = [name.strip() for name in setting.split(",")]
    return [name for name in names if name not in ("", "none")]


def check_trackers(setting: str) -> None:
    """Refuse trackers that cannot start. Creates nothing; on a terminal, W&B may ask for a login.

    Args:
        setting: what --tracker names.

    Raises:
        UserError: there is no such tracker, its package is not installed, or W&B has no login.
    """
    names = tracker_names(setting)
    for name in names:
        if name not in KINDS:
            known = ", ".join(KINDS)
            raise UserError(f"--tracker {name} is no tracker: expected {known} or none{nearest(name, KINDS)}")
        if importlib.util.find_spec(name) is None:  # each package has its tracker's name
            raise UserError(f"--tracker {name} needs a package that is not installed. Run: uv pip install {name}")
    if "wandb" in names:
        import wandb

        try:
            if wandb.setup().settings.mode == "online":
                wandb.login()
        except (wandb.Error, ValueError) as error:  # ValueError: a setting or a key of the wrong form
            reason = one_line(error)[:160].rstrip(".")
            raise UserError(
                f"--tracker wandb cannot log in: {reason}. Run wandb login, or set WANDB_MODE=offline"
            ) from error


class Trackers:
    """The trackers of a run. One that fails later is reported and dropped, and the run continues.

    Args:
        setting: what --tracker names; `check_trackers` has accepted it.
        run_id: from the checkpoint that the run resumes from; None for a new run.
        warn: called with a line for people.
        output_dir, config, start_step: as Tracker's.
    """

    def __init__(self, setting: str, output_dir: Path, run_id: str | None, config: dict, start_step: int, warn):
        names = tracker_names(setting)
        if run_id is None and names:
            run_id = uuid4().hex[:8]
        self.run_id = run_id
        self.warn = warn
        self.trackers = {name: KINDS[name](output_dir, run_id, config, start_step) for name in names}
        self.running: dict[str, Tracker] = {}

    def start(self) -> None:
        """Open all of them, or none.

        Raises:
            UserError: W&B refuses the run.
        """
        for name, tracker in self.trackers.items():
            try:
                tracker.start()
            except BaseException:
                self.close()  # those that have started hold files and threads
                raise
            self.running[name] = tracker

    def log(self, line: dict) -> None:
        """The numbers of a line of metrics.jsonl; those by joint as name/joint."""
        values = {}
        for name, value in line.items():
            if isinstance(value, dict):
                values |= {f"{name}/{joint}": number for joint, number in value.items()}
            elif isinstance(value, (int, float)) and name != "step":
                values[name] = value
        self._each(lambda tracker: tracker.log(values, line["step"]))

    def note(self, name: str, text: str, step: int) -> None:
        self._each(lambda tracker: tracker.note(name, text, step))

    def picture(self, name: str, figure, step: int) -> None:
        """A matplotlib figure."""
        self._each(lambda tracker: tracker.picture(name, figure, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self.running.clear()

    def _each(self, call) -> None:
        for name, tracker in list(self.running.items()):
            try:
                call(tracker)
            except Exception as error:  # of any kind: a tracker must not end a training run
                self.warn(f"--tracker {name} failed, the run continues without it: {one_line(error)[:160]}")
                del self.running[name]
                # Its thread would otherwise keep writing, to files that may be gone by then.
                with contextlib.suppress(Exception):
                    tracker.close()
