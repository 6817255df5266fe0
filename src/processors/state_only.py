"""A pipeline step for datasets without a camera."""

from dataclasses import dataclass

from lerobot.processor import ObservationProcessorStep, ProcessorStepRegistry


@ProcessorStepRegistry.register("armature_state_to_environment_state")
@dataclass
class StateToEnvironmentState(ObservationProcessorStep):
    """Gives the (normalised) observation.state a second time, as observation.environment_state.

    LeRobot's act and diffusion refuse to run on a state alone, yet take any environment state beside it. LeRobot finds
    this step through its plugin mechanism wherever this project is installed.
    """

    def observation(self, observation: dict) -> dict:
        return {**observation, "observation.environment_state": observation["observation.state"]}

    def transform_features(self, features):
        return features
