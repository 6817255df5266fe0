"""Closed loop: run a policy in a simulated task, episode by episode from fixed seeds, and count how often it succeeds."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from runtime import EVAL, seed_all
from sim.environments import Simulation, check_batch


@dataclass
class Episode:
    """One try: the seed that it started from, how it ended, its rewards' sum, and its images, all or only the last."""

    seed: int
    success: bool
    steps: int
    reward: float
    frames: list[np.ndarray] = field(repr=False)  # (H, W, 3) uint8 each


def run_episodes(
    simulation: Simulation,
    policy,
    seeds: list[int],
    num_videos: int = 0,
    quiet: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[Episode]:
    """Run an episode for each seed, with a progress bar.

    Args:
        policy: a LoadedPolicy or AsyncPolicy; None for the environment's scripted expert.
        num_videos: keep every frame of so many successes and as many failures, the first ones.
        is_stopped: asked before every step; True drops the episode and the ones after it.
    """
    from tqdm.auto import tqdm

    episodes = []
    with tqdm(seeds, unit="episode", disable=quiet or not sys.stderr.isatty()) as bar:
        for seed in bar:
            outcomes = [episode.success for episode in episodes]
            wants_video = min(outcomes.count(True), outcomes.count(False)) < num_videos
            episode = run_episode(simulation, policy, seed, wants_video, is_stopped)
            if episode is None:
                break
            if outcomes.count(episode.success) >= num_videos:
                del episode.frames[:-1]
            episodes.append(episode)
            bar.set_postfix(success=f"{np.mean([*outcomes, episode.success]):.0%}", refresh=False)
    return episodes


def run_episode(
    simulation: Simulation, policy, seed: int, keep_frames: bool, is_stopped: Callable[[], bool]
) -> Episode | None:
    """Run one episode from a seed, which also determines the policy's randomness. None if it is stopped."""
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    env = simulation.env
    if policy is not None:
        policy.reset()  # before seeding: an AsyncPolicy waits here for a thread that may still draw noise
    seed_all(seed, EVAL)
    observation, _ = env.reset(seed=[seed], options={NEW_ROLLOUT_OPTION: True})
    frames = []
    reward = 0.0
    for step in range(1, simulation.max_steps + 1):
        if is_stopped():
            return None
        if not keep_frames:
            frames.clear()
        frames.append(first_image(env, observation))

        if policy is None:
            action = np.stack(env.call("expert_action"))
        else:
            batch = simulation.batch_of(observation)
            if step == 1:
                check_batch(batch, policy.needed(batch))
            batch = {key: value for key, value in batch.items() if key in policy.expected or key == "task"}
            action = policy.select(batch)  # (1, A)
            action = simulation.postprocess({"action": action})["action"].cpu().numpy()

        observation, step_reward, terminated, truncated, info = env.step(action)
        reward += float(step_reward[0])
        if terminated[0] or truncated[0]:
            break
    return Episode(seed=seed, success=is_success(info), steps=step, reward=reward, frames=frames)


def is_success(info: dict) -> bool:
    """Whether the last step was a success; after an automatic reset, gymnasium keeps that in final_info."""
    last = info.get("final_info", info)
    return bool(np.asarray(last.get("is_success", [False])).reshape(-1)[0])


def first_image(env, observation: dict) -> np.ndarray:
    """(H, W, 3) uint8: the first camera's, or the environment's own view where the observation has no images."""
    pixels = observation["pixels"] if "pixels" in observation else env.call("render")
    if isinstance(pixels, dict):
        pixels = next(iter(pixels.values()))
    return pixels[0]


def wilson_interval(successes: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a success rate, which also holds near 0 and 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    rate = successes / tries
    spread = z * z / tries
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / tries + spread / (4 * tries)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(episodes: list[Episode]) -> dict:
    """Success rate with its 95 % interval, lengths, and every episode, for JSON."""
    successes = sum(episode.success for episode in episodes)
    low, high = wilson_interval(successes, len(episodes))
    lengths = [episode.steps for episode in episodes if episode.success]
    return {
        "success_rate": successes / len(episodes),
        "success_low": low,
        "success_high": high,
        "successes": successes,
        "num_episodes": len(episodes),
        "median_steps_of_successes": float(np.median(lengths)) if lengths else None,
        "episodes": [{"seed": e.seed, "success": e.success, "steps": e.steps, "reward": e.reward} for e in episodes],
    }
