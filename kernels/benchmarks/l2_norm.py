"""The L2 norm of all gradients, for clipping: one flat buffer, and a list like a model's parameters. Each is read once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm_kernels.benchmarks.harness import Case, Function, Provider, Work, standard
from megalm_kernels.l2_norm import l2_norm, l2_norm_reference

_SIZES = {"tiny": [3000], "quick": [2**28], "full": [2**24, 2**28, 2**30]}
_LIST = {"tiny": (4, 100), "quick": (290, 2**22), "full": (290, 2**22)}  # tensors, elements of each


def cases(sizes: str) -> Iterator[Case]:
    """fp32, and bf16 of the last size."""
    for numel in _SIZES[sizes]:
        yield _case(1, numel, torch.float32)
    yield _case(1, _SIZES[sizes][-1], torch.bfloat16)
    yield _case(*_LIST[sizes], torch.float32)


def _case(count: int, numel: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device) -> list[Tensor]:
        return [torch.randn(numel, device=device).to(dtype) for _ in range(count)]

    def call(function: Function) -> Function:
        return lambda *tensors: function(list(tensors))

    reference = call(l2_norm_reference)
    providers = [*standard("l2_norm", call(l2_norm), reference), Provider("foreach", lambda: _foreach)]
    return Case("l2_norm", f"{count} x {numel:,}", dtype, make, reference, providers, Work(count * numel * dtype.itemsize))


def _foreach(*tensors: Tensor) -> Tensor:
    """As torch.nn.utils.clip_grad_norm_ does it."""
    norms = torch._foreach_norm(list(tensors))
    return torch.linalg.vector_norm(torch.stack(list(norms)).float())
