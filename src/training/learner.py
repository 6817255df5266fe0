"""The policy with everything that trains it, and one optimizer step: forward, backward, update, moving average."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.folder import OPTIMIZER, TRAINED_WEIGHTS, WEIGHTS, has_trained_weights
from checkpoints.tensors import is_finite, read_optimizer, require_finite
from config import TrainConfig
from errors import UserError, one_line
from policy.adapters import has_adapters, load_adapter_state_dict
from policy.losses import loss_averages_over_actions, set_vqbet_phase
from policy.presets import optimizer_preset, scheduler_preset
from processors.augment import augment
from processors.padding import preprocess_batch
from processors.pipelines import to_float_batch
from runtime import ROUND, STEP, NoHostSync, make_scaler, seed_all
from training.distributed import Distributed, copy_unsharded
from training.means import scalars
from training.optimizers import build_optimizer, rounds, sum_gradients_in_float32

NORMS = (torch.nn.LayerNorm, torch.nn.GroupNorm)
AVERAGE = "average/"  # before the name of a weight: its float32 average, in training_weights.safetensors


@dataclass
class StepResult:
    """What an optimizer step gives, on the device."""

    loss: Tensor  # mean over this process's samples
    sub_losses: list[dict]  # the policy's own numbers about each of this process's micro-batches
    grad_norm: Tensor  # norm of the whole batch's gradient, before clipping


@dataclass
class LearnerState:
    """What a checkpoint holds of a learner, gathered from all processes."""

    weights: dict  # to act with: their average, if there is one
    trained_weights: dict  # what differs while the weights are trained, if `weights` are their average; else empty
    optimizer: dict


@dataclass(eq=False)
class Learner:
    """The policy with everything that trains it."""

    config: TrainConfig
    distributed: Distributed
    policy: torch.nn.Module  # LeRobot policy, on its device
    model: torch.nn.Module  # the policy as training calls it: wrapped for several processes
    preprocess: object  # LeRobot's pipeline from a batch to the policy's input
    meta: object  # LeRobot's metadata of the dataset
    optimizer: torch.optim.Optimizer
    clip_norm: float | None  # gradients are clipped to this norm
    scaler: torch.amp.GradScaler
    ema: "EMA"
    lr_factor: Callable[[int], float]  # step -> factor of the peak learning rates
    peak_lrs: list[float]  # one for each of the optimizer's groups

    def step(self, batch: dict, step: int) -> StepResult:
        """Take optimizer step number `step`, counted from 0, on this process's samples of the batch."""
        # Dropout and noise are a function of (seed, step, rank), so that a resumed run draws the same.
        seed_all(self.config.seed, STEP, step, self.distributed.rank)
        factor = self.lr_factor(step)
        for group, peak_lr in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak_lr * factor

        count = self.config.grad_accumulation_steps
        mean_loss = torch.zeros((), device=self.distributed.device)
        sub_losses = []
        with self.distributed.detect_lost_peer():
            for number, micro_batch in enumerate(micro_batches(batch, count), start=1):
                set_vqbet_phase(self.policy, step)
                with self.distributed.sync_gradients(self.model, last=number == count):
                    loss, numbers = self.forward(micro_batch)
                    self.distributed.backward(self.model, self.scaler.scale(loss / count))
                mean_loss = mean_loss + loss.detach() / count
                sub_losses.append(numbers)
            if rounds(self.optimizer):
                seed_all(self.config.seed, ROUND, step)  # the same in each process of DDP, whose weights stay the same
            grad_norm = self.distributed.optimizer_step(self.policy, self.optimizer, self.scaler, self.clip_norm)

        self.ema.update(step + 1)
        if hasattr(self.policy, "update"):
            self.policy.update()  # such as a plugin's own moving average, which lerobot-train calls here too
        return StepResult(mean_loss, sub_losses, grad_norm)

    def forward(self, batch: dict) -> tuple[Tensor, dict]:
        """The policy's loss of a micro-batch, and the numbers among its sub-losses, weighted as the loss is."""
        # Cameras leave the loader as uint8, and become floats on the device.
        batch = to_float_batch(batch, self.meta, self.distributed.device)
        weight = batch.pop("weight").mean()
        batch = augment(batch, self.meta, self.config)
        # Compiled kernels do not survive NoHostSync, and read sub-losses without waiting for the device.
        no_host_sync = contextlib.nullcontext() if self.config.compile else NoHostSync()
        with no_host_sync, self.distributed.autocast(self.config.precision):
            loss, sub_losses = self.model(preprocess_batch(self.preprocess, batch))
        # A loss that is a mean over unpadded actions is weighted by how many of the whole batch's this micro-batch has.
        if num_micro_batches(self.config, self.distributed) > 1 and loss_averages_over_actions(self.policy.config):
            return loss * weight, scalars(sub_losses, weight)
        return loss, scalars(sub_losses)

    def load(self, checkpoint: Path, scaler: dict) -> None:
        """Load what a checkpoint holds of the training: trained weights, the optimizer's state, the scaler's.

        The policy was built with the checkpoint's weights to act with, which is where the average starts.

        Raises:
            UserError: weights or moments are not finite numbers, or the optimizer's file holds code, or belongs to another
                optimizer.
        """
        require_finite(self.local_weights(), checkpoint / WEIGHTS)
        if has_trained_weights(checkpoint):
            path = checkpoint / TRAINED_WEIGHTS
            tensors = self.ema.load(load_file(path))
            self.distributed.load_weights(self.policy, path, tensors, optional=self.ema.without_average(self.policy))
            require_finite(self.local_weights(), path)
        state = read_optimizer(checkpoint)
        try:
            self.distributed.load_optimizer_state(self.policy, self.optimizer, state)
        except (ValueError, KeyError) as error:
            raise UserError(
                f"{checkpoint / OPTIMIZER} does not fit this policy's optimizer: {one_line(error)}. "
                "Resume from another checkpoint, or pass this one as --policy_path to train its weights afresh"
            ) from error
        if self.scaler.is_enabled() and scaler:
            self.scaler.load_state_dict(scaler)

    def local_weights(self) -> list[Tensor]:
        """The weights that are trained, or this process's shards of them."""
        weights = [parameter.detach() for parameter in self.policy.parameters() if parameter.requires_grad]
        return [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]

    def is_finite(self) -> bool:
        """Whether the weights of this process are finite. Waits for the device."""
        return all(map(is_finite, self.local_weights()))

    def state(self) -> LearnerState:
        """What a checkpoint holds, unsharded. Every process calls this; only the main one gets it where it is sharded."""
        with self.distributed.detect_lost_peer():
            trained_weights = {}
            if self.ema.decay > 0:
                fixed = self.ema.without_average(self.policy)
                weights = self.distributed.weights(self.policy)
                trained_weights = {name: tensor for name, tensor in weights.items() if name not in fixed}
                averages = self.distributed.unsharded_tensors(self.ema.rounded)
                trained_weights |= {AVERAGE + name: tensor for name, tensor in averages.items()}
            with self.ema.applied():
                return LearnerState(
                    weights=self.distributed.weights(self.policy),
                    trained_weights=trained_weights,
                    optimizer=self.distributed.optimizer_state(self.policy, self.optimizer),
                )

    def apply_ema(self, unsharded) -> None:
        """Exchange the trained weights for their average, in the policy and in its unsharded copy, for good."""
        self.ema.apply()
        if self.distributed.is_sharded:
            with self.distributed.detect_lost_peer():
                weights = self.distributed.weights(self.policy)
            if unsharded is not None:
                if has_adapters(unsharded):
                    load_adapter_state_dict(unsharded, weights)
                else:
                    unsharded.load_state_dict(weights)

    @contextlib.contextmanager
    def ema_applied(self, unsharded):
        """Within this, the policy and its unsharded copy have the averaged weights."""
        self.apply_ema(unsharded)
        try:
            yield
        finally:
            self.ema.restore()


