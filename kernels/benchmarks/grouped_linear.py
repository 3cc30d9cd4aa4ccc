"""The experts of a mixture: every row times the matrix of its group.

FLOPs: 2 T N K forward, 4 T N K backward, whatever the groups' lengths; these are uneven, and one group in sixteen is empty. The
loop knows the lengths on the host, so it does not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm_kernels.benchmarks.harness import OURS, Absent, Case, Function, Provider, Work
from megalm_kernels.grouped_linear import GroupedMM, grouped_linear, grouped_linear_reference, loop

_SHAPES = {  # rows, groups, features, outputs
    "tiny": [(64, 4, 16, 24)],
    "quick": [(65536, 16, 4096, 1536)],
    "full": [
        (65536, 8, 4096, 14336),
        (65536, 16, 4096, 1536),
        (65536, 64, 2048, 1408),
        (65536, 64, 1408, 2048),
        (4096, 64, 2048, 1408),
    ],
}


def cases(sizes: str) -> Iterator[Case]:
    """bf16."""
    for shape in _SHAPES[sizes]:
        yield _case(*shape, torch.bfloat16)


def _case(rows: int, groups: int, features: int, outputs: int, dtype: torch.dtype) -> Case:
    product = 2 * rows * features * outputs
    moved = (rows * (features + outputs) + groups * features * outputs) * dtype.itemsize
    bounds = _bounds(rows, groups)

    def make(device: torch.device) -> list[Tensor]:
        x = torch.randn(rows, features, device=device).to(dtype)
        weight = (torch.randn(groups, outputs, features, device=device) / features**0.5).to(dtype)
        return [x, weight, torch.tensor(bounds, dtype=torch.int32, device=device)]

    def public(x: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
        return grouped_linear(x, weight, starts)

    def mm(x: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
        return loop(x, weight, bounds)

    def grouped_mm() -> Function:
        if not hasattr(torch, "_grouped_mm"):
            raise Absent("torch has no _grouped_mm")
        return lambda x, weight, starts: GroupedMM.apply(x, weight, starts, None)

    return Case(
        "grouped_linear", f"{rows} x {features} x {outputs}, {groups} groups", dtype, make, grouped_linear_reference,
        [
            Provider(OURS, lambda: public, {"grouped_linear": OURS}),
            Provider("torch", lambda: mm),
            Provider("torch grouped_mm", grouped_mm),
            Provider("reference", lambda: grouped_linear_reference),
        ],
        Work(moved, product), Work(2 * moved, 2 * product), bound="flops", gradients=(0, 1),
    )  # fmt: skip


def _bounds(rows: int, groups: int) -> list[int]:
    """Where groups begin that get from 0 to about twice their share of the rows."""
    shares = [(7 * g % 16) + (g % 3) for g in range(groups)]
    total = sum(shares)
    return [rows * sum(shares[:g]) // total for g in range(groups + 1)]
