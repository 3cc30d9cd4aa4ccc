"""Rotary position embedding (Su et al. 2021), halves convention: pairs are (x[i], x[i + D/2])."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm_kernels.dispatch import implementation, register


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair by its position's angle. x (B, S, H, D), cos and sin (S, D/2) fp32; the result has x's dtype."""
    return implementation("rotary")(x, cos, sin)


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, in fp32: (a, b) -> (a cos - b sin, b cos + a sin)."""
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (S, 1, D/2): the same for every head
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


register("rotary", "torch", rotary_reference)
