"""Flow policies of the smallest size, without a dataset."""

import torch

from helpers.runs import SMALL_POLICY_ARGS
from policy.factory import build_policy, policy_config

TINY = SMALL_POLICY_ARGS["flow"].split()


def tiny_flow(*overrides: str, cameras: int = 1, state: int = 3, actions: int = 2, tasks=()):
    """A flow policy for cameras of 32x32 pixels, a state and actions of so many dimensions; always the same weights."""
    from lerobot.configs import FeatureType, PolicyFeature

    config = policy_config("flow", [*TINY, *overrides], "cpu")
    config.input_features = {
        f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for i in range(cameras)
    }
    config.input_features["observation.state"] = PolicyFeature(FeatureType.STATE, (state,))
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (actions,))}
    config.tasks = list(tasks) or config.tasks
    torch.manual_seed(0)
    return build_policy(config, None)
