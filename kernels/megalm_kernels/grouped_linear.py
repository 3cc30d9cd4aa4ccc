"""A linear layer of its own for each group of rows, as the experts of a mixture have it.

    y[t] = W[g] x[t]        dx[t] = dy[t] W[g]        dW[g] = sum of dy[t] x[t]^T        for the rows t of group g

Group g has the rows starts[g] .. starts[g + 1] - 1; rows from starts[G] on are padding: 0, and no gradient. With Triton the host
never asks a GPU how long the groups are. 2 T N K operations each; at least x, W and y are moved: (T K + G N K + T N) elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megalm_kernels.arguments import check_device, check_dtype, check_kernel_dtype, check_shape, refuse
from megalm_kernels.dispatch import implementation, kernel_op, register, triton_obstacle
from megalm_kernels.launch import capability

_OPERATION = "grouped_linear"


def grouped_linear(x: Tensor, weight: Tensor, starts: Tensor, starts_host: Sequence[int] | None = None) -> Tensor:
    """Each group's rows times its matrix: x (T, K), weight (G, N, K) of x's dtype, starts (G + 1,) int32 -> (T, N).

    starts begins with 0, does not fall, and ends at T or below, behind which rows are padding. starts_host: the same numbers
    where the host has them: torch's loop then need not wait for a GPU. dW is added up in fp32 and has weight's dtype.
    Raises ValueError; for wrong numbers in `starts` only if they are on the CPU; for fp64 where Triton was chosen.
    """
    _check(x, weight, starts)
    bounds = _known_bounds(starts, starts_host, x.shape[0])
    return implementation(_OPERATION)(x, weight, starts, bounds)


def _check(x: Tensor, weight: Tensor, starts: Tensor) -> None:
    check_dtype(_OPERATION, "x", x)
    check_dtype(_OPERATION, "weight", weight, (x.dtype,))
    check_dtype(_OPERATION, "starts", starts, (torch.int32,))
    if x.dim() != 2:
        raise refuse(_OPERATION, "the shape of x", tuple(x.shape), "(rows, features)")
    if weight.dim() != 3 or 0 in weight.shape:
        raise refuse(_OPERATION, "the shape of weight", tuple(weight.shape), "(groups, outputs, features), each at least 1")
    check_shape(_OPERATION, "weight", weight, (*weight.shape[:2], x.shape[1]))
    check_shape(_OPERATION, "starts", starts, (weight.shape[0] + 1,))
    check_device(_OPERATION, "weight", weight, x)
    check_device(_OPERATION, "starts", starts, x)


def _known_bounds(starts: Tensor, host: Sequence[int] | None, rows: int) -> list[int] | None:
    """`starts` on the host, checked, if it can be had without waiting; None: not."""
    if torch.compiler.is_compiling():
        return None
    bounds = starts.tolist() if starts.device.type == "cpu" else None
    if host is not None:
        given = [int(bound) for bound in host]
        if len(given) != starts.shape[0] or (bounds is not None and given != bounds):
            wanted = bounds if bounds is not None else f"{starts.shape[0]} numbers, those of starts"
            raise refuse(_OPERATION, "starts_host", given, wanted)
        bounds = given
    if bounds is not None and (bounds[0] != 0 or bounds[-1] > rows or bounds != sorted(bounds)):
        raise refuse(_OPERATION, "starts", bounds, f"0 first, none below the one before, none above {rows}, the rows of x")
    return bounds


def grouped_linear_reference(x: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """The formula, group by group, in x's dtype."""
    bounds = starts.tolist()
    parts = [x[begin:end] @ weight[g].t() for g, begin, end in _groups(bounds)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - bounds[-1], weight.shape[1])])


