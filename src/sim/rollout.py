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

    @property
    def outcome(self) -> tuple[bool, int, float]:
        """What is the same each time, if policy and simulation are deterministic."""
        return self.success, self.steps, self.reward


def run_episodes(
    simulation: Simulation,
    policy,
    seeds: list[int],
    quiet: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> list[Episode]:
    """Run an episode for each seed, with a progress bar.

    Args:
        policy: a LoadedPolicy or AsyncPolicy; None for the environment's scripted expert.
        is_stopped: asked before every step; True drops the episode and the ones after it.
    """
    from tqdm.auto import tqdm

    episodes = []
    with tqdm(seeds, unit="episode", disable=quiet or not sys.stderr.isatty()) as bar:
        for seed in bar:
            episode = run_episode(simulation, policy, seed, is_stopped=is_stopped)
            if episode is None:
                break
            episodes.append(episode)
            bar.set_postfix(success=f"{np.mean([episode.success for episode in episodes]):.0%}", refresh=False)
    return episodes


def run_episode(
    simulation: Simulation,
    policy,
    seed: int,
    film: bool = False,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Episode | None:
    """Run one episode from a seed, which also determines the policy's randomness. None if it is stopped.

    Pictures are rendered only when somebody looks: the policy, as far as it says so, or a film. What nobody sees changes
    no outcome.

    Args:
        film: keep the images of all steps, not only the last.
    """
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    env = simulation.env
    if policy is not None:
        policy.reset()  # before seeding: an AsyncPolicy waits here for a thread that may still draw noise
    seed_all(seed, EVAL)
    set_rendering(env, True)
    observation, _ = env.reset(seed=[seed], options={NEW_ROLLOUT_OPTION: True})
    frames = [first_image(env, observation)]
    reward = 0.0
    for step in range(1, simulation.max_steps + 1):
        if is_stopped():
            return None
        if policy is None:
            action = np.stack(env.call("expert_action"))
        else:
            batch = simulation.batch_of(observation)
            if step == 1:
                check_batch(batch, policy.needed(batch))
            batch = {key: value for key, value in batch.items() if key in policy.expected or key == "task"}
            action = policy.select(batch)  # (1, A)
            action = simulation.postprocess({"action": action})["action"].cpu().numpy()

        set_rendering(env, film or (policy is not None and policy.looks))
        observation, step_reward, terminated, truncated, info = env.step(action)
        reward += float(step_reward[0])
        is_over = bool(terminated[0] or truncated[0])
        if film or is_over or step == simulation.max_steps:
            frames.append(last_image(env, observation, info, frames[-1]))
        if is_over:
            break
    if not film:
        del frames[:-1]
    return Episode(seed=seed, success=is_success(info), steps=step, reward=reward, frames=frames)


def set_rendering(env, on: bool) -> None:
    """Let an environment of ours (sim.scripted) render its next pictures or not. Others always render."""
    for single in getattr(env, "envs", ()):
        if hasattr(single.unwrapped, "renders"):
            single.unwrapped.renders = on


def is_success(info: dict) -> bool:
    """Whether the last step was a success; after an automatic reset, gymnasium keeps that in final_info."""
    last = info.get("final_info", info)
    return bool(np.asarray(last.get("is_success", [False])).reshape(-1)[0])


def first_image(env, observation: dict) -> np.ndarray:
    """(H, W, 3) uint8: the first camera's, or the environment's own view where the observation has no images."""
    pixels = observation["pixels"] if "pixels" in observation else env.call("render")
    return first_camera(pixels)[0]


def first_camera(pixels):
    return next(iter(pixels.values())) if isinstance(pixels, dict) else pixels


def last_image(env, observation: dict, info: dict, before: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: what the first camera shows after a step, or `before`, from the step before it.

    After an automatic reset, `observation` shows the next episode, and gymnasium keeps the last one's in final_obs.
    """
    if "final_obs" not in info:
        return first_image(env, observation)
    last = info["final_obs"][0]
    return first_camera(last["pixels"]) if "pixels" in last else before


def wilson_interval(successes: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a success rate, which also holds near 0 and 1.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).
    """
    rate = successes / tries
    spread = z * z / tries
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / tries + spread / (4 * tries)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def rates(successes: int, num_episodes: int) -> dict:
    """Success rate with its 95 % interval, for JSON."""
    low, high = wilson_interval(successes, num_episodes)
    return {
        "success_rate": successes / num_episodes,
        "success_low": low,
        "success_high": high,
        "successes": successes,
        "num_episodes": num_episodes,
    }


def summary(episodes: list[Episode]) -> dict:
    """Success rate with its 95 % interval, lengths, and every episode, for JSON."""
    lengths = [episode.steps for episode in episodes if episode.success]
    return {
        **rates(sum(episode.success for episode in episodes), len(episodes)),
        "median_steps_of_successes": float(np.median(lengths)) if lengths else None,
        "episodes": [{"seed": e.seed, "success": e.success, "steps": e.steps, "reward": e.reward} for e in episodes],
    }


def summary_of_tasks(numbers: list[dict], groups: dict[str, list[str]]) -> dict:
    """Success of several tasks, of groups of them, and of all.

    Args:
        numbers: content of each task's numbers.json.
        groups: {group: its tasks}; groups without any of these tasks are left out.
    """
    tasks = {}
    for task in numbers:
        kept = ("successes", "num_episodes", "success_rate", "success_low", "success_high", "max_steps", "episodes")
        tasks[task["task"]] = {key: task[key] for key in kept}

    def together(names: list[str]) -> dict:
        counted = {key: sum(tasks[name][key] for name in names) for key in ("successes", "num_episodes")}
        return {"num_tasks": len(names), **rates(**counted)}

    by_group = {}
    for group, names in groups.items():
        present = [name for name in names if name in tasks]
        if present:
            by_group[group] = together(present)
    means = [group["success_rate"] for group in by_group.values()]
    return {
        "all": together(list(tasks)),
        "mean_of_groups": float(np.mean(means)) if means else None,
        "groups": by_group,
        "tasks": tasks,
    }
