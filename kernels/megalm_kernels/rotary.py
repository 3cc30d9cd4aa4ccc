"""Rotary position embedding (Su et al. 2021): pairs of channels are turned by an angle that grows with the position.

    (a, b) -> (a cos - b sin, b cos + a sin)        backward: the same with -sin

The pairs of the R turned channels are (x[i], x[i + R/2]), or (x[2i], x[2i + 1]) if `interleaved`; channels from R on stay.
A kernel reads x once and writes it once: 4 bytes per element of bf16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm_kernels.arguments import FLOATS, check_device, check_dtype, check_kernel_dtype, check_shape, refuse
from megalm_kernels.dispatch import implementation, kernel_op, register, triton_obstacle

_ANGLES = (torch.float32, torch.float16, torch.bfloat16)


def rotary(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, interleaved: bool = False, inplace: bool = False
) -> Tensor:
    """Turn each pair by its position's angle. x (B, S, H, D) or (T, H, D), any strides; the result has x's dtype.

    cos, sin: (P, R/2), R <= D, fp32 or bf16, one row per position; they get no gradient. positions: (S,), (B, S) or (T,)
    int64, the row for each token; default 0 .. S-1. One that has no row raises ValueError where that can be known without
    waiting for a GPU: by the number of rows, or if `positions` is on the CPU; on a GPU, its token becomes NaN.
    inplace: write into x, and return it. Raises ValueError; also for a leaf that requires a gradient, and for fp64
    where Triton was chosen.
    """
    _check(x, cos, sin, positions)
    if inplace:
        _check_writable(x)
    return implementation("rotary")(x, cos, sin, positions, interleaved, inplace)


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    check_dtype("rotary", "x", x)
    if x.dim() not in (3, 4):
        raise refuse("rotary", "the shape of x", tuple(x.shape), "(B, S, H, D) or (T, H, D)")
    for name, angles in (("cos", cos), ("sin", sin)):
        check_dtype("rotary", name, angles, FLOATS if x.dtype == torch.float64 else _ANGLES)
    if cos.dim() != 2 or not 1 <= cos.shape[1] <= x.shape[-1] // 2:
        raise refuse("rotary", "the shape of cos", tuple(cos.shape), f"(P, R/2) with R from 2 to {x.shape[-1]}, as x has")
    check_shape("rotary", "sin", sin, cos.shape)
    for name, angles in (("cos", cos), ("sin", sin)):
        check_device("rotary", name, angles, x)
        if angles.requires_grad:
            raise refuse("rotary", name, "a tensor that requires a gradient", "fixed angles")
    tokens = x.shape[-3]
    if positions is None:
        if cos.shape[0] < tokens:
            raise refuse("rotary", "the shape of cos", tuple(cos.shape), f"at least {tokens} rows, one per token")
        return
    check_dtype("rotary", "positions", positions, (torch.int64,))
    if positions.shape != x.shape[-3:-2]:
        check_shape("rotary", "positions", positions, x.shape[:-2])
    check_device("rotary", "positions", positions, x)
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise refuse("rotary", "positions", f"{low} to {high}", f"0 to {cos.shape[0] - 1}, the rows of cos")


def _check_writable(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():  # which cannot trace _is_view
        of = x._base if x._is_view() else x
        if of is not None and of.is_leaf:
            wanted = "not a leaf that requires a gradient, nor a view of one"
            raise refuse("rotary", "x (inplace)", "one whose old value its gradient belongs to", wanted)
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise refuse("rotary", "the strides of x (inplace)", x.stride(), "none of 0: its elements share memory")


def rotary_reference(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    """The formula, in fp32 (fp64 if x is). inverse: turn back."""
    turned = 2 * cos.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t[: x.shape[-3]] if positions is None else t[positions] for t in (cos, sin))
    cos, sin = cos.to(wide).unsqueeze(-2), sin.to(wide).unsqueeze(-2)  # (S, 1, R/2): the same for every head
    sin = -sin if inverse else sin
    a, b = _pairs(x[..., :turned].to(wide), interleaved)
    y = (a * cos - b * sin, b * cos + a * sin)
    joined = torch.stack(y, dim=-1).flatten(-2) if interleaved else torch.cat(y, dim=-1)
    joined = joined.to(x.dtype)
    return joined if turned == x.shape[-1] else torch.cat((joined, x[..., turned:]), dim=-1)


def _pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, ...]:
    return x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)


def _rotary_torch(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool) -> Tensor:
    y = rotary_reference(x, cos, sin, positions, interleaved)
    return x.copy_(y) if inplace else y


@kernel_op("rotary", "rotary:turn")
def rotary_op(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    """A turned copy of x."""
    return rotary_reference(x, cos, sin, positions, interleaved, inverse).contiguous()


@rotary_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@kernel_op("rotary_in_place", "rotary:turn_in_place", mutates=["x"])
def rotary_in_place_op(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> None:
    """Turn x itself."""
    x.copy_(rotary_reference(x, cos, sin, positions, interleaved, inverse))


@rotary_in_place_op.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)


def _turn_back(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return rotary_op(grad, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None, None


rotary_op.register_autograd(_turn_back, setup_context=_save)


class _InPlace(torch.autograd.Function):
    """An operator that writes into its argument cannot have a gradient of its own: torch learns of the writing here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool) -> Tensor:
        _save(ctx, (x, cos, sin, positions, interleaved, False), x)
        rotary_in_place_op(x, cos, sin, positions, interleaved, False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _turn_back(ctx, grad)[:5]


def _rotary_triton(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inplace: bool) -> Tensor:
    check_kernel_dtype("rotary", "x", x)
    if not inplace:
        return rotary_op(x, cos, sin, positions, interleaved, False)
    if torch.is_grad_enabled() and x.requires_grad:
        return _InPlace.apply(x, cos, sin, positions, interleaved)
    rotary_in_place_op(x, cos, sin, positions, interleaved, False)
    return x


register("rotary", "torch", _rotary_torch)
register("rotary", "triton", _rotary_triton, triton_obstacle)
