"""Which run is meant, and everything that can refuse it, settled before anything of it is built at full size.

`plan_run` turns settings into a RunPlan: final settings, output folder, checkpoint to resume from, the opened dataset and what
the policy will be. What it returns does not change any more.
"""

import contextlib
import copy
import gc
import math
import os
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import hub
import runtime
from checkpoints.folder import (
    MANIFEST,
    TrainState,
    branch_of,
    find_checkpoints,
    find_resume,
    has_backup,
    read_state,
    sort_key,
    step_of,
    verify,
)
from checkpoints.lock import RunFolder, sole_writer
from checkpoints.tensors import require_real
from config import TrainConfig, check_names, merge, read_config_file
from data.observations import leave_out, observation_names, observations_flag
from data.source import Source
from data.split import split_episodes
from errors import UserError, find_path
from exchange.lerobot_runs import from_lerobot, lerobot_checkpoint
from policy.factory import policy_config, saved_config_class
from policy.migration import resolve_policy_folder
from policy.presets import merge_training_preset
from policy.requirements import check_policy_of, check_requirements, require_backbone_weights
from processors.bases import AUTO
from processors.features import ignored_states
from processors.statistics import require_statistics, unnormalised_names, wanted_mode
from sim.environments import Simulation
from training.changes import (
    compare_data,
    compare_learning_rates,
    compare_machine,
    compare_optimizers,
    compare_settings,
    describe_data,
    settings_taken_over,
)
from training.distributed import Distributed
from training.evaluation import open_simulation
from training.feature_store import can_store_features, encode
from training.launch import make_distributed
from training.learner import build_learner
from training.memory import Memory, check_memory, estimate_memory, memory_remedies
from training.optimizers import check_optimizer
from training.parts import build_processors, build_source, build_training_policy, open_loader, plan_memory
from training.policy_plan import PolicyPlan, plan_policy
from training.trackers import check_trackers

# None in these stands for the policy's preset.
PRESET_FIELDS = ("batch_size", "ema_decay", "augment", "augment_style", "image_size")
PATH_FIELDS = (
    "dataset_id", "dataset_root", "cache_dir", "policy_path", "output_dir", "resume_from_checkpoint", "config_path",
)  # fmt: skip
FP32_ONLY = ("vqbet",)  # the averages of its codebook cannot be computed under autocast


@dataclass(frozen=True)
class RunPlan:
    """A run before it is built. A context manager: leaving it releases the output folder and the other processes.

    Attributes:
        config: every setting, final: presets merged, minutes turned into steps.
        output_dir: the run's folder, which no other run writes to until the plan is left.
        folder: its lock; None in a process that writes nothing there.
        checkpoint: folder to resume from; None for a new run.
        state: what that checkpoint recorded of its run; None for a new run.
        warnings: what changes on this resume, and what is doubtful about the data, one line each.
        notes: lines to print below the header.
        distributed: the processes of this run.
        source: the dataset, open and checked.
        train_episodes, held_out: (E,) positions in `source.episodes` to train on and to validate on.
        data: what a checkpoint records of the data.
        policy: what the policy and its processors are built from.
        simulation: the simulation of --eval_env, open and checked; None without one, and in all processes but the main one.
        memory: estimated bytes that training takes; None if only the built policy shows them.
    """

    config: TrainConfig
    output_dir: Path
    folder: RunFolder | None
    checkpoint: Path | None
    state: TrainState | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    distributed: Distributed
    source: Source
    train_episodes: Tensor
    held_out: Tensor
    data: dict
    policy: PolicyPlan
    simulation: Simulation | None
    memory: Memory | None
    cleanup: ExitStack

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.cleanup.__exit__(*error)

    def check_folder(self) -> None:
        """Call before every change in the run's folder.

        Raises:
            LostFolderError: it was moved, deleted or replaced.
            OSError: the disk does not say.
        """
        if self.folder is not None:
            self.folder.check()

    @property
    def kept(self) -> int:
        """The most checkpoints that the run has on the disk at a time."""
        return kept_checkpoints(self.config)

    def memory_remedies(self) -> list[str]:
        """Flags that would let this run take less memory."""
        return memory_remedies(
            self.config,
            self.policy.config,
            resumed=self.checkpoint is not None,
            kind=self.distributed.kind,
            processes=self.distributed.size,
        )

    def memory_of(self, policy) -> tuple[Memory, list[str]]:
        """What the run takes, and warnings where something has no room for it that `plan_run` could not check.

        Args:
            policy: as it was built, before it is wrapped for several processes.

        Raises:
            UserError: the device cannot hold it, or the disk not even one checkpoint.
        """
        memory = estimate_memory(policy, self.config, self.distributed.kind, self.distributed.size)
        if self.memory is not None:
            return memory, []
        self.distributed.on_main(lambda: require_room(self.output_dir, memory.checkpoint))
        warnings = check_memory(memory, self.distributed.device, self.memory_remedies())
        return memory, warnings + warn_of_room(self.output_dir, memory.checkpoint, self.config)


