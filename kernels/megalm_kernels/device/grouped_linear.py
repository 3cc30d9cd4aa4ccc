"""The kernels of grouped_linear.py: a tile of the result each, whose group a program finds from `starts`.

Slots for blocks of rows are counted as for packed attention: from shapes alone, so some stay empty, and their programs end at
once. The padding rows are one more group, whose sums have no terms. Tiles are read by descriptors that end where the group ends.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels import tables
from megalm_kernels.device.attention_tiles import place_in
from megalm_kernels.launch import arch_of, launch

_TOGETHER = 8  # blocks of rows that pass over the columns side by side: what they read of the matrix stays in the L2
_SEARCHED = 128  # groups that a program looks at together to find its own


@triton.jit
def _group_of(slot, STARTS, groups, BLOCK_M: tl.constexpr, SEARCHED: tl.constexpr):
    """The group of a slot, `groups` for padding. Group g has slots from starts[g] // BLOCK_M + g on, at least as many as its
    blocks."""
    found = -1
    for base in tl.range(0, groups + 1, SEARCHED, num_stages=1):
        g = base + tl.arange(0, SEARCHED)
        first = tl.load(STARTS + g, mask=g <= groups, other=0) // BLOCK_M + g
        found += tl.sum(((first <= slot) & (g <= groups)).to(tl.int32), axis=0)
    return found


@triton.jit(do_not_specialize=["rows", "groups", "slots", "columns"])  # counts: no kernel of its own for each
def _products(
    X, W, Y, STARTS, rows, groups, slots, columns, inner, outer, x_row, w_group, w_row,
    TRANSPOSED: tl.constexpr, TOGETHER: tl.constexpr, SEARCHED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of Y (rows, outer) = X W[g]^T, W[g] (outer, inner); TRANSPOSED: X W[g], W[g] (inner, outer)."""
    column, slot = place_in(tl.program_id(0), columns, slots, TOGETHER, False)
    group = _group_of(slot, STARTS, groups, BLOCK_M, SEARCHED)
    real = group < groups
    start = tl.load(STARTS + group)
    row = start.to(tl.int64) + (slot - start // BLOCK_M - group) * BLOCK_M
    end = min(tl.load(STARTS + group + 1, mask=real, other=rows), rows)
    count = end - row.to(tl.int32)
    if count <= 0:
        return
    place = column * BLOCK_N
    W += tl.where(real, group, 0).to(tl.int64) * w_group
    x_tiles = tl.make_tensor_descriptor(X + row * x_row, [count, inner], [x_row, 1], [BLOCK_M, BLOCK_K])
    if TRANSPOSED:
        w_tiles = tl.make_tensor_descriptor(W, [inner, outer], [w_row, 1], [BLOCK_K, BLOCK_N])
    else:
        w_tiles = tl.make_tensor_descriptor(W, [outer, inner], [w_row, 1], [BLOCK_N, BLOCK_K])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, tl.where(real, inner, 0), BLOCK_K):
        w = w_tiles.load([k, place]) if TRANSPOSED else w_tiles.load([place, k]).T
        total = tl.dot(x_tiles.load([0, k]), w, total, input_precision="ieee")
    m, n = tl.arange(0, BLOCK_M), place + tl.arange(0, BLOCK_N)
    address = (row + m)[:, None] * outer + n[None, :]
    tl.store(Y + address, total.to(Y.dtype.element_ty), mask=(m < count)[:, None] & (n < outer)[None, :])


