"""The cross entropy kernels: every feature, rows of one block and of many, parts of a vocabulary, in place, odd values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch
from megalm_kernels.cross_entropy import IGNORE, cross_entropy, cross_entropy_gradient, cross_entropy_statistics
from megalm_kernels.device import cross_entropy as on_device
from tests.kernels.device import far_memory

ALL = dict(label_smoothing=0.1, z_loss=0.02, softcap=3.0)
FEATURES = [{}, dict(label_smoothing=0.1), dict(z_loss=0.02), dict(softcap=3.0), ALL]


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("triton", device.type):
        yield


def formula(x: Tensor, labels: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0) -> Tensor:
    """In x's dtype, by logarithms of probabilities."""
    x = softcap * torch.tanh(x / softcap) if softcap else x
    log_p = torch.log_softmax(x, -1)
    loss = -(1 - label_smoothing) * log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * log_p.mean(-1)
    return (loss + z_loss * torch.logsumexp(x, -1) ** 2).masked_fill(labels == IGNORE, 0.0)


def case(rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Logits of a trained model's spread, labels of which the second of three is ignored; the last column is one."""
    generator = torch.Generator().manual_seed(rows + columns)
    logits = 3 * torch.randn(rows, columns, generator=generator)
    logits[0, 0] += 9  # the largest in the first block, and in the last
    logits[-1, -1] += 9
    labels = torch.randint(columns, (rows,), generator=generator)
    labels[-1] = columns - 1
    labels[1::3] = IGNORE
    return logits.to(device, dtype), labels.to(device)


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (11, 48), (4, 9001)])  # one block; a few programs for one row
@pytest.mark.parametrize("features", FEATURES, ids=lambda features: "+".join(features) or "plain")
def test_losses_and_gradient(rows, columns, features, device, dtype, judge):
    logits, labels = case(rows, columns, device, dtype)
    ours = lambda x: cross_entropy(x, labels, **features)  # noqa: E731
    judge(ours, lambda x: formula(x, labels, **features), [logits])


def test_more_rows_than_one_program_merges_and_wide_rows_of_one_program(device, judge, monkeypatch):
    monkeypatch.setattr(on_device, "MERGED_ROWS", 4)
    for rows, columns in ((9, 3), (7, 8200)):
        logits, labels = case(rows, columns, device)
        judge(lambda x: cross_entropy(x, labels, **ALL), lambda x: formula(x, labels, **ALL), [logits])  # noqa: B023


@pytest.mark.parametrize("layout", ["rows", "wider rows", "columns"])
def test_in_place_and_layouts_without_a_copy_of_the_rows(layout, device, dtype, judge):
    logits, labels = case(5, 48, device, dtype)
    written = []

    def ours(x: Tensor) -> Tensor:
        y = torch.cat((x, x), 1) * 1
        y = {"rows": x * 1, "wider rows": y[:, :48], "columns": x.t().contiguous().t()}[layout]
        if layout == "wider rows":
            assert not y.is_contiguous()
        written.append((y, y.detach().clone()))
        return cross_entropy(y, labels, inplace=layout != "wider rows", z_loss=0.1)

    judge(ours, lambda x: formula(x, labels, z_loss=0.1), [logits])
    for y, before in written:
        assert torch.equal(y.detach(), before) == (layout != "rows"), "in place where asked for and possible, and nowhere else"


def test_in_place_writes_its_own_columns_only(device):
    logits, labels = case(5, 48, device)
    memory = torch.cat((logits, logits), 1)
    gradient = cross_entropy_gradient(
        memory[:, :48], labels, *cross_entropy_statistics(memory[:, :48], labels)[:2], torch.ones(5, device=device), inplace=True
    )
    assert gradient.data_ptr() == memory.data_ptr() and gradient.stride() == (96, 1)
    assert torch.equal(memory[:, 48:], logits) and not torch.equal(memory[:, :48], logits)


def in_parts(logits: Tensor, labels: Tensor, parts: list[Tensor], inplace: bool, vocab_size: int, **features: float):
    """What ranks would do: statistics of each part, reduced; losses; gradients."""
    smoothing, z_loss = features.get("label_smoothing", 0.0), features.get("z_loss", 0.0)
    softcap = features.get("softcap", 0.0)
    firsts = [sum(p.shape[1] for p in parts[:i]) for i in range(len(parts))]
    places = [dict(first=first, vocab_size=vocab_size, softcap=softcap) for first in firsts]
    found = [cross_entropy_statistics(x, labels, with_sum=True, **at) for x, at in zip(parts, places, strict=True)]
    largest = torch.stack([part.largest for part in found]).amax(0)
    total = sum(part.total * torch.exp(part.largest - largest) for part in found)
    target, logit_sum = sum(part.target for part in found), sum(part.logit_sum for part in found)
    lse = largest + total.log()
    losses = lse - (1 - smoothing) * target - smoothing * logit_sum / vocab_size + z_loss * lse**2
    losses = losses.where(labels != IGNORE, 0.0)
    grad = torch.linspace(0.5, 2, len(labels), device=labels.device)
    scalars = dict(label_smoothing=smoothing, z_loss=z_loss, inplace=inplace)
    gradients = [
        cross_entropy_gradient(x, labels, largest, total, grad, **at, **scalars) for x, at in zip(parts, places, strict=True)
    ]
    return losses, torch.cat(gradients, 1)