@dataclass
class ChosenRun:
    """Which run the settings mean: a new one, or one to resume. Attributes as RunPlan's."""

    config: TrainConfig
    output_dir: Path
    folder: RunFolder | None
    checkpoint: Path | None
    state: TrainState | None
    warnings: list[str]


@runtime.without_collector()
def plan_run(settings: dict) -> RunPlan:
    """Settle which run `settings` ask for, and ask everything that can refuse it.

    Raises:
        UserError: settings that are unknown or contradict each other, no such checkpoint, an output folder in use, no login at a
            service that the run reports to, data that do not fit the policy, or no room for a checkpoint.
    """
    given = gather_settings(settings)
    with ExitStack() as cleanup:
        distributed = cleanup.enter_context(make_distributed(given.get("device") or "auto"))
        # The main process hashes the checkpoint and locks the folder; the others learn which they are.
        chosen = distributed.on_main(
            lambda: choose_run(given, distributed, cleanup), for_others=lambda chosen: replace(chosen, folder=None)
        )
        if chosen.checkpoint is not None and not chosen.checkpoint.is_dir():
            # Another machine, with its own disk: a checkpoint from the Hub or of lerobot-train goes into its own cache.
            chosen.checkpoint, _ = find_checkpoint(given["resume_from_checkpoint"], chosen.output_dir)
        distributed.use(chosen.config.device)
        warnings = chosen.warnings
        runtime.set_numerics(chosen.config.deterministic)

        # What the policy reads besides is asked for before the dataset and any weights are downloaded.
        distributed.on_main(lambda: check_policy(chosen, distributed))

        # The dataset: the main process downloads it, the others find it.
        with distributed.main_first():
            source = build_source(chosen.config)
        fresh = chosen.checkpoint is None
        config = merge_training_preset(chosen.config, source.picture_sizes, distributed.device, fresh)
        distributed.check(config)
        distributed.local_batch_size(config.batch_size, config.grad_accumulation_steps)  # fails if it does not divide
        split = split_episodes(source, config, chosen.state)
        data = distributed.on_main(lambda: describe_data(source, split.held_out), for_others=lambda data: data)
        warnings += compare_data(chosen.state, data, config)

        # The policy: its settings and processors, without weights.
        policy = plan_policy(config, chosen.checkpoint, source, distributed)
        config = policy.settings
        if policy.folder is None:
            distributed.on_main(lambda: require_backbone_weights(policy.config))
        # As a trial: tokenizers are fetched here.
        preprocess, postprocess = build_processors(copy.deepcopy(policy), source.meta)
        normalised = [key for key in (*policy.config.input_features, "action") if key not in policy.empty]
        require_statistics(policy.config, preprocess, postprocess, normalised, str(policy.folder or policy.config.type))
        warnings += unnormalised_warnings(policy.config, preprocess)
        if policy.unused:
            leave_out(source, policy.unused)  # after `describe_data`, whose hash is of all that was opened
        simulation = distributed.on_main(lambda: open_simulation(config, policy.config, preprocess))
        if simulation is not None:
            cleanup.callback(simulation.close)
        warnings += policy.warnings
        warnings += compare_optimizers(chosen.state, chosen.checkpoint, policy.config, config)
        warnings += compare_learning_rates(chosen.state, policy.config, config)
        memory = plan_memory(policy, source.meta, distributed)
        if memory is not None:
            distributed.on_main(lambda: require_room(chosen.output_dir, memory.checkpoint))
            remedies = memory_remedies(
                config, policy.config, resumed=not fresh, kind=distributed.kind, processes=distributed.size
            )
            warnings += check_memory(memory, distributed.device, remedies)
        warnings += source.warnings

        notes = unused_notes(policy, source)
        if config.minutes and fresh:
            config, note = fix_steps(config, distributed, source, split.train, policy)
            notes.append(note)
        if memory is not None:
            warnings += warn_of_room(chosen.output_dir, memory.checkpoint, config)
        return RunPlan(
            config=config,
            output_dir=chosen.output_dir,
            folder=chosen.folder,
            checkpoint=chosen.checkpoint,
            state=chosen.state,
            warnings=tuple(warnings),
            notes=tuple(notes),
            distributed=distributed,
            source=source,
            train_episodes=split.train,
            held_out=split.held_out,
            data=data,
            policy=policy,
            simulation=simulation,
            memory=memory,
            cleanup=cleanup.pop_all(),
        )


