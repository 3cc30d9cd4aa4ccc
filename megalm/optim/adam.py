"""AdamW as a torch optimizer, on the fused kernel. Works on the engines' flat fp32 buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megalm.config.optim import OptimConfig
from megalm_kernels import fused_adam


class AdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam. State per parameter: step (fp32 scalar on the CPU), exp_avg, exp_avg_sq.

    Everything it needs is in `state[p]`: DeepSpeed calls `step` once per group with a list of one flat parameter.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "AdamW takes no closure"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
            state.update({"step": torch.tensor(0.0), **moments})
        state["step"] += 1
        beta1, beta2 = group["betas"]
        fused_adam(
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], step=int(state["step"]), lr=group["lr"],
            beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
        )  # fmt: skip


def build_optimizer(param_groups: list[dict], config: OptimConfig) -> AdamW:
    """AdamW over `param_groups`, each with its own weight decay."""
    return AdamW(param_groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)
