"""Activations in torch's operators, their operators under torch.compile, and what they refuse."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from megalm_kernels import (
    activations,
    bias_gelu,
    bias_gelu_reference,
    dispatch,
    geglu,
    geglu_reference,
    swiglu,
    swiglu_reference,
)
from megalm_kernels.activations import bias_gelu_op, gated_op

CASES = {
    "swiglu": (swiglu, swiglu_reference, lambda a, b: F.silu(a) * b),
    "geglu": (geglu, geglu_reference, lambda a, b: F.gelu(a, approximate="tanh") * b),
    "bias_gelu": (bias_gelu, bias_gelu_reference, lambda a, b: F.gelu(a + b, approximate="tanh")),
}
TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=2e-2, atol=2e-2)}


def inputs(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
    a, b = torch.randn(2, 3, 17), torch.randn(17) if name == "bias_gelu" else torch.randn(2, 3, 17)
    return [x.to(dtype).requires_grad_() for x in (a, b)]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_what_runs_equals_the_reference(name: str, dtype: torch.dtype) -> None:
    """And what models have called from the first version on, to the bit."""
    function, reference, first = CASES[name]
    args = inputs(name, dtype)
    with dispatch.use("torch"):
        y = function(*args)
    assert torch.equal(y, first(*args))
    want = reference(*args)
    torch.testing.assert_close(y, want, **TOLERANCE[dtype])
    for got, expected in zip(*(torch.autograd.grad(out.sum(), args) for out in (y, want)), strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE[dtype])


def test_a_bias_in_fp32_leaves_the_dtype_alone() -> None:
    x, bias = torch.randn(3, 5, dtype=torch.bfloat16), torch.randn(5)
    assert bias_gelu(x, bias).dtype == bias_gelu_op(x, bias).dtype == torch.bfloat16


def test_operators_satisfy_torch() -> None:
    for gelu in (False, True):
        torch.library.opcheck(gated_op, (*inputs("swiglu", torch.float32), gelu))
    torch.library.opcheck(bias_gelu_op, tuple(inputs("bias_gelu", torch.float32)))


def test_gradients_of_the_operators() -> None:
    for gelu in (False, True):
        torch.autograd.gradcheck(lambda a, b, g=gelu: gated_op(a, b, g), inputs("swiglu", torch.float64))
    torch.autograd.gradcheck(bias_gelu_op, inputs("bias_gelu", torch.float64))


def test_operators_compile_into_one_graph() -> None:
    def run(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return bias_gelu_op(gated_op(a, b, True) + gated_op(a, b, False), bias).square()

    args = [*inputs("swiglu", torch.float32), inputs("bias_gelu", torch.float32)[1]]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), run(*args))
    for got, want in zip(*(torch.autograd.grad(f(*args).sum(), args) for f in (compiled, run)), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("function", [swiglu, geglu])
def test_gated_refuses(function) -> None:
    gate, up = torch.randn(2, 6), torch.randn(2, 6)
    wrong = {
        r"gate is \(\), wanted \(..., F\)": lambda: function(gate[0, 0], up[0, 0]),
        "dtype of gate is torch.int64": lambda: function(gate.long(), up),
        r"up is \(2, 5\), wanted \(2, 6\)": lambda: function(gate, up[:, :5]),
        "dtype of up is torch.bfloat16, wanted torch.float32": lambda: function(gate, up.bfloat16()),
        "device of up is meta": lambda: function(gate, up.to("meta")),
        "gate is of type list, wanted a Tensor": lambda: function([1.0], up),
        "up is None, wanted a Tensor": lambda: function(gate, None),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert str(error.value).startswith(function.__name__)


def test_bias_gelu_refuses() -> None:
    x, bias = torch.randn(2, 6), torch.randn(6)
    wrong = {
        r"x is \(\), wanted \(..., F\)": lambda: bias_gelu(x[0, 0], bias),
        "dtype of x is torch.int64": lambda: bias_gelu(x.long(), bias),
        "dtype of bias is torch.int64": lambda: bias_gelu(x, bias.long()),
        r"bias is \(5,\), wanted \(6,\)": lambda: bias_gelu(x, bias[:5]),
        "device of bias is meta": lambda: bias_gelu(x, bias.to("meta")),
        "x is of type list, wanted a Tensor": lambda: bias_gelu([1.0], bias),
        "bias is None, wanted a Tensor": lambda: bias_gelu(x, None),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=f"^bias_gelu: .*{message}"):
            call()


def test_the_kernels_refuse_fp64() -> None:
    """With what to do; torch's operators take it."""
    x, row = torch.randn(2, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    configured = 'kernels.swiglu=torch or use(swiglu="torch")'
    wrong = [
        (swiglu, activations._swiglu_triton, (x, x), "gate", configured),
        (geglu, activations._geglu_triton, (x, x), "gate", 'use(geglu="torch")'),
        (bias_gelu, activations._bias_gelu_triton, (x, row), "x", 'use(bias_gelu="torch")'),
        (bias_gelu, activations._bias_gelu_triton, (x.float(), row), "bias", 'use(bias_gelu="torch")'),
    ]
    for public, kernel, args, name, remedy in wrong:
        with dispatch.use("torch"):
            public(*args)
        message = f"{public.__name__} with Triton: the dtype of {name} is torch.float64, wanted "
        with pytest.raises(ValueError, match=re.escape(message) + f".*others: {re.escape(remedy)}"):
            kernel(*args)
