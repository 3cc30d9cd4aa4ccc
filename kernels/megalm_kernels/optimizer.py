"""AdamW as a torch optimizer, on the fused kernel.

It stands in for torch.optim.AdamW and for apex's FusedAdam, and its state_dict goes into and comes from theirs: per parameter
`step`, `exp_avg`, `exp_avg_sq` (always fp32), per group torch's settings, and `step` and `bias_correction` where apex looks.
All that a step needs is in `state[p]` and in the group: DeepSpeed's ZeRO puts one flat shard in place of a group's parameters
and steps one group at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalm_kernels.arguments import refuse
from megalm_kernels.fused_adam import fused_adam
from megalm_kernels.rounding import join_fp32, split_fp32

MASTERS = ("none", "fp32", "remainder")
_NAME = "FusedAdamW"
_OPTIONS = ("master", "stochastic_rounding", "seed", "capturable")  # of this optimizer: not taken from a state_dict
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STORED = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master": torch.float32, "remainder": torch.int16}
# What another optimizer's group may say that this one does not do, with the only value that it does.
_ONLY = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True, "bias_correction": True}


class FusedAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); moments in fp32, parameters in fp32, bf16 or fp16.

    master: what a 16-bit parameter is rounded from: "none" (itself), "fp32" (a copy) or "remainder" (bf16 only: the 16 bits
    that bf16 lacks, which with the parameter are the fp32 number). stochastic_rounding: of bf16 parameters that have no master;
    `seed` and the step pick the chance, so ranks with the same parameters round alike. capturable: the step count is kept on
    the device, so that a CUDA graph of the step counts on; `lr` should then be a tensor on the device too, if it changes.
    torch.amp.GradScaler's scale and its found_inf are applied in the same pass, and the count is then on the device too.
    Raises ValueError for settings out of range.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves unscaling and skipping to `step`

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, *, master: str = "none", stochastic_rounding: bool = False, seed: int = 0,
        capturable: bool = False,
    ):  # fmt: skip
        if master not in MASTERS:
            raise refuse(_NAME, "master", master, " or ".join(MASTERS))
        if stochastic_rounding and master != "none":
            raise refuse(_NAME, "stochastic_rounding", f"True with master {master}", "master none: a master loses nothing")
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not isinstance(value, Tensor) and not value >= 0.0:
                raise refuse(_NAME, name, value, "at least 0")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise refuse(_NAME, "betas", betas, "at least 0 and less than 1")
        options = dict(master=master, stochastic_rounding=stochastic_rounding, seed=seed, capturable=capturable)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options))

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
    ) -> Any:
        """One step; returns what `closure` does. grad_scale multiplies the gradients, found_inf (if not 0) makes it no step:
        fp32 tensors of one element on the parameters' device, which the host does not wait for."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        divisor = getattr(self, "grad_scale", None)  # GradScaler sets this one and the next for the time of the call
        if divisor is not None:
            grad_scale = 1.0 / divisor.float() if grad_scale is None else grad_scale / divisor.float()
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        index = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, index, grad_scale, found_inf)
                index += 1
        return loss

    def _update(
        self, parameter: Tensor, group: dict[str, Any], index: int, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """One parameter's step. `index` in the seed: equal values in two parameters are not rounded alike."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            raise refuse(_NAME, "the gradient of a parameter", "sparse", "dense")
        state = self.state[parameter]
        if "exp_avg" not in state:
            state.update(self._fresh(parameter))
        by_chance = self.defaults["stochastic_rounding"] and parameter.dtype == torch.bfloat16
        if found_inf is None:
            state["step"] += 1
        else:  # the host does not know whether to count: the count moves to where this is known
            state["step"] = state["step"].to(parameter.device)
            state["step"] += found_inf.reshape(()) == 0
        step = state["step"]
        on_device = self.defaults["capturable"] or step.device.type != "cpu"
        if not on_device and parameter.is_cuda and torch.cuda.is_current_stream_capturing():  # it would repeat this step for ever
            raise refuse(_NAME, "capturable", False, "True in a CUDA graph")
        target, grad = parameter.contiguous(), parameter.grad.contiguous()
        beta1, beta2 = group["betas"]
        fused_adam(
            target, grad, state["exp_avg"], state["exp_avg_sq"],
            step=step if on_device else max(int(step), 1), lr=_on_host_or_beside(group["lr"], target),
            beta1=float(beta1), beta2=float(beta2), eps=group["eps"], weight_decay=group["weight_decay"],
            master=state.get("master"), remainder=state.get("remainder"),
            stochastic_seed=self.defaults["seed"] + (index << 32) if by_chance else None,
            grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        if target is not parameter:
            parameter.copy_(target)

    def _fresh(self, parameter: Tensor) -> dict[str, Tensor]:
        """State before the first step: all but `step` contiguous and of the parameter's shape."""

        def zeros() -> Tensor:
            return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)

        step = torch.zeros((), device=parameter.device if self.defaults["capturable"] else "cpu")
        return {"step": step, "exp_avg": zeros(), "exp_avg_sq": zeros(), **self._fresh_master(parameter)}

    def _fresh_master(self, parameter: Tensor) -> dict[str, Tensor]:
        kind = self._master_of(parameter)
        if kind == "fp32":
            return {"master": parameter.detach().float().contiguous()}
        if kind == "remainder":
            return {"remainder": torch.zeros(parameter.shape, dtype=torch.int16, device=parameter.device)}
        return {}

    def _master_of(self, parameter: Tensor) -> str:
        return "none" if parameter.dtype == torch.float32 else self.defaults["master"]

    def state_dict(self) -> dict[str, Any]:
        """As torch's; each group also has apex's `bias_correction` and, once a step was done, `step` (waits for the device)."""
        saved = super().state_dict()
        for group in saved["param_groups"]:
            steps = [int(saved["state"][i]["step"]) for i in group["params"] if "step" in saved["state"].get(i, {})]
            group.update({"bias_correction": True}, **{"step": max(steps)} if steps else {})
        return saved

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this class, torch.optim.AdamW or apex's FusedAdam. Load the model's weights first: a master that is not in
        `state_dict`, or is there in its other form, is made of them. Raises ValueError for what would be another algorithm."""
        saved_groups = state_dict["param_groups"]
        for group in saved_groups:
            for name, only in _ONLY.items():
                if name == "decoupled_weight_decay" and not group["weight_decay"]:
                    continue  # torch.optim.Adam without decay is the same
                if bool(group.get(name, only)) is not only:
                    raise refuse(_NAME, f"{name} in the state_dict", group[name], only)
        super().load_state_dict(state_dict)
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: self.defaults[name] for name in _OPTIONS})
            steps = group.pop("step", 0)
            group.pop("bias_correction", None)
            for parameter, key in zip(group["params"], saved_group["params"], strict=True):
                if state_dict["state"].get(key):
                    self.state[parameter] = self._adopt(parameter, {"step": steps, **state_dict["state"][key]})

    def _adopt(self, parameter: Tensor, saved: dict[str, Any]) -> dict[str, Tensor]:
        """State from what was saved, in dtypes of its own: torch casts a loaded state to the dtype of the parameter."""
        device = parameter.device if self.defaults["capturable"] else "cpu"
        step = torch.as_tensor(saved["step"], dtype=torch.float32).reshape(()).to(device, copy=True)
        state = {"step": step, **self._fresh_master(parameter)}
        for name in set(_MOMENTS) | state.keys() & saved.keys() - {"step"}:
            state[name] = saved[name].to(parameter.device, _STORED[name], copy=True).contiguous()
        if "master" in state and "remainder" in saved and "master" not in saved:
            state["master"] = join_fp32(parameter.detach().contiguous(), saved["remainder"].to(parameter.device))
        if "remainder" in state and "master" in saved and "remainder" not in saved:
            high, state["remainder"] = split_fp32(saved["master"].to(parameter.device, torch.float32).contiguous())
            parameter.copy_(high)  # where the master lies between two, this one rounds away from zero
        return state


def _on_host_or_beside(lr: float | Tensor, parameter: Tensor) -> float | Tensor:
    """A learning rate that is a tensor on another device (the CPU's) as a number."""
    if isinstance(lr, Tensor):
        return lr.float() if lr.device == parameter.device and lr.device.type != "cpu" else float(lr)
    return float(lr)
