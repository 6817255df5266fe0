"""Fine-tuning some of the weights: PEFT adapters (LoRA and others) through LeRobot's own wrapper, and freezing by name."""

import contextlib
import re
from pathlib import Path
from types import MethodType

from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from command_line import parse_overrides
from errors import UserError, one_line

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def add_adapters(policy, base: str, method: str, r: int, overrides: list[str] | None):
    """The policy with fresh adapters, which alone are trained.

    Args:
        policy: LeRobot policy with the weights to adapt.
        base: folder or Hub id of those weights, which the adapters' file names.
        method: a PEFT method, such as lora.
        r: rank of the adapters.
        overrides: further settings of LeRobot's PeftConfig, such as target_modules=all-linear.

    Raises:
        UserError: peft is not installed, or the settings do not fit the policy.
    """
    from lerobot.configs.default import PeftConfig

    asked = {"method_type": method, "r": r, **parse_overrides("--peft_args", PeftConfig, overrides)}
    policy.config.pretrained_path = Path(base)
    try:
        return policy.wrap_with_peft(peft_cli_overrides=asked)
    except ImportError as error:
        raise UserError("--peft needs the package peft: uv pip install peft") from error
    except KeyError as error:
        raise UserError(f"--peft {method}: peft has no such method: lora is the usual one") from error
    except (ValueError, TypeError) as error:
        hint = ": name modules with --peft_args target_modules=all-linear" if "target" in str(error) else ""
        raise UserError(f"--peft {method}: {one_line(error)[:200]}{hint}") from error


def load_adapters(policy, folder: Path):
    """The policy with the adapters in a checkpoint folder, to train on or to act with."""
    from peft import PeftModel

    return PeftModel.from_pretrained(policy, str(folder), is_trainable=True)


def base_of(folder: Path) -> str:
    """Folder or Hub id of the weights that a folder's adapters belong to.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise UserError(f"{folder} holds adapters, which need the package peft: uv pip install peft") from error
    return PeftConfig.from_pretrained(str(folder)).base_model_name_or_path


def adapters_config(policy):
    """PEFT's config of the policy's adapters, None if it has none."""
    return policy.active_peft_config if is_adapted(policy) else None


def is_adapted(policy) -> bool:
    return hasattr(policy, "peft_config")


def adapters_of(policy, state_dict: dict) -> dict:
    """Of a state dict the adapters' tensors, named as PEFT's files name them."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(policy, state_dict)


def put_adapters(policy, tensors: dict) -> None:
    """Load tensors such as `adapters_of` gives."""
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(policy, tensors)


def counted_once(module) -> dict:
    """Arguments of torch's `checkpoint` by which batch norms do not count again what they see in the repetition.

    None where there are no such, or in torch.compile, which takes no arguments of this kind.
    """
    norms = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]

    @contextlib.contextmanager
    def uncounted():
        before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        try:
            yield
        finally:  # it ends by an exception once it has what the backward pass needs
            for norm, momentum, count in before:
                norm.momentum = momentum
                norm.num_batches_tracked.copy_(count)

    return {"context_fn": lambda: (contextlib.nullcontext(), uncounted())} if norms and not is_compiling() else {}


def freeze(policy, patterns: list[str]) -> None:
    """Leave the parameters as they are whose names match one of the regular expressions.

    Raises:
        UserError: one matches no parameter, or nothing is left to train.
    """
    names = [name for name, _ in policy.named_parameters()]
    for pattern in patterns:
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise UserError(f"--freeze {pattern} is no regular expression: {error}") from None
        if not found:
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(f"--freeze {pattern} matches no parameter: their names begin with {', '.join(parts[:12])}")
        for name, parameter in policy.named_parameters():
            if name in found:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise UserError(f"--freeze {' '.join(patterns)} leaves nothing to train")
    for module in policy.modules():  # a frozen batch norm normalises as it will later, and its statistics stay
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            module.eval().train = MethodType(lambda self, mode=True: self, module)
