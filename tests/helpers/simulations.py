"""A simulation without a simulator."""

import numpy as np

from sim.environments import Simulation


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
