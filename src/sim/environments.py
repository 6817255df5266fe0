"""Simulated tasks to evaluate a policy in: LeRobot's environments by name, and ours, which have a scripted expert.

Ours are modules of this folder. Each has a ScriptedTask and a ScriptedConfig (`scripted.py` says what those promise: the
expert, which actions take noise, when pixels are rendered), registered with LeRobot as `armature_<name>`, and a line in
OURS. It imports its simulator inside functions, since that may not be installed. `rendering.Renderer` draws any MuJoCo
model cheaply.
"""

from dataclasses import dataclass

from command_line import parse_overrides
from errors import UserError, as_user_error, likeliest_pairs, nearest, rename_flag

# The name that users type: our environment type, in place of LeRobot's.
OURS = {
    "aloha": "armature_aloha",
    "metaworld": "armature_metaworld",
    "ogbench": "armature_ogbench",
    "so101": "armature_so101",
}


@dataclass
class Simulation:
    """One simulated task, with what LeRobot puts between it and a policy.

    Attributes:
        env: a gymnasium vector environment of one.
        config: LeRobot's EnvConfig.
        preprocess, postprocess: the environment type's own pipelines, for observations and for actions.
        max_steps: steps after which an episode has failed.
        rename: {the environment's name of an observation: the policy's}.
    """

    env: object
    config: object
    preprocess: object
    postprocess: object
    max_steps: int
    rename: dict[str, str]

    def batch_of(self, observation: dict) -> dict:
        """LeRobot's batch, under the policy's names, of an observation as the environment returns it."""
        from lerobot.envs import preprocess_observation

        batch = preprocess_observation(observation)
        batch["task"] = task_text(self.env)
        return {self.rename.get(key, key): value for key, value in self.preprocess(batch).items()}

    def check(self, expected: dict) -> None:
        """Check the first observation of an episode, see `check_batch`."""
        observation, _ = self.env.reset(seed=[0])
        check_batch(self.batch_of(observation), expected)

    def close(self) -> None:
        self.env.close()


def open_simulation(
    name: str,
    task: str | None = None,
    overrides: list[str] | None = None,
    policy_config=None,
    max_steps: int | None = None,
    rename: dict[str, str] | None = None,
    flag: str = "--env_args",
) -> Simulation:
    """Make the environment of a task.

    Args:
        name: one of OURS, or any environment type that LeRobot knows: pusht, libero, ...
        task: such as drawer-open-v3; None for the type's default.
        overrides: the type's own settings, such as ["look=lerobot"], which the user passed with `flag`.
        policy_config: LeRobot's config of the policy, which some types adapt to.
        max_steps: None for the type's own limit.

    Raises:
        UserError: there is no such type, task or setting, or its package is not installed.
    """
    import gymnasium
    from lerobot.envs import EnvConfig
    from lerobot.envs.factory import make_env, make_env_pre_post_processors

    # They register our types; here, because they import LeRobot, which takes seconds.
    import sim.aloha
    import sim.metaworld
    import sim.ogbench_tasks
    import sim.so101  # noqa: F401

    known = EnvConfig.get_known_choices()
    kind = OURS.get(name, name)
    if kind not in known:
        raise UserError(
            f"unknown environment {name}{nearest(name, known) or '.'} Pass one of {', '.join(sorted(known))}"
        )
    overrides = list(overrides or [])
    if max_steps and name in OURS:
        overrides.append(f"episode_length={max_steps}")
    settings = parse_overrides(flag, known[kind], overrides)
    if task:
        settings["task"] = task
    with as_user_error(f"environment {name}", (gymnasium.error.Error, ValueError, LookupError)):
        config = known[kind](**settings)
        if getattr(config, "hub_path", None):
            raise UserError(
                f"environment {name} is a Python file of the Hub repo {config.hub_path}, which is not run. Pass one of "
                f"{', '.join(sorted(set(known) - {kind}))}, or install it as a package that registers its type"
            )
        suites = make_env(config, n_envs=1)  # {suite: {number: vector environment}}
    envs = [env for suite in suites.values() for env in suite.values()]
    if len(envs) != 1:
        raise UserError(f"task {task} of environment {name}: expected one task, got {len(envs)}. Pass one of them")

    preprocess, postprocess = make_env_pre_post_processors(config, policy_config)
    limit = envs[0].call("_max_episode_steps")[0]
    return Simulation(
        env=envs[0],
        config=config,
        preprocess=preprocess,
        postprocess=postprocess,
        max_steps=min(limit, max_steps or limit),
        rename=rename or {},
    )


def check_batch(batch: dict, expected: dict) -> None:
    """Check that a batch of a simulation has what the policy takes.

    Args:
        expected: {observation: (kind, shape)}, as LoadedPolicy.expected.

    Raises:
        UserError: an observation is missing, or has another shape.
    """
    for key, (kind, shape) in expected.items():
        if key not in batch:
            given = sorted(name for name in batch if name.startswith("observation"))
            free = {name: batch[name].ndim for name in given if name not in expected}
            missing = {name: 1 + len(shape) for name, (_, shape) in expected.items() if name not in batch}
            pairs = likeliest_pairs(missing, free)
            remedy = "Evaluate in the task that the policy was trained for"
            if pairs:
                remedy = f"If that is the same, pass evaluate.py {rename_flag(pairs)} (train.py renames none)"
            raise UserError(f"the simulation has no {key}, which the policy takes: got {', '.join(given)}. {remedy}")
        got = tuple(batch[key].shape[1:])
        remedy = "Evaluate in the task that the policy was trained for"
        if kind == "uint8":
            got = (*got[1:], got[0])  # (C, H, W) to (H, W, C)
            remedy = (
                "Set the environment's size, with image_size=... (aloha: and image_width), or train with --image_size"
            )
        fits = len(got) == len(shape) and all(want in (None, size) for want, size in zip(shape, got, strict=True))
        if not fits:
            raise UserError(f"{key} of the simulation does not fit the policy: expected {shape}, got {got}. {remedy}")


def task_text(env) -> list[str]:
    """The task in words, where the environment has any."""
    for name in ("task_description", "task"):
        try:
            return list(env.call(name))
        except (AttributeError, NotImplementedError):
            continue
    return [""]
