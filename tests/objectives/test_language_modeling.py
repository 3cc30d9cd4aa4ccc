"""The causal loss is a sum over the tokens that count, so that any split of the batch gives the same gradient."""

from __future__ import annotations

import pytest
import torch

from megalm.objectives.language_modeling import causal_loss, count_tokens
from megalm.parallel.topology import Group

ALONE = Group((0,), 0)


def test_sum_over_counted_tokens() -> None:
    logits, labels = torch.randn(2, 5, 11), torch.randint(11, (2, 5))
    labels[0, 1] = labels[1, 4] = -100
    probabilities = logits.softmax(-1)
    by_hand = [-probabilities[b, s, labels[b, s]].log() for b in range(2) for s in range(5) if labels[b, s] >= 0]
    torch.testing.assert_close(causal_loss(logits, labels, ALONE, 11), torch.stack(by_hand).sum())
    assert count_tokens(labels) == 8 == len(by_hand)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_any_split_of_the_batch_gives_the_same_loss_and_gradient(cut: int) -> None:
    logits, labels = torch.randn(4, 6, 11, requires_grad=True), torch.randint(11, (4, 6))
    labels[0] = -100  # the parts count different numbers of tokens
    labels[2, ::2] = -100
    whole = causal_loss(logits, labels, ALONE, 11) / count_tokens(labels)
    parts = [(logits[rows], labels[rows]) for rows in (slice(0, cut), slice(cut, 4))]
    split = torch.stack([causal_loss(x, y, ALONE, 11) / count_tokens(labels) for x, y in parts]).sum()
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (split, whole)))


def test_no_token_counts() -> None:
    labels = torch.full((1, 3), -100)
    assert count_tokens(labels) == 0
    assert causal_loss(torch.randn(1, 3, 7), labels, ALONE, 7) == 0
