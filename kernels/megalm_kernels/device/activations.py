"""The kernels of activations.py. A tensor without gaps is taken as one long row: no lane idles at the ends of short rows."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels import tables
from megalm_kernels.device.column_sums import column_sums
from megalm_kernels.dispatch import rows_of
from megalm_kernels.launch import arch_of, launch, multiprocessors

PROGRAMS_PER_MULTIPROCESSOR = 8  # of bias_gelu's backward, each with a row of fp32 partial sums


@triton.jit
def _share(x, GELU: tl.constexpr):
    """The s of silu(x) = x s(x) and gelu(x) = x s(x). gelu: 0 or 1 in fp32 beyond 16, where x^3 may be infinite."""
    if GELU:
        x = _flat(x)
        return tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    else:
        return tl.sigmoid(x)


@triton.jit
def _slope(x, share, GELU: tl.constexpr):
    """The derivative of x s(x)."""
    if GELU:
        x = _flat(x)
        return share * (1.0 + x * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x))
    else:
        return share * (1.0 + x * (1.0 - share))


@triton.jit
def _flat(x):
    """x within -16 .. 16; NaN stays NaN, which tl.clamp would not promise."""
    return tl.where(x > 16.0, 16.0, tl.where(x < -16.0, -16.0, x))


@triton.jit
def _gated(GATE, UP, Y, columns, blocks, gate_row, up_row, y_row, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """y = gate s(gate) up for one block of one row; `blocks` of them per row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gate = tl.load(GATE + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * _share(gate, GELU) * up
    tl.store(Y + row * y_row + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _gated_backward(
    DY,
    GATE,
    UP,
    DGATE,
    DUP,
    columns,
    blocks,
    dy_row,
    gate_row,
    up_row,
    result_row,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dgate = dy up (gate s(gate))', dup = dy gate s(gate) for one block of one row."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    dy = tl.load(DY + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(GATE + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_row + column, mask=inside, other=0.0).to(tl.float32)
    share = _share(gate, GELU)
    dgate, dup = dy * up * _slope(gate, share, GELU), dy * gate * share
    tl.store(DGATE + row * result_row + column, dgate.to(DGATE.dtype.element_ty), mask=inside)
    tl.store(DUP + row * result_row + column, dup.to(DUP.dtype.element_ty), mask=inside)


@triton.jit
def _bias_gelu(X, BIAS, Y, rows, columns, blocks, x_row, y_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """y = gelu(x + bias) for ROWS rows of one block of columns, so that they share one read of the bias."""
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    bias = tl.load(BIAS + column, mask=column < columns, other=0.0).to(tl.float32)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(X + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    y = x * _share(x, True)
    tl.store(Y + row[:, None] * y_row + column[None, :], y.to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["groups"])  # it depends on the GPU: no kernel of its own for each count
def _bias_gelu_backward(
    DY, X, BIAS, DX, PARTIALS, rows, columns, blocks, groups, dy_row, x_row, dx_row, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """dx = dy gelu'(x + bias) for every `groups`-th tile of ROWS rows, and the sum of those rows: one row of PARTIALS."""
    group = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < columns
    bias = tl.load(BIAS + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(group, tl.cdiv(rows, ROWS), groups):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & is_column[None, :]
        x = tl.load(X + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32) + bias
        dy = tl.load(DY + row[:, None] * dy_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        dx = dy * _slope(x, _share(x, True), True)
        tl.store(DX + row[:, None] * dx_row + column[None, :], dx.to(DX.dtype.element_ty), mask=inside)
        total += dx
    tl.store(PARTIALS + group.to(tl.int64) * columns + column, tl.sum(total, axis=0), mask=is_column)


def gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    """silu(gate) * up, or gelu(gate) * up; contiguous."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel() == 0:
        return y
    g, u, out = _rows(gate, up, y)
    settings = tables.lookup("gated", arch_of(y.device), y.element_size())
    blocks = triton.cdiv(g.shape[1], settings["BLOCK"])
    grid = (g.shape[0] * blocks,)
    launch(_gated, grid, g, u, out, g.shape[1], blocks, g.stride(0), u.stride(0), out.stride(0), GELU=gelu, **settings)
    return y


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up; contiguous."""
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if dgate.numel() == 0:
        return dgate, dup
    dy, g, u, dg, du = _rows(grad, gate, up, dgate, dup)
    settings = tables.lookup("gated_backward", arch_of(dg.device), dg.element_size())
    blocks = triton.cdiv(g.shape[1], settings["BLOCK"])
    strides = (dy.stride(0), g.stride(0), u.stride(0), dg.stride(0))
    grid = (g.shape[0] * blocks,)
    launch(_gated_backward, grid, dy, g, u, dg, du, g.shape[1], blocks, *strides, GELU=gelu, **settings)
    return dgate, dup


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Each as (T, F); as (1, T F) if none has gaps between its rows."""
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [rows_of(x) for x in tensors]


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias); contiguous."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, out = rows_of(x), rows_of(y)
    settings = tables.lookup("bias_gelu", arch_of(x.device), x.element_size())
    blocks = triton.cdiv(x.shape[1], settings["BLOCK"])
    grid = (triton.cdiv(x.shape[0], settings["ROWS"]) * blocks,)
    launch(_bias_gelu, grid, x, bias.contiguous(), out, *x.shape, blocks, x.stride(0), out.stride(0), **settings)
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (contiguous) and bias."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    dy, x, out = rows_of(grad), rows_of(x), rows_of(dx)
    rows, columns = x.shape
    settings = tables.lookup("bias_gelu_backward", arch_of(x.device), x.element_size())
    blocks = triton.cdiv(columns, settings["BLOCK"])
    tiles = triton.cdiv(rows, settings["ROWS"])
    groups = min(tiles, triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device), blocks))
    partials = torch.empty(groups, columns, dtype=torch.float32, device=x.device)
    strides = (dy.stride(0), x.stride(0), out.stride(0))
    sizes = (rows, columns, blocks, groups)
    launch(_bias_gelu_backward, (groups * blocks,), dy, x, bias.contiguous(), out, partials, *sizes, *strides, **settings)
    return dx, column_sums(partials, bias.dtype)


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the tables; whole tensors, and halves of one, whose rows have gaps."""
    claims = {"LDG.128", "STG.128"}
    for dtype in (torch.bfloat16, torch.float32):
        whole = torch.empty(4096, 2 * 11008, dtype=dtype, device="meta")
        gate, up = whole.split(11008, dim=1)
        bias = torch.empty(2 * 11008, dtype=dtype, device="meta")
        for name, gelu in (("swiglu", False), ("geglu", True)):
            yield f"{name} {dtype}", partial(gated, whole, whole, gelu), claims
            yield f"{name} {dtype} halves", partial(gated, gate, up, gelu), claims
            yield f"{name} {dtype} backward", partial(gated_backward, whole, whole, whole, gelu), claims
            yield f"{name} {dtype} halves backward", partial(gated_backward, gate, gate, up, gelu), claims
        yield f"bias_gelu {dtype}", partial(bias_gelu, whole, bias), claims
        yield f"bias_gelu {dtype} backward", partial(bias_gelu_backward, whole, whole, bias), {"LDG.128"}
