"""Train a policy on a LeRobot dataset: `python src/train.py --dataset_id ...`, or `from train import train`.

Top to bottom: train() and its loop, how a planned run is built, what is logged and saved, and the command.
One optimizer step is in training/learner.py, everything that is settled before the first step in training/plan.py.
"""

import contextlib
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from command_line import parse_command_line, print_error
from errors import UserError
from printing import command_output, safe_output

if __name__ == "__main__":
    GIVEN = parse_command_line(sys.argv[1:])  # before the imports that take seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes over, Ctrl-C ends the process without a traceback

import torch
from torch import Tensor

import hub
import runtime
from checkpoints.folder import TrainState, branch_of, find_checkpoints, sort_key
from checkpoints.writer import Snapshot, Writer, finishing, publish
from data.loader import Loader
from policy.adapters import adapter_config
from policy.losses import unknown_average
from reports.pages import last
from training.distributed import LostPeerError
from training.evaluation import Evaluator
from training.feature_store import features_change, stored_versions
from training.learner import Learner, build_learner, num_micro_batches
from training.means import LossMeans
from training.optimizers import rounding_warning
from training.parts import build_processors, build_training_policy, open_loader
from training.plan import RunPlan, plan_run
from training.progress import Report, Stopwatch, TrainResult, closing_message, header, training_info


def train(**settings) -> TrainResult:
    """Train a policy. Every keyword is a flag of the command line: `python src/train.py --help` lists them.

    SIGINT (Ctrl-C, a notebook's interrupt), SIGTERM, SIGUSR1 and SIGHUP (a terminal that is closed) end the run after the
    current step, with a checkpoint. Validation and simulation then do not begin, or end at their next batch or step.

    Returns:
        TrainResult with steps, final_loss, history, checkpoint, policy, stopped_by and plot().

    Raises:
        UserError: a mistake that you can mend, in one line.
        KeyboardInterrupt: a SIGINT after one of these. The checkpoint being written is finished; nothing else is saved.
    """
    with (
        safe_output(),
        plan_run(settings) as plan,
        runtime.enough_memory(plan.config.batch_size, plan.memory_remedies()),
        build_run(plan) as run,
    ):
        if run.evaluation_is_missing and run.is_evaluation_step():
            run.evaluate()
            if not run.stop_signal:  # the same in every process
                run.save()  # the same checkpoint again, with what was measured: best.json goes by that
        while not run.is_over():
            batch = run.next_batch()
            result = run.learner.step(batch, run.step)  # forward, backward, optimizer, average
            run.count(result)
            if run.is_log_step():
                run.log(result)
            if run.is_evaluation_step():
                run.evaluate()
            if run.stop_signal or run.is_save_step():
                run.save()
        return run.finish()


