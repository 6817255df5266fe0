"""Train a policy on a LeRobot dataset: `python src/train.py --dataset_id ...`, or `from train import train`.

Top to bottom: train() and its loop, how a run comes to be, and what is logged and saved. A step itself is in step.py.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from command_line import parse_command_line
from config import TrainConfig
from errors import UserError, one_line

if __name__ == "__main__":
    GIVEN = parse_command_line(sys.argv[1:])  # before the imports that take seconds: --help answers at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() Ctrl-C ends it without a traceback

import torch

import hub
import runtime
from checkpoints.folder import TrainState, find_checkpoints, sort_key
from checkpoints.writer import Snapshot, Writer, finishing, publish
from data.split import split
from policy.adapters import adapters_config
from policy.presets import with_preset
from reports.pages import last
from training.distributed import Distributed, is_lost_peer
from training.evaluation import Evaluator, said
from training.learner import Learner
from training.parts import build_loader, build_parts, build_source
from training.plan import compare_data, compare_rates, data_of, fix_steps, settle
from training.progress import Report, Stopwatch, TrainResult, closing_words, header, numbers, training_info


def train(**settings) -> TrainResult:
    """Train a policy. Every keyword is a flag of the command line: `python src/train.py --help` lists them.

    SIGINT (Ctrl-C, a notebook's interrupt), SIGTERM and SIGUSR1 end it after the step under way, with a checkpoint.

    Returns:
        TrainResult with steps, final_loss, history, checkpoint, policy, stopped_by and plot().

    Raises:
        UserError: a mistake the user can mend, message in one line.
        KeyboardInterrupt: a second SIGINT; what was being written is dropped, earlier checkpoints are whole.
    """
    with contextlib.ExitStack() as held:
        with runtime.without_collector():
            run = Run(*settle(settings, held), held)
        while not run.is_over():
            batch = run.watch.wait(run.loader)
            parts, grad_norm = run.train_step(batch)
            if run.is_log_step():
                run.log(parts, grad_norm)
            if run.exam.is_due(run.step, run.is_planned_save()):
                run.examine()
            if run.asked or run.is_planned_save():
                run.save()
        return run.finish()


class Run:
    """One training run: the policy and everything that moves it, and where it stands."""

    def __init__(
        self,
        distributed: Distributed,
        config: TrainConfig,
        output_dir: Path,
        resumed: Path | None,
        state,
        changes,
        held,
    ):
        self.distributed, self.output_dir, self.resumed, self.device = (
            distributed,
            output_dir,
            resumed,
            distributed.device,
        )
        runtime.set_numerics(config.deterministic)
        with distributed.main_first():
            source = build_source(config)
        self.config = config = with_preset(config, source.meta, self.device, resumed is None)
        held.enter_context(runtime.enough_memory(config.batch_size))
        distributed.check(config)
        kept, held_out = split(source, config, state)
        self.data = data_of(source, held_out)
        runtime.seed_all(config.seed, runtime.INIT)
        self.policy, self.preprocess, self.postprocess = build_parts(config, resumed, source, self.device)
        self.whole = distributed.unsharded_copy(self.policy)
        self.learner = Learner(config, distributed, self.policy, self.preprocess, source.meta)
        if config.push_to_hub and distributed.is_main:
            hub.create_repo(config.push_to_hub)

        before = state.trainer_state if state else {"step": 0, "samples_seen": 0, "loss_sums": [0.0], "loss_count": 0}
        self.step, self.samples_seen, self.course = before["step"], before["samples_seen"], before.get("course", 0)
        # loss since the last log line, and the first step that was not finite: on the device, read when logging
        self.loss_sum = torch.tensor(distributed.local_value(before["loss_sums"]), device=self.device)
        self.loss_count = before["loss_count"]
        self.bad_step = torch.tensor(-1, device=self.device)
        self.train_seconds = state.training_info["train_seconds"] if state else 0.0
        if resumed is not None:
            self.learner.load(resumed, before.get("scaler", {}))

        self.start_step, self.saved_step = self.step, self.step if resumed else None
        at_trackers = before.get("tracker_run_id")
        self.report = held.enter_context(
            Report(output_dir, resumed, self.step, config, at_trackers, distributed.is_main)
        )
        self.report.say(header(source, held_out, self.policy, config, distributed, self.step, output_dir, resumed))
        changes += compare_data(state, self.data) + compare_rates(state, self.learner)
        self.report.warn(*changes, *source.warnings)
        self.exam = Evaluator(config, source, held_out, self.whole, self.preprocess, self.postprocess, self.report.warn)
        held.callback(self.exam.close)
        with distributed.main_first():  # it decodes the frames, the others find them
            self.loader = build_loader(
                config, source, kept, self.policy, self.preprocess, self.samples_seen, distributed, self.report.say
            )
        held.callback(self.loader.close)
        if config.minutes and resumed is None:
            self.config = self.exam.config = config = fix_steps(self)
        self.writer = held.enter_context(Writer(output_dir, config, self.report.warn, resumed))
        self.policy.train()
        self.watch = Stopwatch(config.save_minutes)
        self.signals, self.asked, self.save_is_due = held.enter_context(runtime.StopSignals()), 0, False
        self.exam.is_stopped = lambda: self.signals.asked is not None

    def train_step(self, batch: dict):
        """One optimizer step on a batch; returns the policy's sub-losses and the gradient norm, on the device."""
        loss, parts, grad_norm = self.learner.step(batch, self.step)
        # with fp16 a gradient that is not finite is a step left out
        finite = torch.isfinite(loss if self.learner.scaler.is_enabled() else loss + grad_norm)
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, self.step)
        self.loss_sum, self.loss_count = self.loss_sum + loss, self.loss_count + 1
        self.step, self.samples_seen = self.step + 1, self.samples_seen + self.config.batch_size
        self.asked, self.save_is_due = self.distributed.all_reduce_max(
            self.signals.asked or 0, self.watch.save_is_due()
        )
        self.report.advance()
        return parts, grad_norm

    def is_over(self) -> bool:
        return self.step >= self.config.steps or (self.asked > 0 and self.saved_step == self.step)

    def is_log_step(self) -> bool:
        return self.step % self.config.log_freq == 0 or self.step in (1, self.config.steps)

    def is_planned_save(self) -> bool:
        step, freq = self.step, self.config.save_freq
        return (freq > 0 and step % freq == 0) or step == self.config.steps or self.save_is_due > 0

    def stop_if_not_finite(self) -> None:
        first = int(self.bad_step)  # waits for the device
        if first < 0:
            return
        self.writer.wait()  # for the one that may be the last good
        kept = find_checkpoints(self.output_dir)
        where = self.loader.describe(self.samples_seen - (self.step - first) * self.config.batch_size)
        raise UserError(
            f"the loss is not finite at step {first + 1}, whose batch holds episode:frame {where}; last good "
            f"checkpoint: {max(kept, key=sort_key, default='none yet')}; lower --lr, or look at those frames"
        )

    def log(self, parts: dict | None, grad_norm) -> None:
        """One line of metrics, the loss as its mean since the line before (and not what a part of the policy's is called)."""
        self.stop_if_not_finite()
        self.writer.check()
        line = {
            "step": self.step,
            "epoch": round(self.samples_seen / self.loader.samples_per_epoch, 4),
            "loss": self.distributed.mean(self.loss_sum) / self.loss_count,
            "lr": self.learner.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
        }
        self.report.log({**line, **numbers(parts), **line, **self.watch.rates(self.config.batch_size)})
        if self.step % self.config.log_freq == 0 or self.step == 1:  # else the run's end, which a longer run goes over
            self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0

    def examine(self) -> None:
        """Held-out episodes and simulation, to a line of metrics; other processes wait for the main one."""
        with self.watch.paused(), self.learner.acting(self.whole):
            if self.distributed.is_main and (results := self.exam.results(self.loader)):
                self.report.examined({"step": self.step, **results}, said(results), self.exam.picture)
            self.distributed.barrier()
            (self.asked,) = self.distributed.all_reduce_max(self.signals.asked or 0)

    def save(self) -> None:
        """Have checkpoint-<step> written; a run that went bad since the last log line is stopped instead."""
        self.stop_if_not_finite()
        with self.watch.paused():
            self.loss_sums = self.distributed.all_gather(self.loss_sum)
            trees = self.learner.state()  # of all processes
            if self.distributed.is_main:
                protected = (
                    [self.resumed] if self.resumed and self.step - self.start_step <= self.config.save_freq else []
                )
                parts = self.policy.config, self.preprocess, self.postprocess, self.state()
                self.writer.save(Snapshot(self.step, *trees, *parts, adapters_config(self.policy)), protected)
                self.report.begin_file()
                self.report.trackers.note("checkpoint", f"checkpoint-{self.step}", self.step)
        self.saved_step = self.step
        self.watch.last_save = time.perf_counter()

    def state(self) -> TrainState:
        """Where the run stands, for a resume and for people."""
        standing = {"step": self.step, "samples_seen": self.samples_seen, "batch_size": self.config.batch_size}
        standing |= {"seed": self.config.seed, "world_size": self.distributed.size, "course": self.course}
        sums = {"loss_sums": self.loss_sums, "loss_count": self.loss_count}
        own = {"scaler": self.learner.scaler.state_dict(), "tracker_run_id": self.report.trackers.run_id}
        info = training_info(self.policy, self.config.dataset_id, self.report.history, self.device, self.step)
        seconds = round(self.train_seconds + self.watch.since_start(), 1)
        return TrainState(
            trainer_state={**standing, **sums, **own, "data": self.data},
            train_config=self.config.asdict(),
            training_info={**info, **standing, "train_seconds": seconds},
        )

    def finish(self) -> TrainResult:
        """Final model files, curve, upload, and what to run next; of a run that was stopped, the command that goes on."""
        self.writer.finish()
        self.learner.take_average(self.whole)
        history, stopped = self.report.history, self.step < self.config.steps
        checkpoint = self.writer.saved or self.output_dir / f"checkpoint-{self.saved_step}"
        result = TrainResult(
            self.step, last(history, "loss"), history, checkpoint, self.whole, self.output_dir,
            signal.Signals(self.asked).name if stopped else None,
        )  # fmt: skip
        if self.distributed.is_main:
            self.whole.eval()
            self.report.save_curve()
            if not stopped:
                with finishing(result.checkpoint, self.output_dir):
                    publish(result.checkpoint, self.output_dir)
                    self.report.save_card(result.checkpoint)
            repo = None if stopped else self.config.push_to_hub
            if repo and (address := hub.push(repo, self.output_dir, result.checkpoint, self.report.warn)):
                print(f"uploaded to {address}")
            print(closing_words(result, self.config, self.start_step, self.distributed.size), flush=True)
        return result


def main(given: dict) -> int:
    """Run the command line; a user's mistake is one line and exit status 2, a signal's stop 128 plus its number."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        result = train(**given)
    except UserError as error:
        if rank:  # most mistakes are met by all processes: the main one says them, and the launcher ends the others
            time.sleep(2)
        print(f"error: {f'process {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        print(f"error: process {rank} has lost another one of this run ({one_line(error)[:160]}); checkpoints are whole: "
              "launch it again with --resume_from_checkpoint latest", file=sys.stderr, flush=True)  # fmt: skip
        os._exit(1)  # at once: what is left of the connection may wait for ever
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint auto goes on from what was saved", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a thread may still be writing
    return 128 + signal.Signals[result.stopped_by] if result.stopped_by else 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main(GIVEN))
