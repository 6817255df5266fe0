"""Which run is meant, and everything that can refuse it, settled before anything of it is built at full size.

`plan_run` turns settings into a RunPlan: final settings, output folder, checkpoint to resume from, the opened dataset and what
the policy will be. What it returns does not change any more.
"""

import copy
import gc
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

import hub
import runtime
from checkpoints.folder import TrainState
from checkpoints.lock import RunFolder
from config import TrainConfig
from data.observations import leave_out, observation_names, observations_flag
from data.source import Source
from data.split import split_episodes
from policy.factory import policy_config
from policy.presets import merge_training_preset
from policy.requirements import check_policy_of, check_requirements, require_backbone_weights
from processors.features import ignored_states
from processors.statistics import require_statistics, unnormalised_names, wanted_mode
from sim.environments import Simulation
from training.changes import compare_data, compare_learning_rates, compare_optimizers, describe_data
from training.chosen_run import ChosenRun, choose_run, find_checkpoint, gather_settings
from training.distributed import Distributed
from training.evaluation import open_simulation
from training.launch import make_distributed
from training.memory import Memory, check_memory, estimate_memory, memory_remedies
from training.parts import build_processors, build_source, plan_memory
from training.policy_plan import PolicyPlan, plan_policy
from training.room import kept_checkpoints, require_room, warn_of_room
from training.step_time import fix_steps


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


@runtime.without_collector()
def plan_run(settings: dict) -> RunPlan:
    """Settle which run `settings` ask for, and ask everything that can refuse it.

    Raises:
        UserError: settings that are unknown or contradict each other, no such checkpoint, an output folder in use, no login at a
            service that the run reports to, data that do not fit the policy, or no room for a checkpoint.
    """
    gc.collect()  # frees what an earlier run left
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


def check_policy(chosen: ChosenRun, distributed: Distributed) -> None:
    """Raise a UserError where the policy, its processors or its base need something that cannot be had."""
    config = chosen.config
    if chosen.checkpoint is not None:
        check_policy_of(chosen.checkpoint)
    elif config.policy_path:
        check_policy_of(hub.fetch(config.policy_path, "--policy_path", weights=False), config.policy_args)
    else:
        check_requirements(policy_config(config.policy, config.policy_args, str(distributed.device)), None)
