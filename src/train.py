"""Train a policy on a LeRobot dataset: `python src/train.py --dataset_id ...`, or `from train import train`.

Top to bottom: train() and its loop, one step, what is logged and saved, and how a run comes to be.
"""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from config import TrainConfig, UserError, parse_command_line

if __name__ == "__main__":
    GIVEN = parse_command_line(sys.argv[1:])  # before the imports that take seconds: --help answers at once

import torch

import checkpoint as checkpoints
import hub
import runtime
from budget import fix_steps
from build import build_loader, build_parts, build_source
from exam import Exam, said
from optim import Average, make_optimizer, make_schedule
from policy import load_weights
from processors import pixels_to_float
from report import Report, Stopwatch, TrainResult, closing_words, header, numbers, training_info
from resume import settle
from summary import last
from validation import split
from writer import Writer, publish


def train(**settings) -> TrainResult:
    """Train a policy. Every keyword is a flag of the command line: `python src/train.py --help` lists them.

    SIGINT (Ctrl-C, a notebook's interrupt), SIGTERM and SIGUSR1 end it after the step under way, with a checkpoint.

    Returns:
        TrainResult with steps, final_loss, history, checkpoint, policy, stopped_by and plot().

    Raises:
        UserError: a mistake the user can mend, told in one line.
        KeyboardInterrupt: a second SIGINT; what was being written is dropped, earlier checkpoints are whole.
    """
    with contextlib.ExitStack() as held:
        with runtime.without_collector():
            run = Run(*settle(settings, held), held)
        while not run.is_over():
            batch = run.watch.wait(run.loader)
            parts, grad_norm = run.train_step(batch)
            run.report.advance()
            if run.is_log_step():
                run.log(parts, grad_norm)
            if run.exam.is_due(run.step):
                run.examine()
            if run.is_save_step():
                run.save()
        return run.finish()


