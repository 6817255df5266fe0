"""Which policy: LeRobot's by name, with its settings checked, built afresh or from a checkpoint folder."""

import contextlib
import hashlib
import io
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import hub
from command_line import parse_overrides
from errors import UserError, nearest, one_line, policy_errors
from policy.adapters import base_of, load_adapters
from processors.pipelines import FILES
from runtime import user_cache_dir


def known_policies() -> list[str]:
    import lerobot.policies  # noqa: F401  (fills the registry)
    from lerobot.configs import PreTrainedConfig

    import policy.flow  # noqa: F401  (ours)

    return sorted(PreTrainedConfig.get_known_choices())


def policy_class(name: str):
    """LeRobot's config class of policy `name`.

    Raises:
        UserError: there is none.
    """
    from lerobot.configs import PreTrainedConfig

    known = known_policies()
    if name not in known:
        raise UserError(f"unknown policy {name!r}{nearest(name, known)}: LeRobot has {', '.join(known)}")
    return PreTrainedConfig.get_choice_class(name)


def policy_config(name: str, overrides: list[str] | None, device: str):
    """LeRobot's config of policy `name` with the settings in `overrides`.

    Raises:
        UserError: unknown policy or setting, or values that the policy refuses.
    """
    config_class = policy_class(name)
    values = parse_overrides("--policy_args", config_class, overrides)
    values = with_fitting_steps(
        values, next((f.default for f in fields(config_class) if f.name == "n_action_steps"), None)
    )
    with policy_errors(name):
        return config_class(**{"device": device, "push_to_hub": False, **values})


def load_policy_config(folder: Path, overrides: list[str] | None, device: str):
    """The config.json of a LeRobot checkpoint folder, with the settings in `overrides` changed."""
    import json

    from lerobot.configs import PreTrainedConfig

    known_policies()
    try:
        name = json.loads((folder / "config.json").read_text()).get("type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no policy: config.json cannot be read ({one_line(error)})") from None
    if name not in PreTrainedConfig.get_known_choices():
        raise UserError(f"{folder} holds a policy {name!r}, which this LeRobot does not know")
    with policy_errors(name), quiet_lerobot():
        config = PreTrainedConfig.from_pretrained(folder)
        values = parse_overrides("--policy_args", type(config), overrides)
        return replace(config, device=device, **with_fitting_steps(values, getattr(config, "n_action_steps", None)))


def with_fitting_steps(values: dict, n_action_steps: int | None) -> dict:
    """Settings with as many action steps as a chunk that they shorten can hold, where they name none."""
    if "chunk_size" in values and n_action_steps is not None:
        return {"n_action_steps": min(values["chunk_size"], n_action_steps), **values}
    return values


def build_policy(config, meta, folder: Path | None = None):
    """The policy on its device, fresh or with the weights in a checkpoint folder.

    Args:
        config: LeRobot policy config with its input and output features set.
        meta: the dataset's LeRobotDatasetMetadata, which some policies read.
        folder: holds model.safetensors, of which every tensor is loaded and no other.

    Raises:
        UserError: an extra is not installed, a backbone cannot be fetched, or the weights do not fit.
    """
    from lerobot.policies import get_policy_class

    if config.use_peft and folder is not None:
        base = hub.fetch(base_of(folder), "the adapters' policy")
        policy = load_adapters(build_policy(replace(config, use_peft=False), meta, base), folder).to(config.device)
        policy.config.use_peft = True  # as it is saved
        return policy
    backbone = getattr(config, "pretrained_backbone_weights", None)
    with policy_errors(config.type), quiet_lerobot():
        if folder is not None and backbone is not None:
            config.pretrained_backbone_weights = None  # the file holds them: nothing to download
        if meta is not None:
            config._runtime_dataset_meta = meta
        try:
            policy = get_policy_class(config.type)(config, dataset_stats=meta and meta.stats, dataset_meta=meta)
        finally:
            if backbone is not None:
                config.pretrained_backbone_weights = backbone
    if folder is not None:
        load_weights(policy, folder / "model.safetensors")
    return policy.to(config.device)


def counts_valid_actions(config) -> bool:
    """Whether the policy's loss is a mean over the actions within their episodes, rather than over samples."""
    masks = getattr(config, "do_mask_loss_for_padding", False)  # diffusion's
    keeps = getattr(config, "supervise_padding_actions", True)  # eo1's
    return masks or not keeps or config.type in ("act", "flow", "smolvla", "vla_jepa")


