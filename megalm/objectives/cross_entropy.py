"""Cross entropy per token where the vocabulary is split over the tensor parallel ranks.

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
from megalm_kernels import cross_entropy
from megalm_kernels.cross_entropy import IGNORE, cross_entropy_gradient, cross_entropy_statistics


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
        ctx.columns = dict(first=group.rank * logits.shape[-1], vocab_size=vocab_size)
        here = cross_entropy_statistics(logits, labels, **ctx.columns)
        largest = all_reduce(here.largest.clone(), group, dist.ReduceOp.MAX)
        sums = torch.stack((here.target, here.total * torch.exp(here.largest - largest)))  # both in one all-reduce
        target, total = all_reduce(sums, group)
        if here.exponentials is None:
            ctx.save_for_backward(logits, None, labels, largest, total)
        else:
            ctx.save_for_backward(here.exponentials, here.largest, labels, largest, total)
        ctx.dtype = logits.dtype
        return (total.log() + (largest - target)).where(labels != IGNORE, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """d loss / d logit = softmax - 1 at the label."""
        logits, anchor, labels, largest, total = ctx.saved_tensors
        gradient = cross_entropy_gradient(logits, labels, largest, total, grad, **ctx.columns, anchor=anchor, inplace=True)
        return gradient.to(ctx.dtype), None, None, None


def token_losses(logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Losses of single tokens in nats, fp32 (T,); 0 for a label of -100.

    logits (T, V / size rounded up): this rank's columns of the vocabulary, of which those from `vocab_size` on are padding;
    labels (T,) int64, the same on all ranks of the group. The backward may put the gradient where the logits are: nobody else
    reads what a head computes, and a second copy would be the largest tensor of the step.
    """
    if group.size == 1:
        return cross_entropy(logits, labels, inplace=True)
    return _VocabParallelCrossEntropy.apply(logits, labels, group, vocab_size)
