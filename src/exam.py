"""What a policy is examined on while it trains: episodes it has not seen, and a simulation. Changes nothing of the run."""

import contextlib

import sim
from config import TrainConfig, UserError, one_line
from infer import LoadedPolicy
from page import horizon_figure
from runtime import is_out_of_memory
from sim.rollout import check_fits, first_observation, run_episodes, summary
from validation import measure, spread

FIRST_SEED = 1000  # of a simulation's episodes, as lerobot-eval's; the shipped demonstrations are of 0 to 39


class Exam:
    """Examines the policy of a run at the steps that its settings name.

    Args:
        config: val_freq, val_samples, eval_env, eval_task, eval_args, eval_freq, eval_episodes.
        source: the run's dataset.
        held_out: (E,) positions in its episodes to validate on, possibly none.
        policy, preprocess, postprocess: the run's own; the policy None in a process that examines nothing.
        warn: called with a line for people.

    Raises:
        UserError: there is no such simulation, or it does not give what the policy takes.
    """

    def __init__(self, config: TrainConfig, source, held_out, policy, preprocess, postprocess, warn):
        self.config, self.source, self.warn = config, source, warn
        self.parts = policy, preprocess, postprocess
        self.rows = (
            spread(source.starts[held_out], source.ends[held_out], config.val_samples) if len(held_out) else None
        )
        self.errors, self.env, self.validates, self.simulates = None, None, False, False
        self.is_stopped = lambda: False  # whether the run is to end, asked at every step of a simulation
        if config.eval_env:
            try:
                self.env = sim.make_env(config.eval_env, config.eval_task, config.eval_args)
                if policy is not None:
                    loaded = LoadedPolicy(*self.parts)
                    check_fits(loaded.expected, first_observation(*self.env, loaded))
            except UserError as error:
                self.close()
                raise UserError(in_training(str(error))) from error

    def is_due(self, step: int, saving: bool) -> bool:
        """Whether to examine at this step, at which a checkpoint is saved or not."""

        def at(freq: int | None) -> bool:
            return step == self.config.steps or (saving if freq is None else step % freq == 0)

        self.validates = self.rows is not None and at(self.config.val_freq)
        self.simulates = self.env is not None and at(self.config.eval_freq)
        return self.validates or self.simulates

    def results(self, loader) -> dict:
        """Figures of what is due for a line of metrics.jsonl; the policy is in training mode again afterwards.

        One that fails is told, and the run goes on; a simulation in which the run is stopped gives no figures.

        Args:
            loader: of the run; validation batches are made by it.
        """
        line, self.errors = {}, None
        if self.validates:
            fits = loader.share // self.config.grad_accumulation_steps  # in memory: it does in training
            with self.going_on("validation failed, no figures", and_memory=False):
                self.errors = measure(*self.parts, loader, self.rows, self.config.seed, most=fits)
                line |= self.errors.line()
        if self.simulates:
            loaded = Stoppable(*self.parts)
            loaded.is_stopped = self.is_stopped
            seeds = range(FIRST_SEED, FIRST_SEED + self.config.eval_episodes)
            with self.going_on(f"--eval_env {self.config.eval_env} failed, no success rate"):
                result = summary(run_episodes(*self.env, loaded, list(seeds), quiet=self.config.quiet))
                line |= {f"eval_{name}": result[name] for name in ("success_rate", "success_low", "success_high")}
            loaded.reset()
        self.parts[0].train()
        return line

    @contextlib.contextmanager
    def going_on(self, what: str, and_memory: bool = True):
        """Tell what fails within this, and memory that runs out if so asked: the run does not end for it."""
        try:
            yield
        except Stop:
            self.warn("the run is stopped in a simulation: no success rate")
        except Exception as error:
            if not and_memory and is_out_of_memory(error):
                raise
            self.warn(f"{what}: {one_line(error)[:200]}")

    def picture(self):
        """Of the last validation, how the error grows along the chunk; None if there was none."""
        if self.errors is None or self.errors.grid is None:
            return None
        meta = self.source.meta
        return horizon_figure(self.errors.grid, self.errors.spread, self.errors.names, meta.fps)

    def close(self) -> None:
        if self.env is not None:
            self.env[0].close()


class Stop(Exception):  # noqa: N818
    """The run is to end: nothing further is tried."""


class Stoppable(LoadedPolicy):
    """A policy that gives no further action once `is_stopped()`."""

    def select(self, batch: dict):
        if self.is_stopped():
            raise Stop
        return super().select(batch)


def in_training(text: str) -> str:
    """What evaluate.py says, by the flags of train.py."""
    for theirs, ours in (
        ("--env_args", "--eval_args"),
        ("--env ", "--eval_env "),
        ("--task ", "--eval_task "),
        ("pass --rename", "set it with --eval_args, or leave --eval_env out and pass evaluate.py --rename"),
    ):
        text = text.replace(theirs, ours)
    return text


def said(line: dict) -> str:
    """An exam's figures for people."""
    parts = []
    if "val_loss" in line:
        parts.append(f"validation loss {line['val_loss']:.4g}")
    if "val_action_error" in line:
        joints = ", ".join(f"{name} {error:.3g}" for name, error in list(line["val_error_by_joint"].items())[:8])
        parts.append(f"action error {line['val_action_error']:.3g} standard deviations ({joints})")
    if "eval_success_rate" in line:
        interval = f"{line['eval_success_low']:.0%} to {line['eval_success_high']:.0%}"
        parts.append(f"success {line['eval_success_rate']:.0%} (95 % interval {interval})")
    return ", ".join(parts)