def set_phase(policy, step: int) -> None:
    """Tell vqbet, whose first phase ends by a count of its own that is in no checkpoint, which step this is."""
    if policy.config.type == "vqbet":
        quantiser = policy.vqbet.action_head.vqvae_model
        quantiser.optimized_steps = step
        if quantiser.discretized:  # as it leaves itself when the phase ends
            quantiser.eval()
            quantiser.vq_layer.requires_grad_(False)


def in_first_phase(policy) -> bool:
    """Whether this is vqbet before its quantiser is trained, whose loss is another one than afterwards."""
    return policy.config.type == "vqbet" and not policy.vqbet.action_head.vqvae_model.discretized


def load_weights(policy, path: Path) -> None:
    from safetensors import SafetensorError

    try:
        if hasattr(policy, "_fix_pytorch_state_dict_keys") or policy.config.type == "xvla":
            load_renamed(policy, path)
        else:
            policy._load_as_safetensor(policy, str(path), "cpu", True)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {one_line(error)}: take another checkpoint") from None
    except RuntimeError as error:  # torch's list of keys and shapes that differ
        differs = str(error).splitlines()
        first = " ".join(differs[1 if len(differs) > 1 else 0].split())[:200]
        raise UserError(
            f"{path} does not fit policy {policy.name}: {first}: pass the settings it was trained with"
        ) from None


def load_renamed(policy, path: Path) -> None:
    """Load weights that are published under older names, of pi0's family and xvla, as LeRobot's from_pretrained renames them.

    Raises:
        RuntimeError: the policy has other tensors.
    """
    from safetensors.torch import load_file

    state = load_file(path)
    if policy.config.type == "xvla":
        lerobot = sys.modules[type(policy).__module__]
        if lerobot._is_vendored_florence_state_dict(state):
            state = lerobot._remap_vendored_florence_state_dict(state)
    else:
        with quiet_lerobot():
            state = policy._fix_pytorch_state_dict_keys(state, policy.config)
        state = {f"model.{name.removeprefix('model.')}": tensor for name, tensor in state.items()}
    missing, unexpected = policy.load_state_dict(state, strict=False)
    own = policy.state_dict()
    there = {own[name].data_ptr() for name in state if name in own}  # a tensor of two names is saved under one
    missing = [name for name in missing if own[name].data_ptr() not in there]
    if missing or unexpected:
        raise RuntimeError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")


@contextlib.contextmanager
def quiet_lerobot():
    """Without the lines that LeRobot and torch.hub print while they build and load."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def converted_dir() -> Path:
    """Where checkpoints that were converted on the way in are kept."""
    return user_cache_dir() / "converted"


def policy_folder(folder: Path) -> Path:
    """The folder that holds a policy: pretrained_model of a LeRobot checkpoint, or what LeRobot's own migration makes of an old one.

    Old ones, from before processors, have their normalisation in their weights.

    Raises:
        UserError: the migration fails.
    """
    from safetensors import SafetensorError, safe_open

    folder = folder / "pretrained_model" if (folder / "pretrained_model").is_dir() else folder
    try:
        with safe_open(folder / "model.safetensors", "pt") as file:
            old = any(name.startswith(("normalize_inputs", "unnormalize_outputs")) for name in file.keys())  # noqa: SIM118
    except (OSError, SafetensorError):
        return folder  # message where it is loaded
    if not old:
        return folder
    facts = [str(folder.resolve()), (folder / "model.safetensors").stat().st_mtime_ns]
    place = converted_dir() / f"migrated-{hashlib.sha256(str(facts).encode()).hexdigest()[:16]}"
    if not place.is_dir():
        fresh = place.with_name(f".{place.name}.{os.getpid()}")
        command = [sys.executable, "-m", "lerobot.processor.migrate_policy_normalization"]
        done = subprocess.run(
            [*command, "--pretrained-path", str(folder), "--output-dir", str(fresh)], capture_output=True, text=True
        )
        made = all((fresh / name).is_file() for name in ("model.safetensors", *FILES))
        if not made:  # it ends with a model card, which fails offline
            shutil.rmtree(fresh, ignore_errors=True)
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(
                f"{folder} keeps its normalisation in its weights, and LeRobot's migration of it fails: {why[:200]}"
            )
        os.rename(fresh, place)
    return place
