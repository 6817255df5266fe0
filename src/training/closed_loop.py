"""How often a policy succeeds in simulated tasks: episodes from fixed seeds, in this process or in several."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from command_line import split_pair
from data.observations import name_before
from policy.async_policy import AsyncPolicy
from policy.loaded import load_policy
from processors.bases import AUTO, pairs_line
from runtime import available_memory, one_thread, pick_device
from sim.environments import Simulation, open_simulation
from sim.rollout import Episode, run_episode
from sim.workers import InProcess, Job, Workers, available_cores
from training.open_loop import auto_rename

WORKER_BYTES = 700e6  # a worker's own memory, besides its policy's weights


@dataclass(frozen=True)
class Setup:
    """What to evaluate, and in which simulation: the flags of evaluate.py by these names.

    `checkpoint` is None for the simulation's scripted expert.
    """

    checkpoint: str | None
    env: str
    device: str = "auto"
    n_action_steps: int | None = None
    ahead: int | None = None
    env_args: list[str] | None = None
    max_steps: int | None = None
    rename: Sequence[str] = ()
    trained_on: str | None = None


@dataclass
class Result:
    """An episode, and what its simulation says of itself."""

    episode: Episode
    task: str
    fps: float
    max_steps: int


class Runner:
    """Runs episodes of any task of a simulation, one at a time. The simulation of the last task stays open.

    Computes with one thread: the results of two may differ in the last bits, and with them an episode's end.
    """

    def __init__(self, setup: Setup):
        self.setup = setup
        self.task: str | None = None
        self.policy = None
        self.simulation: Simulation | None = None

    def run(self, job: Job, is_stopped: Callable[[], bool] = lambda: False) -> Result | None:
        """The episode of a job; None if it is stopped."""
        with one_thread():
            if self.policy is None and self.setup.checkpoint is not None:
                self.policy = load_policy(
                    self.setup.checkpoint,
                    self.setup.device,
                    self.setup.n_action_steps,
                    trained_on=self.setup.trained_on,
                )
                if self.setup.ahead:
                    self.policy = AsyncPolicy(self.policy, self.setup.ahead)
            if self.simulation is None or job.task != self.task:
                self._open(job.task)
            episode = run_episode(self.simulation, self.policy, job.seed, job.film, is_stopped)
        if episode is None:
            return None
        config = self.simulation.config
        return Result(episode, config.task, config.fps, self.simulation.max_steps)

    def _open(self, task: str | None) -> None:
        self.close()  # before the next one: closing a renderer blacks out the others
        config = None if self.policy is None else self.policy.policy.config
        setup = self.setup
        rename = dict(split_pair(pair)[::2] for pair in setup.rename if pair != AUTO)
        self.simulation = open_simulation(setup.env, task, setup.env_args, config, setup.max_steps, rename)
        self.task = task
        if AUTO in setup.rename and self.policy is not None:
            print(rename_cameras(self.simulation, self.policy))

    def close(self) -> None:
        if self.simulation is not None:
            self.simulation.close()
        self.simulation = None


def rename_cameras(simulation: Simulation, policy) -> str:
    """Pair the cameras of a simulation with those of a policy, for `--rename auto`. Returns the line that says how."""
    observation, _ = simulation.env.reset(seed=[0])
    batch = simulation.batch_of(observation)
    cameras = [key for key, value in batch.items() if getattr(value, "ndim", 0) == 4]
    pairs = auto_rename(policy, batch, cameras)
    names = {name_before(simulation.rename, old): new for old, (new, _) in pairs.items()}
    simulation.rename = simulation.rename | names
    return pairs_line(pairs)


def count_workers(wanted: int | None, episodes: int, folder: Path | None, device: str) -> int:
    """`--num_workers`, else one for each core, as far as there are episodes and memory for them.

    Args:
        folder: the policy's; None for an expert.
        device: as of `pick_device`.
    """
    if wanted is not None:
        return min(wanted, episodes)
    weights = 0
    if folder is not None:
        weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        weights = weights or max((file.stat().st_size for file in folder.rglob("*.safetensors")), default=0)
    each = WORKER_BYTES + 2 * weights  # 2: while they are read
    fitting = available_memory() / each
    if folder is not None and pick_device(device).type == "cuda":
        fitting = min(fitting, torch.cuda.mem_get_info(pick_device(device))[0] / each)
    return max(1, min(available_cores(), episodes, int(0.8 * fitting)))


@dataclass
class TaskResult:
    """The episodes of one task, in the order of their seeds. Those that were filmed have all their images.

    Attributes:
        task: as it was asked for.
        name: of the task that this is, where that was None.
        changed: seeds that ended differently when they were run again to be filmed.
    """

    task: str | None
    name: str = ""
    fps: float = 0.0
    max_steps: int = 0
    episodes: list[Episode] = field(default_factory=list)
    changed: list[int] = field(default_factory=list)


def run_tasks(
    pool: InProcess | Workers,
    tasks: Sequence[str | None],
    seeds: Sequence[int],
    num_videos: int = 0,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> Iterator[TaskResult]:
    """Run an episode of each task from each seed. Yields a task as soon as all of it is there.

    Args:
        num_videos: film so many successes of each task and as many failures, the first ones.
        on_episode: called with each episode once, in the order in which they end.
    """
    for task in tasks:
        for number, seed in enumerate(seeds):
            # However they end, the first `num_videos` are among those to film. The others are known at the end only.
            pool.add(Job(task, seed, film=number < num_videos))
    results = {task: TaskResult(task) for task in tasks}
    done: dict[str | None, dict[int, Episode]] = {task: {} for task in tasks}
    again = dict.fromkeys(tasks, 0)  # how many episodes are being run again
    while results:
        job, new = pool.next()
        result = results[job.task]
        episodes = done[job.task]
        if job.seed not in episodes:
            episodes[job.seed] = new.episode
            on_episode(new.episode)
            if len(episodes) < len(seeds):
                continue
            result.name = new.task
            result.fps = new.fps
            result.max_steps = new.max_steps
            for seed in seeds_to_film(episodes, seeds, num_videos):
                if len(episodes[seed].frames) == 1:
                    pool.add(Job(job.task, seed, film=True))
                    again[job.task] += 1
        else:
            again[job.task] -= 1
            if new.episode.outcome == episodes[job.seed].outcome:
                episodes[job.seed] = new.episode
            else:
                result.changed.append(job.seed)
        if again[job.task] == 0:
            result.episodes = [episodes[seed] for seed in seeds]
            yield results.pop(job.task)


def seeds_to_film(episodes: dict[int, Episode], seeds: Sequence[int], num_videos: int) -> list[int]:
    """The first `num_videos` successes and failures."""
    chosen = []
    for success in (True, False):
        chosen += [seed for seed in seeds if episodes[seed].success == success][:num_videos]
    return chosen
