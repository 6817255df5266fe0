"""Predict chunks of actions for whole batches.

B samples, S steps of history, T steps of a chunk, R planned steps, A joints, C channels, H and W pixels.
"""

import contextlib
from dataclasses import replace

import torch
from lerobot.policies.rtc import RTCConfig
from lerobot.policies.utils import populate_queues
from lerobot.utils.constants import OBS_IMAGE, OBS_IMAGES
from torch import Tensor

from errors import UserError

QUEUES = {  # type of a policy: its attribute with the planned actions, or with queues among which they are
    "flow": "_actions",
    **dict.fromkeys(("act", "eo1", "evo1", "fastwam", "molmoact2", "pi0", "pi05", "pi0_fast"), "_action_queue"),
    **dict.fromkeys(("diffusion", "multi_task_dit", "smolvla", "vqbet", "xvla"), "_queues"),
}


@torch.no_grad()
def predict_chunk(policy, batch: dict, planned: Tensor | None = None, num_committed: int = 0) -> Tensor:
    """(B, T, A) normalised actions. The first one belongs to the moment of the observation.

    Args:
        policy: a LeRobot policy that predicts chunks; it is reset.
        batch: preprocessed observations, with history (B, S, ...) if the policy was trained on it.
        planned: (B, R, A) normalised actions planned from this moment on, for a policy that continues them: flow, and those
            with real-time chunking, where `switch_rtc_on` came first.
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
        if planned is not None and supports_rtc(policy):
            return policy.predict_action_chunk(
                batch,
                prev_chunk_left_over=planned,
                inference_delay=num_committed,
                execution_horizon=min(execution_horizon(policy.config, num_committed), planned.shape[1]),
            )
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


def count_planned(policy) -> int | None:
    """How many actions `select_action` will still return without looking at an observation; None where that is not known.

    It is known of the policies in QUEUES, since their code was read: they predict when their queue is empty, and only then.
    """
    queue = getattr(policy, QUEUES.get(policy.config.type, ""), None)  # act has none with temporal ensembling
    if isinstance(queue, dict):
        queue = queue["action"]
    return None if queue is None else len(queue)


def supports_rtc(policy) -> bool:
    """Whether LeRobot has real-time chunking (RTC) for a policy, as for smolvla, pi0 and pi05."""
    return hasattr(policy.config, "rtc_config") and policy.supports_rtc()


def switch_rtc_on(policy) -> None:
    """Let a policy predict with RTC, by the settings in its config or else LeRobot's, and freeze its weights."""
    settings = policy.config.rtc_config or RTCConfig()
    policy.config.rtc_config = replace(settings, enabled=True)
    policy.init_rtc_processor()
    # RTC predicts with gradients enabled: weights that need them would keep the activations of every denoising step.
    policy.requires_grad_(False)


@contextlib.contextmanager
def rtc_off(policy):
    """RTC switched off for a while: LeRobot's select_action refuses to work with it."""
    settings = getattr(policy.config, "rtc_config", None)
    if settings is None or not settings.enabled:
        yield
        return
    settings.enabled = False
    try:
        yield
    finally:
        settings.enabled = True


def execution_horizon(config, num_committed: int) -> int:
    """How many planned actions RTC guides a chunk towards: the committed ones fully, those after them less and less.

    LeRobot's setting, 10, unless the committed actions take up more than half of it, or it is more than half of the chunk.
    """
    settings = config.rtc_config or RTCConfig()
    return min(max(settings.execution_horizon, 2 * num_committed), chunk_length(config)[0] // 2)


def chunk_length(config) -> tuple[int, str]:
    """T, and the setting that says so. A policy without a chunk size of its own returns the actions that it carries out.

    Raises:
        UserError: the policy predicts no chunks.
    """
    for name in ("chunk_size", "action_chunk_size", "n_action_steps"):
        if hasattr(config, name):
            return getattr(config, name), name
    raise UserError(f"policy {config.type} predicts no chunks. Act without --ahead")
