"""Load the weights of a policy from model.safetensors, or from several such files."""

import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from errors import UserError, one_line, read_json
from policy.quiet import quiet_lerobot
from runtime import progress_interval
from trust import OTHER_COPY, is_inside

WEIGHTS = "model.safetensors"  # LeRobot's name
INDEX = "model.safetensors.index.json"  # the list of shards, as transformers writes it

# How torch and safetensors, and LeRobot's fastwam, begin the RuntimeError for weights of another policy.
MISFIT = ("Error(s) in loading state_dict", "FastWAM: ")


def weight_files(folder: Path) -> list[Path]:
    """The files with a policy's weights: model.safetensors, or the shards that model.safetensors.index.json lists.

    Raises:
        UserError: one of them is missing, or the list is not of its form.
    """
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, OTHER_COPY).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(map(is_inside, weight_map.values())):
            raise UserError(f"{folder / INDEX}: expected the file of each tensor as weight_map. {OTHER_COPY}")
        names = sorted(set(weight_map.values()))
    for name in names:
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}, which holds weights of the policy. {OTHER_COPY}")
    return [folder / name for name in names]


def load_weights(policy, folder: Path, quiet: bool = True) -> None:
    """Load the weights in a folder, all of them and no others, into the policy, on whichever device it is.

    The files are mapped into memory, and each tensor is copied into the policy's: there is no second copy of the weights.

    Args:
        quiet: no progress bar.

    Raises:
        UserError: a file cannot be read, or its tensors are not those of the policy.
    """
    files = weight_files(folder)
    path = files[0]
    try:
        with CopyBar(files, quiet):
            if len(files) > 1:
                path = folder / INDEX
                load_renamed(policy, path, {name: tensor for file in files for name, tensor in load_file(file).items()})
            elif hasattr(policy, "_fix_pytorch_state_dict_keys") or policy.config.type == "xvla":
                load_renamed(policy, path, load_file(path))
            else:
                policy._load_as_safetensor(policy, str(path), "cpu", True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}. Use another checkpoint") from None
    except RuntimeError as error:
        if not str(error).startswith(MISFIT):
            raise
        raise UserError(misfit(policy, path, first_difference(error))) from None


class CopyBar(TorchFunctionMode):
    """Within this context, a progress bar of the bytes that are copied from tensors of these files, if it takes seconds."""

    def __init__(self, files: list[Path], quiet: bool):
        super().__init__()
        from tqdm.auto import tqdm

        self.bar = tqdm(
            desc="loading the weights",
            total=sum(path.stat().st_size for path in files),
            unit="B",
            unit_scale=True,
            disable=quiet,
            delay=2,
            mininterval=progress_interval(),
        )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.copy_:
            self.bar.update(args[1].nbytes)
        return result

    def __exit__(self, *error):
        self.bar.close()
        return super().__exit__(*error)


def load_renamed(policy, path: Path, state: dict) -> None:
    """Load tensors that may have the names of pi0's or xvla's original code, which LeRobot's from_pretrained renames.

    Args:
        path: file that the tensors are from, for messages.

    Raises:
        UserError: the tensors are not those of the policy.
    """
    if policy.config.type == "xvla":
        modeling_xvla = sys.modules[type(policy).__module__]
        if modeling_xvla._is_vendored_florence_state_dict(state):
            state = modeling_xvla._remap_vendored_florence_state_dict(state)
    elif hasattr(policy, "_fix_pytorch_state_dict_keys"):
        with quiet_lerobot():
            state = policy._fix_pytorch_state_dict_keys(state, policy.config)
        state = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in state.items()}
    load_tensors(policy, path, state)


def load_tensors(policy, path: Path, state: dict, optional=()) -> None:
    """Load tensors under the policy's own names.

    Args:
        path: file that the tensors are from, for messages.
        optional: names whose tensors may be missing.

    Raises:
        UserError: the tensors are not those of the policy.
    """
    # Not strict, because tensors that share memory have several names in the policy and one in the file.
    missing, unexpected = policy.load_state_dict(state, strict=False)
    tensors = policy.state_dict()
    loaded = {tensors[name].data_ptr() for name in state if name in tensors}
    missing = [name for name in missing if name not in optional and tensors[name].data_ptr() not in loaded]
    if missing or unexpected:
        raise UserError(misfit(policy, path, f"missing {missing[:3]}, unexpected {unexpected[:3]}"))


def first_difference(error: RuntimeError) -> str:
    """The first of the names and shapes that differ, which torch lists after a heading, one a line."""
    message = str(error)
    differences = message.splitlines()[1:] or [message]
    return " ".join(differences[0].split())[:200].rstrip(".")


def misfit(policy, path: Path, difference: str) -> str:
    return f"{path} does not fit policy {policy.name}: {difference}. Pass the --policy_args that it was trained with"
