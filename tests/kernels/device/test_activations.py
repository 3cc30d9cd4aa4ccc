"""The kernels of the gated activations and of the biased one."""

from __future__ import annotations

import pytest
import torch

from megalm_kernels import (
    bias_gelu,
    bias_gelu_reference,
    dispatch,
    geglu,
    geglu_reference,
    swiglu,
    swiglu_reference,
)

GATED = pytest.mark.parametrize(("ours", "plain"), [(swiglu, swiglu_reference), (geglu, geglu_reference)])


@pytest.fixture(autouse=True)
def kernels(device):
    with dispatch.use("triton", device.type):
        yield


@GATED
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 3, 17), (1, 4111)])
def test_gated(ours, plain, shape, device, dtype, judge):
    judge(ours, plain, [3 * torch.randn(shape, dtype=dtype, device=device) for _ in range(2)])


@GATED
@pytest.mark.parametrize("width", [5, 1030])
def test_gated_halves_of_one_tensor(ours, plain, width, device, dtype, judge):
    whole = torch.randn(2, 3, 2 * width, dtype=dtype, device=device)
    judge(lambda x: ours(*x.chunk(2, dim=-1)), lambda x: plain(*x.chunk(2, dim=-1)), [whole])


# A width above a block, odd; more rows than all programs take in one turn; one row; columns alone.
@pytest.mark.parametrize("shape", [(2, 3, 17), (101, 5), (1, 1029), (9,), (3, 2100)])
def test_bias_gelu(shape, device, dtype, judge):
    x = torch.randn(shape, dtype=dtype, device=device)
    judge(bias_gelu, bias_gelu_reference, [x, torch.randn(shape[-1], dtype=dtype, device=device)])


def test_any_strides(device, dtype):
    """Rows in steps, and columns that are not next to each other; gradients that are one number seen from everywhere."""
    whole = torch.randn(6, 40, dtype=dtype, device=device)
    bias = torch.randn(20, dtype=dtype, device=device)
    for x in (whole[::2, :20], whole[:, ::2], whole[:, :20].t().contiguous().t()):
        x = x.detach().requires_grad_()
        same = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for function in (lambda x: swiglu(x, 2 * x), lambda x: geglu(2 * x, x), lambda x: bias_gelu(x, bias)):
            (grad,) = torch.autograd.grad(function(x).sum(), [x])
            (want,) = torch.autograd.grad(function(same).sum(), [same])
            assert torch.equal(function(x), function(same)) and torch.equal(grad, want)


@pytest.mark.parametrize("function", [swiglu, geglu, bias_gelu])
def test_large_values(function, device):
    """No infinity or NaN comes of finite values: far out, the activations are 0 and x, their slopes 0 and 1."""
    x = torch.tensor([-3e38, -1e20, -1e4, -100.0, -30.0, 0.0, 30.0, 100.0, 1e4, 1e20, 3e38], device=device)
    x.requires_grad_()
    other = torch.zeros_like(x) if function is bias_gelu else torch.ones_like(x)
    y = function(x, other)
    (grad,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(y, x.detach().relu(), rtol=0, atol=1e-11)
    torch.testing.assert_close(grad[[0, 1, 2, 3, 7, 8, 9, 10]].cpu(), torch.tensor([0.0] * 4 + [1.0] * 4), rtol=0, atol=1e-11)
    assert grad.isfinite().all()


@pytest.mark.parametrize("function", [swiglu, geglu, bias_gelu])
def test_nan_goes_through(function, device):
    x = torch.tensor([0.5, torch.nan, 1.0], device=device, requires_grad=True)
    y = function(x, torch.ones(3, device=device))
    (grad,) = torch.autograd.grad(y.sum(), [x])
    assert y.isnan().tolist() == grad.isnan().tolist() == [False, True, False]


def test_nothing(device, dtype):
    for shape in ((0, 8), (3, 0)):
        x = torch.zeros(shape, dtype=dtype, device=device, requires_grad=True)
        bias = torch.zeros(shape[-1], dtype=dtype, device=device, requires_grad=True)
        for y in (swiglu(x, x), geglu(x, x), bias_gelu(x, bias)):
            assert y.shape == shape
            y.sum().backward()
        assert x.grad is not None and x.grad.shape == shape
        assert bias.grad is not None and not bias.grad.any()
