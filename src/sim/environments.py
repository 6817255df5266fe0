"""Simulated tasks to try a policy in: LeRobot's environments by name, and Meta-Distributed rendered fast."""

import os
import subprocess
import sys

from command_line import parse_overrides
from errors import UserError, nearest, one_line

OURS = {"metaworld": "armature_metaworld"}  # the name people type: the environment type that stands in for LeRobot's


def pick_renderer() -> str:
    """Set MUJOCO_GL, which has to happen before mujoco is imported: EGL where it works, else OSMesa.

    Raises:
        UserError: neither is there.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return os.environ.get("MUJOCO_GL", "the system's own")
    probe = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    for backend in ("egl", "osmesa"):  # tried in another process: a failed attempt cannot be undone in this one
        environment = {**os.environ, "MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise UserError("no library for rendering without a screen: apt-get install -y libegl1 libgl1 libosmesa6")


def make_env(name: str, task: str | None, overrides: list[str] | None = None):
    """(environment, its config): one LeRobot vector environment of one task, by the name of its type.

    Args:
        name: metaworld (ours), or any type that LeRobot knows: pusht, aloha, libero, ...
        task: such as drawer-open-v3; None for the type's own default.
        overrides: settings of the type's own, such as ["look=lerobot"].

    Raises:
        UserError: there is no such type, task or setting, or its package is not installed.
    """
    import gymnasium
    from lerobot.envs import EnvConfig
    from lerobot.envs.factory import make_env as lerobot_make_env

    import sim.metaworld  # noqa: F401  registers our type

    kind, known = OURS.get(name, name), EnvConfig.get_known_choices()
    if kind not in known:
        raise UserError(f"--env {name}: there is no such environment{nearest(name, known)}: {', '.join(sorted(known))}")
    values = {**parse_overrides("--env_args", known[kind], overrides), **({"task": task} if task else {})}
    try:
        config = known[kind](**values)
        suites = lerobot_make_env(config, n_envs=1)
    except ImportError as error:
        raise UserError(f"--env {name} needs a package that is not installed: {one_line(error)[:200]}") from None
    except UserError:
        raise
    except (gymnasium.error.Error, ValueError, TypeError, LookupError) as error:
        raise UserError(f"--env {name} cannot be made of these settings: {one_line(error)[:200]}") from error
    tasks = [(suite, place) for suite, places in suites.items() for place in places]
    if len(tasks) != 1:
        raise UserError(f"--task {task} of {name} is {len(tasks)} tasks, expected one: {tasks[:5]}")
    return suites[tasks[0][0]][tasks[0][1]], config
