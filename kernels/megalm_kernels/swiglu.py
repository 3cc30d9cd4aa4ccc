"""SwiGLU (Shazeer 2020): y = silu(gate) * up."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.dispatch import implementation, register


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; gate and up of one shape and dtype."""
    return implementation("swiglu")(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, in fp32."""
    g = gate.float()
    return (g * g.sigmoid() * up.float()).to(gate.dtype)


def _swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


register("swiglu", "torch", _swiglu_torch)