@dataclass
class Run:
    """One training run: its finished parts, and where it stands. A context manager: leaving it stops its threads.

    Attributes:
        unsharded: the policy as one process runs it, to validate and to save; None in a process that does neither.
        step: optimizer steps done.
        samples_seen: samples trained on, which is where the loader stands.
        branch: how often the run went back to an earlier step.
        ancestors: [branch, last step that this run has of it] of each branch that it left when it went back.
        losses: the loss and the policy's sub-losses since the last log line.
        first_bad_step: first step whose loss or gradient was not finite, -1 so far; on the device.
        train_seconds: wall time of the runs before this resume.
        saved_step: step of the newest checkpoint, None before the first.
        evaluation_is_missing: whether a stop kept this step from being validated or simulated: a resume begins with it.
        stop_signal: number of the signal that asked this run to end, 0 so far; the same in every process.
        minutes_have_passed: whether --save_minutes asks for a checkpoint after this step.
    """

    plan: RunPlan
    policy: torch.nn.Module
    preprocess: object
    postprocess: object
    unsharded: torch.nn.Module | None
    learner: Learner
    loader: Loader
    evaluator: Evaluator
    report: Report
    writer: Writer
    signals: runtime.StopSignals
    stopwatch: Stopwatch
    cleanup: ExitStack
    step: int
    samples_seen: int
    branch: int
    ancestors: list
    losses: LossMeans
    first_bad_step: Tensor
    train_seconds: float
    saved_step: int | None
    evaluation_is_missing: bool
    stop_signal: int = 0
    minutes_have_passed: bool = False

    def __post_init__(self):
        self.config = self.plan.config
        self.distributed = self.plan.distributed
        self.start_step = self.step

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return self.cleanup.__exit__(*error)

    def next_batch(self) -> dict:
        """The loader's next batch. If the loader of any process fails, the steps before it are saved first."""
        batch = None
        failure = None
        try:
            batch = self.stopwatch.wait(self.loader)
        except Exception as error:
            failure = error
        (has_failed,) = self.distributed.all_reduce_max(int(failure is not None))
        if has_failed:
            self.save_what_is_done()
            raise failure or LostPeerError("the data of this step could not be read in another process")
        return batch

    def save_what_is_done(self) -> None:
        """Save before an error ends the run. If that fails too, it is a warning."""
        if self.step == self.start_step or self.step == self.saved_step:
            return
        try:
            self.save()
            self.writer.finish()
            self.report.warn(f"step {self.step + 1} fails: the steps before it are saved in checkpoint-{self.step}")
        except UserError as error:
            self.report.warn(f"step {self.step + 1} fails, and the steps before it are not saved: {error}")
        self.distributed.barrier()  # a launcher ends the main process once another has left

    def count(self, result) -> None:
        """Take in a finished step: its loss, and whether any process is asked to stop or save."""
        # With fp16, a gradient that is not finite is a step that the scaler skips.
        watched = result.loss if self.learner.scaler.is_enabled() else result.loss + result.grad_norm
        already_bad = self.first_bad_step >= 0
        self.first_bad_step = torch.where(torch.isfinite(watched) | already_bad, self.first_bad_step, self.step)
        self.losses.add(result.loss, result.sub_losses)
        self.step += 1
        self.samples_seen += self.config.batch_size
        self.minutes_have_passed = self.sync_stop_signal(self.stopwatch.save_is_due())
        self.report.advance()

    def is_over(self) -> bool:
        stopped = self.stop_signal > 0 and self.saved_step == self.step
        return stopped or self.step >= self.config.steps

    def is_log_step(self) -> bool:
        return self.step % self.config.log_freq == 0 or self.step in (1, self.config.steps)

    def is_save_step(self) -> bool:
        save_freq = self.config.save_freq
        planned = save_freq > 0 and self.step % save_freq == 0
        return planned or self.step == self.config.steps or self.minutes_have_passed

    def is_evaluation_step(self) -> bool:
        return self.evaluator.is_due(self.step, self.is_save_step())

    def stop_if_not_finite(self) -> None:
        first_bad_step = int(self.first_bad_step)  # waits for the device
        if first_bad_step < 0:
            return
        last_good = self.last_good_checkpoint()
        frames = self.loader.describe(self.samples_seen - (self.step - first_bad_step) * self.config.batch_size)
        raise UserError(
            f"the loss is not finite at step {first_bad_step + 1}, whose batch holds episode:frame {frames}; "
            f"last good checkpoint: {last_good}. Lower --lr, or look at those frames"
        )

    def stop_if_weights_are_not_finite(self) -> None:
        """Call before a save: the loss of the step that spoilt them was finite, and no later one may have shown it."""
        (is_spoilt,) = self.distributed.all_reduce_max(int(not self.learner.is_finite()))
        if is_spoilt:
            raise UserError(
                f"the weights are not finite after step {self.step}, which is not saved; last good checkpoint: "
                f"{self.last_good_checkpoint()}. Lower --lr"
            )

    def last_good_checkpoint(self) -> Path | str:
        """The newest checkpoint on the disk, for a message. Waits for the one that is being written."""
        self.writer.wait()
        return max(find_checkpoints(self.plan.output_dir), key=sort_key, default="none yet")

    def log(self, result) -> None:
        """Write a line of metrics, with the mean loss since the line before."""
        self.stop_if_not_finite()
        self.writer.check()
        line = {
            "step": self.step,
            "epoch": round(self.samples_seen / self.loader.samples_per_epoch, 4),
            "loss": self.losses.loss(),
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": result.grad_norm.item(),
        }
        sub_losses = self.losses.mean_sub_losses()
        # A policy may call one of its sub-losses "loss": the line's own numbers win, and keep their place in front.
        self.report.log({**line, **sub_losses, **line, **self.stopwatch.rates(self.config.batch_size)})
        # The line at the end of a run is extra: a longer run, which passes this step, sums on.
        if self.step % self.config.log_freq == 0 or self.step == 1:
            self.losses.clear()

    def evaluate(self) -> None:
        """Validate on held-out episodes and in simulation, unless the run is to stop. Only the main process does it."""
        if self.stop_signal:
            self.evaluation_is_missing = True
            return
        with self.stopwatch.paused(), self.learner.ema_applied(self.unsharded):
            if not self.distributed.is_main:
                self.wait_for_evaluation()
                return
            if self.evaluation_is_missing:
                self.report.forget_evaluation(self.step)
            evaluation = self.evaluator.results(self.step, self.is_save_step(), self.loader, self.is_stopped)
            if evaluation.metrics:
                line = {"step": self.step, **evaluation.metrics}
                self.report.log_evaluation(line, evaluation.summary_line(), evaluation.figure)
            self.evaluation_is_missing = evaluation.was_stopped
            self.sync_stop_signal(True)  # the other processes stop waiting

    def is_stopped(self) -> bool:
        """Whether any process was asked to stop. The main process asks this while it evaluates; the others answer."""
        self.sync_stop_signal(False)
        return self.stop_signal > 0

    def wait_for_evaluation(self) -> None:
        """Answer the main process's `is_stopped` until it is done."""
        while not self.sync_stop_signal(False):
            pass

    def sync_stop_signal(self, flag: bool) -> bool:
        """Bring `stop_signal` up to date, the same in every process; returns whether any of them passes a true `flag`."""
        self.stop_signal, any_flag = self.distributed.all_reduce_max(self.signals.asked or 0, flag)
        return bool(any_flag)

    def save(self) -> None:
        """Start writing checkpoint-<step>; a run that went bad since the last log line is stopped instead."""
        self.stop_if_not_finite()
        self.stop_if_weights_are_not_finite()
        with self.stopwatch.paused():
            losses = self.losses.state()  # both gathered from all processes
            state = self.learner.state()
            if self.distributed.is_main:
                snapshot = Snapshot(
                    step=self.step,
                    weights=state.weights,
                    trained_weights=state.trained_weights,
                    optimizer=state.optimizer,
                    policy_config=self.policy.config,
                    preprocessor=self.preprocess,
                    postprocessor=self.postprocess,
                    state=self.train_state(losses),
                    adapters=adapter_config(self.policy),
                )
                self.writer.save(snapshot, self.protected_checkpoints())
                self.report.rewrite_metrics()
                self.report.trackers.note("checkpoint", f"checkpoint-{self.step}", self.step)
        self.saved_step = self.step
        self.stopwatch.last_save = time.perf_counter()

    def protected_checkpoints(self) -> list[Path]:
        """The checkpoint that this run resumed from, until it has saved one of its own."""
        resumed_from = self.plan.checkpoint
        if resumed_from is None or self.step - self.start_step > self.config.save_freq:
            return []
        return [resumed_from]

    def train_state(self, losses: dict) -> TrainState:
        """Where the run stands, for an exact resume and for people. `losses` is the state of `self.losses`."""
        position = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "batch_size": self.config.batch_size,
            "seed": self.config.seed,
            "world_size": self.distributed.size,
            "branch": self.branch,
        }
        trainer_state = {
            **position,
            "ancestors": self.ancestors,
            **losses,
            "evaluation_is_missing": self.evaluation_is_missing,
            "scaler": self.learner.scaler.state_dict(),
            "tracker_run_id": self.report.trackers.run_id,
            "stored_features": stored_versions(self.loader.frames),
            "data": self.plan.data,
        }
        device = self.distributed.device
        info = training_info(self.policy, self.config.dataset_id, self.report.history, device, self.step)
        train_seconds = round(self.train_seconds + self.stopwatch.since_start(), 1)
        return TrainState(
            trainer_state=trainer_state,
            train_config=self.config.asdict(),
            training_info={
                **info,
                **position,
                "train_seconds": train_seconds,
                "joint_names": self.plan.policy.joint_names,
                "datasets": self.plan.policy.datasets or None,
                "depth": {key: asdict(recorded) for key, recorded in self.plan.policy.depth.items()},
            },
        )

    def finish(self) -> TrainResult:
        """Put the finished policy into the run's folder, upload it, and print what to do next."""
        self.writer.finish()
        self.learner.apply_ema(self.unsharded)
        stopped = self.step < self.config.steps
        output_dir = self.plan.output_dir
        result = TrainResult(
            steps=self.step,
            final_loss=last(self.report.history, "loss"),
            history=self.report.history,
            checkpoint=self.writer.saved or output_dir / f"checkpoint-{self.saved_step}",
            policy=self.unsharded,
            output_dir=output_dir,
            stopped_by=signal.Signals(self.stop_signal).name if stopped else None,
        )
        if not self.distributed.is_main:
            return result
        self.unsharded.eval()
        with finishing(result.checkpoint, output_dir):
            self.plan.check_folder()
            self.report.save_curves()
            if not stopped:
                publish(result.checkpoint, output_dir, self.plan.check_folder)
                self.report.save_card(result.checkpoint)
        if not stopped and self.config.push_to_hub:
            address = hub.push(self.config.push_to_hub, output_dir, result.checkpoint, self.report.warn)
            if address:
                print(f"uploaded to {address}")
        print(closing_message(result, self.plan, self.start_step), flush=True)
        return result


