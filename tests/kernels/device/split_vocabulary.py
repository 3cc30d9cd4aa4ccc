"""A linear layer and cross entropy whose vocabulary is in parts, joined in one process as ranks would join them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm_kernels.cross_entropy import IGNORE
from megalm_kernels.linear_cross_entropy import linear_cross_entropy_gradient, linear_cross_entropy_statistics

PADDING = 7.0  # a weight that would be seen in any sum
Features = dict[str, float]


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, rows: list[int], chunk: int, features: Features) -> Tensor:
        smoothing, z_loss, softcap = (features.get(name, 0.0) for name in ("label_smoothing", "z_loss", "softcap"))
        vocab_size = len(weight)
        padding = weight.new_full((sum(rows) - vocab_size, weight.shape[1]), PADDING)
        ctx.parts = torch.cat((weight, padding)).split(rows)
        firsts = [sum(rows[:i]) for i in range(len(rows))]
        ctx.places = [dict(first=first, vocab_size=vocab_size, softcap=softcap, chunk=chunk) for first in firsts]
        ctx.features = dict(label_smoothing=smoothing, z_loss=z_loss)
        found = [
            linear_cross_entropy_statistics(x, part, labels, with_sum=True, **at)
            for part, at in zip(ctx.parts, ctx.places, strict=True)
        ]
        assert all(part.exponentials is None for part in found)
        largest = torch.stack([part.largest for part in found]).amax(0)
        total = torch.stack([part.total * torch.exp(part.largest - largest) for part in found]).sum(0)
        target = torch.stack([part.target for part in found]).sum(0)
        logit_sum = torch.stack([part.logit_sum for part in found]).sum(0)
        ctx.save_for_backward(x, labels, largest, total)
        losses = total.log() + (largest - target) + smoothing * (target - logit_sum / vocab_size)
        return (losses + z_loss * (largest + total.log()) ** 2).where(labels != IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, labels, largest, total = ctx.saved_tensors
        found = [
            linear_cross_entropy_gradient(x, part, labels, largest, total, grad, **ctx.features, **at)
            for part, at in zip(ctx.parts, ctx.places, strict=True)
        ]
        dx = torch.stack([part[0] for part in found]).to(grad.dtype).sum(0).to(x.dtype)
        dweight, vocab_size = torch.cat([part[1] for part in found]), ctx.places[0]["vocab_size"]
        assert dweight.dtype == grad.dtype, "fp32 of 16-bit weights"
        assert not dweight[vocab_size:].any(), "padding has no gradient"
        return dx, dweight[:vocab_size].to(x.dtype), None, None, None, None


def losses_in_parts(x: Tensor, weight: Tensor, labels: Tensor, rows: list[int], chunk: int, **features: float) -> Tensor:
    """Losses (T,) with gradients. rows: of each part, together at least those of weight (V, E); the rest is padding."""
    return _InParts.apply(x, weight, labels, rows, chunk, features)
