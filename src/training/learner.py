"""One optimizer step: a batch, in parts where it is accumulated, through the policy and back, and the weights moved."""

import contextlib
import math
from dataclasses import asdict, replace

import torch
from torch import Tensor

from checkpoints.folder import TRAINED_WEIGHTS, load_optimizer
from config import TrainConfig
from policy.factory import counts_valid_actions, set_phase
from policy.presets import preset_schedule
from processors.pipelines import as_floats
from runtime import STEP, NoHostSync, make_scaler, seed_all
from training.distributed import Distributed


class Learner:
    """The policy with everything that moves it.

    Args:
        config: the run's settings.
        distributed: its processes.
        policy: to be trained, on its device.
        preprocess: LeRobot's pipeline from a batch to what the policy takes.
        meta: LeRobot's metadata of the dataset.

    Attributes:
        model: the policy as it is called in training: compiled and wrapped for several processes as the settings say.
        optimizer, average, scaler: what a checkpoint holds besides the weights.
    """

    def __init__(self, config: TrainConfig, distributed: Distributed, policy, preprocess, meta):
        self.config, self.distributed, self.policy, self.preprocess, self.meta = (
            config,
            distributed,
            policy,
            preprocess,
            meta,
        )
        optimizer, self.clip_norm = make_optimizer(policy, config)
        if config.compile:
            torch._inductor.config.fallback_random = True  # noise and dropout as they are uncompiled
            torch._dynamo.config.capture_scalar_outputs = True  # a policy's .item() breaks no graph
            policy.compile()
        share = (
            distributed.local_batch_size(config.batch_size, config.grad_accumulation_steps)
            // config.grad_accumulation_steps
        )
        self.model, self.optimizer = distributed.wrap(policy, optimizer, self.clip_norm, share, config.precision)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self._begin(config)

    def _begin(self, config: TrainConfig) -> None:
        self.config = config
        self.scaler = make_scaler(config.precision, self.distributed.device)
        self.average = EMA(self.policy, config.ema_decay, copying=self.distributed.is_sharded)
        self.factor = make_schedule(self.policy, config)

    def start_over(self, config: TrainConfig) -> None:
        """As if no step had been taken, but for the weights."""
        self.optimizer.state.clear()
        self._begin(config)

    def load(self, checkpoint, scaler: dict) -> None:
        """Take over a checkpoint's trained weights, where the policy has loaded their average, and the optimizer's state."""
        if (checkpoint / TRAINED_WEIGHTS).exists():
            self.distributed.load_weights(self.policy, checkpoint / TRAINED_WEIGHTS)
        load_optimizer(checkpoint, self.distributed, self.policy, self.optimizer)
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)

    def state(self) -> tuple[dict, dict, dict]:
        """The weights to act with, the trained ones where those are their average, and the optimizer's state, each whole."""
        own = {} if self.average.decay == 0 else self.distributed.weights(self.policy)
        with self.average.in_place():
            return (
                self.distributed.weights(self.policy),
                own,
                self.distributed.optimizer_state(self.policy, self.optimizer),
            )

    def take_average(self, whole) -> None:
        """Change over to the weights to act with, in the policy and in its `whole` copy."""
        self.average.swap()
        if self.distributed.is_sharded:
            weights = self.distributed.weights(self.policy)
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
        seed_all(self.config.seed, STEP, step, self.distributed.rank)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * self.factor(step)
        count, total = self.config.grad_accumulation_steps, torch.zeros((), device=self.distributed.device)
        for number, part in enumerate(parts_of(batch, count)):
            set_phase(self.policy, step)
            with self.distributed.sync_gradients(self.model, number == count - 1):
                loss, parts = self.forward(part)
                self.distributed.backward(self.model, self.scaler.scale(loss / count))
            total = total + loss.detach() / count
        grad_norm = self.distributed.optimizer_step(self.policy, self.optimizer, self.scaler, self.clip_norm)
        self.average.update(step + 1)
        if hasattr(self.policy, "update"):
            self.policy.update()  # tdmpc's moving average, as lerobot-train calls it
        return total, parts, grad_norm

    def forward(self, batch: dict) -> tuple[Tensor, dict | None]:
        """The policy's loss of a part of a batch, and its sub-losses."""
        batch = as_floats(batch, self.meta, self.distributed.device)
        weight = batch.pop("weight").mean()  # 1 for a whole batch, up to rounding
        if self.config.augment and self.meta.camera_keys:
            from processors.augment import augment

            batch = augment(batch, self.meta.camera_keys, self.config.seed)
        no_wait = (
            contextlib.nullcontext() if self.config.compile else NoHostSync()
        )  # which compiled kernels do not survive
        with no_wait, self.distributed.autocast(self.config.precision):
            loss, parts = self.model(self.preprocess(batch))
        shared = self.distributed.size * self.config.grad_accumulation_steps > 1
        if shared and counts_valid_actions(self.policy.config):
            loss = loss * weight
        return loss, parts


