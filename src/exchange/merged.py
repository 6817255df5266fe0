"""A policy with its adapters merged into its weights: a folder that needs neither PEFT nor the policy they were trained on."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import hub
from checkpoints.folder import verify_policy
from checkpoints.writer import share_weights, write_json
from errors import UserError, one_line, read_json
from policy.adapters import adapter_config
from policy.factory import build_policy, load_policy_config
from policy.migration import resolve_policy_folder
from policy.training_record import trained_datasets, trained_depth, trained_joint_names, trained_rename
from processors.pipelines import load_processors


def write_merged(checkpoint: str, output: Path) -> None:
    """Write the policy in a checkpoint with its adapters merged into its weights, as a LeRobot policy folder.

    Args:
        checkpoint: a checkpoint-<step> folder, a policy folder or a Hub id.
        output: a new folder.

    Raises:
        UserError: `output` exists, or there are no adapters, or PEFT does not merge these.
        OSError: the folder cannot be written.
    """
    if output.exists():
        raise UserError(f"{output} exists already. Choose another folder, or remove it")
    fetched = hub.fetch(checkpoint, "checkpoint")
    verify_policy(fetched)
    folder = resolve_policy_folder(fetched)
    config = load_policy_config(folder, None, "cpu")
    if not config.use_peft:
        raise UserError(f"--merge: {checkpoint} has no adapters to merge. It is a policy by itself: leave --merge out")
    preprocess, postprocess = load_processors(folder, "cpu")
    policy = build_policy(config, None, folder)
    method = adapter_config(policy).peft_type.value.lower()
    base = adapter_config(policy).base_model_name_or_path
    try:
        merged = policy.merge_and_unload(safe_merge=True)
    except (NotImplementedError, ValueError) as error:
        raise UserError(
            f"--merge: PEFT does not merge these adapters ({method}): {one_line(error)[:200].rstrip('.')}. "
            "Load them as they are, which needs peft"
        ) from error
    if was_quantized(folder):
        print(
            f"note: {checkpoint} was trained on weights of 4 bits: its adapters are merged into the weights of {base} "
            "before rounding, as they are loaded to act",
            file=sys.stderr,
        )
    merged.config.use_peft = False
    merged.config.pretrained_path = None

    unfinished = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        merged.save_pretrained(unfinished)
        preprocess.save_pretrained(unfinished)
        postprocess.save_pretrained(unfinished)
        # `load_policy` reads these two.
        info = {
            "joint_names": trained_joint_names(folder, config),
            "datasets": trained_datasets(folder) or None,
            "depth": {key: asdict(recorded) for key, recorded in trained_depth(folder).items()},
            "merged_from": str(checkpoint),
        }
        write_json(unfinished / "training_info.json", info)
        write_json(unfinished / "train_config.json", {"rename": trained_rename(folder)})
        share_weights(unfinished, as_file=unfinished / "config.json")
        unfinished.rename(output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def was_quantized(folder: Path) -> bool:
    """Whether a run of ours trained the adapters in a folder on weights of 4 bits."""
    path = folder / "train_config.json"
    return path.is_file() and bool(read_json(path).get("peft_quantize"))
