"""SwiGLU, GeGLU, and GELU after a bias.

Bytes per element, s the size of one: gated forward 3 s (read gate and up, write y), backward 5 s (read dy, gate and up, write
both gradients); bias and GELU forward 2 s, backward 3 s (read dy and x, write dx).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm_kernels import activations
from megalm_kernels.benchmarks.harness import Case, Function, Provider, Work, find, standard

_SHAPES = {"tiny": [(8, 64)], "quick": [(8192, 14336)], "full": [(16384, 4096), (8192, 14336), (8192, 28672)]}
_LIGER = {
    "swiglu": ("liger_kernel.ops.swiglu", "LigerSiLUMulFunction"),
    "geglu": ("liger_kernel.ops.geglu", "LigerGELUMulFunction"),
}


def cases(sizes: str) -> Iterator[Case]:
    """bf16 everywhere, fp32 on the first shape."""
    for operation in ("swiglu", "geglu", "bias_gelu"):
        for rows, width in _SHAPES[sizes]:
            yield _case(operation, rows, width, torch.bfloat16)
        yield _case(operation, *_SHAPES[sizes][0], torch.float32)


def _case(operation: str, rows: int, width: int, dtype: torch.dtype) -> Case:
    gated = operation in _LIGER
    tensor, vector = rows * width * dtype.itemsize, 0 if gated else width * dtype.itemsize

    def make(device: torch.device) -> list[Tensor]:
        return [torch.randn(shape, device=device).to(dtype) for shape in ((rows, width), (rows, width) if gated else (width,))]

    reference = getattr(activations, f"{operation}_reference")
    peers = [_liger(operation)] if gated else []
    return Case(
        operation, f"{rows} x {width}", dtype, make, reference,
        standard(operation, getattr(activations, operation), reference, *peers),
        Work((3 if gated else 2) * tensor + vector), Work((5 if gated else 3) * tensor + 2 * vector), gradients=(0, 1),
    )  # fmt: skip


def _liger(operation: str) -> Provider:
    def load() -> Function:
        return find(*_LIGER[operation]).apply

    return Provider("liger", load)
