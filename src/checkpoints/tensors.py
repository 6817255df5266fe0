"""Read the optimizer's state in a checkpoint, and refuse tensors that training cannot continue from.

A manifest shows that a file is the one that was written, not that it is valid: people edit files and rewrite the manifest.
"""

import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints.folder import OPTIMIZER, OPTIMIZER_ENTRIES
from errors import UserError, one_line, read_json

PER_PARAMETER = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer"}  # of torch's Adam and SGD
OTHER_CHECKPOINT = "Resume from another checkpoint"


def read_optimizer(checkpoint: Path) -> dict:
    """The optimizer's state dict in a checkpoint: tensors and numbers, on the CPU.

    Raises:
        UserError: the file is damaged, or holds code, which is not run.
    """
    file = checkpoint / OPTIMIZER
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise UserError(
                f"{file} is refused: expected tensors and numbers, got code that would run {code[1]}. "
                "Resume from a checkpoint that you trust"
            ) from error
        raise UserError(f"{file} cannot be read: {one_line(error)[:160]}. {OTHER_CHECKPOINT}") from error
    if not is_optimizer_state(state):
        raise UserError(
            f"{file} holds no optimizer's state: expected state and param_groups, whose parameters are numbered from 0. "
            f"{OTHER_CHECKPOINT}"
        )
    problem = missing_entries(state, checkpoint) or wrong_tensor(state["state"])
    if problem:
        raise UserError(f"{file} is damaged: {problem}. {OTHER_CHECKPOINT}")
    separate(state["state"])
    return state


def is_optimizer_state(state) -> bool:
    """Whether a value has the form of a torch optimizer's state dict."""
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        return False
    entries = state["state"]
    groups = state["param_groups"]
    if not isinstance(entries, dict) or not isinstance(groups, list):
        return False
    if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
        return False
    numbers = [number for group in groups for number in group["params"]]
    return numbers == list(range(len(numbers))) and all(isinstance(entry, dict) for entry in entries.values())


def missing_entries(state: dict, checkpoint: Path) -> str | None:
    """What an optimizer's state lacks: an entry that the checkpoint counted, or a key that the rest of its group has."""
    entries = state["state"]
    path = checkpoint / "trainer_state.json"
    # A parameter that never got a gradient has no entry, so only the count shows whether one was lost.
    expected = read_json(path).get(OPTIMIZER_ENTRIES) if path.is_file() else None
    if expected not in (None, len(entries)):
        return f"expected the state of {expected} parameters, got {len(entries)}"
    for group in state["param_groups"]:
        keys = set()
        for number in group["params"]:
            keys |= PER_PARAMETER & entries.get(number, {}).keys()
        for number in group["params"]:
            missing = keys - entries.get(number, {}).keys()
            if number in entries and missing:
                return f"parameter {number} has no {sorted(missing)[0]}"
    return None


def wrong_tensor(entries: dict) -> str | None:
    """The first tensor or number of an optimizer's state that training cannot continue from; None if all are valid."""
    for number, entry in entries.items():
        for name, value in entry.items():
            problem = None
            if isinstance(value, Tensor):
                problem = tensor_problem(value)
            elif isinstance(value, float) and not math.isfinite(value):
                problem = str(value)
            if problem:
                return f"{name} of parameter {number}: expected finite numbers in a dense tensor, got {problem}"
    return None


def tensor_problem(tensor: Tensor) -> str | None:
    """Why a tensor on the CPU is not a dense one of finite real numbers; None if it is."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        return "a sparse or nested tensor"
    if tensor.device.type != "cpu":
        return f"a tensor without values, on the device {tensor.device.type}"
    if tensor.is_quantized or tensor.is_complex():
        return f"a tensor of {tensor.dtype}"
    if not is_finite(tensor):
        return "NaN or infinite ones"
    return None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinite numbers."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() < 4:
        tensor = tensor.float()
    # A sum is finite only if all of its terms are, and is much faster than a look at each. It may overflow.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def separate(entries: dict) -> None:
    """Clone tensors of an optimizer's state that share memory, since each is updated in place."""
    seen = set()
    for entry in entries.values():
        for name, value in entry.items():
            if not isinstance(value, Tensor) or value.numel() == 0:
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
                entry[name] = value.clone()
            seen.add(storage.data_ptr())


def require_real(checkpoint: Path) -> None:
    """Refuse a checkpoint with complex tensors: PyTorch would drop their imaginary parts. Reads only the files' headers.

    Raises:
        UserError: a safetensors file has one, or cannot be read.
    """
    for file in sorted(checkpoint.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                dtypes = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read: {one_line(error)[:160]}. {OTHER_CHECKPOINT}") from error
        for name, dtype in dtypes.items():
            if dtype.startswith("C"):
                raise UserError(
                    f"{file} is damaged: {name}: expected real numbers, got dtype {dtype}. {OTHER_CHECKPOINT}"
                )


def require_finite(parameters: Iterable[Tensor], file: Path) -> None:
    """Raise a UserError if weights that were read from `file` are NaN or infinite."""
    if not all(map(is_finite, parameters)):
        raise UserError(f"{file} is damaged: expected finite weights, got NaN or infinite ones. {OTHER_CHECKPOINT}")
