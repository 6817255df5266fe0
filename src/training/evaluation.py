"""How good a policy is on episodes it has not seen: its loss, and how far its actions are from the recorded ones.

B samples, T steps of the chunk from now on, A joints.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from config import TrainConfig, UserError
from data.source import parse_episodes
from policy import counts_valid_actions, in_first_phase, set_phase
from policy.chunk import predict_chunk
from processors import as_floats, is_still
from runtime import VALIDATE, seed_all


def split(source, config: TrainConfig, state=None) -> tuple[Tensor, Tensor]:
    """Positions in `source.episodes` to train on and to hold out, ascending; a function of the settings and of `state`.

    Args:
        state: of the checkpoint that a run goes on from, whose choice is kept where its settings are.

    Raises:
        UserError: nothing would be left to train on.
    """
    count = len(source.episodes)
    chosen: set[int] = set()
    if config.val_episodes:
        wanted = set(parse_episodes(config.val_episodes, source.meta.total_episodes, "--val_episodes"))
        chosen = {i for i, episode in enumerate(source.episodes) if episode in wanted}
    elif config.val_fraction:
        order = np.random.default_rng([config.seed, VALIDATE]).permutation(count)
        drawn = set(order[: max(1, round(config.val_fraction * count))].tolist())
        chosen = held_out_before(source, config, state) or drawn
    if chosen and len(chosen) == count:
        asked = (
            f"--val_episodes {config.val_episodes}" if config.val_episodes else f"--val_fraction {config.val_fraction}"
        )
        raise UserError(f"{asked} holds out all {count} episodes: leave some to train on")
    kept = [i for i in range(count) if i not in chosen]
    return torch.tensor(kept, dtype=torch.int64), torch.tensor(sorted(chosen), dtype=torch.int64)


def held_out_before(source, config: TrainConfig, state) -> set[int]:
    """Positions of what the resumed run's --val_fraction held out: another draw, from a dataset that grew, would call
    unseen what was trained on."""
    was = state and state.trainer_state.get("data")
    if not was or config.val_fraction != state.train_config["val_fraction"]:
        return set()
    return {i for i, place in enumerate(source.places) if place in was["held_out"]}


def spread(starts: Tensor, ends: Tensor, count: int) -> Tensor:
    """(at most `count`,) rows, evenly spread over the given episodes; all of them for 0."""
    rows = torch.cat([torch.arange(a, b) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)])
    if count == 0 or count >= len(rows):
        return rows
    return rows[torch.linspace(0, len(rows) - 1, count).round().long()]


def action_names(meta) -> list[str]:
    """(A,) names of the joints, numbered where the dataset has none, or not one for each."""
    size, names = meta.features["action"]["shape"][0], meta.features["action"].get("names")
    told = isinstance(names, list) and len(names) == size == len(set(map(str, names)))
    return list(map(str, names)) if told else [f"action {i}" for i in range(size)]


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
def reliance(policy, preprocess, postprocess, loader, keys, rows: Tensor, scale, seed: int) -> dict[str, float] | None:
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
