"""Linear layers whose weight gradients may wait, and several linear layers of one input in one matrix product.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum dy

`dW` needs neither the layers before nor after it, so it can be computed later: behind a collective, or where a pipeline
rank would wait (Qi et al. 2023). The queue that collects such work is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class GradientQueue(Protocol):
    """Where a backward may leave its weight gradients for later."""

    @property
    def holds(self) -> bool:
        """Whether to leave them."""
        ...

    def add(self, weights: Sequence[Tensor], x: Tensor, dy: Tensor) -> None:
        """dW of the weights, joined along dim 0, is dy^T x. x (..., E), dy (..., F)."""
        ...


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, queue: GradientQueue | None = None) -> Tensor:
    """x W^T + b. x (..., E), weight (F, E), bias (F,) -> (..., F). With a queue, dW may be computed later."""
    return F.linear(x, weight, bias) if queue is None else _Linear.apply(x, weight, bias, queue)


def linears(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], queue: GradientQueue | None = None
) -> tuple[Tensor, ...]:
    """Several layers of one input in one product: x (..., E), weights (F_i, E) -> one (..., F_i) each.

    Weights that lie one behind the other in memory (the engines' flat buffers) are used in place, others are joined first.
    """
    return _Linears.apply(x, queue, *weights, *biases)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The parts one below the other (dim 0): without a copy where they lie so in memory already."""
    first, numel = parts[0], 0
    adjacent = True
    for part in parts:
        adjacent = adjacent and part.is_contiguous() and part.data_ptr() == first.data_ptr() + numel * first.element_size()
        adjacent = adjacent and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        numel += part.numel()
    if not adjacent:
        return torch.cat(list(parts))
    return first.detach().as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())


class _Linear(torch.autograd.Function):
    """One layer: the same as `_Linears` with one, without what joining and splitting cost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, queue: GradientQueue) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weights, ctx.queue, ctx.has_bias = (weight,), queue, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        db = dy.flatten(0, -2).sum(0) if ctx.has_bias else None
        if not ctx.needs_input_grad[1]:  # frozen
            return dx, None, db, None
        if ctx.queue.holds:
            ctx.queue.add(ctx.weights, x, dy)
            return dx, None, db, None
        return dx, weight_gradient(x, dy), db, None


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, queue: GradientQueue | None, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        weights = parameters[: len(parameters) // 2]
        biases = [bias for bias in parameters[len(weights) :] if bias is not None]
        ctx.save_for_backward(x, *weights)
        ctx.weights = weights  # a checkpoint gives back what was saved as other tensors, without the parameters' .grad
        ctx.queue, ctx.has_bias = queue, bool(biases)
        ctx.sizes = [weight.shape[0] for weight in weights if weight is not None]
        y = F.linear(x, join(weights), join(biases) if biases else None)  # type: ignore[arg-type]
        return y.split(ctx.sizes, -1)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dy = torch.cat(dys, -1)
        dx = dy @ join(weights) if ctx.needs_input_grad[0] else None
        none: list[Tensor | None] = [None] * len(weights)
        dbs = list(dy.flatten(0, -2).sum(0).split(ctx.sizes)) if ctx.has_bias else none
        if not any(ctx.needs_input_grad[2 : 2 + len(weights)]):  # frozen
            return dx, None, *none, *dbs
        if ctx.queue is not None and ctx.queue.holds:
            ctx.queue.add(ctx.weights, x, dy)
            return dx, None, *none, *dbs
        return dx, None, *weight_gradient(x, dy).split(ctx.sizes), *dbs


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """dW = dy^T x, summed over all but the last dim. x (..., E), dy (..., F) -> (F, E)."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)