@pytest.mark.parametrize("features", [{}, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("inplace", [False, True])
def test_parts_of_a_vocabulary(features, inplace, device):
    """Three parts and one of padding only; the third ends in padding of anything."""
    logits, labels = case(7, 100, device)
    padded = torch.cat((logits, torch.full((7, 60), torch.nan, device=device)), 1)
    parts = [part.contiguous() for part in padded.split((40, 40, 40, 40), 1)]
    losses, gradient = in_parts(logits, labels, parts, inplace, 100, **features)
    x = logits.double().requires_grad_()
    wanted = formula(x, labels, **features)
    wanted.backward(torch.linspace(0.5, 2, 7, device=device).double())
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:, :100].double(), x.grad, rtol=2e-6, atol=1e-6)
    assert not gradient[:, 100:].any()
    assert all((torch.equal(a, b)) == inplace for a, b in zip(parts[:2], gradient.split((40, 40, 80), 1)[:2], strict=True))


def test_huge_logits_and_logits_of_minus_infinity(device, judge):
    logits, labels = case(9, 48, device)
    labels[:] = torch.arange(9) % 3  # every one counts
    far = logits + torch.linspace(-1e4, 1e4, 9, device=device)[:, None]
    spread = logits * 3e4
    cut = logits.masked_fill(torch.arange(48, device=device) % 5 == 4, -torch.inf)
    for x in (far, spread, cut):
        judge(lambda x: cross_entropy(x, labels), lambda x: formula(x, labels), [x])
    judge(lambda x: cross_entropy(x, labels, softcap=30.0), lambda x: formula(x, labels, softcap=30.0), [cut])


def test_an_ignored_row_may_hold_anything(device, dtype):
    logits, labels = case(6, 48, device, dtype)
    labels[:] = torch.tensor([3, IGNORE, IGNORE, 4, IGNORE, 5])
    logits[1], logits[2, 7], logits[4, :2] = torch.nan, torch.inf, torch.tensor([-torch.inf, torch.nan])
    x = logits.clone().requires_grad_()
    losses = cross_entropy(x, labels, **ALL)
    losses.backward(torch.full_like(losses, 2.0).masked_fill(labels == IGNORE, torch.nan))
    ignored = labels == IGNORE
    assert not losses[ignored].any() and not x.grad[ignored].any()
    assert torch.isfinite(losses).all() and torch.isfinite(x.grad).all() and (x.grad[~ignored] != 0).any(1).all()


def test_a_row_that_is_not_a_distribution_is_nan(device):
    """As torch's: all -inf, a NaN, +inf. And a label that no vocabulary has, which a GPU cannot raise an error for."""
    logits, _ = case(5, 48, device)
    logits[0], logits[1, 3], logits[2, 47] = -torch.inf, torch.nan, torch.inf
    labels = torch.tensor([1, 2, 3, 48, -7], device=device)
    scalars = (0.0, 0.0, IGNORE, 0.0)
    losses, largest, total = torch.ops.megalm.cross_entropy(logits, labels, *scalars, False)
    gradient = torch.ops.megalm.cross_entropy_gradient(logits, labels, largest, total, torch.ones_like(losses), 0, 48, *scalars)
    assert torch.isnan(losses).all() and torch.isnan(gradient).all(1).all()


def test_no_tokens(device):
    x = torch.zeros(0, 48, device=device, requires_grad=True)
    losses = cross_entropy(x, torch.zeros(0, dtype=torch.int64, device=device))
    losses.sum().backward()
    assert losses.shape == (0,) and x.grad.shape == (0, 48)


def beyond_int32(device: torch.device) -> None:
    """Rows so far apart that the last begins beyond 2^31 elements."""
    with dispatch.use("triton", device.type):
        x = far_memory.zeros(3 * 2**30 + 64, torch.bfloat16, device).as_strided((4, 48), (2**30, 1))
        logits, labels = case(4, 48, device, torch.bfloat16)
        labels[3] = 47
        x.copy_(logits)
        losses, largest, total = torch.ops.megalm.cross_entropy(x, labels, 0.0, 0.0, IGNORE, 0.0, False)
        want = formula(logits.double(), labels)
        torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
        ours = cross_entropy_gradient(x, labels, largest, total, torch.ones_like(losses), inplace=True)
        assert ours.data_ptr() == x.data_ptr()
        torch.testing.assert_close(ours, cross_entropy_gradient(logits, labels, largest, total, torch.ones_like(losses)))


def test_memory_beyond_int32(device):
    far_memory.run_far(__name__, "beyond_int32", device)
