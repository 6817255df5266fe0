"""Load the weights of a policy from model.safetensors."""

import sys
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file

from errors import UserError, one_line
from policy.quiet import quiet_lerobot

# How torch and safetensors, and LeRobot's fastwam, begin the RuntimeError for weights of another policy.
MISFIT = ("Error(s) in loading state_dict", "FastWAM: ")


def load_weights(policy, path: Path) -> None:
    """Load every tensor of a safetensors file into the policy.

    Raises:
        UserError: the file cannot be read, or its tensors are not those of the policy.
    """
    try:
        if hasattr(policy, "_fix_pytorch_state_dict_keys") or policy.config.type == "xvla":
            load_renamed(policy, path)
        else:
            policy._load_as_safetensor(policy, str(path), "cpu", True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}. Use another checkpoint") from None
    except RuntimeError as error:
        if not str(error).startswith(MISFIT):
            raise
        raise UserError(misfit(policy, path, first_difference(error))) from None


def load_renamed(policy, path: Path) -> None:
    """Load weights under the names of pi0's or xvla's original code, which LeRobot's from_pretrained renames.

    Raises:
        UserError: the tensors are not those of the policy.
    """
    state = load_file(path)
    if policy.config.type == "xvla":
        modeling_xvla = sys.modules[type(policy).__module__]
        if modeling_xvla._is_vendored_florence_state_dict(state):
            state = modeling_xvla._remap_vendored_florence_state_dict(state)
    else:
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
