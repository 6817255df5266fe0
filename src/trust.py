"""Nothing that is read runs code: what the files of a policy may name, checked before anything that they name is imported.

LeRobot imports and calls any class that a processor's JSON names, PEFT imports a module that an adapter's JSON names, and
transformers runs the Python files of a tokenizer's or a backbone's repo.
"""

import contextlib
import importlib
import importlib.metadata
import os
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from unittest.mock import patch

from lerobot.configs import PreTrainedConfig
from lerobot.processor import ProcessorStep, ProcessorStepRegistry
from lerobot.utils.import_utils import register_third_party_plugins

from errors import UserError, find_path, not_a_file, read_json, require_file, require_files

PIPELINES = ("policy_preprocessor.json", "policy_postprocessor.json")  # LeRobot's names
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
STEP_MODULES = ("lerobot.processor.", "lerobot.policies.", "lerobot.rewards.")
# Packages that LeRobot's commands import because they are installed under such a name.
PLUGINS = ("lerobot_policy_", "lerobot_robot_", "lerobot_camera_", "lerobot_teleoperator_", "lerobot_env_")
OTHER_COPY = "Use another copy of the policy"
TRUSTED = "ARMATURE_TRUST_CODE_OF"  # environment variable: Hub ids and folders whose Python files may run, with commas


def check_policy_folder(folder: Path) -> None:
    """Check every file of a policy's folder that can name code or other files.

    Raises:
        UserError: one of them names what is not allowed, is not of its form, or is no file but a pipe, say.
    """
    if folder.is_dir():
        require_files(folder, OTHER_COPY)
    for name in PIPELINES:
        if (folder / name).is_file():
            read_pipeline(folder / name)
    if (folder / ADAPTER_CONFIG).is_file():
        read_adapter_config(folder)


def read_pipeline(path: Path) -> list[dict]:
    """The steps of a saved pipeline, each of which LeRobot may make.

    Raises:
        UserError: the file is not a pipeline, or a step is not allowed.
    """
    pipeline = read_json(path, OTHER_COPY)
    name = pipeline.get("name", "")
    if not isinstance(name, str) or len(name) > 100:  # LeRobot names the steps' files by it
        raise UserError(f"{path}: expected a short text as name, got {name!r:.60}. {OTHER_COPY}")
    steps = pipeline.get("steps")
    if not isinstance(steps, list):
        raise UserError(f"{path}: expected a list of steps, got {steps!r:.60}. Use another copy of the policy")
    for number, step in enumerate(steps):
        problem = step_problem(step, path.parent)
        if problem:
            raise UserError(f"{path}: step {number} {problem}")
    return steps


def step_problem(step, folder: Path) -> str | None:
    """Why a step of a pipeline in `folder` is refused; None if LeRobot may make it."""
    if not isinstance(step, dict):
        return f"is refused: expected an object, got {step!r:.60}. Use another copy of the policy"
    if "registry_name" in step:
        if not is_registered(step["registry_name"]):
            return (
                f"is refused: expected a step that this LeRobot has, got registry_name {step['registry_name']!r:.80}. "
                "Install the package that registers it, or the version of LeRobot that wrote the policy"
            )
    elif not is_step_class(step.get("class")):
        return (
            f"is refused: expected a processor step of LeRobot or of an installed plugin, got class "
            f"{step.get('class')!r:.80}, whose code is not run. If it is a step of your own, install its module as a "
            "package called lerobot_policy_..., or import it before the policy is loaded"
        )
    config = step.get("config", {})
    if not isinstance(config, dict):
        return f"is refused: expected an object of settings, got config {config!r:.60}. Use another copy of the policy"
    artifacts = step.get("artifacts", {})
    if not isinstance(artifacts, dict):
        return (
            f"is refused: expected an object of paths, got artifacts {artifacts!r:.60}. Use another copy of the policy"
        )
    files = list(artifacts.values())
    if "state_file" in step:
        files.append(step["state_file"])
    for name in files:
        if not is_inside(name):
            return f"is refused: expected a file in {folder}, got {name!r:.80}. Use another copy of the policy"
        found = find_path(folder / name, "a processor's file")
        if found is None:
            return f"has a file {name} that is missing from {folder}. Use another copy of the policy"
        if found.is_dir():
            require_files_within(found)
    if "state_file" in step:
        found = not_a_file(folder / step["state_file"])
        if found:
            return f"is refused: expected a file, got {found} as {step['state_file']}. Use another copy of the policy"
    return None


