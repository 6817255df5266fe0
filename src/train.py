"""Train a policy on a LeRobot dataset: `python src/train.py --dataset_id ...`, or `from train import train`.

Top to bottom: train() and its loop, one step, what is logged and saved, and how a run comes to be.
"""

import sys
import time
from pathlib import Path

from config import TrainConfig, UserError, parse_command_line

if __name__ == "__main__":
    GIVEN = parse_command_line(sys.argv[1:])  # before the imports that take seconds: --help answers at once

import torch

import checkpoint as checkpoints
import hub
from data.frames import Frames
from data.loader import Loader
from data.source import open_dataset
from data.union import unite
from optim import apply_flags, make_optimizer, make_schedule
from policy import build_policy, load_policy_config, policy_config
from processors import (
    adapt_processors,
    feature_problems,
    has_processors,
    load_processors,
    make_processors,
    pixels_to_float,
    policy_features,
    resize_of,
    stats_problems,
    usable_stats,
    window_deltas,
)
from report import Report, Stopwatch, TrainResult, header, numbers, training_info
from resume import settle
from runtime import INIT, STEP, NoHostSync, pick_device, refuse_many_processes, seed_all, threads, without_collector


def train(**settings) -> TrainResult:
    """Train a policy. Every keyword is a flag of the command line: `python src/train.py --help` lists them.

    Returns:
        TrainResult with steps, final_loss, history, checkpoint, policy and plot().

    Raises:
        UserError: a mistake the user can mend, told in one line.
    """
    with without_collector():
        run = Run(*settle(settings))
    try:
        with run.report:
            while run.step < run.config.steps:
                batch = run.watch.wait(run.loader)
                parts, grad_norm = run.train_step(batch)
                if run.is_log_step():
                    run.log(parts, grad_norm)
                if run.is_save_step():
                    run.save()
    finally:
        run.loader.close()
    return run.finish()


