"""Predict chunks of actions for whole batches.

B samples, S steps of history, T steps of a chunk, R planned steps, A joints, C channels, H and W pixels.
"""

import torch
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES
from torch import Tensor


@torch.no_grad()
def predict_chunk(policy, batch: dict, planned: Tensor | None = None, num_committed: int = 0) -> Tensor:
    """(B, T, A) normalised actions. The first one belongs to the moment of the observation.

    Args:
        policy: a LeRobot policy that predicts chunks; it is reset.
        batch: preprocessed observations, with history (B, S, ...) if the policy was trained on it.
        planned: (B, R, A) actions planned from this moment on, for a policy that blends into them (flow).
        num_committed: planned actions that are carried out before the chunk is ready.

    Raises:
        NotImplementedError: the policy predicts no chunks.
    """
    policy.eval()
    policy.reset()
    queues = getattr(policy, "_queues", {})
    if not any(key.startswith("observation") for key in queues):
        if planned is not None and hasattr(policy.config, "blend_steps"):
            return policy.predict_action_chunk(batch, planned=planned, num_committed=num_committed)
        return policy.predict_action_chunk(batch)

    # diffusion, vqbet and others read the history from their queues, which select_action fills step by step
    cameras = list(policy.config.image_features)
    for step in range(policy.config.n_obs_steps):
        observation = {key: batch[key][:, step] for key in policy.config.input_features}
        if cameras:
            # (B, cameras, C, H, W)
            observation[OBS_IMAGES] = torch.stack([observation[key] for key in cameras], dim=-4)
            observation[OBS_IMAGE] = observation[cameras[0]]
        populate_queues(queues, observation)
    chunk = policy.predict_action_chunk(observation)
    policy.reset()
    return chunk
