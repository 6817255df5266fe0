"""Defaults that a policy sets for training, and the flags that override them."""

from dataclasses import replace

import torch

from config import TrainConfig
from errors import UserError, as_user_error
from policy.factory import policy_config_class
from policy.weights_dtype import set_weights_dtype


def merge_training_preset(config: TrainConfig, picture_sizes: list, device, fresh: bool) -> TrainConfig:
    """The settings with those that are None filled in: from the preset of a new policy, else as in lerobot-train.

    Args:
        config: the run's settings.
        picture_sizes: (H, W) of each camera, whose pictures a preset may shrink.
        device: torch.device to train on.
        fresh: whether the run starts at step 0.
    """
    preset = {"batch_size": 8, "ema_decay": 0.0, "augment": False, "augment_style": "full"}
    if fresh and config.policy_path is None:
        policy = policy_config_class(config.policy)
        if hasattr(policy, "training_preset"):
            preset |= policy.training_preset(device.type, picture_sizes)
    unset = {name: value for name, value in preset.items() if getattr(config, name) is None}
    return replace(config, **unset)


def apply_training_flags(policy_config, config: TrainConfig) -> None:
    """Write --lr, --weight_decay, --weights_dtype and --gradient_checkpointing into the policy's config.

    Raises:
        UserError: the policy has no gradient checkpointing.
    """
    if config.lr is not None and hasattr(policy_config, "optimizer_lr"):
        policy_config.optimizer_lr = config.lr
    if config.weight_decay is not None and hasattr(policy_config, "optimizer_weight_decay"):
        policy_config.optimizer_weight_decay = config.weight_decay
    set_weights_dtype(policy_config, config.weights_dtype)
    if hasattr(policy_config, "gradient_checkpointing"):
        if config.gradient_checkpointing is not None:
            policy_config.gradient_checkpointing = config.gradient_checkpointing
    elif config.gradient_checkpointing:
        raise UserError(f"--gradient_checkpointing: policy {policy_config.type} has none. Leave the flag out")


def optimizer_preset(policy_config, config: TrainConfig):
    """LeRobot's config of the policy's optimizer, with --lr, --weight_decay and --grad_clip_norm over it."""
    flags = {"lr": config.lr, "weight_decay": config.weight_decay, "grad_clip_norm": config.grad_clip_norm}
    given = {name: value for name, value in flags.items() if value is not None}
    return replace(policy_config.get_optimizer_preset(), **given)


def check_presets(policy_config, config: TrainConfig) -> None:
    """Build the policy's optimizer and schedule for a single number, to see whether they take the policy's settings.

    Raises:
        UserError: one of them refuses a value.
    """
    number = torch.zeros(1, requires_grad=True)
    preset = optimizer_preset(policy_config, config)
    schedule = scheduler_preset(policy_config, config)
    with as_user_error(f"policy {policy_config.type}: its optimizer", invalid=ValueError):
        if preset.type in ("adam", "adamw", "sgd"):  # others take a policy's parameters by name
            preset.build([number])
    with as_user_error(f"policy {policy_config.type}: its learning rates", invalid=(ValueError, ArithmeticError)):
        if schedule is not None:
            factor = schedule.build(torch.optim.SGD([number], lr=1.0), config.steps).lr_lambdas[0]
            for step in (0, 1, config.steps):
                factor(step)


def scheduler_preset(policy_config, config: TrainConfig):
    """LeRobot's config of the policy's learning rate schedule, with --warmup_steps; None for a schedule of the flags."""
    if config.lr_schedule is not None:
        return None
    preset = policy_config.get_scheduler_preset()
    if preset is None or config.warmup_steps is None:
        return preset
    preset = replace(preset, num_warmup_steps=config.warmup_steps)
    if hasattr(preset, "num_decay_steps"):
        # LeRobot scales the warm-up down with a decay that is longer than the run
        preset = replace(preset, num_decay_steps=min(preset.num_decay_steps, config.steps))
    return preset
