"""Cross entropy of a batch's logits, summed over the tokens: the forward reads the logits, the backward reads and writes them.

6 bytes per logit in bf16. The gradient may not overwrite the logits, unless the peer knows no other way.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm_kernels.benchmarks.harness import Case, Function, Provider, Work, find, standard
from megalm_kernels.cross_entropy import cross_entropy, cross_entropy_reference

_SHAPES = {"tiny": [(8, 96)], "quick": [(8192, 32000)], "full": [(8192, 32000), (8192, 131072), (16384, 50304)]}


def cases(sizes: str) -> Iterator[Case]:
    """bf16 everywhere; fp32, and label smoothing with z-loss, on the first shape."""
    for tokens, vocabulary in _SHAPES[sizes]:
        yield _case(tokens, vocabulary, torch.bfloat16)
    yield _case(*_SHAPES[sizes][0], torch.float32)
    yield _case(*_SHAPES[sizes][0], torch.bfloat16, label_smoothing=0.1, z_loss=1e-4)


def _case(tokens: int, vocabulary: int, dtype: torch.dtype, **features: float) -> Case:
    size = tokens * vocabulary * dtype.itemsize

    def make(device: torch.device) -> list[Tensor]:
        logits = (2 * torch.randn(tokens, vocabulary, device=device)).to(dtype)
        return [logits, torch.randint(vocabulary, (tokens,), device=device)]

    def call(function: Function) -> Function:
        return lambda logits, labels: function(logits, labels, **features).sum()

    def liger() -> Function:
        function = find("liger_kernel.ops.cross_entropy", "LigerCrossEntropyFunction").apply
        z_loss, smoothing = features.get("z_loss", 0.0), features.get("label_smoothing", 0.0)
        return lambda logits, labels: function(logits, labels, None, -100, z_loss, smoothing, "sum")

    reference = call(cross_entropy_reference)
    providers = standard("cross_entropy", call(cross_entropy), reference, Provider("liger", liger))
    return Case(
        "cross_entropy", f"{tokens} x {vocabulary}{' smooth+z' if features else ''}", dtype, make, reference, providers,
        Work(size), Work(2 * size), gradients=(0,),
    )  # fmt: skip
