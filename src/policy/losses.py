"""What training needs to know about a policy's loss: what it averages over, and which phase vqbet is in."""

# What the losses of LeRobot 0.6.1's policies average over, by their sources; two more have a setting for it. pi0_fast,
# molmoact2 and wall_x average over tokens, whose number is known only inside them.
OVER_ACTIONS = ("act", "evo1", "groot", "smolvla", "vla_jepa")
OVER_SAMPLES = ("fastwam", "lingbot_va", "pi0", "pi05", "vqbet", "xvla")


def loss_averages_over_actions(config) -> bool | None:
    """Whether the policy's loss is a mean over unpadded actions, instead of a mean over samples; None if that is not known.

    The mean of several micro-batches or ranks must then weight each by its number of unpadded actions. A config class can
    declare it with an attribute or property `loss_averages_over_actions`.
    """
    declared = getattr(config, "loss_averages_over_actions", None)
    if isinstance(declared, bool):
        return declared
    if hasattr(config, "do_mask_loss_for_padding"):  # diffusion, multi_task_dit
        return config.do_mask_loss_for_padding
    if hasattr(config, "supervise_padding_actions"):  # eo1
        return not config.supervise_padding_actions
    if config.type in OVER_ACTIONS + OVER_SAMPLES:
        return config.type in OVER_ACTIONS
    return None


def unknown_average(config, micro_batches: int) -> list[str]:
    """A warning where a step has several micro-batches, and nothing says how their losses make up that of the whole batch.

    Args:
        micro_batches: of a step, over all processes.
    """
    has_padding = any(config.action_delta_indices or [])  # beyond an episode's end
    if micro_batches == 1 or not has_padding or loss_averages_over_actions(config) is not None:
        return []
    return [
        f"each step adds up {micro_batches} parts of its batch, and policy {config.type} does not say what its loss averages over: "
        "their gradients are weighted equally, which is not the gradient of the whole batch if the loss counts only some "
        f"actions. Set loss_averages_over_actions = True or False in {type(config).__name__} if that is a class of yours"
    ]


def set_vqbet_phase(policy, step: int) -> None:
    """Set the step by which vqbet decides whether it still trains its quantizer; other policies have no phases.

    vqbet counts its steps in an attribute that is not part of its state dict, so a resumed run would count from 0.
    """
    if policy.config.type != "vqbet":
        return
    quantizer = policy.vqbet.action_head.vqvae_model
    quantizer.optimized_steps = step
    if quantizer.discretized:
        # vqbet does this once, at the end of the first phase; a resumed run has to repeat it
        quantizer.eval()
        quantizer.vq_layer.requires_grad_(False)


def is_training_quantizer(policy) -> bool:
    """Whether this is vqbet in its first phase, whose loss cannot be compared with the loss afterwards."""
    return policy.config.type == "vqbet" and not policy.vqbet.action_head.vqvae_model.discretized