def num_micro_batches(config: TrainConfig, distributed: Distributed) -> int:
    """Into how many micro-batches a step's batch is split, over all processes."""
    return distributed.size * config.grad_accumulation_steps


def build_learner(config: TrainConfig, distributed: Distributed, policy, preprocess, meta) -> Learner:
    """Make the optimizer, compile the policy and wrap it for several processes; arguments as Learner's fields.

    Raises:
        UserError: the batch cannot be split evenly, fp16 or FSDP's settings do not fit the policy.
    """
    check_fp16(policy, config.precision, distributed.device)
    micro_batch_size = distributed.local_batch_size(config.batch_size, config.grad_accumulation_steps)
    micro_batch_size //= config.grad_accumulation_steps
    preset = optimizer_preset(policy.config, config)
    clip_norm = preset.grad_clip_norm or None
    if config.compile:
        torch._inductor.config.fallback_random = True  # the same noise and dropout as without compiling
        torch._dynamo.config.capture_scalar_outputs = True  # a policy's .item() does not split its graph
        policy.compile()
    optimizer = build_optimizer(policy, preset, config.optimizer, distributed.is_sharded)
    if config.grad_accumulation_steps > 1 and distributed.kind == "one":
        sum_gradients_in_float32(optimizer)
    model, optimizer = distributed.wrap(policy, optimizer, clip_norm, micro_batch_size, config.precision)
    return Learner(
        config=config,
        distributed=distributed,
        policy=policy,
        model=model,
        preprocess=preprocess,
        meta=meta,
        optimizer=optimizer,
        clip_norm=clip_norm,
        scaler=make_scaler(config.precision, distributed.device),
        ema=EMA.start(policy, config.ema_decay, by_copy=distributed.is_sharded),
        lr_factor=make_schedule(policy.config, config),
        peak_lrs=[group["lr"] for group in optimizer.param_groups],
    )


