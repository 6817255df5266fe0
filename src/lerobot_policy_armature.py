"""LeRobot's entry: its tools import this module by the distribution's name and find what Armature's checkpoints use."""

import policy.flow  # noqa: F401  (registers a policy)
import processors.state_only  # noqa: F401  (registers a processor step)
import sim.metaworld  # noqa: F401  (registers an environment type)
