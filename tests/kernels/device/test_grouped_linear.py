"""The kernels of grouped linear layers: every shape of the groups, every layout of the memory, far addresses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm_kernels import dispatch, grouped_linear, grouped_linear_reference
from tests.kernels.device import far_memory


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("triton", device.type):
        yield


def starts_at(bounds: list[int], device: torch.device) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32, device=device)


# rows, features, outputs, starts. Blocks of rows have 64 or 128, of columns 128 or 256, and 64 features go by at a time.
CASES = {
    "odd sizes, empty groups at the ends and between, padding": (300, 70, 141, [0, 0, 129, 129, 290, 290]),
    "one group": (129, 64, 272, [0, 129]),
    "a group of one row": (5, 3, 7, [0, 1, 5]),
    "blocks that pass side by side and one beyond": (1300, 16, 264, [0, 640, 1290]),
    "groups of few rows": (40, 24, 130, [0, 3, 3, 17, 40, 40, 40]),
    "nothing but padding": (70, 8, 16, [0, 0, 0]),
}


@pytest.mark.parametrize("case", CASES)
def test_grouped_linear(case, device, dtype, judge):
    rows, features, outputs, bounds = CASES[case]
    x = torch.randn(rows, features, device=device, dtype=dtype)
    weight = torch.randn(len(bounds) - 1, outputs, features, device=device, dtype=dtype)
    starts = starts_at(bounds, device)
    judge(lambda x, w: grouped_linear(x, w, starts), lambda x, w: grouped_linear_reference(x, w, starts), [x, weight])


def test_of_more_groups_than_are_looked_at_together(device, monkeypatch):
    from megalm_kernels.device import grouped_linear as kernels

    x, weight = torch.randn(40, 8, device=device), torch.randn(6, 8, 8, device=device)
    starts = starts_at([0, 3, 3, 17, 30, 38, 38], device)
    want = grouped_linear(x, weight, starts)
    monkeypatch.setattr(kernels, "_SEARCHED", 2)
    assert torch.equal(grouped_linear(x, weight, starts), want)


def test_of_no_rows(device, dtype):
    x, weight = torch.randn(0, 8, device=device, dtype=dtype), torch.randn(2, 4, 8, device=device, dtype=dtype)
    y = grouped_linear(x.requires_grad_(), weight.requires_grad_(), starts_at([0, 0, 0], device))
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (y.shape, dx.shape) == ((0, 4), (0, 8)) and torch.equal(dweight, torch.zeros_like(weight))


def test_reads_any_strides(device, dtype):
    """And gradients of any strides: that of a sum has none at all."""
    fused, weight = torch.randn(20, 64, device=device, dtype=dtype), torch.randn(3, 24, 32, device=device, dtype=dtype)
    starts = starts_at([0, 7, 7, 18], device)
    views = {
        "in order": (fused[:, :32].contiguous(), weight),
        "a slice, columns apart": (fused[:, :32], weight.mT.contiguous().mT),
        "columns apart, every other matrix": (fused[:, :32].t().contiguous().t(), weight.repeat_interleave(2, 0)[::2]),
    }
    results = {}
    for name, inputs in views.items():
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = grouped_linear(*leaves, starts)
        results[name] = [y.detach(), *torch.autograd.grad(y.sum(), leaves)]
    for name, found in results.items():
        assert all(torch.equal(*pair) for pair in zip(found, results["in order"], strict=True)), name
    shifted = fused[:, 1:33]  # at addresses that no descriptor can have
    assert torch.equal(grouped_linear(shifted, weight, starts), grouped_linear(shifted.contiguous(), weight, starts))


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy's, of inf - inf
def test_what_is_not_finite_stays_in_its_group(device, dtype):
    """Tiles reach over the end of a group, of its matrix and into the padding."""
    x, weight = torch.randn(30, 20, device=device, dtype=dtype), torch.randn(3, 21, 20, device=device, dtype=dtype)
    x[10:20], weight[1], x[25:] = torch.nan, torch.inf, torch.nan
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    y = grouped_linear(*leaves, starts_at([0, 10, 20, 25], device))
    dy = torch.randn_like(y, dtype=torch.float32).to(dtype)
    dy[25:] = torch.nan
    dx, dweight = torch.autograd.grad(y, leaves, dy)
    assert y[10:20].isnan().all() and not dx[10:20].isfinite().any() and not dweight[1].isfinite().any()
    for kept in (y[:10], y[20:], dx[:10], dx[20:], dweight[::2]):
        assert kept.isfinite().all()
    assert not y[25:].count_nonzero() and not dx[25:].count_nonzero()


def far(device: torch.device) -> None:
    """Rows of x and of the gradient, and matrices, that begin beyond 2^31 elements."""
    stride, rows, size = 2**30, 5, 48
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        far_memory.zeros((rows - 1) * stride + size, torch.bfloat16, device).as_strided((rows, size), (stride, 1))
        for _ in range(2)
    )
    weight = far_memory.zeros(2 * stride + size**2, torch.bfloat16, device).as_strided((3, size, size), (stride, size, 1))
    for t in (x, dy, weight):
        t.copy_(torch.randn(t.shape, generator=generator))
    starts = starts_at([0, 3, 3, 5], device)
    results = []
    with dispatch.use("triton", device.type):
        for near in (False, True):
            leaves = [(t.contiguous() if near else t).detach().requires_grad_() for t in (x, weight)]
            y = grouped_linear(*leaves, starts)
            results.append([y.detach(), *torch.autograd.grad(y, leaves, dy.contiguous() if near else dy)])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), "other numbers than those of near rows"


def far_result(device: torch.device) -> None:
    """A result of more than 2^31 elements, of which the last program's are looked at: padding, which it makes 0."""
    from megalm_kernels.device import grouped_linear as kernels

    far_memory.run_last_programs(kernels, device)
    rows, outputs = 2**18 + 100, 2**13
    x = far_memory.zeros(rows * 8, torch.bfloat16, device).view(rows, 8)
    weight, starts = torch.randn(1, outputs, 8, device=device).bfloat16(), starts_at([0, 8], device)
    result = far_memory.zeros(rows * outputs, torch.bfloat16, device).view(rows, outputs)
    result[-1] = torch.nan
    kernels.torch.empty = lambda *args, **kwargs: result
    with dispatch.use("triton", device.type):
        y = grouped_linear(x, weight, starts)
    assert not y[-1, -100:].count_nonzero() and (device.type != "cpu" or y[-1, 0].isnan())


@pytest.mark.parametrize("case", [far, far_result], ids=lambda case: case.__name__)
def test_addresses_are_int64(case, device):
    far_memory.run_far(__name__, case.__name__, device)
