"""Check what a policy reads besides its folder (tokenizers, backbones, bases on the Hub) before anything large is downloaded."""

import re
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import Request

import torch
from lerobot.utils.import_utils import require_package
from torchvision import models

import hub
from errors import UserError, as_user_error, find_path
from policy.adapter_settings import base_model_of
from policy.factory import load_policy_config
from policy.migration import resolve_policy_folder
from processors.pipelines import has_processors
from trust import PIPELINES, read_pipeline

# By the sources of LeRobot 0.6.1. Repos that a policy's new processors read, and that no setting names:
TOKENIZERS = {
    "pi0": ("google/paligemma-3b-pt-224",),
    "pi05": ("google/paligemma-3b-pt-224",),
    "groot": ("nvidia/Cosmos-Reason2-2B",),
}
# Settings that name a repo which is not read here, or not always.
UNREAD = {"fastwam": ("model_id", "base_model_id"), "molmoact2": ("discrete_action_tokenizer",)}
READ_IF = {"text_encoder_model_id": "load_text_encoder", "jepa_encoder_name": "enable_world_model"}
WEIGHTS_IF = {"vlm_model_name": "load_vlm_weights"}


def fetch_policy(repo: str, what: str) -> Path:
    """A policy's folder, or the snapshot of its Hub repo. Its weights are downloaded last.

    Args:
        repo: a folder, user/name or user/name@revision.
        what: the flag or noun that messages call it by.

    Raises:
        UserError: there is none, or something else that it reads cannot be had.
    """
    folder = hub.fetch(repo, what, weights=False)
    if find_path(repo, what) is not None:
        return folder
    check_policy_of(folder)
    folder = hub.fetch(repo, what)
    if not any(folder.rglob("*.safetensors")):
        raise UserError(
            f"{what} {repo} has no weights on this machine. Run this online once: {hub.download_command(repo)}"
        )
    return folder


def check_policy_of(folder: Path, overrides: list[str] | None = None) -> None:
    """As `check_requirements`, for the policy in a folder. A folder that cannot be read passes: later checks report why.

    Args:
        folder: the policy's, or that of its checkpoint.
        overrides: NAME=VALUE for single settings.
    """
    try:
        folder = resolve_policy_folder(folder)
        if not has_processors(folder):
            return
        config = load_policy_config(folder, overrides, "cpu")
    except UserError:
        return
    check_requirements(config, folder)


def check_requirements(config, folder: Path | None) -> None:
    """Refuse a policy that needs a package or a Hub repo that is neither on this machine nor can be downloaded.

    Args:
        config: LeRobot's config of the policy.
        folder: the policy's; None for a new one.

    Raises:
        UserError: names everything that is missing, or the LeRobot extra to install.
    """
    needs = repos_of(config, folder)
    what = f"policy {config.type}"
    if needs:
        with as_user_error(what, policy=config.type):
            require_package("transformers", extra=config.type)  # reads them all
    hub.require_repos(needs, what)


def repos_of(config, folder: Path | None) -> dict[str, bool]:
    """{Hub id: whether its weights are read} of the repos that a policy always reads; arguments as `check_requirements`."""
    needs = {}
    for f in fields(config):
        repo = getattr(config, f.name)
        is_tokenizer = "tokenizer" in f.name
        if not is_hub_id(repo) or not (is_hub_id(f.default) or f.name == "base_model_path"):
            continue
        if f.name in UNREAD.get(config.type, ()) or not getattr(config, READ_IF.get(f.name, ""), True):
            continue
        if folder is not None and (is_tokenizer or config.type == "eo1"):
            continue  # the folder's processors, or its config, say what is read
        weights = not is_tokenizer and getattr(config, WEIGHTS_IF.get(f.name, ""), True)
        needs[repo] = needs.get(repo, False) or weights
    tokenizers = TOKENIZERS.get(config.type, ())
    if folder is not None:
        tokenizers = saved_tokenizers(folder)
    for repo in tokenizers:
        needs.setdefault(repo, False)
    if folder is not None and config.use_peft:
        base = base_model_of(folder)
        if is_hub_id(base):
            needs[base.partition("@")[0]] = True
    return needs


def saved_tokenizers(folder: Path) -> list[str]:
    """The Hub ids from which the processors in a folder load tokenizers."""
    repos = []
    for name in PIPELINES:
        if not (folder / name).is_file():
            continue
        for step in read_pipeline(folder / name):
            own_files = step.get("artifacts", {})  # later LeRobots keep tokenizers in the folder
            for key, value in step.get("config", {}).items():
                if re.search("(tokenizer|processor)_name$", key) and key not in own_files and is_hub_id(value):
                    repos.append(value)
    return repos


def is_hub_id(value) -> bool:
    """Whether a setting's value is user/name of the Hub, and no folder here."""
    return isinstance(value, str) and re.fullmatch(hub.HUB_ID, value) is not None and not Path(value).exists()


def require_backbone_weights(config) -> None:
    """Check that torchvision's weights, with which a new act, diffusion or vqbet starts, can be had.

    Raises:
        UserError: it is not on this machine, and its server cannot be reached.
    """
    weights = getattr(config, "pretrained_backbone_weights", None)
    backbone = getattr(config, "vision_backbone", None)
    if weights is None or backbone not in models.list_models(models):
        return
    url = models.get_model_weights(backbone)[weights.rpartition(".")[2]].url
    if (Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name).is_file():
        return
    remedy = "Go online once, or pass --policy_args pretrained_backbone_weights=none"
    with as_user_error(f"policy {config.type}", offline=remedy):
        torch.hub.urlopen(Request(url, method="HEAD"), timeout=20).close()
