"""The actions that a policy predicts from one moment on, for whole batches at a time."""

import torch
from torch import Tensor


@torch.no_grad()
def predict_chunk(policy, batch: dict, rest: Tensor | None = None, settled: int = 0) -> Tensor:
    """(B, T, A) normalised actions, the first being that of the moment itself.

    Args:
        policy: any LeRobot policy that predicts chunks; its queues are emptied.
        batch: preprocessed, with the history (B, n_obs_steps, ...) that the policy was trained on.
        rest: (B, R, A) what was planned from now on, for a policy that goes over from it (flow).
        settled: of these, how many are carried out before the chunk is there.

    Raises:
        NotImplementedError: this policy has no chunks.
    """
    from lerobot.policies.utils import populate_queues
    from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES

    policy.eval()
    policy.reset()
    queues = getattr(policy, "_queues", {})
    if not any(key.startswith("observation") for key in queues):
        known = rest is not None and hasattr(policy.config, "blend_steps")
        return policy.predict_action_chunk(batch, **({"rest": rest, "settled": settled} if known else {}))
    cameras = list(policy.config.image_features)
    for step in range(policy.config.n_obs_steps):  # as select_action would have seen them, one after the other
        now = {key: batch[key][:, step] for key in policy.config.input_features}
        if cameras:
            now |= {OBS_IMAGES: torch.stack([now[key] for key in cameras], dim=-4), OBS_IMAGE: now[cameras[0]]}
        populate_queues(queues, now)
    chunk = policy.predict_action_chunk(now)
    policy.reset()
    return chunk