@runtime.without_collector()
def build_run(plan: RunPlan) -> Run:
    """Build the parts of a planned run: policy, learner, report, evaluator, loader, writer."""
    config = plan.config
    distributed = plan.distributed
    meta = plan.source.meta
    with ExitStack() as cleanup:
        # The policy, and what trains it. Its initial weights are a function of the seed.
        runtime.seed_all(config.seed, runtime.INIT)
        policy = build_training_policy(plan.policy, meta, quiet=config.quiet or not distributed.is_main)
        preprocess, postprocess = build_processors(plan.policy, meta)
        memory, memory_warnings = plan.memory_of(policy)
        warnings = [
            *plan.warnings,
            *memory_warnings,
            *unknown_average(policy.config, num_micro_batches(config, distributed)),
        ]
        unsharded = distributed.unsharded_copy(policy)
        learner = build_learner(config, distributed, policy, preprocess, meta)

        # Where the run stands.
        position = {"step": 0, "samples_seen": 0, "loss_sums": [0.0], "loss_count": 0}
        train_seconds = 0.0
        if plan.state is not None:
            position = plan.state.trainer_state
            train_seconds = plan.state.training_info["train_seconds"]
            learner.load(plan.checkpoint, position.get("scaler", {}))
            warnings += rounding_warning(learner.optimizer, position, distributed.is_sharded)

        # What people see of it.
        if config.push_to_hub and distributed.is_main:
            hub.create_repo(config.push_to_hub)
        report = cleanup.enter_context(
            Report(
                plan.output_dir,
                resumed_from=plan.checkpoint,
                start_step=position["step"],
                config=config,
                run_id=position.get("tracker_run_id"),
                is_main=distributed.is_main,
                check_folder=plan.check_folder,
            )
        )
        for line in [*header(plan, policy, memory, position["step"]).split("\n"), *plan.notes]:
            report.say(line)
        report.warn(*warnings)
        evaluator = Evaluator(
            config=config,
            source=plan.source,
            held_out=plan.held_out,
            policy=unsharded,
            preprocess=preprocess,
            postprocess=postprocess,
            simulation=plan.simulation,
            warn=report.warn,
        )

        # The data: the main process decodes the frames, the others find them.
        with distributed.main_first():
            loader = open_loader(
                config,
                plan.source,
                plan.train_episodes,
                policy,
                preprocess,
                position["samples_seen"],
                distributed,
                report.say,
            )
        cleanup.callback(loader.close)
        report.warn(*features_change(position, stored_versions(loader.frames)))

        writer = cleanup.enter_context(Writer(plan.output_dir, config, report.warn, plan.checkpoint, plan.check_folder))
        signals = cleanup.enter_context(runtime.StopSignals())
        policy.train()
        return Run(
            plan=plan,
            policy=policy,
            preprocess=preprocess,
            postprocess=postprocess,
            unsharded=unsharded,
            learner=learner,
            loader=loader,
            evaluator=evaluator,
            report=report,
            writer=writer,
            signals=signals,
            stopwatch=Stopwatch(config.save_minutes),
            cleanup=cleanup.pop_all(),
            step=position["step"],
            samples_seen=position["samples_seen"],
            branch=branch_of(position),
            ancestors=position.get("ancestors", []),
            losses=LossMeans(distributed, position),
            first_bad_step=torch.tensor(-1, device=distributed.device),
            train_seconds=train_seconds,
            saved_step=position["step"] if plan.state else None,
            evaluation_is_missing=position.get("evaluation_is_missing", False),
        )


