"""A policy's presets, with the flags of the run over them."""

from dataclasses import replace

from config import TrainConfig
from errors import UserError
from policy.factory import policy_class
from processors.pipelines import policy_features


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


def preset_schedule(policy_config, config: TrainConfig):
    """LeRobot's config of the policy's own schedule with the asked warm-up; None where a flag names another, or it has none."""
    preset = None if config.lr_schedule else policy_config.get_scheduler_preset()
    if preset is None or config.warmup_steps is None:
        return preset
    changed = {"num_warmup_steps": config.warmup_steps}
    if hasattr(preset, "num_decay_steps"):  # of a run that is shorter than these LeRobot shortens the warm-up too
        changed["num_decay_steps"] = min(preset.num_decay_steps, config.steps)
    return replace(preset, **changed)


def with_preset(config: TrainConfig, meta, device, fresh: bool) -> TrainConfig:
    """The settings, those that were not given filled in: as a new policy's own preset has them, else as lerobot-train has."""
    preset = {"batch_size": 8, "ema_decay": 0.0, "augment": False}
    if fresh and config.policy_path is None and hasattr(kind := policy_class(config.policy), "training_preset"):
        preset |= kind.training_preset(
            device.type, [f.shape[1:] for f in policy_features(meta, None)[0].values() if f.type.value == "VISUAL"]
        )
    return replace(config, **{name: value for name, value in preset.items() if getattr(config, name) is None})
