"""The optimizer of a run: AdamW on the fused kernel, with the settings of `optim`."""

from __future__ import annotations

from megalm.config.optim import OptimConfig
from megalm_kernels import FusedAdamW


def build_optimizer(param_groups: list[dict], config: OptimConfig) -> FusedAdamW:
    """AdamW over `param_groups`, each with its own weight decay; the engines give it fp32 weights, so it keeps no master."""
    betas = (config.beta1, config.beta2)
    return FusedAdamW(param_groups, lr=config.lr, betas=betas, eps=config.eps, weight_decay=0.0)