def require_files_within(folder: Path) -> None:
    """Raise a UserError if a folder, such as a tokenizer's, has something that is neither a file nor a folder."""
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            require_file(path, OTHER_COPY)


def is_registered(name) -> bool:
    """Whether a step of this name is registered, if need be by an installed plugin of LeRobot's."""
    if not isinstance(name, str):
        return False
    if name not in ProcessorStepRegistry.list():
        register_third_party_plugins()
    return name in ProcessorStepRegistry.list()


def is_step_class(path) -> bool:
    """Whether `path` is module.Class of a ProcessorStep, in a module that may be imported for that or is imported already."""
    if not isinstance(path, str) or "." not in path:
        return False
    module, _, name = path.rpartition(".")
    if module not in sys.modules:
        if not module.startswith(STEP_MODULES) and not is_plugin(module.partition(".")[0]):
            return False
        try:
            importlib.import_module(module)
        except ImportError:
            return False  # this LeRobot does not have it
    step = getattr(sys.modules[module], name, None)
    return isinstance(step, type) and issubclass(step, ProcessorStep)


def is_plugin(package: str) -> bool:
    """Whether a package is installed as a plugin of LeRobot's."""
    if not package.startswith(PLUGINS):
        return False
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def is_inside(name) -> bool:
    """Whether a file's name leads to a place within its folder."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def read_adapter_config(folder: Path) -> dict:
    """PEFT's config of the adapters in a folder.

    Raises:
        UserError: it is not of its form, or names code or other adapters.
    """
    path = folder / ADAPTER_CONFIG
    config = read_json(path, OTHER_COPY)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{path}: expected the folder or Hub id of the adapted policy as base_model_name_or_path, got {base!r:.80}. "
            "Write it there"
        )
    # PEFT imports megatron_core where megatron_config is set. X-LoRA loads the adapters that it names, from anywhere.
    for name in ("megatron_config", "adapters"):
        if config.get(name):
            raise UserError(
                f"{path} is refused: expected no {name}, got {config[name]!r:.80}, which names code or other files. "
                "Use adapters of another kind, such as lora"
            )
    return config


@contextlib.contextmanager
def no_remote_code(what: str):
    """Within this, no Python file that a tokenizer, a backbone or an adapter brings with it is run.

    transformers asks the terminal whether to run such files, and LeRobot answers yes for some policies. Excepted are the
    Hub repos that the installed LeRobot names by itself, and those in the environment variable ARMATURE_TRUST_CODE_OF.

    Args:
        what: what is loaded, for the message.

    Raises:
        UserError: such a file was to be run.
    """
    try:
        from transformers import dynamic_module_utils as remote  # slow, and not always installed
    except ImportError:
        yield
        return
    trusted = os.environ.get(TRUSTED, "").split(",")
    of_lerobot = default_repos()
    refused = []
    find_file = remote.cached_file

    def find_allowed_file(path_or_repo_id, *args, **options):
        """In place of transformers' search for a Python file, its first step before it runs one."""
        repo = str(path_or_repo_id)
        if repo not in trusted and (repo not in of_lerobot or Path(repo).is_dir()):
            refused.append(f"it asks to run the Python files of {repo}. If you trust them, set {TRUSTED}={repo}")
            raise UserError(refused[-1])
        return find_file(path_or_repo_id, *args, **options)

    with patch.object(remote, "cached_file", find_allowed_file), patch.object(remote, "TIME_OUT_REMOTE_CODE", 0):
        try:
            yield
        except Exception as error:
            # LeRobot and transformers wrap the refusal in errors of their own
            if not refused and not asks_for_code(error):
                raise
            reason = refused[0] if refused else "a repo that it names has Python files to run. Use one without them"
            raise UserError(f"{what} is refused: {reason}") from error
    if refused:
        raise UserError(f"{what} is refused: {refused[0]}")


def default_repos() -> set[str]:
    """The Hub ids that the settings of LeRobot's policies and processor steps have by default."""
    steps = [ProcessorStepRegistry.get(name) for name in ProcessorStepRegistry.list()]
    repos = set()
    for owner in [*PreTrainedConfig.get_known_choices().values(), *filter(is_dataclass, steps)]:
        defaults = [f.default for f in fields(owner) if isinstance(f.default, str)]
        repos.update(default for default in defaults if "/" in default and not default.startswith("."))
    return repos


def asks_for_code(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is transformers' question whether to run a repo's code."""
    while error is not None:
        if "trust_remote_code=True" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
