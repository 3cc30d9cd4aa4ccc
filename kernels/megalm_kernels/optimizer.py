"""AdamW as a torch optimizer, on the fused kernel.

It stands in for torch.optim.AdamW and for apex's FusedAdam, and its state_dict goes into and comes from theirs: per parameter
`step`, `exp_avg`, `exp_avg_sq` (always fp32), per group torch's settings, and `step` and `bias_correction` where apex looks.
All that a step needs is in `state[p]` and in the group: DeepSpeed's ZeRO puts one flat shard in place of a group's parameters
and steps one group at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megalm_kernels import compat
from megalm_kernels.arguments import check_dtype, check_integer, check_not_negative, kind_of, refuse
from megalm_kernels.fused_adam import fused_adam
from megalm_kernels.rounding import join_fp32, split_fp32

MASTERS = ("none", "fp32", "remainder")
_NAME = "FusedAdamW"
_OPTIONS = ("master", "stochastic_rounding", "seed", "capturable")  # of this optimizer: not of a group, nor of a state_dict
_SETTINGS = ("lr", "betas", "eps", "weight_decay")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOMENTS = ("exp_avg", "exp_avg_sq")
_STORED = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "master": torch.float32, "remainder": torch.int16}
# What another optimizer's group may say that this one does not do, with the only value that it does.
_ONLY = {"amsgrad": False, "maximize": False, "decoupled_weight_decay": True, "bias_correction": True}


class FusedAdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019); moments in fp32, parameters in fp32, bf16 or fp16.

    master: what a 16-bit parameter is rounded from: "none" (itself), "fp32" (a copy) or "remainder" (bf16 only: the 16 bits
    that bf16 lacks, which with the parameter are the fp32 number). stochastic_rounding: of bf16 parameters that have no master;
    `seed` (64 bits) and the step pick the chance, so ranks with the same parameters round alike; without any bf16 parameter it
    warns. capturable: the step count is kept on the device, so that a CUDA graph of the step counts on; `lr` should then be a
    tensor on the device too, if it changes. These four are of all groups, the other settings of each. torch.amp.GradScaler's
    scale and its found_inf are applied in the same pass, and the count is then on the device too. Raises ValueError for settings
    out of range, a dtype that has no step, and a group with another master, stochastic_rounding, seed or capturable.
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
        check_integer(_NAME, "seed", seed, bits=64)
        options = dict(master=master, stochastic_rounding=stochastic_rounding, seed=seed, capturable=capturable)
        settings = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        _check_settings(settings)
        super().__init__(params, {**settings, **options})
        if stochastic_rounding and not any(p.dtype == torch.bfloat16 for group in self.param_groups for p in group["params"]):
            warnings.warn(f"{_NAME}: stochastic_rounding is True, but no parameter is bf16: it changes nothing", stacklevel=2)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. Raises ValueError as the class says, and then the group is not added."""
        for name in _OPTIONS:
            value = self.defaults[name]
            if isinstance(param_group, dict) and param_group.get(name, value) != value:
                wanted = f"{value}, as for the whole optimizer: set it there"
                raise refuse(_NAME, f"{name} of a param group", param_group[name], wanted)
        compat.undecorated(torch.optim.Optimizer.add_param_group)(self, param_group)
        try:
            _check_settings(self.param_groups[-1], " of a param group")
            for i, parameter in enumerate(self.param_groups[-1]["params"]):
                check_dtype(_NAME, f"parameter {i} of a param group", parameter, _FLOATS)
                if self._master_of(parameter) == "remainder" and parameter.dtype != torch.bfloat16:
                    wanted = "torch.bfloat16 (or torch.float32) with master remainder; master fp32 takes it"
                    raise refuse(_NAME, f"the dtype of parameter {i} of a param group", parameter.dtype, wanted)
        except ValueError:
            del self.param_groups[-1]
            raise

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
            stochastic_seed=(self.defaults["seed"] + (index << 32)) % 2**64 if by_chance else None,
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
        `state_dict`, or is there in its other form, is made of them. Raises ValueError, and changes nothing, for the state of
        another algorithm or of parameters of another shape."""
        saved_groups = state_dict["param_groups"]
        self._check_loaded(state_dict["state"], saved_groups)
        super().load_state_dict(state_dict)
        for group, saved_group in zip(self.param_groups, saved_groups, strict=True):
            group.update({name: self.defaults[name] for name in _OPTIONS})
            steps = group.pop("step", 0)
            group.pop("bias_correction", None)
            for parameter, key in zip(group["params"], saved_group["params"], strict=True):
                if state_dict["state"].get(key):
                    self.state[parameter] = self._adopt(parameter, {"step": steps, **state_dict["state"][key]})

    def _check_loaded(self, states: dict[Any, dict[str, Any]], groups: list[dict[str, Any]]) -> None:
        """Raises ValueError unless this is AdamW's state of these parameters. torch counts groups and parameters."""
        index = 0
        for ours, group in zip(self.param_groups, groups, strict=False):
            of_all = {"step": group["step"]} if "step" in group else {}  # apex's
            for parameter, key in zip(ours["params"], group["params"], strict=False):
                if states.get(key):
                    _check_state(index, {**of_all, **states[key]}, parameter)
                index += 1
        for group in groups:
            for name in _SETTINGS:
                if name not in group:
                    raise refuse(_NAME, f"{name} of a group of the state_dict", "absent", f"AdamW's: {', '.join(_SETTINGS)}")
            _check_settings(group, " in the state_dict")
            for name, only in _ONLY.items():
                if name == "decoupled_weight_decay" and not group["weight_decay"]:
                    continue  # torch.optim.Adam without decay is the same
                if bool(group.get(name, only)) is not only:
                    raise refuse(_NAME, f"{name} in the state_dict", group[name], only)

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


def _check_settings(settings: dict[str, Any], where: str = "") -> None:
    """Raises ValueError for what is out of range. A rate on a GPU is not looked at: the host would wait for it."""
    rate = settings["lr"]
    if not isinstance(rate, Tensor):
        check_not_negative(_NAME, f"lr{where}", rate)
    for name in ("eps", "weight_decay"):
        check_not_negative(_NAME, f"{name}{where}", settings[name])
    betas = settings["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise refuse(_NAME, f"betas{where}", betas, "two of at least 0 and less than 1")


def _check_state(index: int, saved: dict[str, Any], parameter: Tensor) -> None:
    """Raises ValueError unless `saved` is AdamW's state of the optimizer's parameter number `index`, and of its shape."""
    where = f"of parameter {index} in the state_dict"
    lacking = [name for name in (*_MOMENTS, "step") if name not in saved]
    if lacking:
        wanted = f"the state of AdamW (torch's, apex's or {_NAME}'s): {', '.join(_MOMENTS)} and step; it has {', '.join(saved)}"
        raise refuse(_NAME, f"{' and '.join(lacking)} {where}", "absent", wanted)
    for name in [name for name in _STORED if name in saved]:
        if not isinstance(saved[name], Tensor):
            raise refuse(_NAME, f"{name} {where}", kind_of(saved[name]), "a Tensor")
        if saved[name].shape != parameter.shape:
            raise refuse(_NAME, f"the shape of {name} {where}", tuple(saved[name].shape), f"{tuple(parameter.shape)}, as it has")


def _on_host_or_beside(lr: float | Tensor, parameter: Tensor) -> float | Tensor:
    """A learning rate that is a tensor on another device (the CPU's) as a number."""
    if isinstance(lr, Tensor):
        return lr.float() if lr.device == parameter.device and lr.device.type != "cpu" else float(lr)
    return float(lr)
