"""Several tasks by one name: Meta-World's ten and fifty, and LeRobot's groups of them by difficulty."""

import importlib.util
import json
from pathlib import Path

from errors import UserError, nearest

MT10 = (
    "reach-v3",
    "push-v3",
    "pick-place-v3",
    "door-open-v3",
    "drawer-open-v3",
    "drawer-close-v3",
    "button-press-topdown-v3",
    "peg-insert-side-v3",
    "window-open-v3",
    "window-close-v3",
)


def difficulty_groups(env: str) -> dict[str, list[str]]:
    """{group: its tasks}, from easy to very_hard, as LeRobot groups Meta-World's fifty tasks; empty for other simulations."""
    if env not in ("metaworld", "armature_metaworld"):
        return {}
    # From the file, since importing lerobot.envs.metaworld imports the simulator too.
    lerobot = Path(importlib.util.find_spec("lerobot").origin).parent
    return json.loads((lerobot / "envs" / "metaworld_config.json").read_text())["DIFFICULTY_TO_TASKS"]


def suites(env: str) -> dict[str, list[str]]:
    """{name: tasks} that `--task` takes instead of a task."""
    groups = difficulty_groups(env)
    if not groups:
        return {}
    return {"mt10": list(MT10), "mt50": [task for tasks in groups.values() for task in tasks], **groups}


def tasks_of(env: str, text: str | None) -> list[str | None]:
    """The tasks that `--task` names, each once: a task, a suite, or several of them separated by commas; [None] if unset.

    Raises:
        UserError: Meta-World has no such task.
    """
    if not text:
        return [None]
    known = suites(env)
    tasks = []
    for name in text.split(","):
        name = name.strip()
        if known and name not in known and name not in known["mt50"]:
            close = nearest(name, [*known["mt50"], *known]) or "."
            raise UserError(
                f"Meta-World has no task {name!r}{close} Pass one like drawer-open-v3, or {', '.join(known)}"
            )
        tasks += known.get(name, [name])
    return list(dict.fromkeys(tasks))
