"""The backward of attention without atomics (Dao 2023, algorithm 2, with dQ in a pass of its own): the same bits in every run.

    delta   the row sums of dout * out, less the gradient of lse
    dK, dV  a program has a block of keys of one key/value head and goes through the queries of all heads that share it
    dQ      a program has a block of queries and goes through the keys, as in the forward

Both compute the shares again from lse: 7 products of tiles where one pass needs 5, and no order of additions left to chance.
`deterministic=False` takes one pass, which adds its parts of dQ up in memory, in whatever order programs come.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels import tables
from megalm_kernels.compat import interpreting
from megalm_kernels.device.attention_forward import (
    UNSPECIALIZED,
    count_programs,
    dropout_arguments,
    flags_of,
    in_order,
    padded_dim,
    sequences_bound,
    settings_of,
    slopes_stride,
    strides_of,
    tile_ready,
)
from megalm_kernels.device.attention_tiles import (
    LOG2_E,
    heads_at_once,
    keeps,
    key_blocks,
    part_of,
    products,
    query_blocks,
    scored,
    span,
    visible,
)
from megalm_kernels.launch import arch_of, launch


@triton.jit(do_not_specialize=["queries", "heads", "blocks"])
def _delta(
    OUT, DOUT, DLSE, DELTA, queries, heads, blocks, d_sequence, d_row, d_head,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """delta = sum(dout * out) - dlse for one block of queries of one head of one sequence."""
    block, at = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    sequence, head = at // heads, at % heads
    rows = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < queries)[:, None] & (columns < D)[None, :]
    out = OUT + (sequence * queries + rows)[:, None] * heads * D + head * D + columns[None, :]
    dout = DOUT + sequence * d_sequence + rows[:, None] * d_row + head * d_head + columns[None, :]
    product = tl.load(out, mask=inside, other=0.0).to(tl.float32) * tl.load(dout, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(product, axis=1)
    result = (sequence * heads + head) * queries + rows
    if WITH_LSE:
        delta -= tl.load(DLSE + result, mask=rows < queries, other=0.0)
    tl.store(DELTA + result, delta, mask=rows < queries)


@triton.jit
def _gradient_of_scores(
    s, dshare, masked, places, columns, lse, delta, keys, left, right, scale, softcap, slope,
    sequence, head, queries_at, columns_at, seed_low, seed_high, drop_below, keep_scale,
    MASK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Of a tile, from q k^T and dout v^T either way round: the shares that reach the values, the gradient of q k^T / scale."""
    t, factor, tanh = scored(s, places, columns, scale, softcap, slope, SOFTCAP, ALIBI)
    share = tl.exp2(t * factor - lse)
    if MASK:  # noqa: SIM102 - the one at compile time
        if masked:  # not a matter of compile time: a loop of its own costs registers
            share = tl.where(visible(places, columns, keys, left, right, HAS_LEFT, HAS_RIGHT), share, 0.0)
    given = share
    if DROPOUT:
        keep = keeps(queries_at, columns_at, head, sequence, seed_low, seed_high, drop_below)
        given = tl.where(keep, share * keep_scale, 0.0)
        dshare = tl.where(keep, dshare * keep_scale, 0.0)
    ds = share * (dshare - delta)
    if SOFTCAP:
        ds = ds * (1.0 - tanh * tanh)
    return given, ds


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dkdv(
    Q, K, V, DOUT, LSE, DELTA, DQ, DK, DV, SLOPES, STARTS_Q, STARTS_K, sequences, queries, keys, heads, groups, blocks, width,
    q_sequence, q_row, q_head, k_sequence, k_row, k_head, v_sequence, v_row, v_head, d_sequence, d_row, d_head, slopes_sequence,
    left, right, scale, softcap, seed_low, seed_high, drop_below, keep_scale, o_sequence, o_head, o_query, o_key,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
    ADD_DQ: tl.constexpr, BY_POINTERS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys of one key/value head; heads: of keys. With ADD_DQ also that block's part of dQ (fp32)."""
    sequence, kv, heads, block = part_of(tl.program_id(0), blocks, heads, width, STARTS_K, sequences, BLOCK_K, SEQUENCES, False)
    wide, of_a_head = sequence.to(tl.int64), queries.to(tl.int64)  # rows of statistics
    statistics = wide * 0 if SEQUENCES else wide * heads * groups * queries  # where those of head 0 begin
    rows_from, columns_from = wide * 0 if SEQUENCES else wide * queries, wide * 0 if SEQUENCES else wide * keys
    q_start, queries = span(STARTS_Q, sequence, queries, SEQUENCES)
    k_start, keys = span(STARTS_K, sequence, keys, SEQUENCES)
    column = block * BLOCK_K
    if column >= keys:
        return
    first = kv * groups
    q_width, d_width = (groups - 1) * q_head + D, (groups - 1) * d_head + D
    q_width, d_width = q_width.to(tl.int32), d_width.to(tl.int32)
    Q += wide * q_sequence + q_start * q_row + first.to(tl.int64) * q_head
    DOUT += wide * d_sequence + q_start * d_row + first.to(tl.int64) * d_head
    K += wide * k_sequence + k_start * k_row + kv.to(tl.int64) * k_head
    V += wide * v_sequence + k_start * v_row + kv.to(tl.int64) * v_head
    q_rows = tl.make_tensor_descriptor(Q, [queries, q_width], [q_row, 1], [BLOCK_Q, BLOCK_D])
    d_rows = tl.make_tensor_descriptor(DOUT, [queries, d_width], [d_row, 1], [BLOCK_Q, BLOCK_D])
    k_rows = tl.make_tensor_descriptor(K, [keys, D], [k_row, 1], [BLOCK_K, BLOCK_D])
    v_rows = tl.make_tensor_descriptor(V, [keys, D], [v_row, 1], [BLOCK_K, BLOCK_D])
    if PART:
        q_parts = tl.make_tensor_descriptor(Q, [queries, q_width], [q_row, 1], [BLOCK_Q, PART])
        d_parts = tl.make_tensor_descriptor(DOUT, [queries, d_width], [d_row, 1], [BLOCK_Q, PART])
        k_parts = tl.make_tensor_descriptor(K, [keys, D], [k_row, 1], [BLOCK_K, PART])
        v_parts = tl.make_tensor_descriptor(V, [keys, D], [v_row, 1], [BLOCK_K, PART])
    if ADD_DQ:
        dq_row = heads * groups * D
        DQ += (rows_from + q_start) * dq_row + first * D
        if not BY_POINTERS:
            dq_rows = tl.make_tensor_descriptor(DQ, [queries, groups * D], [dq_row, 1], [BLOCK_Q, BLOCK_D])
    if ADD_DQ or not PART:
        k, v = k_rows.load([column, 0]), v_rows.load([column, 0])
    dk, dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32), tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    columns = (column + tl.arange(0, BLOCK_K))[:, None]
    begin, full, end_full, end = query_blocks(column, queries, keys, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT)
    if ADD_DQ:
        full = tl.where(column + BLOCK_K > keys, end, full)  # what is beyond the keys is 0, and 0 * inf would reach dQ
    steps = tl.cdiv(max(end - begin, 0), BLOCK_Q)
    for step in tl.range(0, steps * groups):
        group = step // max(steps, 1)  # a loop that is not entered may still compute its first step ahead
        row = begin + (step - group * steps) * BLOCK_Q
        rows = row + tl.arange(0, BLOCK_Q)
        at = statistics + q_start + (first + group) * of_a_head
        q_column, d_column = (group * q_head).to(tl.int32), (group * d_head).to(tl.int32)
        q = q_rows.load([row, q_column])
        lse = tl.load(LSE + at + rows, mask=rows < queries, other=float("inf")) * LOG2_E
        if PART:
            s = products(k_parts, column, 0, q_parts, row, q_column, BLOCK_K, BLOCK_Q, D, PART)
            dout = d_rows.load([row, d_column])
            dshare = products(v_parts, column, 0, d_parts, row, d_column, BLOCK_K, BLOCK_Q, D, PART)
        else:
            s = tl.dot(k, q.T)
            dout = d_rows.load([row, d_column])
            dshare = tl.dot(v, dout.T)
        delta = tl.load(DELTA + at + rows, mask=rows < queries, other=0.0)
        slope = 0.0
        if ALIBI:
            slope = tl.load(SLOPES + sequence * slopes_sequence + first + group)
        given, ds = _gradient_of_scores(
            s, dshare, (row < full) | (row >= end_full), (rows + (keys - queries))[None, :], columns, lse[None, :], delta[None,
            :],
            keys, left, right, scale, softcap, slope, sequence + o_sequence, first + group + o_head, rows[None, :] + o_query,
            columns + o_key,
            seed_low, seed_high, drop_below, keep_scale, HAS_LEFT or HAS_RIGHT or ADD_DQ, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI,
            DROPOUT,
        )  # fmt: skip
        dv = tl.dot(given.to(dout.dtype), dout, dv, input_precision="ieee")
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
        if ADD_DQ:
            part = tl.dot(ds.T, k, input_precision="ieee")
            if BY_POINTERS:
                wide_columns = tl.arange(0, BLOCK_D)[None, :]
                target = DQ + rows[:, None].to(tl.int64) * dq_row + group * D + wide_columns
                tl.atomic_add(target, part, mask=(rows < queries)[:, None] & (wide_columns < D), sem="relaxed")
            else:
                dq_rows.atomic_add([row, group * D], part)  # beyond D it adds zeros: k has none there
    out_row = heads * D
    DK += (columns_from + k_start) * out_row + kv * D
    DV += (columns_from + k_start) * out_row + kv * D
    dk_rows = tl.make_tensor_descriptor(DK, [keys, D], [out_row, 1], [BLOCK_K, BLOCK_D])
    dv_rows = tl.make_tensor_descriptor(DV, [keys, D], [out_row, 1], [BLOCK_K, BLOCK_D])
    dk_rows.store([column, 0], (dk * scale).to(DK.dtype.element_ty))
    dv_rows.store([column, 0], dv.to(DV.dtype.element_ty))


