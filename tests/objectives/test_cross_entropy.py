"""The vocabulary split over ranks gives the loss and the gradients of the whole vocabulary on one rank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalm.objectives.cross_entropy import token_losses
from megalm.parallel.topology import Group
from megalm.testing import run_distributed

T, V = 23, 48


def case(name: str) -> tuple[Tensor, Tensor]:
    """Logits (T, V) and labels (T,), of which every seventh is not counted."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(T, V, generator=generator)
    labels = torch.randint(V, (T,), generator=generator)
    labels[:V] = torch.arange(V)[:T] * 2 % V  # every rank holds some
    labels[::7] = -100
    if name == "huge":
        logits = logits * 3e4
    elif name == "far from zero":
        logits = logits + torch.linspace(-1e4, 1e4, T)[:, None]
    elif name == "one rank holds all the mass":
        logits[:, : V // 4] += 200
    elif name == "a logit of minus infinity":
        logits[torch.arange(T), (labels.clamp(min=0) + 1) % V] = -torch.inf
    elif name == "all ignored":
        labels[:] = -100
    elif name == "bf16":
        logits = logits.bfloat16()
    return logits, labels


CASES = [
    "plain", "huge", "far from zero", "one rank holds all the mass", "a logit of minus infinity", "all ignored", "bf16",
]  # fmt: skip


def losses_and_gradient(logits: Tensor, labels: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    x = logits.clone().requires_grad_()
    losses = token_losses(x, labels, group, V)
    (losses * torch.linspace(0.5, 2, T)).sum().backward()
    assert x.grad is not None
    return losses.detach(), x.grad


def on_one_rank(rank: int, world_size: int) -> dict[str, tuple]:
    group = Group(tuple(range(world_size)), rank)
    found = {}
    for name in CASES:
        logits, labels = case(name)
        part = logits.chunk(world_size, -1)[rank].contiguous()
        losses, gradient = losses_and_gradient(part, labels, group)
        found[name] = losses.tolist(), gradient.float().tolist(), str(losses.dtype), str(gradient.dtype)
    return found


@pytest.fixture(scope="module", params=[2, 4])
def by_rank(request: pytest.FixtureRequest) -> list[dict[str, tuple]]:
    return run_distributed(on_one_rank, request.param)


def expected(name: str) -> tuple[Tensor, Tensor]:
    logits, labels = case(name)
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, labels, ignore_index=-100, reduction="none")
    (losses * torch.linspace(0.5, 2, T)).sum().backward()
    assert x.grad is not None
    return losses.detach(), x.grad


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_split_vocabulary_equals_cross_entropy(name: str, by_rank: list[dict[str, tuple]]) -> None:
    losses, gradient = expected(name)
    joined = torch.cat([torch.tensor(found[name][1]) for found in by_rank], -1)
    tolerance = 4e-3 if name == "bf16" else 1e-6  # bf16 keeps 8 bits of the gradient
    torch.testing.assert_close(joined.double(), gradient, rtol=tolerance, atol=tolerance)
    for found in by_rank:
        mine = torch.tensor(found[name][0])
        assert mine.tolist() == by_rank[0][name][0], "every rank has the same losses, to the bit"
        torch.testing.assert_close(mine.double(), losses, rtol=1e-6, atol=2e-6 if name != "far from zero" else 2e-3)
        assert found[name][2] == "torch.float32"
        assert found[name][3] == ("torch.bfloat16" if name == "bf16" else "torch.float32")


@pytest.mark.parametrize("name", CASES)
def test_whole_vocabulary_equals_cross_entropy(name: str) -> None:
    logits, labels = case(name)
    losses, gradient = losses_and_gradient(logits, labels, Group((0,), 0))
    reference, reference_gradient = expected(name)
    torch.testing.assert_close(losses.double(), reference, rtol=1e-6, atol=2e-6 if name != "far from zero" else 2e-3)
    tolerance = 4e-3 if name == "bf16" else 1e-6
    torch.testing.assert_close(gradient.double(), reference_gradient, rtol=tolerance, atol=tolerance)
    assert losses.dtype == torch.float32 and gradient.dtype == logits.dtype
    assert not losses[labels == -100].any() and not gradient[labels == -100].any()


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    losses = token_losses(torch.full((3, V), 7.0), torch.tensor([0, 5, V - 1]), Group((0,), 0), V)
    torch.testing.assert_close(losses, torch.full((3,), math.log(V)))


def leave_logits(rank: int, world_size: int) -> bool:
    logits, labels = case("plain")
    part = logits.chunk(world_size, -1)[rank].contiguous()
    before = part.clone()
    losses_and_gradient(part, labels, Group((0, 1), rank))
    return torch.equal(part, before)


@pytest.mark.dist
def test_the_callers_logits_are_left_alone() -> None:
    assert run_distributed(leave_logits, 2) == [True, True]
