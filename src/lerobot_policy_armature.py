"""LeRobot's entry: its tools import this module by the distribution's name and find what Armature's checkpoints use."""

import policy.flow  # noqa: F401  (registers a policy)
import processors.state_only  # noqa: F401  (registers a processor step)
import sim.aloha
import sim.metaworld
import sim.ogbench_tasks
import sim.so101  # noqa: F401  (these register environment types)
