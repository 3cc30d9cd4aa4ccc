"""Cross entropy per token: loss = logsumexp(logits) - logits[label]; a label of -100 does not count."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.dispatch import implementation, register

IGNORE = -100


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses of single tokens in nats, fp32 (T,); 0 where the label is -100. logits (T, V), labels (T,) int64."""
    return implementation("cross_entropy")(logits, labels)


def cross_entropy_reference(logits: Tensor, labels: Tensor) -> Tensor:
    """The formula, in fp32."""
    x = logits.float()
    counted = labels != IGNORE
    picked = x.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (torch.logsumexp(x, dim=-1) - picked) * counted


def _cross_entropy_torch(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")


register("cross_entropy", "torch", _cross_entropy_torch)
