"""How good a run's policy is while it trains: its loss and action errors on held-out episodes, its success in simulation."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from config import TrainConfig
from data.loader import Loader
from data.source import Source
from errors import UserError, one_line
from policy.loaded import LoadedPolicy, expected_observation
from reports.figures import horizon_figure
from runtime import is_out_of_memory
from sim import environments
from sim.environments import Simulation
from sim.rollout import run_episodes, summary
from training.open_loop import BATCH_SIZE, OpenLoopErrors, evenly_spaced_rows, measure

FIRST_SEED = 1000  # of a simulation's episodes, as lerobot-eval's; the shipped demonstrations have 0 to 39


def open_simulation(config: TrainConfig, policy_config, preprocess) -> Simulation | None:
    """Open the simulation of --eval_env and check that it gives what the policy takes; None without one.

    Needs only the policy's config and preprocessor, so that a mistake is found before the policy is built.

    Raises:
        UserError: there is no such simulation, or its observations do not fit the policy.
    """
    if not config.eval_env:
        return None
    simulation = environments.open_simulation(
        config.eval_env, config.eval_task, config.eval_args, policy_config, flag="--eval_args"
    )
    try:
        simulation.check(expected_observation(policy_config, preprocess))
    except UserError:
        simulation.close()
        raise
    return simulation


@dataclass
class Evaluation:
    """What was measured at one step of a run, without what was not due or failed.

    Attributes:
        metrics: a line of metrics.jsonl.
        errors: on held-out episodes.
        was_stopped: whether the run was stopped before all was measured.
    """

    metrics: dict
    errors: OpenLoopErrors | None
    was_stopped: bool

    def summary_line(self) -> str:
        """The metrics for people."""
        metrics = self.metrics
        texts = []
        if "val_loss" in metrics:
            texts.append(f"validation loss {metrics['val_loss']:.4g}")
        if "val_action_error" in metrics:
            by_joint = list(metrics["val_error_by_joint"].items())[:8]
            joints = ", ".join(f"{name} {error:.3g}" for name, error in by_joint)
            texts.append(f"action error {metrics['val_action_error']:.3g} standard deviations ({joints})")
        if "eval_success_rate" in metrics:
            interval = f"{metrics['eval_success_low']:.0%} to {metrics['eval_success_high']:.0%}"
            texts.append(f"success {metrics['eval_success_rate']:.0%} (95 % interval {interval})")
        return ", ".join(texts)

    def figure(self):
        """How the error grows along the chunk; None where that was not measured."""
        if self.errors is None or self.errors.error is None:
            return None
        return horizon_figure(self.errors.error, self.errors.std, self.errors.names, self.errors.fps)


@dataclass
class Evaluator:
    """Evaluates a run's policy at the steps that its settings name.

    Attributes:
        held_out: (E,) positions in `source.episodes` to validate on, possibly none.
        policy, preprocess, postprocess: the run's own. The policy is None in a process that evaluates nothing.
        simulation: of `open_simulation`; None in a process that evaluates nothing.
        warn: called with a line for people.
    """

    config: TrainConfig
    source: Source
    held_out: Tensor
    policy: object
    preprocess: object
    postprocess: object
    simulation: Simulation | None
    warn: Callable[[str], None]

    def is_due(self, step: int, saving: bool) -> bool:
        """Whether to evaluate at this step, at which a checkpoint is saved or not."""
        return self._validation_is_due(step, saving) or self._simulation_is_due(step, saving)

    def _validation_is_due(self, step: int, saving: bool) -> bool:
        return len(self.held_out) > 0 and self._is_time(step, saving, self.config.val_freq)

    def _simulation_is_due(self, step: int, saving: bool) -> bool:
        return bool(self.config.eval_env) and self._is_time(step, saving, self.config.eval_freq)

    def _is_time(self, step: int, saving: bool, freq: int | None) -> bool:
        if step == self.config.steps:
            return True
        return saving if freq is None else step % freq == 0

    def results(
        self, step: int, saving: bool, loader: Loader, is_stopped: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """Do what is due. What fails is a warning, and the run continues. Leaves the policy in training mode.

        Args:
            loader: the run's, which also makes the validation batches.
            is_stopped: whether the run is to end; asked before every batch and every step of a simulation.
        """
        policy = LoadedPolicy(self.policy, self.preprocess, self.postprocess)
        metrics = {}
        errors = None
        was_stopped = False
        if self._validation_is_due(step, saving):
            errors = self._validate(policy, loader, is_stopped)
            if errors is None:  # it was stopped, or failed
                was_stopped = is_stopped()
            else:
                metrics |= errors.metrics()
        if self._simulation_is_due(step, saving) and not was_stopped:
            success = {}
            if not is_stopped():
                success = self._simulate(policy, is_stopped)
            metrics |= success
            was_stopped = not success and is_stopped()
        self.policy.train()
        return Evaluation(metrics, errors, was_stopped)

    def _validate(self, policy: LoadedPolicy, loader: Loader, is_stopped: Callable[[], bool]) -> OpenLoopErrors | None:
        starts = self.source.starts[self.held_out]
        ends = self.source.ends[self.held_out]
        rows = evenly_spaced_rows(starts, ends, self.config.val_samples)
        # No more samples at a time than training has shown to fit the memory.
        batch_size = min(BATCH_SIZE, loader.local_batch_size // self.config.grad_accumulation_steps)
        try:
            return measure(policy, loader, rows, self.config.seed, batch_size, is_stopped)
        except Exception as error:
            if is_out_of_memory(error):  # train() says what to do about that
                raise
            self._warn_of("validation", error)
            return None

    def _simulate(self, policy: LoadedPolicy, is_stopped: Callable[[], bool]) -> dict[str, float]:
        seeds = range(FIRST_SEED, FIRST_SEED + self.config.eval_episodes)
        quiet = self.config.quiet
        try:
            episodes = run_episodes(self.simulation, policy, seeds, quiet=quiet, is_stopped=is_stopped)
        except Exception as error:
            self._warn_of(f"--eval_env {self.config.eval_env}", error)
            return {}
        finally:
            policy.reset()
        if len(episodes) < len(seeds):
            self.warn("the run was stopped during a simulation, which gives no success rate: resuming repeats it")
            return {}
        result = summary(episodes)
        return {f"eval_{name}": result[name] for name in ("success_rate", "success_low", "success_high")}

    def _warn_of(self, what: str, error: Exception) -> None:
        self.warn(f"{what} failed, training continues: {type(error).__name__}: {one_line(error)[:200]}")
