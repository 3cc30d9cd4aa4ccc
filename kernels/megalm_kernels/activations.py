"""Activation functions with the product or the sum that goes with them, in one pass over memory.

    swiglu     y = silu(gate) * up                                     (Shazeer 2020)
    geglu      y = gelu(gate) * up                                     (Shazeer 2020)
    bias_gelu  y = gelu(x + bias)

gelu is the tanh form (Hendrycks and Gimpel 2016): gelu(x) = x/2 (1 + tanh z) = x sigmoid(2 z), z = sqrt(2/pi) (x + 0.044715 x^3).
The backward computes the forward's intermediate values again from its inputs, and writes all gradients in one pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.arguments import check_device, check_dtype, check_kernel_dtype, check_shape, refuse
from megalm_kernels.dispatch import implementation, kernel_op, register, rows_of, triton_obstacle


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, element by element; gate, up (..., F) of one shape and dtype, which may be halves of one tensor.

    Raises ValueError; also for fp64 where Triton was chosen.
    """
    _check_gated("swiglu", gate, up)
    return implementation("swiglu")(gate, up)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, element by element, with the tanh form; the rest as for `swiglu`."""
    _check_gated("geglu", gate, up)
    return implementation("geglu")(gate, up)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) with the tanh form. x (..., F), bias (F,), which may have another dtype; the result has x's.

    Raises ValueError; also for fp64 where Triton was chosen.
    """
    check_dtype("bias_gelu", "x", x)
    if x.dim() == 0:
        raise refuse("bias_gelu", "the shape of x", tuple(x.shape), "(..., F)")
    check_dtype("bias_gelu", "bias", bias)
    check_shape("bias_gelu", "bias", bias, x.shape[-1:])
    check_device("bias_gelu", "bias", bias, x)
    return implementation("bias_gelu")(x, bias)


def _check_gated(operation: str, gate: Tensor, up: Tensor) -> None:
    check_dtype(operation, "gate", gate)
    if gate.dim() == 0:
        raise refuse(operation, "the shape of gate", tuple(gate.shape), "(..., F)")
    check_dtype(operation, "up", up, (gate.dtype,))
    check_shape(operation, "up", up, gate.shape)
    check_device(operation, "up", up, gate)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, in fp32 (fp64 if gate is)."""
    return _gated(gate, up, False)


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, in fp32 (fp64 if gate is)."""
    return _gated(gate, up, True)


def bias_gelu_reference(x: Tensor, bias: Tensor) -> Tensor:
    """The formula, in fp32 (fp64 if x is)."""
    wide = _wide(x)
    h = wide + bias.to(wide.dtype)
    return (h * _share(h, True)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    wide = _wide(gate)
    return (wide * _share(wide, gelu) * _wide(up)).to(gate.dtype)


_GELU, _CUBIC = math.sqrt(8 / math.pi), 0.044715  # 2 z = _GELU (x + _CUBIC x^3)
_FLAT = 16.0  # beyond, the sigmoid in gelu is 0 or 1 in fp32; x^3 could be infinite, and 0 * infinity is not a number


def _share(x: Tensor, gelu: bool) -> Tensor:
    """The s of silu and gelu, both of which are x s(x)."""
    if not gelu:
        return x.sigmoid()
    x = x.clamp(-_FLAT, _FLAT)
    return (_GELU * (x + _CUBIC * x**3)).sigmoid()


def _slope(x: Tensor, share: Tensor, gelu: bool) -> Tensor:
    """The derivative of x s(x) by x; share: s(x)."""
    if not gelu:
        return share * (1 + x * (1 - share))
    x = x.clamp(-_FLAT, _FLAT)
    return share * (1 + x * (1 - share) * _GELU * (1 + 3 * _CUBIC * x * x))


def _swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _geglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _bias_gelu_torch(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias, approximate="tanh").to(x.dtype)


register("swiglu", "torch", _swiglu_torch)
register("geglu", "torch", _geglu_torch)
register("bias_gelu", "torch", _bias_gelu_torch)

# The kernels as operators of torch.


@kernel_op("gated", "activations:gated")
def gated_op(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up."""
    return _gated(gate, up, gelu).contiguous()


@kernel_op("gated_backward", "activations:gated_backward")
def gated_backward_op(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    dy, x = _wide(grad), _wide(gate)
    share = _share(x, gelu)
    dgate, dup = dy * _wide(up) * _slope(x, share, gelu), dy * x * share
    return dgate.to(gate.dtype).contiguous(), dup.to(gate.dtype).contiguous()


@kernel_op("bias_gelu", "activations:bias_gelu")
def bias_gelu_op(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias)."""
    return bias_gelu_reference(x, bias).contiguous()


@kernel_op("bias_gelu_backward", "activations:bias_gelu_backward")
def bias_gelu_backward_op(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    h = _wide(x) + bias.to(_wide(x).dtype)
    dx = _wide(grad) * _slope(h, _share(h, True), True)
    return dx.to(x.dtype).contiguous(), rows_of(dx).sum(0).to(bias.dtype)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


gated_op.register_fake(lambda gate, up, gelu: _like(gate))
gated_backward_op.register_fake(lambda grad, gate, up, gelu: (_like(gate), _like(up)))
bias_gelu_op.register_fake(lambda x, bias: _like(x))
bias_gelu_backward_op.register_fake(lambda grad, x, bias: (_like(x), _like(bias)))


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.gelu = inputs
    ctx.save_for_backward(gate, up)


def _differentiate_gated(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_backward_op(grad, *ctx.saved_tensors, ctx.gelu), None


def _save_bias_gelu(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_bias_gelu(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return bias_gelu_backward_op(grad, *ctx.saved_tensors)


gated_op.register_autograd(_differentiate_gated, setup_context=_save_gated)
bias_gelu_op.register_autograd(_differentiate_bias_gelu, setup_context=_save_bias_gelu)


def _swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    check_kernel_dtype("swiglu", "gate", gate)
    return gated_op(gate, up, False)


def _geglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    check_kernel_dtype("geglu", "gate", gate, configured=False)
    return gated_op(gate, up, True)


def _bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
    check_kernel_dtype("bias_gelu", "x", x, configured=False)
    check_kernel_dtype("bias_gelu", "bias", bias, configured=False)
    return bias_gelu_op(x, bias)


register("swiglu", "triton", _swiglu_triton, triton_obstacle)
register("geglu", "triton", _geglu_triton, triton_obstacle)
register("bias_gelu", "triton", _bias_gelu_triton, triton_obstacle)