def unnormalised_warnings(policy_config, preprocess) -> list[str]:
    """A line for each observation that a run of lerobot-train, which is resumed here, does not normalise though its config says so."""
    return [
        f"lerobot-train did not normalise {new}, whose statistics have the dataset's name, {old}. The run keeps to that: "
        "to normalise it, start a new run from its weights with --policy_path"
        for new, old in unnormalised_names(preprocess).items()
        if new in policy_config.input_features and wanted_mode(policy_config, new, undone=False) != "IDENTITY"
    ]


def unused_notes(policy: PolicyPlan, source: Source) -> list[str]:
    """What the policy does not look at, in a line each."""
    notes = list(policy.notes)
    if policy.unused:
        note = f"not decoded, since the policy does not take it: {', '.join(policy.unused)}"
        if not policy.resumed:
            used = observations_flag(observation_names(source.meta), source.renamed)
            note += f". To leave its files unchecked too, pass {used}"
        notes.append(note)
    ignored = ignored_states(policy.config)
    if ignored:
        notes.append(f"policy {policy.config.type} looks at observation.state and cameras, not at {', '.join(ignored)}")
    return notes


def gather_settings(settings: dict) -> dict:
    """The settings over those of their --config_path file, with ~ expanded in folders.

    Raises:
        UserError: a name is unknown, or the file cannot be read.
    """
    check_names(settings, "for train()")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}
    from_file = {}
    check_paths(settings)
    if settings.get("config_path"):
        from_file = read_config_file(settings["config_path"])
    given = merge_lengths(from_file, settings)
    check_paths(given)
    for name in ("output_dir", "dataset_root"):
        if given.get(name):
            given[name] = os.path.expanduser(given[name])
    return given


def check_paths(settings: dict) -> None:
    """Raise a UserError for a path among the settings that cannot exist, or that you may not enter."""
    for name in PATH_FIELDS:
        value = settings.get(name)
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if text and isinstance(text, (str, Path)):
                find_path(text, f"--{name}")


def merge_lengths(from_file: dict, settings: dict) -> dict:
    """`settings` over those of a file, where --steps and --minutes replace each other and minutes win side by side."""
    lengths = ("steps", "minutes")
    if any(settings.get(name) is not None for name in lengths):
        from_file = {name: value for name, value in from_file.items() if name not in lengths}
    given = {**from_file, **settings}
    if given.get("minutes") is not None:
        given.pop("steps", None)
    return given


def choose_run(given: dict, distributed: Distributed, cleanup: ExitStack) -> ChosenRun:
    """Find the output folder, take it for this run until `cleanup` is closed, and find the checkpoint to resume from.

    The main process calls this.
    """
    asked = given.get("resume_from_checkpoint")
    output_dir = given.get("output_dir")
    names_no_checkpoint = asked in (None, "latest", "auto")
    if asked is None:
        check_services(merge(given))  # before a base policy is downloaded

    # The output folder. Its default name has the policy's name in it.
    if asked is None or (output_dir is None and names_no_checkpoint):
        given = with_policy_of_base(given)
    if output_dir is None and names_no_checkpoint:
        output_dir = default_output_dir(merge(given))
    elif output_dir is None and has_backup(Path(os.path.expanduser(asked))):
        output_dir = Path(os.path.expanduser(asked)).parent  # taking the folder puts the backup back in its place
    folder = None
    if output_dir is not None:
        output_dir = Path(output_dir)
        folder = cleanup.enter_context(sole_writer(output_dir))

    # The checkpoint, and what it recorded.
    checkpoint, warnings = find_checkpoint(asked, output_dir)
    state = None
    if checkpoint is not None:
        state = read_state(checkpoint, given.get("resume_step"))
        # A None would ask for the preset again: what it filled in for the checkpoint stays.
        given = {name: value for name, value in given.items() if value is not None or name not in PRESET_FIELDS}
        given = with_recorded_names(given, state.train_config)
    elif asked is not None:  # auto, which found none
        given = with_policy_of_base(given)

    # The settings: those given over those of the checkpoint.
    recorded = None
    if state is not None:
        require_real(checkpoint)
        recorded, not_taken = settings_taken_over(given, state, checkpoint)
        warnings += not_taken
    config = merge(given, recorded)
    check_paths(config.asdict())
    device = distributed.use(config.device)
    check_optimizer(config.optimizer)
    config = replace(config, precision=choose_precision(config, device))
    if asked is not None:
        check_services(config)
    if state is not None:
        warnings += compare_settings(config, state, checkpoint, distributed.size)
        warnings += compare_machine(state, runtime.describe_machine(device))

    if output_dir is None:
        output_dir = folder_of_checkpoint(asked, checkpoint, config)
        folder = cleanup.enter_context(sole_writer(output_dir))
    warnings += folder.warnings
    warnings += check_branch(output_dir, checkpoint, state)
    return ChosenRun(config, output_dir, folder, checkpoint, state, warnings)