def _groups(bounds: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(group, its first row, the row behind its last)."""
    return ((g, bounds[g], bounds[g + 1]) for g in range(len(bounds) - 1))


def _products(x: Tensor, weight: Tensor, bounds: Sequence[int], transposed: bool) -> Tensor:
    """x[t] W[g]^T of all rows, (T, N), by one product per group, each written in its place; transposed: x[t] W[g], (T, K)."""
    y = torch.empty(x.shape[0], weight.shape[2 if transposed else 1], dtype=x.dtype, device=x.device)
    for g, begin, end in _groups(bounds):
        if begin < end:
            torch.mm(x[begin:end], weight[g] if transposed else weight[g].t(), out=y[begin:end])
    y[bounds[-1] :].zero_()
    return y


def _weight_products(dy: Tensor, x: Tensor, bounds: Sequence[int]) -> Tensor:
    """dy^T x of each group's rows, (G, N, K)."""
    dweight = torch.empty(len(bounds) - 1, dy.shape[1], x.shape[1], dtype=x.dtype, device=x.device)
    for g, begin, end in _groups(bounds):
        if begin < end:
            torch.mm(dy[begin:end].t(), x[begin:end], out=dweight[g])
        else:
            dweight[g].zero_()
    return dweight


class _Loop(torch.autograd.Function):
    """One product per group: nothing is copied, and only x and weight are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        return _products(x, weight, bounds, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = _products(dy, weight, ctx.bounds, True) if ctx.needs_input_grad[0] else None
        dweight = _weight_products(dy, x, ctx.bounds) if ctx.needs_input_grad[1] else None
        return dx, dweight, None


def loop(x: Tensor, weight: Tensor, bounds: Sequence[int]) -> Tensor:
    """`grouped_linear` by one product per group; bounds: its starts."""
    return _Loop.apply(x, weight, bounds)


def _grouped_torch(x: Tensor, weight: Tensor, starts: Tensor, bounds: Sequence[int] | None) -> Tensor:
    if _has_grouped_mm(x, weight):
        return GroupedMM.apply(x, weight, starts, bounds)
    if bounds is None and x.device.type == "cpu":  # a compiler looks on, which must not see how many rows a group has
        return grouped_linear_op(x, weight, starts, False)
    return loop(x, weight, starts.tolist() if bounds is None else bounds)


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has one call for all groups that does not wait for the GPU: bf16, sm_90 or newer, aligned rows."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or x.shape[0] == 0 or not hasattr(torch, "_grouped_mm"):
        return False
    aligned = all(size % 8 == 0 for size in weight.shape[1:]) and x.is_contiguous() and weight.is_contiguous()
    return aligned and torch.version.hip is None and capability(x.device.index or 0) >= 90


class GroupedMM(torch.autograd.Function):
    """`torch._grouped_mm`, which does not write padding rows and need not write the gradient of an empty group's matrix.

    Its own gradient is not used: depending on the layout that it takes, it refuses groups that are empty or not a multiple of 8.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, starts: Tensor, bounds: Sequence[int] | None) -> Tensor:
        ctx.save_for_backward(x, weight, starts)
        ctx.bounds = bounds
        return _clear_padding(torch._grouped_mm(x, weight.transpose(1, 2), starts[1:]), starts, bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, starts = ctx.saved_tensors
        dy, dx, dweight = dy.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dx = _clear_padding(torch._grouped_mm(dy, weight, starts[1:]), starts, ctx.bounds)
        if ctx.needs_input_grad[1]:
            dweight = torch._grouped_mm(dy.t(), x, starts[1:])
            if ctx.bounds is None or any(begin == end for _, begin, end in _groups(ctx.bounds)):
                dweight.masked_fill_((starts[1:] == starts[:-1])[:, None, None], 0.0)
        return dx, dweight, None, None


def _clear_padding(y: Tensor, starts: Tensor, bounds: Sequence[int] | None) -> Tensor:
    if bounds is None:
        return y.masked_fill_((torch.arange(y.shape[0], device=y.device) >= starts[-1])[:, None], 0.0)
    y[bounds[-1] :].zero_()
    return y


@kernel_op("grouped_linear", "grouped_linear:products")
def grouped_linear_op(x: Tensor, weight: Tensor, starts: Tensor, transposed: bool) -> Tensor:
    """x[t] W[g]^T of all rows; transposed: x[t] W[g]."""
    return _products(x, weight, starts.tolist(), transposed)


@grouped_linear_op.register_fake
def _(x: Tensor, weight: Tensor, starts: Tensor, transposed: bool) -> Tensor:
    return torch.empty(x.shape[0], weight.shape[2 if transposed else 1], dtype=x.dtype, device=x.device)


@kernel_op("grouped_linear_weight", "grouped_linear:weight_products")
def grouped_linear_weight_op(dy: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """dy^T x of each group's rows."""
    return _weight_products(dy, x, starts.tolist())


@grouped_linear_weight_op.register_fake
def _(dy: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    return torch.empty(starts.shape[0] - 1, dy.shape[1], x.shape[1], dtype=x.dtype, device=x.device)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, starts, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, starts)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, starts = ctx.saved_tensors
    dx = grouped_linear_op(dy, weight, starts, not ctx.transposed) if ctx.needs_input_grad[0] else None
    dweight = None
    if ctx.needs_input_grad[1]:
        dweight = grouped_linear_weight_op(*((x, dy) if ctx.transposed else (dy, x)), starts)
    return dx, dweight, None, None


grouped_linear_op.register_autograd(_backward, setup_context=_save)


def _grouped_triton(x: Tensor, weight: Tensor, starts: Tensor, bounds: Sequence[int] | None) -> Tensor:
    check_kernel_dtype(_OPERATION, "x", x)
    return grouped_linear_op(x, weight, starts, False)


register(_OPERATION, "torch", _grouped_torch)
register(_OPERATION, "triton", _grouped_triton, triton_obstacle)