def parts_of(batch: dict, count: int):
    """The batch in `count` equal parts."""
    size = len(batch["sample"]) // count
    for start in range(0, size * count, size):
        yield {key: item[start : start + size] for key, item in batch.items()}


def make_optimizer(policy, config: TrainConfig):
    """The preset's optimizer, fused where torch has a fused one, and the norm that gradients are clipped to (or None)."""
    preset = policy.config.get_optimizer_preset()
    preset = replace(
        preset, **{name: getattr(config, name) for name in ("lr", "weight_decay") if getattr(config, name) is not None}
    )
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    params = policy.get_optim_params()
    if preset.type in kinds:
        settings = asdict(preset)
        clip = settings.pop("grad_clip_norm")
        optimizer = kinds[preset.type](params, **settings, fused=True)
    else:
        clip, optimizer = preset.grad_clip_norm, preset.build(params)
    clip = clip if config.grad_clip_norm is None else config.grad_clip_norm
    return optimizer, clip or None


def make_schedule(policy, config: TrainConfig):
    """step -> factor of the peak learning rate: LeRobot's preset unless the flags name a schedule. Has no state to save."""
    preset = preset_schedule(policy.config, config)
    if preset is not None:
        stand_in = torch.optim.SGD(
            [torch.zeros(1, requires_grad=True)], lr=1.0
        )  # a scheduler rewires the optimizer it gets
        return preset.build(stand_in, config.steps).lr_lambdas[0]
    shape, warmup = config.lr_schedule or "constant", config.warmup_steps or 0

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, config.steps - warmup)
        return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[shape]

    return factor


class EMA:
    """Exponential moving average of a policy's weights: trained on are its own, evaluated and saved are these.

    The decay rises to `decay` as (1 + step) / (10 + step), so that the average does not remember the beginning.
    Source: Polyak and Juditsky (1992); the rise is TensorFlow's ExponentialMovingAverage's.

    Args:
        policy: the module whose parameters are averaged.
        decay: such as 0.999; 0 for no average at all.
        copying: change over by copying, where something else holds on to the weights' memory.
    """

    def __init__(self, policy, decay: float, copying: bool = False):
        self.decay, self.own, self.copying = decay, list(policy.parameters()), copying
        self.weights = [] if decay == 0 else [p.detach().clone() for p in self.own]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        if self.decay > 0:
            torch._foreach_lerp_(self.weights, self.own, 1 - min(self.decay, (1 + step) / (10 + step)))

    @contextlib.contextmanager
    def in_place(self):
        """Within this, the policy's weights are the averaged ones."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        if self.decay > 0:
            for i, own in enumerate(self.own):
                if self.copying:
                    held = own.detach().clone()
                    own.copy_(self.weights[i])
                    self.weights[i].copy_(held)
                else:
                    own.data, self.weights[i] = self.weights[i], own.data
