"""Layer norm (Ba et al. 2016): y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.dispatch import implementation, register


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Norm over the last dim. x (..., E), weight and bias (E,); the result has x's dtype, statistics are fp32."""
    return implementation("layer_norm")(x, weight, bias, eps)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """The formula, in fp32."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float() + bias.float()).to(x.dtype)


def _layer_norm_torch(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


register("layer_norm", "torch", _layer_norm_torch)
