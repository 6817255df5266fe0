"""One optimizer step: a batch, in parts where it is accumulated, through the policy and back, and the weights moved."""

import contextlib

import torch
from torch import Tensor

from checkpoint import OWN_WEIGHTS, load_optimizer
from config import TrainConfig
from optim import Average, make_optimizer, make_schedule
from policy import counts_valid_actions, set_phase
from processors import as_floats
from runtime import STEP, NoHostSync, make_scaler, seed_all
from world import World


class Learner:
    """The policy with everything that moves it.

    Args:
        config: the run's settings.
        world: its processes.
        policy: to be trained, on its device.
        preprocess: LeRobot's pipeline from a batch to what the policy takes.
        meta: LeRobot's metadata of the dataset.

    Attributes:
        model: the policy as it is called in training: compiled and wrapped for several processes as the settings say.
        optimizer, average, scaler: what a checkpoint holds besides the weights.
    """

    def __init__(self, config: TrainConfig, world: World, policy, preprocess, meta):
        self.config, self.world, self.policy, self.preprocess, self.meta = config, world, policy, preprocess, meta
        optimizer, self.clip_norm = make_optimizer(policy, config)
        if config.compile:
            torch._inductor.config.fallback_random = True  # noise and dropout as they are uncompiled
            torch._dynamo.config.capture_scalar_outputs = True  # a policy's .item() breaks no graph
            policy.compile()
        share = world.share(config.batch_size, config.grad_accumulation_steps) // config.grad_accumulation_steps
        self.model, self.optimizer = world.wrap(policy, optimizer, self.clip_norm, share, config.precision)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._begin(config)

    def _begin(self, config: TrainConfig) -> None:
        self.config = config
        self.scaler = make_scaler(config.precision, self.world.device)
        self.average = Average(self.policy, config.ema_decay, copying=self.world.in_parts)
        self.factor = make_schedule(self.policy, config)

    def start_over(self, config: TrainConfig) -> None:
        """As if no step had been taken, but for the weights."""
        self.optimizer.state.clear()
        self._begin(config)

    def load(self, checkpoint, scaler: dict) -> None:
        """Take over a checkpoint's trained weights, where the policy has loaded their average, and the optimizer's state."""
        if (checkpoint / OWN_WEIGHTS).exists():
            self.world.load_weights(self.policy, checkpoint / OWN_WEIGHTS)
        load_optimizer(checkpoint, self.world, self.policy, self.optimizer)
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)

    def state(self) -> tuple[dict, dict, dict]:
        """The weights to act with, the trained ones where those are their average, and the optimizer's state, each whole."""
        own = {} if self.average.decay == 0 else self.world.weights(self.policy)
        with self.average.in_place():
            return self.world.weights(self.policy), own, self.world.optimizer_state(self.policy, self.optimizer)

    def take_average(self, whole) -> None:
        """Change over to the weights to act with, in the policy and in its `whole` copy."""
        self.average.swap()
        if self.world.in_parts:
            weights = self.world.weights(self.policy)
            if whole is not None:
                whole.load_state_dict(weights)

    @contextlib.contextmanager
    def acting(self, whole):
        """Within this, `whole` has the weights to act with."""
        self.take_average(whole)
        try:
            yield
        finally:
            self.average.swap()

    def step(self, batch: dict, step: int) -> tuple[Tensor, dict | None, Tensor]:
        """Take step number `step` on this process' share of its batch.

        Returns:
            This share's loss, the policy's sub-losses of its last part, and the gradient norm of the whole batch, all on the device.
        """
        # dropout and noise are a function of (seed, step, rank)
        seed_all(self.config.seed, STEP, step, self.world.rank)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(step)
        count, total = self.config.grad_accumulation_steps, torch.zeros((), device=self.world.device)
        for number, part in enumerate(parts_of(batch, count)):
            set_phase(self.policy, step)
            with self.world.last_of_step(self.model, number == count - 1):
                loss, parts = self.forward(part)
                self.world.backward(self.model, self.scaler.scale(loss / count))
            total = total + loss.detach() / count
        grad_norm = self.world.move(self.policy, self.optimizer, self.scaler, self.clip_norm)
        self.average.update(step + 1)
        if hasattr(self.policy, "update"):
            self.policy.update()  # tdmpc's moving average, as lerobot-train calls it
        return total, parts, grad_norm

    def forward(self, batch: dict) -> tuple[Tensor, dict | None]:
        """The policy's loss of a part of a batch, and its sub-losses."""
        batch = as_floats(batch, self.meta, self.world.device)
        weight = batch.pop("weight").mean()  # 1 for a whole batch, up to rounding
        if self.config.augment and self.meta.camera_keys:
            from processors.augment import augment

            batch = augment(batch, self.meta.camera_keys, self.config.seed)
        no_wait = (
            contextlib.nullcontext() if self.config.compile else NoHostSync()
        )  # which compiled kernels do not survive
        with no_wait, self.world.autocast(self.config.precision):
            loss, parts = self.model(self.preprocess(batch))
        shared = self.world.size * self.config.grad_accumulation_steps > 1
        if shared and counts_valid_actions(self.policy.config):
            loss = loss * weight
        return loss, parts


def parts_of(batch: dict, count: int):
    """The batch in `count` equal parts."""
    size = len(batch["sample"]) // count
    for start in range(0, size * count, size):
        yield {key: item[start : start + size] for key, item in batch.items()}