def check_fp16(policy, precision: str, device: torch.device) -> None:
    """Refuse --precision fp16 for weights that PyTorch does not compute with in fp16.

    Its GradScaler scales no gradients in float16, and the CPU normalises float16 with float32 or float16 weights only.

    Raises:
        UserError: the policy has such weights.
    """
    if precision != "fp16":
        return
    wrong = {parameter.dtype for parameter in policy.parameters() if parameter.requires_grad} & {torch.float16}
    for module in policy.modules():
        weight = getattr(module, "weight", None)
        if device.type == "cpu" and isinstance(module, NORMS) and weight is not None:
            wrong |= {weight.dtype} & {torch.bfloat16}
    if wrong:
        dtypes = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in wrong))
        raise UserError(
            f"--precision fp16: expected float32 weights, got {dtypes} in policy {policy.config.type}. Pass --precision "
            "bf16 or fp32"
        )


def micro_batches(batch: dict, count: int):
    """Cut a batch of B samples into `count` batches of B / count."""
    size = len(batch["sample"]) // count
    for start in range(0, size * count, size):
        yield {key: item[start : start + size] for key, item in batch.items()}


def make_schedule(policy_config, config: TrainConfig) -> Callable[[int], float]:
    """step -> factor of the peak learning rate: the policy's preset unless the flags name a schedule.

    A function of the step has no state to save.
    """
    preset = scheduler_preset(policy_config, config)
    if preset is not None:
        # LeRobot's scheduler changes the optimizer that it gets: only its function of the step is used.
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return preset.build(optimizer, config.steps).lr_lambdas[0]
    shape = config.lr_schedule or "constant"
    warmup_steps = config.warmup_steps or 0

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, config.steps - warmup_steps)
        if shape == "linear":
            return 1.0 - progress
        if shape == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, unless its dtype has more bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class EMA:
    """Exponential moving average of a policy's weights: the policy is trained on its own, evaluated and saved with these.

    Only trained weights have an average. Weights of fewer than 32 bits have a float32 average, because in their own dtype a
    small step rounds to none. The decay rises to `decay` as (1 + step) / (10 + step), so that the average forgets the
    initial weights. Source: Polyak and Juditsky (1992); the rise is that of TensorFlow's ExponentialMovingAverage.

    Args:
        parameters: {name: trained parameter of the policy}.
        averages: {name: its average so far}; both are empty for no average.
        decay: such as 0.999; 0 for no average.
        by_copy: whether to apply the average by copying, because FSDP or DeepSpeed hold on to the parameters' memory.
    """

    def __init__(self, parameters: dict[str, Tensor], averages: dict[str, Tensor], decay: float, by_copy: bool = False):
        self.parameters = parameters
        self.averages = averages
        self.decay = decay
        self.by_copy = by_copy
        self.trained: dict[str, Tensor] = {}  # the trained weights, while the policy has their average
        # Averages of more bits than the weights, and the others.
        self.rounded = {name: average for name, average in averages.items() if average.dtype != parameters[name].dtype}
        self.exact = {name: average for name, average in averages.items() if name not in self.rounded}

    @classmethod
    def start(cls, policy, decay: float, by_copy: bool = False) -> "EMA":
        """The average of a policy's weights as they are now."""
        parameters = {}
        averages = {}
        if decay > 0:
            parameters = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
            averages = {name: wide(parameter.detach()).clone() for name, parameter in parameters.items()}
        return cls(parameters, averages, decay, by_copy)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps."""
        if self.decay == 0:
            return
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        if self.exact:
            torch._foreach_lerp_(list(self.exact.values()), [self.parameters[name] for name in self.exact], weight)
        for name, average in self.rounded.items():
            average.lerp_(wide(self.parameters[name]), weight)

    def without_average(self, policy) -> set[str]:
        """Names of the policy's parameters that have no average: they do not differ while it is trained."""
        averaged = {id(parameter) for parameter in self.parameters.values()}
        named = policy.named_parameters(remove_duplicate=False)  # a state dict has tied weights under each name
        return {name for name, parameter in named if id(parameter) not in averaged}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take the averages that a checkpoint holds beside the rounded ones, and return its other tensors.

        Args:
            tensors: of training_weights.safetensors; those of older versions hold no averages.
        """
        rest = {}
        for name, tensor in tensors.items():
            if not name.startswith(AVERAGE):
                rest[name] = tensor
            elif self.decay > 0:  # else the run goes on without an average
                copy_unsharded(self.averages[name.removeprefix(AVERAGE)], tensor)
        return rest

    @contextlib.contextmanager
    def applied(self):
        """Within this, the policy has the averaged weights."""
        self.apply()
        try:
            yield
        finally:
            self.restore()

    @torch.no_grad()
    def apply(self) -> None:
        """Give the policy the averaged weights, rounded to its dtype."""
        for name, average in self.averages.items():
            parameter = self.parameters[name]
            if self.by_copy:
                self.trained[name] = parameter.detach().clone()
                parameter.copy_(average)
            else:
                self.trained[name] = parameter.data
                parameter.data = average.to(parameter.dtype)

    @torch.no_grad()
    def restore(self) -> None:
        """Give the policy the trained weights back."""
        for name, trained in self.trained.items():
            if self.by_copy:
                self.parameters[name].copy_(trained)
            else:
                self.parameters[name].data = trained
        self.trained = {}
