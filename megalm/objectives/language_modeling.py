"""Causal language modelling: predict the next token."""

from __future__ import annotations

from torch import Tensor

from megalm.objectives.cross_entropy import token_losses
from megalm.parallel.topology import Group
from megalm_kernels.cross_entropy import IGNORE


def causal_loss(logits: Tensor, labels: Tensor, group: Group, vocab_size: int) -> Tensor:
    """Sum of the losses of the tokens that count, in nats. logits (B, S, V / size), labels (B, S) int64, -100 = not counted.

    `vocab_size`: V without the columns that pad the last rank's part.
    """
    return token_losses(logits.flatten(0, 1), labels.flatten(), group, vocab_size).sum()


def count_tokens(labels: Tensor) -> Tensor:
    """How many tokens count, int64 scalar."""
    return (labels != IGNORE).sum()
