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
from megalm_kernels.cross_entropy import IGNORE


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
        x = logits.float()
        start, length = group.rank * x.shape[-1], x.shape[-1]
        if start + length > vocab_size:  # columns that only fill this rank's part up
            columns = torch.arange(start, start + length, device=x.device)
            x = x.masked_fill(columns >= vocab_size, -torch.inf)
        largest = all_reduce(x.max(dim=-1).values, group, dist.ReduceOp.MAX)
        x = x - largest.unsqueeze(-1)
        elsewhere = (labels < start) | (labels >= start + length)
        column = (labels - start).masked_fill(elsewhere, 0)
        picked = x.gather(-1, column.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0.0)
        exponentials = x.exp_()  # x is ours: the subtraction made it
        sums = torch.stack((picked, exponentials.sum(-1)))  # both in one all-reduce
        picked, total = all_reduce(sums, group)
        counted = labels != IGNORE
        ctx.save_for_backward(exponentials.div_(total.unsqueeze(-1)), column, elsewhere, counted)
        ctx.dtype = logits.dtype
        return (total.log() - picked) * counted

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """d loss / d logit = softmax - 1 at the label."""
        softmax, column, elsewhere, counted = ctx.saved_tensors
        here = (~elsewhere).to(softmax.dtype).unsqueeze(-1)
        gradient = softmax.scatter_add_(-1, column.unsqueeze(-1), -here)  # in place: there is one backward per forward
        return gradient.mul_((grad * counted).unsqueeze(-1)).to(ctx.dtype), None, None, None


def token_losses(logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Losses of single tokens in nats, fp32 (T,); 0 for a label of -100.

    logits (T, V / size rounded up): this rank's columns of the vocabulary, of which those from `vocab_size` on are padding;
    labels (T,) int64, the same on all ranks of the group.
    """
    if group.size == 1:
        return cross_entropy(logits, labels)
    return _VocabParallelCrossEntropy.apply(logits, labels, group, vocab_size)
