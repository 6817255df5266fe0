"""DeepSpeed ZeRO as a Distributed: its engine steps by itself, and holds optimizer state (and in stage 3 the weights) in parts."""

import contextlib

import torch
import torch.nn.functional as F  # noqa: N812

from errors import UserError
from runtime import autocast
from training.distributed import Distributed, names_of


class DeepSpeedDistributed(Distributed):
    """The processes of a run that `accelerate launch --use_deepspeed` started.

    Its own parts come out as those of one process: weights and optimizer state by parameter.
    """

    def wrap(self, policy, optimizer, clip_norm: float | None, share: int, precision: str):
        if precision != "fp32":
            policy.forward = autocast(precision, self.device)(policy.forward)
        self.groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
        self.names = names_of(policy, optimizer)
        settings = self.accelerator.deepspeed_plugin.deepspeed_config
        settings |= {"train_micro_batch_size_per_gpu": share, "gradient_accumulation_steps": 1}
        settings |= {"gradient_clipping": clip_norm or 0.0}
        self.stage = settings["zero_optimization"]["stage"]
        model, optimizer = self.accelerator.prepare(policy, optimizer)
        self.engine = model
        return model, optimizer.optimizer

    def autocast(self, precision: str):
        """None: DeepSpeed turns off what is on around its engine, so that it is within the policy's forward."""
        return contextlib.nullcontext()

    def check(self, config) -> None:
        """Raise what DeepSpeed cannot do here.

        Raises:
            UserError: settings that need the plain optimizer or whole weights.
        """
        for name, why in (("minutes", "pass --steps"), ("compile", "leave it out")):
            if getattr(config, name):
                raise UserError(f"--{name} does not go with DeepSpeed: {why}, or use DDP or FSDP")
        if config.precision == "fp16":
            raise UserError("--precision fp16 does not go with DeepSpeed: pass bf16 or fp32")
        if config.ema_decay and self.accelerator.deepspeed_plugin.zero_stage == 3:
            raise UserError("--ema_decay does not go with ZeRO stage 3: pass --ema_decay 0, or use stage 2 or FSDP")

    def sync_gradients(self, model, last: bool):
        model.set_gradient_accumulation_boundary(is_boundary=last)
        return super().sync_gradients(model, True)

    def backward(self, model, loss) -> None:
        model.backward(loss)

    def optimizer_step(self, policy, optimizer, scaler, clip_norm):
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def weights(self, policy) -> dict:
        from deepspeed.utils import safe_get_full_fp32_param

        state = {name: tensor.cpu().clone() for name, tensor in policy.state_dict().items()}  # its memory is used again
        if self.stage == 3:
            for name, parameter in policy.named_parameters():
                state[name] = safe_get_full_fp32_param(parameter).cpu()
        return state if self.is_main else {}

    def load_weights(self, policy, path) -> None:
        """Load a file of trained weights, into the optimizer's own copies as well."""
        super().load_weights(policy, path)
        self.engine.optimizer.refresh_fp32_params()

    def optimizer_state(self, policy, optimizer) -> dict:
        from deepspeed.utils import safe_get_full_optimizer_state

        parameters, state = dict(policy.named_parameters()), {}
        self._link()
        entries = self.engine.optimizer.optimizer.state.values()
        step = next((entry["step"] for entry in entries if "step" in entry), None)
        for i, name in enumerate(self.names):
            entry = {key: safe_get_full_optimizer_state(parameters[name], key) for key in ("exp_avg", "exp_avg_sq")}
            if step is not None and entry["exp_avg"] is not None:
                state[i] = {"step": torch.tensor(float(step)), **{k: v.cpu() for k, v in entry.items()}}
        number = {id(parameters[name]): i for i, name in enumerate(self.names)}
        rates = [group["lr"] for group in optimizer.param_groups]
        groups = [
            {**group, "lr": lr, "params": [number[id(p)] for p in group["params"]]}
            for group, lr in zip(self.groups, rates, strict=True)
        ]
        return {"state": state, "param_groups": groups} if self.is_main else {}

    def load_optimizer_state(self, policy, optimizer, state: dict) -> None:
        from deepspeed.utils import (
            safe_get_local_optimizer_state,
            safe_set_full_optimizer_state,
            safe_set_local_optimizer_state,
        )

        parameters = dict(policy.named_parameters())
        if len(self.names) != sum(len(group["params"]) for group in state["param_groups"]):
            raise ValueError("it has another number of parameters")
        steps = next(iter(state["state"].values()))["step"]
        held = self.engine.optimizer
        flat = held.fp32_partitioned_groups_flat if self.stage == 3 else held.single_partition_of_fp32_groups
        for part in flat:
            moments = {key: torch.zeros_like(part) for key in ("exp_avg", "exp_avg_sq")}
            held.optimizer.state[part] = {"step": steps.to(part.device, copy=True), **moments}
        self._link()
        for i, entry in state["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                parameter, value = parameters[self.names[i]], entry[key].to(self.device)
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                    continue
                own = safe_get_local_optimizer_state(parameter, key)  # one of equal parts, the last filled up
                value = F.pad(value.flatten(), (0, own.numel() * self.size - value.numel()))
                safe_set_local_optimizer_state(parameter, value.chunk(self.size)[self.rank].view_as(own), key)

    def _link(self) -> None:
        """Have the engine find the state of every parameter group: after its first step it knows the first one's alone."""
        held = self.engine.optimizer
        if self.stage < 3 and held.optimizer.state:
            held._hp_optimizer_states_linked = False
            held._lazy_init_hp_params_optimizer_state()