@triton.jit(do_not_specialize=["rows", "blocks", "columns"])
def _weight_products(
    DY, X, DW, STARTS, rows, blocks, columns, outer, inner, dy_row, x_row,
    TOGETHER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of DW[g] (outer, inner) = DY^T X over the rows of group g, of which there may be none."""
    group = tl.program_id(0) // (blocks * columns)
    column, block = place_in(tl.program_id(0) % (blocks * columns), columns, blocks, TOGETHER, False)
    start = tl.load(STARTS + group).to(tl.int64)
    count = min(tl.load(STARTS + group + 1), rows) - start.to(tl.int32)
    ends = max(count, 1)  # a descriptor has no sizes of 0; nothing is read by it then
    dy_tiles = tl.make_tensor_descriptor(DY + start * dy_row, [ends, outer], [dy_row, 1], [BLOCK_K, BLOCK_M])
    x_tiles = tl.make_tensor_descriptor(X + start * x_row, [ends, inner], [x_row, 1], [BLOCK_K, BLOCK_N])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, count, BLOCK_K):
        dy, x = dy_tiles.load([k, block * BLOCK_M]), x_tiles.load([k, column * BLOCK_N])
        total = tl.dot(dy.T, x, total, input_precision="ieee")
    m, n = block * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)
    address = (group.to(tl.int64) * outer + m)[:, None] * inner + n[None, :]
    tl.store(DW + address, total.to(DW.dtype.element_ty), mask=(m < outer)[:, None] & (n < inner)[None, :])


def products(x: Tensor, weight: Tensor, starts: Tensor, transposed: bool) -> Tensor:
    """x[t] W[g]^T of all rows, contiguous; transposed: x[t] W[g]."""
    rows, groups = x.shape[0], weight.shape[0]
    outer, inner = (weight.shape[2], weight.shape[1]) if transposed else (weight.shape[1], weight.shape[2])
    y = torch.empty(rows, outer, dtype=x.dtype, device=x.device)
    if rows == 0:
        return y
    x, weight = _tile_ready(x), _tile_ready(weight)
    settings = tables.lookup(f"grouped_linear_{8 * x.element_size()}", arch_of(x.device), triton.cdiv(rows, groups))
    slots, columns = rows // settings["BLOCK_M"] + groups + 1, triton.cdiv(outer, settings["BLOCK_N"])
    launch(
        _products, (slots * columns,), x, weight, y, starts.contiguous(),
        rows, groups, slots, columns, inner, outer, x.stride(0), weight.stride(0), weight.stride(1),
        TRANSPOSED=transposed, TOGETHER=_TOGETHER, SEARCHED=_SEARCHED, **settings,
    )  # fmt: skip
    return y


def weight_products(dy: Tensor, x: Tensor, starts: Tensor) -> Tensor:
    """dy^T x of each group's rows, contiguous."""
    rows, outer, inner, groups = x.shape[0], dy.shape[1], x.shape[1], starts.shape[0] - 1
    dweight = torch.empty(groups, outer, inner, dtype=x.dtype, device=x.device)
    if rows == 0:
        return dweight.zero_()
    dy, x = _tile_ready(dy), _tile_ready(x)
    settings = tables.lookup(f"grouped_linear_weight_{8 * x.element_size()}", arch_of(x.device))
    blocks, columns = triton.cdiv(outer, settings["BLOCK_M"]), triton.cdiv(inner, settings["BLOCK_N"])
    launch(
        _weight_products, (groups * blocks * columns,), dy, x, dweight, starts.contiguous(),
        rows, blocks, columns, outer, inner, dy.stride(0), x.stride(0), TOGETHER=_TOGETHER, **settings,
    )  # fmt: skip
    return dweight


def _tile_ready(x: Tensor) -> Tensor:
    """x, or a copy where a descriptor cannot reach its rows: address and strides must be multiples of 16 bytes."""
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    if aligned and x.data_ptr() % 16 == 0 and (x.stride(-1) == 1 or x.shape[-1] == 1):
        return x
    step = 16 // x.element_size()
    memory = torch.empty(*x.shape[:-1], -(-x.shape[-1] // step) * step, dtype=x.dtype, device=x.device)
    return memory[..., : x.shape[-1]].copy_(x)


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the tables: groups of many rows and of few."""
    claims = {"HMMA", "HGMMA", "UTCMMA", "TMA", "STG.128"}
    yield "grouped_linear bfloat16", partial(_specimen, torch.bfloat16, 8), claims
    yield "grouped_linear bfloat16 of few rows", partial(_specimen, torch.bfloat16, 128), claims
    yield "grouped_linear float16", partial(_specimen, torch.float16, 8), claims
    yield "grouped_linear float32", partial(_specimen, torch.float32, 8), {"TMA", "STG.128"}


def _specimen(dtype: torch.dtype, groups: int, rows: int = 8192, inner: int = 2048, outer: int = 768) -> None:
    x, dy = (torch.empty(rows, size, dtype=dtype, device="meta") for size in (inner, outer))
    weight = torch.empty(groups, outer, inner, dtype=dtype, device="meta")
    starts = torch.empty(groups + 1, dtype=torch.int32, device="meta")
    products(x, weight, starts, False)
    products(dy, weight, starts, True)
    weight_products(dy, x, starts)
