"""A processor step for datasets without a camera."""

from dataclasses import dataclass

from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry


@ProcessorStepRegistry.register("armature_state_to_environment_state")
@dataclass
class StateToEnvironmentState(ObservationProcessorStep):
    """Adds the (normalised) observation.state a second time, as observation.environment_state.

    LeRobot's act and diffusion do not run on a state without a camera or an environment state. LeRobot finds this step
    as a plugin where this project is installed.
    """

    def observation(self, observation: dict) -> dict:
        return {**observation, "observation.environment_state": observation["observation.state"]}

    def transform_features(self, features):
        return features
