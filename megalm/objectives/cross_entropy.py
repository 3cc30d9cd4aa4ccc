"""Cross entropy per token where the vocabulary is split over the tensor parallel ranks; alone, or with the head before it.

One of the two places where a model's mathematics needs a process group: softmax sums over the whole vocabulary, and
gathering the logits (B S V) would cost more than the rest of the layer. Two small all-reduces instead: the maximum (T,),
then the label's logit and the sum of exponentials together (2, T) (Shoeybi et al. 2019, section 3).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.collectives import all_reduce
from megalm.parallel.topology import Group
from megalm_kernels import cross_entropy, linear_cross_entropy
from megalm_kernels.cross_entropy import IGNORE, Statistics, cross_entropy_gradient, cross_entropy_statistics
from megalm_kernels.linear_cross_entropy import linear_cross_entropy_gradient, linear_cross_entropy_statistics


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
        ctx.columns = dict(first=group.rank * logits.shape[-1], vocab_size=vocab_size)
        here = cross_entropy_statistics(logits, labels, **ctx.columns)
        largest, total, target = _of_whole_vocabulary(here, group)
        if here.exponentials is None:
            ctx.save_for_backward(logits, None, labels, largest, total)
        else:
            ctx.save_for_backward(here.exponentials, here.largest, labels, largest, total)
        ctx.dtype = logits.dtype
        return _losses(largest, total, target, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """d loss / d logit = softmax - 1 at the label."""
        logits, anchor, labels, largest, total = ctx.saved_tensors
        gradient = cross_entropy_gradient(logits, labels, largest, total, grad, **ctx.columns, anchor=anchor, inplace=True)
        return gradient.to(ctx.dtype), None, None, None


class _VocabParallelLinearCrossEntropy(torch.autograd.Function):
    """The same of x W^T, whose logits never exist all at once: the backward makes them again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
        ctx.columns = dict(first=group.rank * weight.shape[0], vocab_size=vocab_size)
        here = linear_cross_entropy_statistics(x, weight, labels, **ctx.columns)
        largest, total, target = _of_whole_vocabulary(here, group)
        ctx.save_for_backward(x, weight, labels, largest, total)
        return _losses(largest, total, target, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """dx is this rank's part: as of any layer that splits its outputs, the norm before it sums the parts."""
        x, weight, labels, largest, total = ctx.saved_tensors
        dx, dweight = linear_cross_entropy_gradient(x, weight, labels, largest, total, grad.contiguous(), **ctx.columns)
        return dx, dweight.to(weight.dtype), None, None, None


def _of_whole_vocabulary(here: Statistics, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """largest, total and target, (T,) each, from those of each rank's columns."""
    largest = all_reduce(here.largest.clone(), group, dist.ReduceOp.MAX)
    sums = torch.stack((here.target, here.total * torch.exp(here.largest - largest)))  # both in one all-reduce
    target, total = all_reduce(sums, group)
    return largest, total, target


def _losses(largest: Tensor, total: Tensor, target: Tensor, labels: Tensor) -> Tensor:
    return (total.log() + (largest - target)).where(labels != IGNORE, 0.0)


def head_loss(x: Tensor, weight: Tensor, labels: Tensor, group: Group, vocab_size: int, keep_gradients: bool = False) -> Tensor:
    """The sum of `token_losses(x @ weight.T, labels, group, vocab_size)`, whose logits never exist all at once.

    x (T, E) and labels (T,) int64, the same on all ranks of the group; weight (V / size rounded up, E): this rank's rows.
    keep_gradients: in a group of one, make the gradients in the forward, where the logits are, and keep them for the backward:
    T E + V E numbers, and a quarter of the operations saved. They are made for a gradient of 1, so not for fp16.
    """
    if group.size > 1:
        return _VocabParallelLinearCrossEntropy.apply(x, weight, labels, group, vocab_size).sum()
    if keep_gradients:
        return linear_cross_entropy(x, weight, labels, reduction="sum")
    return linear_cross_entropy(x, weight, labels).sum()


def token_losses(logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Losses of single tokens in nats, fp32 (T,); 0 for a label of -100.

    logits (T, V / size rounded up): this rank's columns of the vocabulary, of which those from `vocab_size` on are padding;
    labels (T,) int64, the same on all ranks of the group. The backward may put the gradient where the logits are: nobody else
    reads what a head computes, and a second copy would be the largest tensor of the step.
    """
    if group.size == 1:
        return cross_entropy(logits, labels, inplace=True)
    return _VocabParallelCrossEntropy.apply(logits, labels, group, vocab_size)
