"""LeRobot's processors around a policy, statistics to normalise by, and augmentation."""
