"""The memory meter finds the peak of a program whose every tensor is known, to the byte, and says what it consists of."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F

from megalm.parallel.memory_meter import Alive, MemoryMeter
from megalm_kernels import linear_cross_entropy

KIB = 256  # fp32 numbers in one


def metered() -> MemoryMeter:
    gc.collect()  # what other tests left must not go in between
    meter = MemoryMeter()
    meter.start()
    return meter


def test_a_program_by_hand() -> None:
    """8 KiB beside 2, of which 4 go; then 1 more. Views and results written into a tensor are no memory of their own."""
    x = torch.ones(2 * KIB)
    meter = metered()
    before = meter.now
    a = x.repeat(2)  # 4 KiB
    b = a + 1  # 4 KiB more: the peak
    assert meter.now - before == 8192
    b.view(2, -1).t().mul_(2)
    del a
    c = x[:KIB] * 2  # 1 KiB
    assert meter.now - before == 5120
    meter.stop()
    assert (meter.peak - before, meter.before) == (8192, before)
    del b, c
    assert meter.now - before == 5120, "what goes after its end is not counted"


def test_what_was_there_before_counts_and_may_go() -> None:
    old = torch.ones(100 * KIB)
    meter = metered()
    assert meter.before == meter.now >= 102_400
    del old
    new = torch.ones(10 * KIB)
    meter.stop()
    assert meter.now - meter.before == new.nbytes - 102_400
    assert meter.peak == meter.before


def test_a_backward_by_hand() -> None:
    """w x: the result for exp's backward, then the gradients of it and, beside it, those of w."""
    w, x = torch.zeros(KIB, requires_grad=True), torch.ones(64, KIB)
    meter = metered()
    before = meter.now
    y = (w * x).exp()
    assert meter.now - before == 65_536, "the product is gone: exp keeps its own result"
    y.backward(x)
    meter.stop()
    # y; the gradient of the product; that with x, and its sum over the rows.
    assert meter.peak - before == 3 * 65_536 + 1024
    assert w.grad is not None
    made = [one for one in meter.made if one.operator == "sum"]
    assert [one.in_backward for one in made] == [True] and made[0].what == "sum in the backward (1, 256) float32"


def test_alive_is_the_peak() -> None:
    """Of one kind together, the largest first; their sizes make up the peak."""
    meter = metered()
    kept = [torch.zeros(KIB) for _ in range(3)]
    kept.append(torch.zeros(8, KIB))
    lost = torch.zeros(16, KIB)
    del lost
    last = torch.zeros(17, KIB)
    meter.stop()
    alive = meter.alive()
    zeros = [one for one in alive if one.what.startswith("zeros")]
    assert zeros == [Alive("zeros (17, 256) float32", 1, 17 * 1024), Alive("zeros (8, 256) float32", 1, 8192),
                     Alive("zeros (256,) float32", 3, 3072)]  # fmt: skip
    assert sum(one.size for one in alive) == meter.peak
    assert len(kept) == 4 and last.numel()


def test_our_own_operators_are_seen_inside() -> None:
    """The fused loss makes logits for 64 of 128 tokens at a time, which are gone when it returns 4 bytes per token."""
    x, weight, labels = torch.ones(128, 16), torch.ones(1000, 16), torch.zeros(128, dtype=torch.long)
    meter = metered()
    losses = linear_cross_entropy(x, weight, labels, chunk=64)
    meter.stop()
    assert losses.nbytes == 512 and meter.now - meter.before < 4 * losses.nbytes
    assert meter.peak - meter.before > 64 * 1000 * 4


def test_a_meter_that_was_never_started_knows_nothing() -> None:
    meter = MemoryMeter()
    assert (meter.peak, meter.before, meter.now, meter.alive()) == (0, 0, 0, [])


@pytest.mark.parametrize("size", [1, 1000])
def test_a_reused_address_is_a_new_tensor(size: int) -> None:
    meter = metered()
    before = meter.now
    for _ in range(50):
        x = F.relu(torch.zeros(size))
        del x
    meter.stop()
    assert meter.now == before
    assert meter.peak - before == 2 * 4 * size
