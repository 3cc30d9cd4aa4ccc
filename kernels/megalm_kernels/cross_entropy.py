"""Cross entropy per token, over a whole vocabulary or one rank's part of it.

    x'       = c tanh(x / c) with a softcap c (Gemma 2: 30), else x
    lse      = log sum_v exp(x'_v)
    loss     = (1 - s) (lse - x'_label) + s mean_v (lse - x'_v) + z lse^2
    dx_v     = (p_v (1 + 2 z lse) - (1 - s) [v = label] - s / V) (1 - tanh^2(x_v / c)) grad,   p_v = exp(x'_v - lse)

s: label_smoothing (Szegedy et al. 2016); z: z_loss (PaLM, Chowdhery et al. 2022, section 5). All of it is fp32. A token whose
label is `ignore_index` has loss 0 and gradient 0; the kernels do not even read its logits, so they may be anything, while
torch's operators give NaN in the gradient of such a row that holds NaN.

A label outside 0..V-1: ValueError where labels are on the CPU. A GPU cannot tell without being waited for: the kernels make
the loss and the gradient of that token NaN, torch's operators stop the process ("device-side assert").
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from megalm_kernels.arguments import (
    check_device,
    check_dtype,
    check_kernel_dtype,
    check_not_negative,
    check_probability,
    check_shape,
    refuse,
)
from megalm_kernels.dispatch import implementation, kernel_op, register, triton_obstacle

IGNORE = -100


class Statistics(NamedTuple):
    """What one part of a vocabulary knows about each token, fp32 (T,). Of an ignored token it may be anything finite.

    total = sum exp(x - largest), over this part; target: the label's logit, 0 if it is in another part; logit_sum: of this
    part, empty unless asked for; exponentials: exp(x - largest) (T, columns) where the implementation had to keep them
    anyway, for `cross_entropy_gradient`, else None.
    """

    largest: Tensor
    total: Tensor
    target: Tensor
    logit_sum: Tensor
    exponentials: Tensor | None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
    softcap: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """Losses of single tokens in nats, fp32 (T,); 0 where the label is `ignore_index`. logits (T, V), labels (T,) int64.

    inplace: the backward may put the gradient where the logits are, which are gone then (the kernels do, if a row's columns
    are next to each other). Never without. Raises ValueError for wrong shapes, dtypes, devices or labels.
    """
    _check("cross_entropy", logits, labels, logits.shape[-1], ignore_index, label_smoothing, z_loss, softcap)
    return implementation("cross_entropy")(logits, labels, label_smoothing, z_loss, ignore_index, softcap, inplace)


def cross_entropy_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    first: int = 0,
    vocab_size: int = 0,
    softcap: float = 0.0,
    ignore_index: int = IGNORE,
    with_sum: bool = False,
) -> Statistics:
    """What the ranks of a split vocabulary reduce: largest by its maximum, then the rest by sums, total times
    exp(largest here - largest of all) beforehand. Then loss = log(total) + largest - target.

    logits (T, columns): the columns from `first` on of a vocabulary of `vocab_size` (0: it ends with these columns); columns
    from `vocab_size` on are padding and do not count. labels (T,) int64 of the whole vocabulary. Gives no gradient: that is
    `cross_entropy_gradient`.
    """
    vocab_size = vocab_size or first + logits.shape[-1]
    _check("cross_entropy_statistics", logits, labels, vocab_size, ignore_index, 0.0, 0.0, softcap)
    scalars = (first, vocab_size, softcap, ignore_index, with_sum)
    if _on_kernels():
        check_kernel_dtype("cross_entropy", "logits", logits)
        largest, total, target, logit_sum = _statistics_op(logits, labels, *scalars)
        return Statistics(largest, total, target, logit_sum, None)
    return statistics_torch(logits, labels, *scalars)


def cross_entropy_gradient(
    logits: Tensor,
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
    inplace: bool = False,
    anchor: Tensor | None = None,
) -> Tensor:
    """Gradient of the logits (T, columns), from the largest and total (T,) of the whole vocabulary: lse = largest + log(total).

    The two stay apart since their sum in fp32 would be off by 1e-3 where logits are 1e4. grad (T,): of the losses.
    anchor: then `logits` holds exp(logits - anchor) instead, as `Statistics.exponentials` with `Statistics.largest` does.
    inplace: written over `logits`.
    """
    vocab_size = vocab_size or first + logits.shape[-1]
    operation = "cross_entropy_gradient"
    _check(operation, logits, labels, vocab_size, ignore_index, label_smoothing, z_loss, softcap)
    for name, x in (("largest", largest), ("total", total), ("grad", grad)):
        check_shape(operation, name, x, labels.shape)
    if anchor is not None and softcap:
        raise refuse(operation, "softcap", softcap, "0 with exponentials, which do not tell the slope of tanh")
    scalars = (first, vocab_size, label_smoothing, z_loss, ignore_index, softcap)
    if anchor is not None or not _on_kernels():
        return gradient_torch(logits, labels, largest, total, grad, *scalars, inplace, anchor)
    check_kernel_dtype("cross_entropy", "logits", logits)
    return _gradient_on_kernels(logits, labels, largest, total, grad, *scalars, inplace)


def losses_with_statistics(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, and the largest and total that their gradient needs, (T,). For who checks arguments and has a backward itself."""
    if _on_kernels():
        check_kernel_dtype("cross_entropy", "logits", logits)
        return _losses_op(logits, labels, label_smoothing, z_loss, ignore_index, softcap, False)
    return losses_torch(logits, labels, label_smoothing, z_loss, ignore_index, softcap)


