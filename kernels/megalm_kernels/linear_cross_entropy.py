"""The last linear layer and the cross entropy together: losses of x W^T, whose (T, V) logits never exist all at once.

Tokens go by in chunks: a matrix product makes the chunk's logits, `cross_entropy`'s statistics and gradient run over them
(the gradient in their own memory), two more products make dx and add to dW.

    reduction="sum"   the gradients are made in the forward, where the logits are: 6 T V E operations in all. They wait in
                      memory for the backward, which multiplies them by the gradient of the sum.
    reduction="none"  the gradients need those of the losses, so the backward makes the logits again: 8 T V E operations.

dW is added up in fp32. Each chunk reads and writes all of it, 8 V E bytes beside 6 C V E operations, on an H200 (4.3 TB/s,
790 TFLOP/s) 245 / C of the time of the products. So a chunk has at least 2048 tokens (12 %), and more where its logits still
take no more memory than x: C V = T E.

Of a vocabulary split over ranks, each has `linear_cross_entropy_statistics` and `linear_cross_entropy_gradient` of its part,
8 T V E / ranks operations as of reduction="none". What goes between the ranks is the caller's: three numbers a token, and dx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from megalm_kernels.arguments import check_device, check_dtype, check_shape, refuse
from megalm_kernels.cross_entropy import (
    IGNORE,
    Statistics,
    check_features,
    check_labels,
    cross_entropy_gradient,
    cross_entropy_reference,
    cross_entropy_statistics,
    losses_with_statistics,
)

SHORTEST_CHUNK = 2048  # tokens


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
    softcap: float = 0.0,
    reduction: str = "none",
    chunk: int = 0,
) -> Tensor:
    """`cross_entropy(x @ weight.T, labels)` of single tokens, fp32 (T,), or its sum over tokens, fp32 ().

    x (T, E) and weight (V, E) of one dtype, in which the products are computed; labels (T,) int64. chunk: tokens at a time
    (0: see above). Raises ValueError for wrong shapes, dtypes, devices, labels, reductions, chunks.
    """
    if reduction not in ("none", "sum"):
        raise refuse("linear_cross_entropy", "reduction", repr(reduction), "'none' or 'sum'")
    features = (label_smoothing, z_loss, softcap)
    _, chunk = _check("linear_cross_entropy", x, weight, labels, 0, 0, features, ignore_index, chunk)
    scalars = (label_smoothing, z_loss, ignore_index, softcap, chunk)
    if reduction == "none":
        return _losses_op(x, weight, labels, *scalars)[0]
    differentiated = torch.is_grad_enabled()
    needs = (differentiated and x.requires_grad, differentiated and weight.requires_grad)
    return _sum_op(x, weight, labels, *scalars, *needs)[0]


def linear_cross_entropy_statistics(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    first: int = 0,
    vocab_size: int = 0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    with_sum: bool = False,
    chunk: int = 0,
) -> Statistics:
    """`cross_entropy_statistics(x @ weight.T, labels)`, without exponentials: what the ranks of a split vocabulary reduce.

    x (T, E), on all ranks the same; weight (columns, E): the rows from `first` on of a vocabulary of `vocab_size` (0: it ends
    with these rows), of which those from `vocab_size` on are padding, finite and not counted; labels (T,) int64 of the whole
    vocabulary. Gives no gradient: that is `linear_cross_entropy_gradient`. Raises ValueError for wrong arguments.
    """
    operation = "linear_cross_entropy_statistics"
    features = (0.0, 0.0, softcap)
    vocab_size, chunk = _check(operation, x, weight, labels, first, vocab_size, features, ignore_index, chunk)
    with torch.no_grad():
        found = _statistics_op(x, weight, labels, first, vocab_size, softcap, ignore_index, with_sum, chunk)
    largest, total, target, logit_sum = found
    return Statistics(largest, total, target, logit_sum, None)


def linear_cross_entropy_gradient(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    largest: Tensor,
    total: Tensor,
    grad: Tensor,
    *,
    first: int = 0,
    vocab_size: int = 0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
    softcap: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """dx (T, E), which the caller sums over the ranks, and dW (columns, E), 0 in padding rows, fp32 of 16-bit weights too.

    largest, total: of the whole vocabulary, as for `cross_entropy_gradient`; grad: of the losses; all (T,), fp32 (of fp64 x
    fp64). The rest as in `linear_cross_entropy_statistics`. Raises ValueError for wrong arguments.
    """
    operation = "linear_cross_entropy_gradient"
    features = (label_smoothing, z_loss, softcap)
    vocab_size, chunk = _check(operation, x, weight, labels, first, vocab_size, features, ignore_index, chunk)
    for name, given in (("largest", largest), ("total", total), ("grad", grad)):
        check_shape(operation, name, given, labels.shape)
        check_dtype(operation, name, given, (_wide(x.dtype),))
        check_device(operation, name, given, x)
    scalars = (first, vocab_size, label_smoothing, z_loss, ignore_index, softcap, chunk)
    with torch.no_grad():
        return _gradients_op(x, weight, labels, largest, total, grad, *scalars, True, True)


def linear_cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor, **features: Any) -> Tensor:
    """The formula, with all the logits at once."""
    return cross_entropy_reference(x @ weight.t(), labels, **features)


def default_chunk(tokens: int, size: int, vocab_size: int) -> int:
    """Tokens of a chunk: as many as have logits of the size of x, at least 2048; equal parts of a multiple of 16."""
    most = max(SHORTEST_CHUNK, tokens * size // max(vocab_size, 1))
    chunks = max(1, -(-tokens // most))
    return max(16, -(-tokens // (16 * chunks)) * 16)


def _check(
    operation: str,
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    vocab_size: int,
    features: tuple[float, float, float],
    ignore_index: int,
    chunk: int,
) -> tuple[int, int]:
    """vocab_size and chunk, or what stands for 0. features: label_smoothing, z_loss, softcap."""
    if x.dim() != 2:
        raise refuse(operation, "the shape of x", tuple(x.shape), "(tokens, hidden size)")
    if weight.dim() != 2:
        raise refuse(operation, "the shape of weight", tuple(weight.shape), "(vocabulary, hidden size)")
    check_shape(operation, "weight", weight, (weight.shape[0], x.shape[1]))
    check_dtype(operation, "x", x)
    check_dtype(operation, "weight", weight, (x.dtype,))
    check_device(operation, "weight", weight, x)
    for name, value in (("first", first), ("vocab_size", vocab_size), ("chunk", chunk)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise refuse(operation, name, repr(value), "an int of at least 0")
    vocab_size = vocab_size or first + weight.shape[0]
    check_labels(operation, labels, x, vocab_size, ignore_index)
    check_features(operation, *features)
    return vocab_size, chunk or default_chunk(x.shape[0], x.shape[1], weight.shape[0])


def _chunks(x: Tensor, weight: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Each chunk's place among the tokens and its logits, all in the same memory."""
    memory = x.new_empty(min(chunk, x.shape[0]), weight.shape[0])
    for begin in range(0, x.shape[0], chunk):
        place = slice(begin, min(begin + chunk, x.shape[0]))
        logits = memory[: place.stop - begin]
        torch.mm(x[place], weight.t(), out=logits)
        yield place, logits


