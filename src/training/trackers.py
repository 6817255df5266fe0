"""Experiment trackers: TensorBoard, Weights & Biases, Trackio. A resumed run goes on as the same run there."""

from pathlib import Path
from uuid import uuid4

from errors import UserError, nearest, one_line

PROJECT = "armature"


class TensorBoard:
    """Event files in output_dir/tensorboard; what a resume does again replaces what was there."""

    def __init__(self, output_dir: Path, run_id: str, config: dict, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start + 1 if start else None)
        self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()), start)

    def log(self, values: dict, step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def note(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)

    def picture(self, name: str, figure, step: int) -> None:
        self.writer.add_figure(name, figure, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """Weights & Biases; offline with WANDB_MODE=offline."""

    def __init__(self, output_dir: Path, run_id: str, config: dict, start: int):
        import wandb

        self.module = wandb
        self.run = wandb.init(
            project=PROJECT, id=run_id, name=output_dir.name, dir=str(output_dir), config=config, resume="allow"
        )
        self.run.define_metric("*", step_metric="train_step")  # its own counter refuses steps that are done again

    def log(self, values: dict, step: int) -> None:
        self.run.log({**values, "train_step": step})

    def note(self, name: str, text: str, step: int) -> None:
        self.run.summary[name] = text

    def picture(self, name: str, figure, step: int) -> None:
        self.run.log({name: self.module.Image(figure), "train_step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio, Hugging Face's local tracker: `trackio show --project armature`."""

    def __init__(self, output_dir: Path, run_id: str, config: dict, start: int):
        import trackio

        self.module = trackio
        trackio.init(project=PROJECT, name=f"{output_dir.name}-{run_id}", config=config, resume="allow", embed=False)

    def log(self, values: dict, step: int) -> None:
        self.module.log(values, step=step)

    def note(self, name: str, text: str, step: int) -> None:
        self.module.log({name: text}, step=step)

    def picture(self, name: str, figure, step: int) -> None:
        figure.canvas.draw()
        import numpy as np

        self.module.log({name: self.module.Image(np.asarray(figure.canvas.buffer_rgba())[..., :3])}, step=step)

    def close(self) -> None:
        self.module.finish()


KINDS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}


class Trackers:
    """Those that a run's `--tracker` names; one that fails is told and left, and the run goes on.

    Args:
        names: such as "tensorboard,wandb"; "none" for none.
        output_dir: the run's folder.
        run_id: the run's name there, from the checkpoint that it goes on from; None for a new one.
        config: every setting.
        start: the step that the run starts from.
        warn: called with a line for people.

    Raises:
        UserError: there is no such tracker, its package is not installed, or it does not start.
    """

    def __init__(self, names: str, output_dir: Path, run_id: str | None, config: dict, start: int, warn):
        wanted = [name.strip() for name in names.split(",") if name.strip() not in ("none", "")]
        self.warn, self.open, self.run_id = warn, {}, run_id or (uuid4().hex[:8] if wanted else None)
        for name in wanted:
            if name not in KINDS:
                raise UserError(f"--tracker {name}: there is no such tracker{nearest(name, KINDS)}: {', '.join(KINDS)}")
        for name in wanted:
            try:
                self.open[name] = KINDS[name](output_dir, self.run_id, config, start)
            except ImportError as error:
                self.close()
                raise UserError(
                    f"--tracker {name} needs a package ({one_line(error)[:100]}): uv pip install {name}"
                ) from None
            except Exception as error:  # its own kinds: no login, no network
                self.close()
                remedy = (
                    "log in, or WANDB_MODE=offline, or leave the flag out" if name == "wandb" else "leave the flag out"
                )
                raise UserError(f"--tracker {name} does not start ({one_line(error)[:160]}): {remedy}") from error

    def _each(self, act) -> None:
        for name, tracker in list(self.open.items()):
            try:
                act(tracker)
            except Exception as error:
                self.warn(f"--tracker {name} failed and is left: {one_line(error)[:160]}")
                del self.open[name]

    def log(self, line: dict) -> None:
        """The numbers of a line of metrics.jsonl."""
        values = {name: value for name, value in line.items() if isinstance(value, (int, float)) and name != "step"}
        for name, joints in line.items():
            if isinstance(joints, dict):
                values |= {f"{name}/{joint}": value for joint, value in joints.items()}
        self._each(lambda tracker: tracker.log(values, line["step"]))

    def note(self, name: str, text: str, step: int) -> None:
        self._each(lambda tracker: tracker.note(name, text, step))

    def picture(self, name: str, figure, step: int) -> None:
        """A matplotlib figure."""
        self._each(lambda tracker: tracker.picture(name, figure, step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
