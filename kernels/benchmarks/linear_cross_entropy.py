"""The last linear layer with its cross entropy, summed over the tokens.

FLOPs: 2 T E V forward, 4 T E V backward, of which the matrix products are all. Some compute gradients in the forward, or the
logits twice: `full` is what compares. The memory beside it is the other half of the result.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.benchmarks.harness import OURS, Case, Function, Provider, Work, compiled, find
from megalm_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

_SHAPES = {  # tokens, width, vocabulary
    "tiny": [(8, 32, 96)],
    "quick": [(8192, 2048, 32000)],
    "full": [(8192, 4096, 32000), (8192, 2048, 128256), (8192, 4096, 131072)],
}


def cases(sizes: str) -> Iterator[Case]:
    """bf16."""
    for shape in _SHAPES[sizes]:
        yield _case(*shape, torch.bfloat16)


def _case(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> Case:
    product = 2 * tokens * width * vocabulary
    moved = (tokens + vocabulary) * width * dtype.itemsize

    def make(device: torch.device) -> list[Tensor]:
        x = torch.randn(tokens, width, device=device).to(dtype)
        weight = (torch.randn(vocabulary, width, device=device) / width**0.5).to(dtype)
        return [x, weight, torch.randint(vocabulary, (tokens,), device=device)]

    def public(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, labels, reduction="sum")

    def reference(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy_reference(x, weight, labels).sum()

    def liger() -> Function:
        function = find("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction").apply
        return lambda x, weight, labels: function(x, weight, labels, None, None, -100, 0.0, 0.0, "sum")

    return Case(
        "linear_cross_entropy", f"{tokens} x {width} x {vocabulary}", dtype, make, reference,
        [
            Provider(OURS, lambda: public, {"cross_entropy": OURS}),  # it goes by the choice for cross_entropy
            Provider("torch", lambda: _whole),
            Provider("torch chunked", lambda: public, {"cross_entropy": "torch"}),
            compiled(reference),
            Provider("reference", lambda: reference),
            Provider("liger", liger),
        ],
        Work(moved, product), Work(2 * moved, 2 * product), bound="flops", gradients=(0, 1),
    )  # fmt: skip


def _whole(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(x, weight).float(), labels, reduction="sum")
