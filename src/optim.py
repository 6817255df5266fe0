"""Optimizer and learning rate: the policy's preset, with the flags of the run over it."""

import contextlib
import math
from dataclasses import asdict, replace

import torch

from config import TrainConfig, UserError


def apply_flags(policy_config, config: TrainConfig) -> None:
    """Write --lr, --weight_decay and --gradient_checkpointing into the policy's own config, which its parts follow.

    Raises:
        UserError: the policy has no gradient checkpointing.
    """
    for flag, name in (("lr", "optimizer_lr"), ("weight_decay", "optimizer_weight_decay")):
        if getattr(config, flag) is not None and hasattr(policy_config, name):
            setattr(policy_config, name, getattr(config, flag))
    if hasattr(policy_config, "gradient_checkpointing") and config.gradient_checkpointing is not None:
        policy_config.gradient_checkpointing = config.gradient_checkpointing
    elif config.gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: policy {policy_config.type} has none: leave the flag out")


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


def preset_schedule(policy_config, config: TrainConfig):
    """LeRobot's config of the policy's own schedule with the asked warm-up; None where a flag names another, or it has none."""
    preset = None if config.lr_schedule else policy_config.get_scheduler_preset()
    if preset is None or config.warmup_steps is None:
        return preset
    changed = {"num_warmup_steps": config.warmup_steps}
    if hasattr(preset, "num_decay_steps"):  # of a run that is shorter than these LeRobot shortens the warm-up too
        changed["num_decay_steps"] = min(preset.num_decay_steps, config.steps)
    return replace(preset, **changed)


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


class Average:
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
