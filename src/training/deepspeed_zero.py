"""DeepSpeed ZeRO as a Distributed: its engine steps by itself and shards the optimizer's state, in stage 3 the weights too."""

import contextlib

import torch
import torch.nn.functional as F  # noqa: N812

from errors import UserError
from runtime import autocast
from training.distributed import Distributed, check_moments, parameter_names

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam and AdamW


class DeepSpeedDistributed(Distributed):
    """The processes of a run that `accelerate launch --use_deepspeed` started.

    Weights and optimizer state are saved and loaded as one process has them, parameter by parameter.
    """

    def check(self, config) -> None:
        """Refuse what DeepSpeed does not support here.

        Raises:
            UserError: settings that need PyTorch's optimizer or unsharded weights.
        """
        super().check(config)
        if config.minutes:
            raise UserError("DeepSpeed does not support --minutes. Pass --steps, or launch with DDP or FSDP")
        if config.peft:
            raise UserError("DeepSpeed does not support --peft. Adapters are small: launch with DDP or FSDP")
        if config.compile:
            raise UserError("DeepSpeed does not support --compile. Leave it out, or launch with DDP or FSDP")
        if config.precision == "fp16":
            raise UserError("DeepSpeed does not support --precision fp16. Pass bf16 or fp32")
        if config.ema_decay and self.accelerator.deepspeed_plugin.zero_stage == 3:
            raise UserError(
                "DeepSpeed stage 3 does not support --ema_decay. Pass --ema_decay 0, or use stage 2 or FSDP"
            )

    def autocast(self, precision: str):
        """No context: DeepSpeed leaves autocast before it calls the policy, so `wrap` puts it into the policy's forward."""
        return contextlib.nullcontext()

    def wrap(self, policy, optimizer, clip_norm: float | None, micro_batch_size: int, precision: str):
        if precision != "fp32":
            policy.forward = autocast(precision, self.device)(policy.forward)
        # The engine rebuilds the parameter groups: keep them as one process has them.
        self.groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        self.names = parameter_names(policy, optimizer)
        settings = self.accelerator.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = micro_batch_size
        settings["gradient_accumulation_steps"] = 1
        settings["gradient_clipping"] = clip_norm or 0.0
        self.stage = settings["zero_optimization"]["stage"]
        self.engine, optimizer = self.accelerator.prepare(policy, optimizer)
        return self.engine, optimizer.optimizer

    def sync_gradients(self, model, last: bool):
        model.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def backward(self, model, loss) -> None:
        model.backward(loss)

    def optimizer_step(self, policy, optimizer, scaler, clip_norm):
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def weights(self, policy) -> dict:
        from deepspeed.utils import safe_get_full_fp32_param

        # a copy, since the engine updates the weights' memory in place
        state = {name: tensor.cpu().clone() for name, tensor in policy.state_dict().items()}
        if self.stage == 3:
            for name, parameter in policy.named_parameters():
                state[name] = safe_get_full_fp32_param(parameter).cpu()
        if not self.is_main:
            return {}
        return state

    def load_weights(self, policy, path, tensors, optional) -> None:
        """Load weights, into the fp32 copies that the engine updates as well."""
        super().load_weights(policy, path, tensors, optional)
        self.engine.optimizer.refresh_fp32_params()

    def optimizer_state(self, policy, optimizer) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state

        self.link_optimizer_state()
        step = None
        for entry in self.engine.optimizer.optimizer.state.values():
            step = entry.get("step", step)

        # The moments of each parameter, gathered from all processes.
        parameters = dict(policy.named_parameters())
        state = {}
        for number, name in enumerate(self.names):
            moments = {key: safe_get_full_optimizer_state(parameters[name], key) for key in MOMENTS}
            if step is not None and moments["exp_avg"] is not None:
                state[number] = {"step": torch.tensor(float(step))}
                state[number].update({key: moment.cpu() for key, moment in moments.items()})
        if not self.is_main:
            return {}

        # The groups, with today's learning rates and numbered parameters.
        groups = []
        first = 0
        for group, engine_group in zip(self.groups, optimizer.param_groups, strict=True):
            numbers = list(range(first, first + len(group["params"])))
            groups.append({**group, "lr": engine_group["lr"], "params": numbers})
            first += len(numbers)
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, policy, optimizer, state: dict) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        count = sum(len(group["params"]) for group in state["param_groups"])
        if count != len(self.names):
            raise ValueError(f"expected {len(self.names)} parameters, got {count}")
        check_moments(dict(policy.named_parameters()), self.names, state["state"])

        # The engine allocates its state in the first step: allocate it now.
        zero = self.engine.optimizer
        shards = zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups
        step = next(iter(state["state"].values()))["step"]
        for shard in shards:
            zero.optimizer.state[shard] = {"step": step.to(shard.device, copy=True)}
            zero.optimizer.state[shard].update({key: torch.zeros_like(shard) for key in MOMENTS})
        self.link_optimizer_state()

        parameters = dict(policy.named_parameters())
        for number, entry in state["state"].items():
            parameter = parameters[self.names[number]]
            for key in MOMENTS:
                moment = entry[key].to(self.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, moment, key)
                    continue
                # Stage 3 cuts each flattened moment into one equal shard a process, padded with zeros at the end.
                shard = safe_get_local_optimizer_state(parameter, key)
                padding = shard.numel() * self.size - moment.numel()
                shards = F.pad(moment.flatten(), (0, padding)).chunk(self.size)
                safe_set_local_optimizer_state(parameter, shards[self.rank].view_as(shard), key)

    def link_optimizer_state(self) -> None:
        """Let the engine find the state of every parameter group: its first step links only the first group."""
        zero = self.engine.optimizer
        if self.stage < 3 and zero.optimizer.state:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()