class Run:
    """One training run: the policy and everything that moves it, and where it stands."""

    def __init__(self, config: TrainConfig, output_dir: Path, resumed: Path | None, state, changes: list[str]):
        refuse_many_processes()
        self.config, self.output_dir, self.resumed = config, output_dir, resumed
        self.device = pick_device(config.device)
        opened = [
            open_dataset(name, config.dataset_root, config.revision, config.episodes) for name in config.dataset_id
        ]
        source = unite(opened)
        seed_all(config.seed, INIT)
        self.policy, self.preprocess, self.postprocess = build(config, resumed, source, self.device)
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

        checkpoints.make_ready(output_dir)
        self.saved, self.start_step = resumed, self.step
        self.report = Report(output_dir, self.step, config.steps, config.quiet)
        self.report.say(header(source, self.policy, config, self.device, self.step, output_dir, resumed))
        self.report.warn([*changes, *source.warnings])
        size, workers = resize_of(self.preprocess), threads(config.num_threads)
        cache = (config.frame_cache, config.cache_dir)
        frames = Frames(source, size, *cache, workers, self.device, config.quiet, self.report.say)
        self.loader = Loader(
            source,
            frames,
            window_deltas(self.policy.config, source.meta),
            config.batch_size,
            config.seed,
            self.samples_seen,
            getattr(self.policy.config, "drop_n_last_frames", 0),
            self.device,
            config.dataset_weights,
        )
        self.policy.train()
        self.watch = Stopwatch()

    def train_step(self, batch: dict):
        """One optimizer step on a batch; returns the policy's sub-losses and the gradient norm, on the device."""
        seed_all(self.config.seed, STEP, self.step, 0)  # dropout and noise are a function of (seed, step, rank)
        batch = pixels_to_float(batch, self.cameras, self.device)
        if self.config.augment and self.cameras:
            from processors.augment import augment

            batch = augment(batch, self.cameras, self.config.seed)
        with NoHostSync():
            loss, parts = self.policy.forward(self.preprocess(batch))
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.clip_norm or float("inf"))
        self.set_lr(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if hasattr(self.policy, "update"):
            self.policy.update()  # tdmpc's moving average, as lerobot-train calls it
        finite = torch.isfinite(loss.detach() + grad_norm)
        self.bad_step = torch.where(finite | (self.bad_step >= 0), self.bad_step, self.step)
        self.loss_sum, self.loss_count = self.loss_sum + loss.detach(), self.loss_count + 1
        self.step, self.samples_seen = self.step + 1, self.samples_seen + self.config.batch_size
        self.report.advance()
        return parts, grad_norm

    def is_log_step(self) -> bool:
        return self.step % self.config.log_freq == 0 or self.step in (1, self.config.steps)

    def is_save_step(self) -> bool:
        return (self.config.save_freq > 0 and self.step % self.config.save_freq == 0) or self.step == self.config.steps

    def stop_if_not_finite(self) -> None:
        first = int(self.bad_step)  # waits for the device
        if first < 0:
            return
        kept = checkpoints.find_checkpoints(self.output_dir)
        where = self.loader.describe(self.samples_seen - (self.step - first) * self.config.batch_size)
        raise UserError(
            f"the loss is not finite at step {first + 1}, whose batch holds episode:frame {where}; last good "
            f"checkpoint: {kept[-1] if kept else 'none yet'}; lower --lr, or look at those frames"
        )

    def log(self, parts: dict | None, grad_norm) -> None:
        """One line of metrics, the loss as its mean since the line before."""
        self.stop_if_not_finite()
        line = {
            "step": self.step,
            "epoch": round(self.samples_seen / self.loader.samples_per_epoch, 4),
            "loss": self.loss_sum.item() / self.loss_count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": grad_norm.item(),
        }
        self.report.log({**line, **numbers(parts), **self.watch.rates(self.config.batch_size)})
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0

    def save(self) -> None:
        """Write checkpoint-<step>; a run that went bad since the last log line is stopped instead."""
        self.stop_if_not_finite()
        begun = time.perf_counter()
        standing = {"step": self.step, "samples_seen": self.samples_seen, "batch_size": self.config.batch_size}
        standing |= {"seed": self.config.seed, "world_size": 1}
        state = checkpoints.TrainState(
            trainer_state={**standing, "loss_sum": self.loss_sum.item(), "loss_count": self.loss_count},
            train_config=self.config.asdict(),
            training_info={
                **training_info(self.policy, self.config.dataset_id, self.report.history, self.device),
                **standing,
                "train_seconds": round(self.train_seconds + self.watch.since_start(), 1),
            },
        )
        self.saved = checkpoints.write_checkpoint(
            self.output_dir, self.step, self.policy, self.preprocess, self.postprocess, self.optimizer, state
        )
        in_first_interval = self.step - self.start_step <= self.config.save_freq
        checkpoints.prune(self.output_dir, self.config.keep_last, never=self.resumed if in_first_interval else None)
        self.watch.leave_out(time.perf_counter() - begun)

    def finish(self) -> TrainResult:
        """Final model files, curve, upload, and what to run next."""
        self.policy.eval()
        self.report.save_curve()
        checkpoints.publish(self.saved, self.output_dir)
        history = self.report.history
        loss = history[-1]["loss"] if history else None
        if self.step == self.start_step:
            print(f"nothing to do: {self.saved} is already at step {self.step}, pass --steps to go on")
        else:
            print(f"done: {self.saved}, loss {loss:.4g}")
        if self.config.push_to_hub:
            print(f"uploaded to {hub.push(self.config.push_to_hub, self.output_dir, self.saved)}")
        print(f"next: python src/infer.py {self.saved} --dataset_id {self.config.dataset_id[0]} --episode 0")
        return TrainResult(self.step, loss, history, self.saved, self.policy, self.output_dir)


def build(config: TrainConfig, resumed: Path | None, source, device):
    """(policy, preprocessor, postprocessor): from the checkpoint, from --policy_path, or afresh."""
    folder = resumed or (hub.fetch(config.policy_path, "--policy_path") if config.policy_path else None)
    inputs, outputs = policy_features(source.meta, config.image_size)
    if folder is None:
        policy_cfg = policy_config(config.policy, config.policy_args, str(device))
        policy_cfg.input_features, policy_cfg.output_features = inputs, outputs
    else:
        policy_cfg = load_policy_config(folder, None if resumed else config.policy_args, str(device))
        source.require(feature_problems(policy_cfg, inputs, outputs, folder.name))
    apply_flags(policy_cfg, config)
    if resumed:
        source.require()
        return build_policy(policy_cfg, source.meta, folder), *load_processors(folder, str(device))
    stats = usable_stats(source.meta, config.imagenet_stats == "on")
    source.require(stats_problems(policy_cfg, stats))
    if folder and has_processors(folder):
        return build_policy(policy_cfg, source.meta, folder), *adapt_processors(
            folder, policy_cfg, stats, config.image_size
        )
    return build_policy(policy_cfg, source.meta, folder), *make_processors(
        policy_cfg, source.meta, stats, config.image_size
    )


def main(given: dict) -> int:
    """Run the command line; a user's mistake is one line and exit status 2."""
    try:
        train(**given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; go on with --resume_from_checkpoint latest", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(GIVEN))