def with_recorded_names(given: dict, recorded: dict) -> dict:
    """The settings of a resume, in which `--rename auto` adds to the pairs that the run has."""
    if AUTO not in (given.get("rename") or []):
        return given
    return {**given, "rename": [*(recorded.get("rename") or []), *given["rename"]]}


def choose_precision(config: TrainConfig, device: torch.device) -> str:
    """What --precision means for this policy on this device.

    Raises:
        UserError: the device or the policy does not compute in it.
    """
    if config.policy not in FP32_ONLY:
        return runtime.pick_precision(config.precision, device, config.weights_dtype)
    for name in ("precision", "weights_dtype"):
        value = getattr(config, name)
        if value not in ("auto", "fp32"):
            raise UserError(f"--{name} {value}: policy {config.policy} computes in fp32 only. Leave --{name} out")
    return "fp32"


def find_checkpoint(asked: str | None, output_dir: Path | None) -> tuple[Path | None, list[str]]:
    """The checkpoint that --resume_from_checkpoint means (None for a new run), and warnings about damaged ones."""
    if asked is None:
        return None, []
    is_ours = os.path.isfile(Path(os.path.expanduser(asked)) / MANIFEST)  # whatever else is in it or beside it
    of_lerobot = None if is_ours else lerobot_checkpoint(asked)
    if of_lerobot is not None:
        converted = from_lerobot(of_lerobot)
        try:
            verify(converted)
        except UserError as error:
            raise UserError(f"{error}. Delete it: it is converted from {of_lerobot} again") from None
        return converted, []
    return find_resume(asked, output_dir)


def folder_of_checkpoint(asked: str, checkpoint: Path, config: TrainConfig) -> Path:
    """Where a run resumed without --output_dir is kept: beside its checkpoint, unless that came from elsewhere."""
    came_from_elsewhere = Path(os.path.expanduser(asked)).resolve() != checkpoint.resolve()  # the Hub, or lerobot-train
    if came_from_elsewhere or step_of(checkpoint) is None:
        return default_output_dir(config)
    return checkpoint.parent


def check_branch(output_dir: Path, checkpoint: Path | None, state: TrainState | None) -> list[str]:
    """Keep runs apart: refuse a folder with another run's checkpoints; going back to an earlier step begins another branch.

    Writes the branch and its ancestors into `state`. Returns a warning where checkpoints will be replaced.
    """
    newest = max(find_checkpoints(output_dir), key=sort_key, default=None)
    if newest is None:
        return []
    # A checkpoint may be a link to another disk: it belongs to the folder that has its name.
    if checkpoint is None or checkpoint.parent.resolve() != output_dir.resolve():
        raise UserError(
            f"--output_dir {output_dir} already holds {newest.name}. Pass --resume_from_checkpoint latest to resume "
            "from it, or another --output_dir"
        )
    if newest.resolve() == checkpoint.resolve():
        return []
    left_at = [branch_of(state.trainer_state), state.trainer_state["step"]]
    state.trainer_state["ancestors"] = [*state.trainer_state.get("ancestors", []), left_at]
    state.trainer_state["branch"] = 1 + sort_key(newest)[0]
    return [
        f"{newest.name} is newer than {checkpoint.name}: the run goes back, and replaces the checkpoints of later steps "
        "as it reaches them"
    ]


def with_policy_of_base(given: dict) -> dict:
    """The settings with --policy as the base of --policy_path has it, if there is a base.

    Raises:
        UserError: the settings name another policy, or there is none.
    """
    base = given.get("policy_path")
    if not base:
        return given
    folder = resolve_policy_folder(hub.fetch(base, "--policy_path", weights=False))
    policy = saved_config_class(folder)
    name = policy.get_choice_name(policy)
    if given.get("policy", name) != name:
        raise UserError(f"--policy {given['policy']}: --policy_path {base} holds a policy {name}. Leave --policy out")
    return {**given, "policy": name}