def _of_tokens(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int, count: int, found_in: Callable[[Tensor, Tensor], Sequence[Tensor]]
) -> list[Tensor]:
    """The `count` numbers of each token, (T,) each, that `found_in` finds in its chunk's logits and labels."""
    results = [_token_numbers(x) for _ in range(count)]
    for place, logits in _chunks(x, weight, chunk):
        for result, part in zip(results, found_in(logits, labels[place]), strict=True):
            result[place] = part
    return results


def _token_numbers(x: Tensor, wanted: bool = True) -> Tensor:
    return x.new_empty(x.shape[0] if wanted else 0, dtype=_wide(x.dtype))


class _Gradients:
    """dx and dW, growing chunk by chunk; what is not needed stays empty."""

    def __init__(self, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool):
        self.x, self.weight = x, weight
        self.dx = torch.empty_like(x) if needs_x else x.new_empty(0)
        self.dweight = weight.new_empty(weight.shape if needs_weight else 0, dtype=_wide(weight.dtype))
        self.needs_x, self.needs_weight, self.begun = needs_x, needs_weight, False
        if needs_weight and x.shape[0] == 0:
            self.dweight.zero_()

    def add(self, place: slice, dlogits: Tensor) -> None:
        if self.needs_x:
            torch.mm(dlogits, self.weight, out=self.dx[place])
        if self.needs_weight:
            _add_product(self.dweight, dlogits.t(), self.x[place], self.begun)
            self.begun = True


