"""RMS norm and layer norm, alone and with the residual addition before them.

Bytes per element of x: forward 2 s (read x, write y), with a residual 4 s (read both, write y and h); backward 3 s (read x and
dy, write dx), with a residual 4 s (read h, dy and dh, write the one gradient of both). s is the size of an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megalm_kernels import norms
from megalm_kernels.benchmarks.harness import Case, Function, Provider, Work, find, standard

_SHAPES = {
    "tiny": [(8, 64)],
    "quick": [(16384, 4096)],
    "full": [(65536, 1024), (16384, 4096), (8192, 8192), (4096, 16384), (1024, 65536)],
}
_EPS = 1e-5


def cases(sizes: str) -> Iterator[Case]:
    """Both norms; bf16 everywhere, fp32 and the residual on the first of the usual widths."""
    for operation in ("rms_norm", "layer_norm"):
        for rows, width in _SHAPES[sizes]:
            yield _case(operation, rows, width, torch.bfloat16, False)
        rows, width = _SHAPES["tiny" if sizes == "tiny" else "quick"][0]
        yield _case(operation, rows, width, torch.bfloat16, True)
        yield _case(operation, rows, width, torch.float32, False)


def _case(operation: str, rows: int, width: int, dtype: torch.dtype, residual: bool) -> Case:
    biased = operation == "layer_norm"
    tensor, vectors = rows * width * dtype.itemsize, (1 + biased) * width * dtype.itemsize

    def make(device: torch.device) -> list[Tensor]:
        big = [torch.randn(rows, width, device=device).to(dtype) for _ in range(1 + residual)]
        return [*big, *((1 + 0.1 * torch.randn(width, device=device)).to(dtype) for _ in range(1 + biased))]

    def call(function: Any) -> Function:
        if residual:
            return lambda x, r, *vectors: function(x, *vectors, eps=_EPS, residual=r)
        return lambda x, *vectors: function(x, *vectors, eps=_EPS)

    reference = call(getattr(norms, f"{operation}_reference"))
    providers = standard(operation, call(getattr(norms, operation)), reference, _liger(operation, residual))
    return Case(
        operation, f"{rows} x {width}{' + residual' * residual}", dtype, make, reference, providers,
        Work((4 if residual else 2) * tensor + vectors), Work((4 if residual else 3) * tensor + 2 * vectors),
        gradients=tuple(range(2 + residual + biased)),
    )  # fmt: skip


def _liger(operation: str, residual: bool) -> Provider:
    """In place on the gradient where its default is so; with a residual, layer norm is not fused there."""

    def load() -> Function:
        if operation == "layer_norm":
            norm = find("liger_kernel.ops.layer_norm", "LigerLayerNormFunction").apply
            if residual:
                return lambda x, r, w, b: _layer_norm_of_sum(norm, x, r, w, b)
            return lambda x, w, b: norm(x, w, b, _EPS)
        if residual:
            fused = find("liger_kernel.ops.fused_add_rms_norm", "LigerFusedAddRMSNormFunction").apply
            return lambda x, r, w: fused(x, r, w, _EPS)
        norm = find("liger_kernel.ops.rms_norm", "LigerRMSNormFunction").apply
        return lambda x, w: norm(x, w, _EPS)

    return Provider("liger", load)


def _layer_norm_of_sum(norm: Function, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    h = residual + x
    return norm(h, weight, bias, _EPS), h