class Run:
    """One training run: the policy and everything that moves it, and where it stands."""

    def __init__(self, config: TrainConfig, output_dir: Path, resumed: Path | None, state, changes: list[str], held):
        runtime.refuse_many_processes()
        self.config, self.output_dir, self.resumed = config, output_dir, resumed
        self.device = runtime.pick_device(config.device)
        source = build_source(config)
        kept, held_out = split(source, config)
        runtime.seed_all(config.seed, runtime.INIT)
        self.policy, self.preprocess, self.postprocess = build_parts(config, resumed, source, self.device)
        self.average = Average(self.policy, config.ema_decay)
        if resumed is not None and (resumed / checkpoints.OWN_WEIGHTS).exists():
            load_weights(self.policy, resumed / checkpoints.OWN_WEIGHTS)
        self.optimizer, self.clip_norm = make_optimizer(self.policy, config)
        self.set_lr = make_schedule(self.policy, self.optimizer, config)
        self.cameras = source.meta.camera_keys
        if config.push_to_hub:
            hub.create_repo(config.push_to_hub)

        before = state.trainer_state if state else {"step": 0, "samples_seen": 0, "loss_sum": 0.0, "loss_count": 0}
        self.step, self.samples_seen = before["step"], before["samples_seen"]
        # loss since the last log line, and the first step that was not finite: on the device, read when logging
        self.loss_sum, self.loss_count = torch.tensor(before["loss_sum"], device=self.device), before["loss_count"]
        self.bad_step = torch.tensor(-1, device=self.device)
        self.train_seconds = state.training_info["train_seconds"] if state else 0.0
        if resumed is not None:
            checkpoints.load_optimizer(resumed, self.optimizer)

        self.start_step, self.saved_step = self.step, self.step if resumed else None
        self.report = held.enter_context(Report(output_dir, self.step, config, before.get("tracker_run_id")))
        self.report.say(header(source, held_out, self.policy, config, self.device, self.step, output_dir, resumed))
        self.report.warn(*changes, *source.warnings)
        self.loader = build_loader(
            config, source, kept, self.policy, self.preprocess, self.samples_seen, self.device, self.report.say
        )
        held.callback(self.loader.close)
        if config.minutes and resumed is None:
            config = self.config = fix_steps(self)
        self.exam = Exam(config, self.loader, held_out, self.policy, self.preprocess, self.postprocess)
        held.callback(self.exam.close)
        self.writer = held.enter_context(Writer(output_dir, config, self.report.warn, resumed))
        self.policy.train()
        self.watch = Stopwatch()
        self.signals = held.enter_context(runtime.StopSignals())

    def train_step(self, batch: dict):
        """One optimizer step on a batch; returns the policy's sub-losses and the gradient norm, on the device."""
        # dropout and noise are a function of (seed, step, rank)
        runtime.seed_all(self.config.seed, runtime.STEP, self.step, 0)
        batch = pixels_to_float(batch, self.cameras, self.device)
        if self.config.augment and self.cameras:
            from processors.augment import augment

            batch = augment(batch, self.cameras, self.config.seed)
        with runtime.NoHostSync():
            loss, parts = self.policy.forward(self.preprocess(batch))
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip_norm or float("inf"))
        self.set_lr(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.step + 1)
        if hasattr(self.policy, "update"):
            self.policy.update()  # tdmpc's moving average, as lerobot-train calls it
        finite = torch.isfinite(loss.detach() + grad_norm)
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, self.step)
        self.loss_sum, self.loss_count = self.loss_sum + loss.detach(), self.loss_count + 1
        self.step, self.samples_seen = self.step + 1, self.samples_seen + self.config.batch_size
        return parts, grad_norm

    def is_over(self) -> bool:
        return self.step >= self.config.steps or (self.signals.asked is not None and self.saved_step == self.step)

    def is_log_step(self) -> bool:
        return self.step % self.config.log_freq == 0 or self.step in (1, self.config.steps)

    def is_save_step(self) -> bool:
        minutes, freq = self.config.save_minutes, self.config.save_freq
        return (
            (freq > 0 and self.step % freq == 0)
            or self.step == self.config.steps
            or (minutes is not None and self.watch.minutes_since_save() >= minutes)
            or self.signals.asked is not None
        )

    def stop_if_not_finite(self) -> None:
        first = int(self.bad_step)  # waits for the device
        if first < 0:
            return
        self.writer.wait()  # for the one that may be the last good
        kept = checkpoints.find_checkpoints(self.output_dir)
        where = self.loader.describe(self.samples_seen - (self.step - first) * self.config.batch_size)
        raise UserError(
            f"the loss is not finite at step {first + 1}, whose batch holds episode:frame {where}; last good "
            f"checkpoint: {kept[-1] if kept else 'none yet'}; lower --lr, or look at those frames"
        )

    def log(self, parts: dict | None, grad_norm) -> None:
        """One line of metrics, the loss as its mean since the line before."""
        self.stop_if_not_finite()
        self.writer.check()
        line = {
            "step": self.step,
            "epoch": round(self.samples_seen / self.loader.samples_per_epoch, 4),
            "loss": self.loss_sum.item() / self.loss_count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
        }
        self.report.log({**line, **numbers(parts), **self.watch.rates(self.config.batch_size)})
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0

    def examine(self) -> None:
        """Held-out episodes and simulation, to a line of metrics."""
        begun = time.perf_counter()
        with self.average.in_place():
            results = self.exam.results(self.step)
        self.report.examined({"step": self.step, **results}, said(results), self.exam.picture)
        self.watch.leave_out(time.perf_counter() - begun)

    def save(self) -> None:
        """Have checkpoint-<step> written; a run that went bad since the last log line is stopped instead."""
        self.stop_if_not_finite()
        begun = time.perf_counter()
        standing = {"step": self.step, "samples_seen": self.samples_seen, "batch_size": self.config.batch_size}
        standing |= {"seed": self.config.seed, "world_size": 1}
        state = checkpoints.TrainState(
            trainer_state={
                **standing,
                "loss_sum": self.loss_sum.item(),
                "loss_count": self.loss_count,
                "tracker_run_id": self.report.trackers.run_id,
            },
            train_config=self.config.asdict(),
            training_info={
                **training_info(self.policy, self.config.dataset_id, self.report.history, self.device, self.step),
                **standing,
                "train_seconds": round(self.train_seconds + self.watch.since_start(), 1),
            },
        )
        in_first_interval = self.resumed and self.step - self.start_step <= self.config.save_freq
        never = [self.resumed] if in_first_interval else []
        self.writer.save(
            self.step, self.policy, self.preprocess, self.postprocess, self.optimizer, self.average, state, never
        )
        self.report.trackers.note("checkpoint", f"checkpoint-{self.step}", self.step)
        self.saved_step = self.step
        self.watch.leave_out(time.perf_counter() - begun)
        self.watch.last_save = time.perf_counter()

    def finish(self) -> TrainResult:
        """Final model files, curve, upload, and what to run next; of a run that was stopped, the command that goes on."""
        self.writer.finish()
        self.average.swap()
        self.policy.eval()
        self.report.save_curve()
        history, stopped = self.report.history, self.step < self.config.steps
        result = TrainResult(
            self.step, last(history, "loss"), history, self.writer.saved, self.policy, self.output_dir,
            self.signals.asked.name if stopped else None,
        )  # fmt: skip
        if not stopped:
            publish(result.checkpoint, self.output_dir)
            self.report.save_card(result.checkpoint)
            if self.config.push_to_hub:
                print(f"uploaded to {hub.push(self.config.push_to_hub, self.output_dir, result.checkpoint)}")
        print(closing_words(result, self.config, self.start_step), flush=True)
        return result


def main(given: dict) -> int:
    """Run the command line; a user's mistake is one line and exit status 2, a signal's stop 128 plus its number."""
    try:
        result = train(**given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint auto goes on from what was saved", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a thread may still be writing
    return 128 + signal.Signals[result.stopped_by] if result.stopped_by else 0


if __name__ == "__main__":
    sys.exit(main(GIVEN))
