"""How good a policy is on episodes it has not seen: its loss, and how far its actions are from the recorded ones.

B samples, T steps of the chunk from now on, A joints.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig
from errors import UserError, one_line
from policy.chunk import predict_chunk
from policy.factory import counts_valid_actions, in_first_phase, set_phase
from policy.loaded import LoadedPolicy
from processors.pipelines import as_floats
from processors.statistics import is_still
from reports.figures import horizon_figure
from runtime import VALIDATE, is_out_of_memory, seed_all
from sim.environments import make_env
from sim.rollout import check_fits, first_observation, run_episodes, summary


def spread(starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """(at most `count`,) rows, evenly spread over the given episodes; all of them for 0."""
    rows = torch.cat([torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    if count == 0 or count >= len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def action_names(meta) -> list[str]:
    """(A,) names of the joints, numbered where the dataset has none, or not one for each."""
    size, names = meta.features["action"]["shape"][0], meta.features["action"].get("names")
    message = isinstance(names, list) and len(names) == size == len(set(map(str, names)))
    return list(map(str, names)) if message else [f"action {i}" for i in range(size)]


@dataclass
class Errors:
    """What a policy got wrong over a set of samples.

    Attributes:
        loss: mean of the policy's own loss, None if it was not asked for, or will be another one later (vqbet's first phase).
        grid: (T, A) mean absolute action error in robot units, of each joint and step of the chunk, as far as the recording goes;
            None without chunks.
        spread: (A,) standard deviation of the recorded actions, to measure errors by; 0 of a joint that is still.
        names: (A,) joints.
    """

    loss: float | None
    grid: np.ndarray | None
    spread: np.ndarray
    names: list[str]

    def line(self) -> dict:
        """As a line of metrics.jsonl has it: by joint in robot units, and by step of the chunk in standard deviations."""
        line = {} if self.loss is None else {"val_loss": self.loss}
        if self.grid is not None:
            moving = self.spread > 0
            relative = (self.grid[:, moving] / self.spread[moving]).mean(1) if moving.any() else self.grid.mean(1)
            line["val_action_error"] = float(relative.mean())
            line["val_error_by_joint"] = dict(zip(self.names, self.grid.mean(0).tolist(), strict=True))
            line["val_error_by_step"] = relative.tolist()
        return line


@torch.no_grad()
def measure(
    policy, preprocess, postprocess, loader, rows: Tensor, seed: int, with_loss: bool = True, most: int | None = None
) -> Errors:
    """Compare the policy with the recording at each of `rows`; the policy is left in eval mode.

    Randomness is a function of (seed, batch): two calls with the same weights give the same numbers.

    Args:
        loader: the batches' maker, a data.loader.Loader.
        rows: (N,) rows of its source.
        most: samples in a batch, if 8 are too many: another number draws other noise.
    """
    policy.eval()
    device, source = next(policy.parameters()).device, loader.source
    now = loader.deltas["action"].tolist().index(0) if "action" in loader.deltas else 0
    loss, weights, total, count = torch.zeros((), device=device), 0, 0.0, 0.0
    chunks, with_loss = True, with_loss and not in_first_phase(policy)
    for number, part in enumerate(rows.split(min(8, most or 8))):
        seed_all(seed, VALIDATE, number)
        batch = loader.batch_of(part)
        ready = preprocess(as_floats(batch, source.meta, device))
        if with_loss:
            set_phase(policy, -1)  # it does not count
            masked = counts_valid_actions(policy.config) and "action_is_pad" in batch
            weight = int((~batch["action_is_pad"]).sum()) if masked else len(part)  # what its loss is a mean over
            loss, weights = loss + policy.forward(ready)[0] * weight, weights + weight
        try:
            predicted = postprocess(predict_chunk(policy, ready)).float().cpu() if chunks else None  # (B, T, A)
        except NotImplementedError:
            chunks = False
        if chunks:
            recorded = batch["action"].float().reshape(len(part), -1, predicted.shape[-1])[:, now:]  # (B, T', A)
            steps = min(predicted.shape[1], recorded.shape[1])
            there = ~batch["action_is_pad"][:, now : now + steps, None] if "action_is_pad" in batch else torch.ones(1)
            error = (predicted[:, :steps] - recorded[:, :steps]).abs() * there
            total, count = total + error.double().sum(0), count + there.double().expand_as(error).sum(0)
    policy.reset()
    actions = source.columns["action"].double()
    return Errors(
        loss.item() / weights if with_loss else None,
        (total / count)[count[:, 0] > 0].numpy() if chunks else None,  # (T, A)
        torch.where(is_still(actions), 0.0, actions.std(0)).reshape(-1).numpy(),
        action_names(source.meta),
    )


@torch.no_grad()
def permutation_importance(
    policy, preprocess, postprocess, loader, keys, rows: Tensor, scale, seed: int
) -> dict[str, float] | None:
    """How far the predicted actions move when one observation is another moment's and the others stay: 0 of one that is not used.

    One input is permuted over the samples, as for permutation importance (Breiman, Random Forests, 2001).

    Args:
        keys: observations of the dataset.
        rows: (N,) rows of the loader's source to try it at.
        scale: (A,) standard deviations of the recorded actions, 0 of a joint that is still.

    Returns:
        Of each key the mean absolute change in standard deviations, over samples, steps of the chunk and joints that move;
        None for a policy without chunks, of a single sample, or where nothing moves.
    """
    policy.eval()
    device, moving = next(policy.parameters()).device, torch.from_numpy(scale > 0)
    if len(rows) < 2 or not moving.any():
        return None
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    total = dict.fromkeys(keys, 0.0)

    def predicted(batch: dict, number: int) -> Tensor:
        seed_all(seed, VALIDATE, number)
        actions = postprocess(predict_chunk(policy, preprocess(batch))).float().cpu()  # (B, T, A); Macs have no double
        return actions[..., moving] / torch.from_numpy(scale)[moving]

    try:
        for number, part in enumerate(rows.tensor_split(-(-len(rows) // 8))):  # a part has two samples at least
            batch = as_floats(loader.batch_of(part), loader.source.meta, device)
            plain = predicted(dict(batch), number)
            for key in keys:
                other = predicted({**batch, key: batch[key].roll(1, 0)}, number)
                total[key] += (other - plain).abs().mean().item() * len(part) / len(rows)
    except NotImplementedError:
        return None
    finally:
        policy.reset()
    return total


FIRST_SEED = 1000  # of a simulation's episodes, as lerobot-eval's; the shipped demonstrations are of 0 to 39


class Evaluator:
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
                self.env = make_env(config.eval_env, config.eval_task, config.eval_args)
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
