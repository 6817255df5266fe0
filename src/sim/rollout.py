"""Closed loop: run a policy in a simulated task, episode by episode, from fixed seeds, and say how often it succeeds."""

import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from errors import UserError, nearest
from runtime import EVAL, seed_all


@dataclass
class Episode:
    """One try: the seed it started from, whether it succeeded, in how many steps, with what reward, and its pictures."""

    seed: int
    success: bool
    steps: int
    reward: float
    frames: list[np.ndarray] = field(repr=False)  # (H, W, 3) uint8 each


def wilson(successes: int, tries: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a success rate: Wilson, "Probable inference" (1927), which holds near 0 and 1 too."""
    rate, spread = successes / tries, z * z / tries
    middle = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / tries + spread / (4 * tries)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(episodes: list[Episode]) -> dict:
    """Success rate with its interval, lengths, and every episode, as JSON has it."""
    successes = sum(episode.success for episode in episodes)
    low, high = wilson(successes, len(episodes))
    lengths = [episode.steps for episode in episodes if episode.success]
    return {
        "success_rate": successes / len(episodes),
        "success_low": low,
        "success_high": high,
        "successes": successes,
        "num_episodes": len(episodes),
        "median_steps_of_successes": float(np.median(lengths)) if lengths else None,
        "episodes": [{name: value for name, value in asdict(e).items() if name != "frames"} for e in episodes],
    }


def check_fits(expected: dict, batch: dict) -> None:
    """Raise a UserError if the environment's observation (LeRobot's batch of it) is not what the policy takes."""
    for key, (kind, shape) in expected.items():
        if key not in batch:
            shown = sorted(k for k in batch if k.startswith("observation"))
            close = nearest(key, shown)
            raise UserError(
                f"the policy takes {key}, the environment gives {', '.join(shown)}{close}: pass --rename THEIRS={key}"
            )
        if kind == "float" and tuple(batch[key].shape[1:]) != tuple(shape):
            raise UserError(
                f"{key} has shape {tuple(batch[key].shape[1:])} in the environment, the policy takes {shape}"
            )
        if kind == "uint8" and None not in shape and tuple(batch[key].shape[2:]) != tuple(shape[:2]):
            size = "x".join(map(str, batch[key].shape[2:]))
            raise UserError(
                f"{key} is {size} in the environment, the policy was trained on {shape[0]}x{shape[1]}: "
                "train with --image_size, or set the environment's (--env_args image_size=...)"
            )


def first_observation(env, config, policy) -> dict:
    """What a policy would be given first."""
    raw, _ = env.reset(seed=[0])
    return observed(env, raw, processors_of(config, policy), {})


def observed(env, raw: dict, processors, rename: dict) -> dict:
    """LeRobot's batch of a raw observation, under the policy's names."""
    from lerobot.envs import preprocess_observation

    batch = {**preprocess_observation(raw), "task": words(env)}
    return {rename.get(key, key): value for key, value in processors[0](batch).items()}


def processors_of(config, policy):
    """The environment type's own (pre, post) pipelines."""
    from lerobot.envs.factory import make_env_pre_post_processors

    return make_env_pre_post_processors(config, policy.policy.config if policy is not None else None)


def run_episode(
    env, processors, policy, seed: int, rename: dict, cap: int | None = None, filmed: bool = True
) -> Episode:
    """One episode of `env`, a vector environment of one, from a seed; the policy's own randomness is a function of it too.

    Args:
        processors: the environment type's own (pre, post) pipelines.
        policy: an object with reset(), expected and select(batch) as infer.LoadedPolicy; None for the environment's expert.
        rename: environment's key -> policy's.
        cap: steps after which it has failed (else the environment's own).
        filmed: keep every picture, else the last one.
    """
    from lerobot.envs.utils import NEW_ROLLOUT_OPTION

    if policy is not None:
        policy.reset()  # which may wait for a chunk that draws still
    seed_all(seed, EVAL)
    raw, _ = env.reset(seed=[seed], options={NEW_ROLLOUT_OPTION: True})
    frames, reward, limit = [], 0.0, env.call("_max_episode_steps")[0]
    limit = min(limit, cap or limit)
    for step in range(1, limit + 1):
        frames = [*(frames if filmed else []), first_picture(env, raw)]
        if policy is None:
            action = np.stack(expert_actions(env))
        else:
            batch = observed(env, raw, processors, rename)
            if step == 1:
                check_fits(policy.expected, batch)
            batch = {key: value for key, value in batch.items() if key in policy.expected or key == "task"}
            action = processors[1]({"action": policy.select(batch)})["action"].cpu().numpy()
        raw, earned, terminated, truncated, info = env.step(action)
        reward += float(earned[0])
        if terminated[0] or truncated[0]:
            break
    return Episode(seed, succeeded(info), step, reward, frames)


def expert_actions(env) -> tuple:
    try:
        return env.call("expert_action")
    except AttributeError as error:
        if "expert_action" not in str(error):
            raise
        raise UserError("this environment has no scripted expert: pass --env metaworld, or a checkpoint") from None


def succeeded(info: dict) -> bool:
    """Whether the only environment's episode ended in success, wherever gymnasium keeps it."""
    place = info.get("final_info", info)
    return bool(np.asarray(place.get("is_success", [False])).reshape(-1)[0])


def first_picture(env, raw: dict) -> np.ndarray:
    """(H, W, 3) uint8: the first camera's, or the environment's own view where a policy gets no pictures."""
    pixels = raw["pixels"] if "pixels" in raw else env.call("render")
    return (next(iter(pixels.values())) if isinstance(pixels, dict) else pixels)[0]


def words(env) -> list[str]:
    """The task in words, as the environment has it."""
    for name in ("task_description", "task"):
        try:
            return list(env.call(name))
        except (AttributeError, NotImplementedError):
            continue
    return [""]


def run_episodes(
    env,
    config,
    policy,
    seeds: list[int],
    rename: dict | None = None,
    cap: int | None = None,
    num_videos: int = 0,
    quiet: bool = False,
) -> list[Episode]:
    """An episode for each seed, with a bar; every picture of the first `num_videos` successes and failures is kept."""
    from tqdm.auto import tqdm

    processors, episodes = processors_of(config, policy), []
    with tqdm(seeds, unit="episode", disable=quiet or not sys.stderr.isatty()) as bar:
        for seed in bar:
            seen = [episode.success for episode in episodes]
            filmed = min(sum(seen), len(seen) - sum(seen)) < num_videos
            episode = run_episode(env, processors, policy, seed, rename or {}, cap, filmed)
            if seen.count(episode.success) >= num_videos:
                del episode.frames[:-1]
            episodes.append(episode)
            bar.set_postfix(success=f"{np.mean([episode.success for episode in episodes]):.0%}", refresh=False)
    return episodes


def write_video(path: Path, frames: list[np.ndarray], fps: float) -> None:
    """An mp4 that browsers play."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=round(fps), options={"crf": "20"})
        height, width = frames[0].shape[:2]
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        for frame in frames:
            picture = np.ascontiguousarray(frame[: stream.height, : stream.width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