def main(given: dict) -> int:
    """Run the command line and return its exit status: 0, 2 for a UserError, or 128 plus the number of a stop signal."""
    rank = int(os.environ.get("RANK", "0"))
    with command_output():
        try:
            result = train(**given)
        except UserError as error:
            if rank:  # every process meets most mistakes: the main one prints first, and the launcher ends the others
                time.sleep(2)
            print_error(error, prefix=f"process {rank}: " if rank else "")
            return 2
        except LostPeerError as error:
            print(
                f"error: {error}\nIf another process printed an error of its own, fix that first. "
                "Checkpoints are complete: launch the run again with --resume_from_checkpoint auto",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)  # at once: what is left of the connection may wait for ever
        except KeyboardInterrupt:
            leave_at_once()
        if result.stopped_by:
            return 128 + signal.Signals[result.stopped_by]
        return 0


def leave_at_once(*signal_and_frame) -> None:
    """What the second Ctrl-C does in the command: end the process, also while a thread is writing."""
    message = b"interrupted. Pass --resume_from_checkpoint auto to continue from the newest checkpoint\n"
    with contextlib.suppress(OSError):  # nobody reads it
        os.write(2, message)  # it may have come in the middle of a print
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    runtime.StopSignals.interrupt = staticmethod(leave_at_once)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(GIVEN))
