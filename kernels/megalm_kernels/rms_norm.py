"""Root mean square norm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.dispatch import implementation, register


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Norm over the last dim. x (..., E), weight (E,); the result has x's dtype, statistics are fp32."""
    return implementation("rms_norm")(x, weight, eps)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula, in fp32."""
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


register("rms_norm", "torch", _rms_norm_torch)
