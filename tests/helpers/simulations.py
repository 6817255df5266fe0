"""A simulation without a simulator."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np

from errors import UserError
from sim.environments import Simulation
from sim.rollout import Episode


class StillArm:
    """A vector environment of one, whose arm never gets anywhere; `on_step` is called at each step."""

    def __init__(self, on_step):
        self.on_step = on_step
        self.steps = 0

    def reset(self, seed, options=None):
        return {"agent_pos": np.zeros((1, 3), np.float32)}, {}

    def step(self, action):
        self.steps += 1
        self.on_step()
        return self.reset(None)[0], np.zeros(1), [False], [False], {}

    def call(self, name):
        return {"render": [np.zeros((8, 8, 3), np.uint8)], "task": ["lift"], "task_description": ["lift"]}[name]

    def close(self): ...


def still_simulation(on_step, max_steps: int = 20) -> Simulation:
    """A simulated task of a state of three numbers, which nothing succeeds at."""
    return Simulation(
        env=StillArm(on_step),
        config=None,
        preprocess=lambda batch: batch,
        postprocess=lambda batch: batch,
        max_steps=max_steps,
        rename={},
    )


class QuickRunner:
    """Runs jobs of `sim.workers` in no time. Even seeds succeed; seeds of a task that is called so do something else."""

    def __init__(self):
        self.task = None

    def run(self, job, is_stopped=lambda: False):
        self.task = job.task
        if job.seed == 3:
            if job.task == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if job.task == "refuse":
                raise UserError("the arm is asleep", "wake it")
            if job.task == "fail":
                raise ZeroDivisionError("a bug")
        while job.task == "long":
            if is_stopped():
                return None
            time.sleep(0.01)
        frames = [np.zeros((8, 8, 3), np.uint8)] * (4 if job.film else 1)
        episode = Episode(job.seed, job.seed % 2 == 0, 10 + job.seed, 0.5, frames)
        return SimpleNamespace(episode=episode, task=job.task, fps=80, max_steps=20, process=os.getpid())

    def close(self): ...