def _on_kernels() -> bool:
    """The parts of a vocabulary go the way of the whole one."""
    return implementation("cross_entropy") is _cross_entropy_triton


def _check(
    operation: str,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> None:
    if logits.dim() != 2:
        raise refuse(operation, "the shape of logits", tuple(logits.shape), "(tokens, vocabulary)")
    check_dtype(operation, "logits", logits)
    check_labels(operation, labels, logits, vocab_size, ignore_index)
    check_features(operation, label_smoothing, z_loss, softcap)


def check_features(operation: str, label_smoothing: float, z_loss: float, softcap: float) -> None:
    """Raises ValueError unless 0 <= label_smoothing < 1 and the others are at least 0."""
    check_probability(operation, "label_smoothing", label_smoothing)
    check_not_negative(operation, "z_loss", z_loss)
    check_not_negative(operation, "softcap", softcap)


def check_labels(operation: str, labels: Tensor, rows: Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises ValueError unless labels (T,) fit rows (T, ...) and, where looking is free, name columns of the vocabulary."""
    check_shape(operation, "labels", labels, rows.shape[:1])
    check_dtype(operation, "labels", labels, (torch.int64,))
    check_device(operation, "labels", labels, rows)
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(labels, FakeTensor):
        return
    wrong = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if wrong.any():
        allowed = f"0 to {vocab_size - 1}, or {ignore_index} for a token that does not count"
        raise refuse(operation, "a label", int(labels[wrong][0]), allowed)


# Plain torch: the formula, and what runs without kernels.


def cross_entropy_reference(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = IGNORE,
    softcap: float = 0.0,
) -> Tensor:
    """The formula, in fp32 (of fp64 logits in fp64)."""
    x = _wide(logits, softcap)
    counted = labels != ignore_index
    lse = torch.logsumexp(x, dim=-1)
    picked = x.gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
    loss = (1 - label_smoothing) * (lse - picked) + z_loss * lse.square()
    if label_smoothing:
        loss = loss + label_smoothing * (lse - x.mean(-1))
    return loss.where(counted, 0.0)


def _wide(logits: Tensor, softcap: float) -> Tensor:
    """The logits in fp32, capped."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    return softcap * torch.tanh(x / softcap) if softcap else x


def _cross_entropy_torch(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, softcap: float, inplace: bool
) -> Tensor:
    x = _wide(logits, softcap)
    losses = F.cross_entropy(x, labels, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    if z_loss:
        losses = losses + z_loss * torch.logsumexp(x, dim=-1).square().where(labels != ignore_index, 0.0)
    return losses


def statistics_torch(
    logits: Tensor, labels: Tensor, first: int, vocab_size: int, softcap: float, ignore_index: int, with_sum: bool
) -> Statistics:
    """`cross_entropy_statistics` with torch's operators, which write the exponentials down to add them up."""
    x, columns = _wide(logits.detach(), softcap), logits.shape[-1]
    ours = bool(softcap) or x.dtype != logits.dtype
    logit_sum = x[:, : max(0, vocab_size - first)].sum(-1) if with_sum else x.new_empty(0)
    if first + columns > vocab_size:  # columns that only fill this part up
        x, ours = x.masked_fill(_padding(x, first, vocab_size), -torch.inf), True
    largest = x.amax(-1)
    column, elsewhere = _column(labels, first, columns)
    target = x.gather(-1, column).squeeze(-1).masked_fill(elsewhere, 0.0)
    target = target.masked_fill(((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index), torch.nan)
    anchor = largest.masked_fill(largest == -torch.inf, 0.0).unsqueeze(-1)  # -inf minus itself would be NaN
    exponentials = (x.sub_(anchor) if ours else x - anchor).exp_()
    return Statistics(largest, exponentials.sum(-1), target, logit_sum, None if softcap else exponentials)


def losses_torch(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`losses_with_statistics` with torch's operators."""
    columns = logits.shape[-1]
    found = statistics_torch(logits, labels, 0, columns, softcap, ignore_index, bool(label_smoothing))
    log_total = found.total.log()
    losses = log_total + (found.largest - found.target)
    if z_loss:
        losses = losses + z_loss * (found.largest + log_total).square()
    if label_smoothing:
        losses = losses + label_smoothing * (found.target - found.logit_sum / columns)
    return losses.where(labels != ignore_index, 0.0), found.largest, found.total


def gradient_torch(
    logits: Tensor,
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
    inplace: bool = False,
    anchor: Tensor | None = None,
) -> Tensor:
    """`cross_entropy_gradient` with torch's operators."""
    counted, columns = labels != ignore_index, logits.shape[-1]
    grad = grad.to(largest.dtype).where(counted, 0.0)
    scale = grad * (1 + 2 * z_loss * (largest + total.log())) / total if z_loss else grad / total
    x = _wide(logits, softcap)
    ours = inplace or bool(softcap) or x.dtype != logits.dtype
    slope = 1 - (x / softcap).square() if softcap else None
    if anchor is None:
        p = (x.sub_(largest.unsqueeze(-1)) if ours else x - largest.unsqueeze(-1)).exp_()
    else:
        p, scale = x if ours else x.clone(), scale * torch.exp(anchor - largest)
    p.mul_(scale.unsqueeze(-1))
    column, elsewhere = _column(labels, first, columns)
    p.scatter_add_(-1, column, (grad * (label_smoothing - 1)).masked_fill(elsewhere, 0.0).unsqueeze(-1))
    if label_smoothing:
        p.sub_((grad * (label_smoothing / vocab_size)).unsqueeze(-1))
    if slope is not None:
        p.mul_(slope)
    if first + columns > vocab_size:
        p.masked_fill_(_padding(p, first, vocab_size), 0.0)
    if p.dtype == logits.dtype and not (inplace and softcap):
        return p
    return logits.copy_(p) if inplace else p.to(logits.dtype)


def _column(labels: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """The label's column (T, 1), 0 where it is not among these, and where it is not (T,)."""
    elsewhere = (labels < first) | (labels >= first + columns)
    return (labels - first).masked_fill(elsewhere, 0).unsqueeze(-1), elsewhere


def _padding(x: Tensor, first: int, vocab_size: int) -> Tensor:
    return torch.arange(first, first + x.shape[-1], device=x.device) >= vocab_size


# Operators on the kernels


@kernel_op("cross_entropy_statistics", "cross_entropy:statistics")
def _statistics_op(
    logits: Tensor, labels: Tensor, first: int, vocab_size: int, softcap: float, ignore_index: int, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = statistics_torch(logits, labels, first, vocab_size, softcap, ignore_index, with_sum)
    ignored = labels == ignore_index
    largest, target = (x.masked_fill(ignored, 0.0) for x in (found.largest, found.target))
    logit_sum = found.logit_sum.masked_fill(ignored, 0.0) if with_sum else found.logit_sum
    return largest, found.total.masked_fill(ignored, 1.0), target, logit_sum


@_statistics_op.register_fake
def _(logits: Tensor, labels: Tensor, *scalars: Any) -> tuple[Tensor, ...]:
    largest, total, target = (logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(3))
    return largest, total, target, logits.new_empty(labels.shape[0] if scalars[-1] else 0, dtype=torch.float32)


@kernel_op("cross_entropy", "cross_entropy:losses")
def _losses_op(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, softcap: float, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return losses_torch(logits, labels, label_smoothing, z_loss, ignore_index, softcap)


@_losses_op.register_fake
def _(logits: Tensor, labels: Tensor, *scalars: Any) -> tuple[Tensor, ...]:
    return tuple(logits.new_empty(labels.shape, dtype=torch.float32) for _ in range(3))


@kernel_op("cross_entropy_gradient", "cross_entropy:gradient")
def _gradient_op(
    logits: Tensor,
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
) -> Tensor:
    scalars = (first, vocab_size, label_smoothing, z_loss, ignore_index, softcap)
    found = gradient_torch(logits, labels, largest, total, grad, *scalars).contiguous()
    return found.masked_fill_((labels == ignore_index).unsqueeze(-1), 0.0)


@_gradient_op.register_fake
def _(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@kernel_op("cross_entropy_gradient_inplace", "cross_entropy:gradient_inplace", mutates=("logits",))
def _gradient_inplace_op(
    logits: Tensor,
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
) -> None:
    scalars = (first, vocab_size, label_smoothing, z_loss, ignore_index, softcap)
    found = gradient_torch(logits, labels, largest, total, grad, *scalars, inplace=True)
    found.masked_fill_((labels == ignore_index).unsqueeze(-1), 0.0)


@_gradient_inplace_op.register_fake
def _(*args: Any) -> None:
    pass


def _gradient_on_kernels(logits: Tensor, *args: Any) -> Tensor:
    """args: those of the operator, and `inplace`."""
    *args_of_op, inplace = args
    if not inplace or (logits.stride(-1) != 1 and logits.shape[-1] > 1):  # such rows would be copied first
        return _gradient_op(logits, *args_of_op)
    _gradient_inplace_op(logits, *args_of_op)
    return logits


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, *ctx.scalars = inputs
    _, largest, total = output
    ctx.mark_non_differentiable(largest, total)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, largest, total)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    logits, labels, largest, total = ctx.saved_tensors
    label_smoothing, z_loss, ignore_index, softcap, inplace = ctx.scalars
    scalars = (0, logits.shape[-1], label_smoothing, z_loss, ignore_index, softcap)
    return _gradient_on_kernels(logits, labels, largest, total, grad, *scalars, inplace), *(None,) * 6


_losses_op.register_autograd(_backward, setup_context=_keep)


def _cross_entropy_triton(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, softcap: float, inplace: bool
) -> Tensor:
    check_kernel_dtype("cross_entropy", "logits", logits)
    return _losses_op(logits, labels, label_smoothing, z_loss, ignore_index, softcap, inplace)[0]


register("cross_entropy", "torch", _cross_entropy_torch)
register("cross_entropy", "triton", _cross_entropy_triton, triton_obstacle)