def _add_product(total: Tensor, a: Tensor, b: Tensor, begun: bool) -> None:
    """total += a @ b, or = if not begun, where total may be wider than both."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=int(begun), out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=int(begun), out=total)
    else:  # a CPU's product has the dtype of its factors
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=int(begun), out=total)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@custom_op("megalm::linear_cross_entropy", mutates_args=())
def _losses_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    features = (label_smoothing, z_loss, ignore_index, softcap)
    found_in = lambda logits, labels: losses_with_statistics(logits, labels, *features)  # noqa: E731
    losses, largest, total = _of_tokens(x, weight, labels, chunk, 3, found_in)
    return losses, largest, total


@_losses_op.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_token_numbers(x) for _ in range(3))


@custom_op("megalm::linear_cross_entropy_statistics", mutates_args=())
def _statistics_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    first: int,
    vocab_size: int,
    softcap: float,
    ignore_index: int,
    with_sum: bool,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalars: dict[str, Any] = dict(first=first, vocab_size=vocab_size, softcap=softcap, ignore_index=ignore_index)

    def found_in(logits: Tensor, labels: Tensor) -> list[Tensor]:
        found = cross_entropy_statistics(logits, labels, **scalars, with_sum=with_sum)
        return [found.largest, found.total, found.target, *([found.logit_sum] if with_sum else [])]

    largest, total, target, *sums = _of_tokens(x, weight, labels, chunk, 4 if with_sum else 3, found_in)
    return largest, total, target, sums[0] if with_sum else _token_numbers(x, wanted=False)


@_statistics_op.register_fake
def _(x: Tensor, weight: Tensor, labels: Tensor, *scalars: Any) -> tuple[Tensor, ...]:
    with_sum = scalars[-2]
    return tuple(_token_numbers(x, wanted) for wanted in (True, True, True, with_sum))


@custom_op("megalm::linear_cross_entropy_gradients", mutates_args=())
def _gradients_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    largest: Tensor,
    total: Tensor,
    grad: Tensor,
    first: int,
    vocab_size: int,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    chunk: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    gradients = _Gradients(x, weight, needs_x, needs_weight)
    columns: dict[str, Any] = dict(first=first, vocab_size=vocab_size)
    features: dict[str, Any] = dict(label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, softcap=softcap)
    for place, logits in _chunks(x, weight, chunk):
        dlogits = cross_entropy_gradient(
            logits, labels[place], largest[place], total[place], grad[place], **columns, **features, inplace=True
        )
        gradients.add(place, dlogits)
    return gradients.dx, gradients.dweight


@_gradients_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _fake_gradients(x, weight, *rest[-2:])


def _fake_gradients(x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool) -> tuple[Tensor, Tensor]:
    dweight = weight.new_empty(weight.shape if needs_weight else 0, dtype=_wide(weight.dtype))
    return torch.empty_like(x) if needs_x else x.new_empty(0), dweight


@custom_op("megalm::linear_cross_entropy_sum", mutates_args=())
def _sum_op(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss: float,
    ignore_index: int,
    softcap: float,
    chunk: int,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = _Gradients(x, weight, needs_x, needs_weight)
    losses = _token_numbers(x)
    ones = torch.ones_like(losses)
    features: dict[str, Any] = dict(label_smoothing=label_smoothing, z_loss=z_loss, ignore_index=ignore_index, softcap=softcap)
    for place, logits in _chunks(x, weight, chunk):
        found = losses_with_statistics(logits, labels[place], label_smoothing, z_loss, ignore_index, softcap)
        losses[place], largest, total = found
        if needs_x or needs_weight:
            dlogits = cross_entropy_gradient(logits, labels[place], largest, total, ones[place], **features, inplace=True)
            gradients.add(place, dlogits)
    return losses.sum(), gradients.dx, gradients.dweight


@_sum_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return x.new_empty((), dtype=_wide(x.dtype)), *_fake_gradients(x, weight, *rest[-2:])


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, labels, *ctx.scalars = inputs
    _, largest, total = output
    ctx.mark_non_differentiable(largest, total)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, labels, largest, total)


def _backward_of_losses(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 6
    if grad is None:
        return None, None, *nothing
    needs = ctx.needs_input_grad[:2]
    weight = ctx.saved_tensors[1]
    dx, dweight = _gradients_op(*ctx.saved_tensors, grad, 0, weight.shape[0], *ctx.scalars, *needs)
    return dx if needs[0] else None, dweight.to(weight.dtype) if needs[1] else None, *nothing


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, dx, dweight = output
    ctx.mark_non_differentiable(dx, dweight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx, dweight)
    ctx.dtype = inputs[1].dtype


def _backward_of_sum(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * 8
    if grad is None:
        return None, None, *nothing
    dx, dweight = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    dx = (dx.to(grad.dtype) * grad).to(dx.dtype) if needs_x else None  # bf16 would round the factor for all tokens alike
    if not needs_weight:
        return dx, None, *nothing
    return dx, torch.mul(dweight, grad, out=dweight.new_empty(dweight.shape, dtype=ctx.dtype)), *nothing


_losses_op.register_autograd(_backward_of_losses, setup_context=_keep_statistics)
_sum_op.register_autograd(_backward_of_sum, setup_context=_keep_gradients)