def check_policy(chosen: ChosenRun, distributed: Distributed) -> None:
    """Raise a UserError where the policy, its processors or its base need something that cannot be had."""
    config = chosen.config
    if chosen.checkpoint is not None:
        check_policy_of(chosen.checkpoint)
    elif config.policy_path:
        check_policy_of(hub.fetch(config.policy_path, "--policy_path", weights=False), config.policy_args)
    else:
        check_requirements(policy_config(config.policy, config.policy_args, str(distributed.device)), None)


def default_output_dir(config: TrainConfig) -> Path:
    names = "+".join(Path(os.path.expanduser(name)).resolve().name for name in config.dataset_id)
    return Path("outputs") / f"{names}_{config.policy}"


def check_services(config: TrainConfig) -> None:
    """Raise a UserError where the run could not report to a tracker or the Hub."""
    check_trackers(config.tracker)
    if config.push_to_hub:
        hub.check_login(config.push_to_hub)


def require_room(output_dir: Path, size: int) -> None:
    """Raise a UserError if the disk of `output_dir` has no room for a checkpoint of `size` bytes."""
    free = free_bytes(output_dir)
    if size > free:
        raise UserError(
            f"--output_dir {output_dir}: a checkpoint takes about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free. "
            "Free some space, or pass another --output_dir"
        )


def warn_of_room(output_dir: Path, size: int, config: TrainConfig) -> list[str]:
    """A warning where the disk has no room for all checkpoints that the run keeps, of `size` bytes each."""
    kept = kept_checkpoints(config)
    free = free_bytes(output_dir)
    if size * kept <= free:
        return []
    return [
        f"the checkpoints to keep take about {kept} x {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
        "pass --keep_last, or a larger --save_freq"
    ]


def kept_checkpoints(config: TrainConfig) -> int:
    """The most checkpoints that the run has on the disk at a time."""
    kept = 1
    if config.save_freq:
        kept = math.ceil(config.steps / config.save_freq)
    if config.keep_last is not None:
        spared = config.steps // config.keep_every if config.keep_every else 0
        kept = min(kept, config.keep_last + spared + 1)  # one more while the oldest waits to be deleted
    return kept


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def fix_steps(config: TrainConfig, distributed: Distributed, source: Source, episodes: Tensor, policy: PolicyPlan):
    """The settings with --steps such that they take --minutes, and a line that says so."""
    remedies = memory_remedies(config, policy.config, resumed=False, kind=distributed.kind, processes=distributed.size)
    with runtime.enough_memory(config.batch_size, remedies):
        seconds = seconds_of_step(config, distributed, source, episodes, policy)
    gc.collect()
    distributed.free_memory()
    steps = max(1, round(60 * config.minutes / seconds))
    return replace(config, steps=steps), f"{config.minutes:g} minutes are {steps:,} steps of {seconds:.3f} s"


def seconds_of_step(
    config: TrainConfig, distributed: Distributed, source: Source, episodes: Tensor, policy: PolicyPlan
) -> float:
    """How long an optimizer step of this run takes, measured on its first batch for 3 % of --minutes, 20 seconds at most.

    The policy that is trained here is thrown away: the run builds its own from the same seed.
    """
    runtime.seed_all(config.seed, runtime.INIT)
    policy = copy.deepcopy(policy)
    model = build_training_policy(policy, source.meta).train()
    preprocess, _ = build_processors(policy, source.meta)
    learner = build_learner(config, distributed, model, preprocess, source.meta)
    one_batch = replace(config, frame_cache="off", quiet=True)  # no frame store for a single batch
    loader = open_loader(one_batch, source, episodes, model, preprocess, 0, distributed, say=lambda line: None)
    with contextlib.closing(loader):
        batch = loader.batch_at(0)
    if can_store_features(model, config, source, distributed):
        features = encode(model, preprocess, batch, source.meta, distributed.device)
        if features:  # the run reads them from its store
            batch = {key: value for key, value in batch.items() if key not in source.meta.camera_keys} | features
    limit = min(20.0, 1.8 * config.minutes)
    return seconds_of(lambda: learner.step(batch, 0), distributed, at_most=limit)


def seconds_of(call, distributed: Distributed, at_most: float) -> float:
    """How long a call takes: the median of those within `at_most` seconds without the first two, of the slowest process."""
    times = []
    end = time.perf_counter() + at_most
    enough = 0
    while not enough:
        begun = time.perf_counter()
        call()
        if distributed.device.type == "cuda":
            torch.cuda.synchronize(distributed.device)  # waits for the device
        times.append(time.perf_counter() - begun)
        (enough,) = distributed.all_reduce_max(len(times) >= 3 and time.perf_counter() > end)
    (nanoseconds,) = distributed.all_reduce_max(round(1e9 * statistics.median(times[2:])))
    return nanoseconds / 1e9
