"""What training needs to know about a policy's loss: what it averages over, and which phase vqbet is in."""


def loss_averages_over_actions(config) -> bool:
    """Whether the policy's loss is a mean over unpadded actions, instead of a mean over samples.

    The mean of several micro-batches or ranks must then weight each by its number of unpadded actions.
    """
    masks_padding = getattr(config, "do_mask_loss_for_padding", False)  # diffusion
    skips_padding = not getattr(config, "supervise_padding_actions", True)  # eo1
    return masks_padding or skips_padding or config.type in ("act", "flow", "smolvla", "vla_jepa")


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