@triton.jit
def _gather(
    dq, q, dout, lse, delta, Q_PARTS, D_PARTS, K_PARTS, V_PARTS, K, V, begin, end, row, queries, keys, left, right, scale,
    softcap, slope,
    sequence, head, query_from, key_from, seed_low, seed_high, drop_below, keep_scale,
    D: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dQ after the keys from begin to end."""
    rows = (row + tl.arange(0, BLOCK_Q))[:, None]
    for start in tl.range(begin, end, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K))[None, :]
        k = K.load([start, 0])
        if PART:
            s = products(Q_PARTS, row, 0, K_PARTS, start, 0, BLOCK_Q, BLOCK_K, D, PART)
            dshare = products(D_PARTS, row, 0, V_PARTS, start, 0, BLOCK_Q, BLOCK_K, D, PART)
        else:
            s = tl.dot(q, k.T)
            dshare = tl.dot(dout, V.load([start, 0]).T)
        _, ds = _gradient_of_scores(
            s, dshare, True, rows + (keys - queries), columns, lse[:, None], delta[:, None], keys, left, right, scale, softcap,
            slope,
            sequence, head, rows + query_from, columns + key_from, seed_low, seed_high, drop_below, keep_scale,
            MASK, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
        )  # fmt: skip
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _dq(
    Q, K, V, DOUT, LSE, DELTA, DQ, SLOPES, STARTS_Q, STARTS_K, sequences, queries, keys, heads, groups, blocks, width,
    q_sequence, q_row, q_head, k_sequence, k_row, k_head, v_sequence, v_row, v_head, d_sequence, d_row, d_head, slopes_sequence,
    left, right, scale, softcap, seed_low, seed_high, drop_below, keep_scale, o_sequence, o_head, o_query, o_key,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries of one head; heads: of queries."""
    sequence, head, heads, block = part_of(tl.program_id(0), blocks, heads, width, STARTS_Q, sequences, BLOCK_Q, SEQUENCES, True)
    wide, this, kv = sequence.to(tl.int64), head.to(tl.int64), (head // groups).to(tl.int64)
    statistics = (this if SEQUENCES else wide * heads + head) * queries  # where this head's begin
    rows_from = wide * 0 if SEQUENCES else wide * queries
    q_start, queries = span(STARTS_Q, sequence, queries, SEQUENCES)
    k_start, keys = span(STARTS_K, sequence, keys, SEQUENCES)
    row = block * BLOCK_Q
    if row >= queries:
        return
    Q += wide * q_sequence + q_start * q_row + this * q_head
    DOUT += wide * d_sequence + q_start * d_row + this * d_head
    K += wide * k_sequence + k_start * k_row + kv * k_head
    V += wide * v_sequence + k_start * v_row + kv * v_head
    q_rows = tl.make_tensor_descriptor(Q, [queries, D], [q_row, 1], [BLOCK_Q, BLOCK_D])
    d_rows = tl.make_tensor_descriptor(DOUT, [queries, D], [d_row, 1], [BLOCK_Q, BLOCK_D])
    k_rows = tl.make_tensor_descriptor(K, [keys, D], [k_row, 1], [BLOCK_K, BLOCK_D])
    v_rows = tl.make_tensor_descriptor(V, [keys, D], [v_row, 1], [BLOCK_K, BLOCK_D])
    q, dout, q_parts, d_parts, k_parts, v_parts = q_rows, d_rows, q_rows, d_rows, k_rows, v_rows
    if PART:
        q_parts = tl.make_tensor_descriptor(Q, [queries, D], [q_row, 1], [BLOCK_Q, PART])
        d_parts = tl.make_tensor_descriptor(DOUT, [queries, D], [d_row, 1], [BLOCK_Q, PART])
        k_parts = tl.make_tensor_descriptor(K, [keys, D], [k_row, 1], [BLOCK_K, PART])
        v_parts = tl.make_tensor_descriptor(V, [keys, D], [v_row, 1], [BLOCK_K, PART])
    else:
        q, dout = q_rows.load([row, 0]), d_rows.load([row, 0])
    rows = row + tl.arange(0, BLOCK_Q)
    lse = tl.load(LSE + statistics + q_start + rows, mask=rows < queries, other=float("inf")) * LOG2_E
    delta = tl.load(DELTA + statistics + q_start + rows, mask=rows < queries, other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + sequence * slopes_sequence + head)
    dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    begin, full, end_full, end = key_blocks(row, queries, keys, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        dq = _gather(
            dq, q, dout, lse, delta, q_parts, d_parts, k_parts, v_parts, k_rows, v_rows, begin, min(full, end), row, queries,
            keys, left, right, scale, softcap, slope,
            sequence + o_sequence, head + o_head, o_query, o_key, seed_low, seed_high, drop_below, keep_scale,
            D, PART, BLOCK_Q, BLOCK_K, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
        )  # fmt: skip
    dq = _gather(
        dq, q, dout, lse, delta, q_parts, d_parts, k_parts, v_parts, k_rows, v_rows, full, end_full, row, queries, keys, left,
        right, scale, softcap, slope,
        sequence + o_sequence, head + o_head, o_query, o_key, seed_low, seed_high, drop_below, keep_scale,
        D, PART, BLOCK_Q, BLOCK_K, False, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
    )  # fmt: skip
    dq = _gather(
        dq, q, dout, lse, delta, q_parts, d_parts, k_parts, v_parts, k_rows, v_rows, end_full, end, row, queries, keys, left,
        right, scale, softcap, slope,
        sequence + o_sequence, head + o_head, o_query, o_key, seed_low, seed_high, drop_below, keep_scale,
        D, PART, BLOCK_Q, BLOCK_K, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
    )  # fmt: skip
    out_row = heads * D
    DQ += (rows_from + q_start) * out_row + head * D
    dq_rows = tl.make_tensor_descriptor(DQ, [queries, D], [out_row, 1], [BLOCK_Q, BLOCK_D])
    dq_rows.store([row, 0], (dq * scale).to(DQ.dtype.element_ty))


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    seed: int,
    origin: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous, and delta, laid out like lse: of it sinks have their gradient."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    if q.numel() == 0 or k.numel() == 0:  # the result is 0, but sinks have a gradient through the lse
        return dq.zero_(), dk.zero_(), dv.zero_(), delta.zero_() if dlse is None else delta.copy_(dlse).neg_()
    if cu_seqlens_q is not None:  # rows behind the last sequence are nobody's
        dq, dk, dv = dq.zero_(), dk.zero_(), dv.zero_()
    out, lse = out.contiguous(), lse.contiguous()
    grouped = q.shape[-2] > k.shape[-2]
    q, dout = (_rows_together(tile_ready(x)) if grouped else tile_ready(x) for x in (q, dout))
    k, v = tile_ready(k), tile_ready(v)
    alibi_slopes, cu_seqlens_q, cu_seqlens_k = in_order(alibi_slopes, cu_seqlens_q, cu_seqlens_k)
    _launch_delta(out, dout, dlse, delta)
    _launch_gradients(
        dq, dk, dv, dout, q, k, v, lse, delta, alibi_slopes, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap,
        dropout_p, seed, origin, deterministic,
    )  # fmt: skip
    return dq, dk, dv, delta


def _launch_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor,
    alibi_slopes: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, left: int, right: int, scale: float,
    softcap: float, dropout_p: float, seed: int, origin: list[int], deterministic: bool,
) -> None:  # fmt: skip
    """Everything after delta."""
    strides = (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(dout), slopes_stride(alibi_slopes))
    numbers = (left, right, scale, softcap, *dropout_arguments(dropout_p, seed), *origin)
    flags = flags_of(left, right, softcap, alibi_slopes, dropout_p) | dict(SEQUENCES=sequences_bound(cu_seqlens_q))
    sizes = (q.shape[-3], k.shape[-3])
    groups = q.shape[-2] // k.shape[-2]

    added = None if deterministic else torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    more = alibi_slopes is not None or softcap > 0.0 or dropout_p > 0.0
    settings = settings_of("attention_dkdv" if deterministic else "attention_backward", q, more)
    sequences, blocks, heads = count_programs(k, cu_seqlens_k, settings["BLOCK_K"])
    width = min(max(1, heads_at_once(q, k) // groups), heads)
    launch(
        _dkdv, (heads * blocks,), q, k, v, dout, lse, delta, added, dk, dv, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
        sequences, *sizes, heads, groups, blocks, width, *strides, *numbers, ADD_DQ=not deterministic,
        BY_POINTERS=interpreting() or arch_of(q.device) < 90, **flags, **settings,
    )  # fmt: skip
    if added is not None:
        torch.mul(added, scale, out=added)
        dq.copy_(added)
        return

    settings = settings_of("attention_dq", q, more)
    sequences, blocks, heads = count_programs(q, cu_seqlens_q, settings["BLOCK_Q"])
    launch(
        _dq, (heads * blocks,), q, k, v, dout, lse, delta, dq, alibi_slopes, cu_seqlens_q, cu_seqlens_k,
        sequences, *sizes, heads, groups, blocks, min(heads_at_once(q, k), heads), *strides, *numbers, **flags, **settings,
    )  # fmt: skip


def _launch_delta(out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    """Packed sequences are one sequence here: rows do not look at each other."""
    queries, heads, dim = out.shape[-3:]
    settings = tables.lookup("attention_delta", arch_of(out.device), dim)
    blocks = triton.cdiv(queries, settings["BLOCK"])
    launch(
        _delta, (delta.numel() // queries * blocks,), out, dout, None if dlse is None else dlse.contiguous(), delta,
        queries, heads, blocks, *strides_of(dout), D=dim, BLOCK_D=triton.next_power_of_2(dim), WITH_LSE=dlse is not None,
        **settings,
    )  # fmt: skip


def _rows_together(x: Tensor) -> Tensor:
    """x, or a copy where one descriptor cannot read the heads of a group: not all heads of a row lie between one row and the
    next; or a tile, whose width is a power of two, reaches beyond a head into memory that may hold anything, NaN too."""
    heads, dim = x.shape[-2:]
    apart = x.stride(-2)
    between_rows = x.stride(-3) >= (heads - 1) * apart + dim
    alone = apart == dim or (apart > 0 and dim == padded_dim(dim))
    return x if between_rows and alone else x.contiguous()


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """What presets launch (heads and lengths make no kernels of their own), every row of the tables, every feature."""
    products = {"HMMA", "TMA"}
    for dim in (32, 48, 64, 80, 96, 128, 192, 256):
        by_groups = {"HGMMA"} if dim <= 128 else set()  # of warps; wider tiles have too few rows for it
        yield f"attention backward D{dim}", partial(_specimen, torch.bfloat16, dim), products | by_groups
    yield "attention backward float16 D128", partial(_specimen, torch.float16, 128), products | {"HGMMA"}
    for dim in (32, 48, 64, 128, 192, 256):
        yield f"attention backward float32 D{dim}", partial(_specimen, torch.float32, dim), {"TMA"}
    each: tuple[dict[str, Any], ...] = (dict(right=-1), dict(left=512, packed=True), dict(alibi=True), dict(softcap=30.0))
    for features in each:
        label = f"attention backward D128 {', '.join(features)}"
        yield label, partial(_specimen, torch.bfloat16, 128, **features), products | {"HGMMA"}
    for dim in (64, 128, 256):
        yield f"attention backward D{dim} everything", partial(_specimen, torch.bfloat16, dim, **_EVERYTHING), products
        for features in ({}, _EVERYTHING):
            label = f"attention backward D{dim} in one pass{', everything' * bool(features)}"
            yield label, partial(_specimen, torch.bfloat16, dim, False, **features), products
        label = f"attention backward float32 D{dim} in one pass"
        yield label, partial(_specimen, torch.float32, dim, False), {"TMA"}
    for dtype in (torch.bfloat16, torch.float32):
        for dim in (32, 48, 64, 128, 192):
            yield f"attention delta {dtype} D{dim}", partial(_delta_specimen, dtype, dim), {"LDG.128"}
    yield "attention delta with a gradient of lse", partial(_delta_specimen, torch.bfloat16, 128, with_lse=True), {"LDG.128"}


_EVERYTHING: dict[str, Any] = dict(left=512, packed=True, alibi=True, softcap=30.0, dropout_p=0.1)


def _delta_specimen(dtype: torch.dtype, dim: int, with_lse: bool = False) -> None:
    out = torch.empty(2, 4096, 8, dim, dtype=dtype, device="meta")
    lse = torch.empty(2, 8, 4096, device="meta")
    _launch_delta(out, out, lse if with_lse else None, lse)


def _specimen(
    dtype: torch.dtype, dim: int, deterministic: bool = True, left: int = -1, right: int = 0, packed: bool = False,
    alibi: bool = False, softcap: float = 0.0, dropout_p: float = 0.0,
) -> None:  # fmt: skip
    size = (4096,) if packed else (2, 4096)
    q, k = (torch.empty(*size, heads, dim, dtype=dtype, device="meta") for heads in (8, 2))
    lse = torch.empty(*size[:-1], 8, 4096, device="meta")
    slopes = torch.empty(8, device="meta") if alibi else None
    starts = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    numbers = (left, right, dim**-0.5, softcap, dropout_p, 1, [0, 0, 0, 0])
    _launch_gradients(q, k, k, q, q, k, k, lse, lse, slopes, starts, starts, *numbers, deterministic)
