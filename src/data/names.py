"""Names of a feature's numbers, such as the robot's joints."""

import math


def joint_names(feature: dict) -> list[str] | None:
    """The name of each number of a feature, in order.

    info.json holds them as `["a", "b"]`, `[["a", "b"]]`, `{"motors": ["a", "b"]}`, or a list for each arm.

    Args:
        feature: its entry in info.json, with a shape and, perhaps, names.

    Returns:
        As many names as the feature has numbers; None if some have no name.
    """
    names = flatten(feature.get("names"))
    if len(names) != math.prod(feature["shape"]) or not all(isinstance(name, str) for name in names):
        return None
    return names


def flatten(names) -> list:
    """The leaves of nested lists and dicts, in order."""
    if isinstance(names, dict):
        names = list(names.values())
    if not isinstance(names, (list, tuple)):
        return [names]
    return [leaf for item in names for leaf in flatten(item)]


def order_warnings(trained: dict, now: dict, holder: str, dataset: str) -> list[str]:
    """A line for each feature whose joints differ in name or order from those that a policy was trained with.

    Args:
        trained: {feature: names} that the policy was trained with.
        now: {feature: names} of a dataset, with features under the policy's names.
        holder, dataset: what to call the policy and the dataset.
    """
    warnings = []
    for key in trained.keys() & now.keys():
        before = trained[key]
        after = now[key]
        if before == after:
            continue
        difference = "are other joints"
        if sorted(before) == sorted(after):
            difference = "are in another order"
        warnings.append(
            f"the joints of {key} {difference}: {holder} was trained with {', '.join(before)}, {dataset} has "
            f"{', '.join(after)}. Numbers go by position: put the dataset's into the policy's order, if these are the same robot"
        )
    return sorted(warnings)
