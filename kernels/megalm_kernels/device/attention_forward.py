"""The forward of attention: one pass over the keys with a running maximum (Dao 2023, algorithm 1), scores in base 2."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels import tables
from megalm_kernels.attention import hopper
from megalm_kernels.attention.call import Call
from megalm_kernels.attention.philox import threshold
from megalm_kernels.device.attention_tiles import (
    LN_2,
    LOG2_E,
    heads_at_once,
    keeps,
    key_blocks,
    part_of,
    products,
    scored,
    span,
    visible,
)
from megalm_kernels.launch import arch_of, launch, seed_halves


@triton.jit
def _attend(
    acc, total, largest, q, Q_PARTS, K_PARTS, K, V, begin, end, row, queries, keys, left, right, scale, softcap, slope,
    sequence, head, query_from, key_from, seed_low, seed_high, drop_below,
    D: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MASK: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The keys from begin to end; acc, total and largest as they are after them."""
    rows = row + tl.arange(0, BLOCK_Q)
    places = (rows + (keys - queries))[:, None]
    for start in tl.range(begin, end, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K))[None, :]
        if PART:
            s = products(Q_PARTS, 0, 0, K_PARTS, start, 0, BLOCK_Q, BLOCK_K, D, PART)
        else:
            s = tl.dot(q, K.load([start, 0]).T)
        s, factor, _ = scored(s, places, columns, scale, softcap, slope, SOFTCAP, ALIBI)
        if MASK:
            s = tl.where(visible(places, columns, keys, left, right, HAS_LEFT, HAS_RIGHT), s, float("-inf"))
        new = tl.maximum(largest, tl.max(s, axis=1) * factor)
        base = new
        if MASK:
            base = tl.where(new == float("-inf"), 0.0, new)  # of a row that has seen nothing yet
        share = tl.exp2(s * factor - base[:, None])
        shrink = tl.exp2(largest - base)
        total = total * shrink + tl.sum(share, axis=1)
        if DROPOUT:
            keep = keeps(rows[:, None] + query_from, columns + key_from, head, sequence, seed_low, seed_high, drop_below)
            share = tl.where(keep, share, 0.0)
        v = V.load([start, 0])
        acc = tl.dot(share.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = new
    return acc, total, largest


UNSPECIALIZED = [  # integers whose divisibility is of no use: no kernel of their own for each of them
    "sequences", "queries", "keys", "heads", "groups", "blocks", "width", "slopes_sequence", "left", "right",
    "seed_low", "seed_high", "drop_below", "o_sequence", "o_head", "o_query", "o_key",
]  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _forward(
    Q, K, V, OUT, LSE, SLOPES, SINKS, STARTS_Q, STARTS_K, sequences, queries, keys, heads, groups, blocks, width,
    q_sequence, q_row, q_head, k_sequence, k_row, k_head, v_sequence, v_row, v_head, slopes_sequence,
    left, right, scale, softcap, seed_low, seed_high, drop_below, keep_scale, o_sequence, o_head, o_query, o_key,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PART: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    SEQUENCES: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, SINK: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """out = softmax(scores) v and lse = log sum exp(scores) for one block of queries of one head. SEQUENCES: 0 if not packed."""
    sequence, head, heads, block = part_of(tl.program_id(0), blocks, heads, width, STARTS_Q, sequences, BLOCK_Q, SEQUENCES, True)
    wide, this, kv = sequence.to(tl.int64), head.to(tl.int64), (head // groups).to(tl.int64)
    statistics = (this if SEQUENCES else wide * heads + head) * queries  # where this head's begin
    out_from = wide * 0 if SEQUENCES else wide * queries
    q_start, queries = span(STARTS_Q, sequence, queries, SEQUENCES)
    k_start, keys = span(STARTS_K, sequence, keys, SEQUENCES)
    row = block * BLOCK_Q
    if row >= queries:
        return
    Q += wide * q_sequence + (q_start + row) * q_row + this * q_head
    K += wide * k_sequence + k_start * k_row + kv * k_head
    V += wide * v_sequence + k_start * v_row + kv * v_head
    q_rows = tl.make_tensor_descriptor(Q, [queries - row, D], [q_row, 1], [BLOCK_Q, BLOCK_D])
    k_rows = tl.make_tensor_descriptor(K, [keys, D], [k_row, 1], [BLOCK_K, BLOCK_D])
    v_rows = tl.make_tensor_descriptor(V, [keys, D], [v_row, 1], [BLOCK_K, BLOCK_D])
    slope = 0.0
    if ALIBI:
        slope = tl.load(SLOPES + sequence * slopes_sequence + head)
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if SINK:
        largest = tl.zeros((BLOCK_Q,), tl.float32) + tl.load(SINKS + head).to(tl.float32) * LOG2_E
        total += 1.0
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    q, q_parts, k_parts = q_rows, q_rows, k_rows
    if PART:
        q_parts = tl.make_tensor_descriptor(Q, [queries - row, D], [q_row, 1], [BLOCK_Q, PART])
        k_parts = tl.make_tensor_descriptor(K, [keys, D], [k_row, 1], [BLOCK_K, PART])
    else:
        q = q_rows.load([0, 0])
    begin, full, end_full, end = key_blocks(row, queries, keys, left, right, BLOCK_Q, BLOCK_K, HAS_LEFT, HAS_RIGHT)
    if HAS_LEFT:
        acc, total, largest = _attend(
            acc, total, largest, q, q_parts, k_parts, k_rows, v_rows, begin, min(full, end), row, queries, keys, left, right,
            scale, softcap, slope,
            sequence + o_sequence, head + o_head, o_query, o_key, seed_low, seed_high, drop_below,
            D, PART, BLOCK_Q, BLOCK_K, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
        )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, q_parts, k_parts, k_rows, v_rows, full, end_full, row, queries, keys, left, right, scale,
        softcap, slope,
        sequence + o_sequence, head + o_head, o_query, o_key, seed_low, seed_high, drop_below,
        D, PART, BLOCK_Q, BLOCK_K, False, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
    )  # fmt: skip
    acc, total, largest = _attend(
        acc, total, largest, q, q_parts, k_parts, k_rows, v_rows, end_full, end, row, queries, keys, left, right, scale, softcap,
        slope,
        sequence + o_sequence, head + o_head, o_query, o_key, seed_low, seed_high, drop_below,
        D, PART, BLOCK_Q, BLOCK_K, True, HAS_LEFT, HAS_RIGHT, SOFTCAP, ALIBI, DROPOUT,
    )  # fmt: skip
    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    lse = tl.where(nothing, float("-inf"), (largest + tl.log2(total)) * LN_2)
    rows = row + tl.arange(0, BLOCK_Q)
    tl.store(LSE + statistics + q_start + rows, lse, mask=rows < queries)
    if DROPOUT:
        total = total / keep_scale
    out_row = heads * D
    OUT += (out_from + q_start + row) * out_row + head * D
    out = tl.make_tensor_descriptor(OUT, [queries - row, D], [out_row, 1], [BLOCK_Q, BLOCK_D])
    out.store([0, 0], (acc * (1.0 / total)[:, None]).to(OUT.dtype.element_ty))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    seed: int,
    origin: list[int],
    deterministic: bool = True,
) -> tuple[Tensor, Tensor]:
    """Result and lse; see `flash_attention`. Result contiguous, lse (B, H, Sq) or packed (H, Tq) fp32."""
    heads = q.shape[-2]
    if cu_seqlens_q is None and hopper.ready(q.device):
        call = Call(left, right, scale, softcap, alibi_slopes, sinks, dropout_p)
        if not hopper.takes(q, k, call):
            from megalm_kernels.device import attention_hopper  # and with it Gluon, which others need not load

            return attention_hopper.forward(q, k, v, left, right, scale)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((*q.shape[:-3], heads, q.shape[-3]), dtype=torch.float32, device=q.device)
    if cu_seqlens_q is not None:  # rows behind the last sequence are nobody's, and stay so
        out, lse = out.zero_(), lse.fill_(-torch.inf)
    if q.numel() == 0:
        return out, lse
    if k.numel() == 0:
        lse.copy_(torch.full_like(lse, -torch.inf) if sinks is None else sinks.float()[:, None].expand(lse.shape))
        if cu_seqlens_q is not None:
            lse.masked_fill_(torch.arange(lse.shape[-1], device=lse.device) >= cu_seqlens_q[-1], -torch.inf)
        return out.zero_(), lse
    q, k, v = (tile_ready(x) for x in (q, k, v))
    alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k = in_order(alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k)
    settings = settings_of("attention_forward", q, more=dropout_p > 0.0)
    sequences, blocks, programs = count_programs(q, cu_seqlens_q, settings["BLOCK_Q"])
    launch(
        _forward, (programs * blocks,), q, k, v, out, lse, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k,
        sequences, q.shape[-3], k.shape[-3], programs, heads // k.shape[-2], blocks, min(heads_at_once(q, k), programs),
        *strides_of(q), *strides_of(k), *strides_of(v), slopes_stride(alibi_slopes), left, right, scale, softcap,
        *dropout_arguments(dropout_p, seed), *origin, SEQUENCES=sequences_bound(cu_seqlens_q),
        **flags_of(left, right, softcap, alibi_slopes, dropout_p), SINK=sinks is not None, **settings,
    )  # fmt: skip
    return out, lse


def settings_of(kernel: str, q: Tensor, more: bool) -> dict[str, Any]:
    """Block sizes by the head dimension, padded to a power of two. more: features that take registers. PART: see `products`."""
    dim, padded, wide = q.shape[-1], padded_dim(q.shape[-1]), q.element_size() == 4
    table = "32" if wide else "16_more" if more else "16"  # in fp32 one for all features
    settings = tables.lookup(f"{kernel}_{table}", arch_of(q.device), dim)
    return dict(D=dim, BLOCK_D=padded, PART=min(32, padded) if wide else 0) | settings


def padded_dim(dim: int) -> int:
    """How wide a tile is: products want powers of two, and 16 at the least."""
    return max(16, triton.next_power_of_2(dim))


def count_programs(x: Tensor, starts: Tensor | None, block: int) -> tuple[int, int, int]:
    """(sequences, blocks of a head, heads in all); packed: slots, of which some stay empty, and the heads of one sequence."""
    if starts is None:
        return x.shape[0], triton.cdiv(x.shape[-3], block), x.shape[0] * x.shape[-2]
    sequences = starts.shape[0] - 1
    return sequences, x.shape[-3] // block + sequences, x.shape[-2]


def sequences_bound(starts: Tensor | None) -> int:
    """Packed sequences, rounded up to a power of two; 0: not packed."""
    return 0 if starts is None else triton.next_power_of_2(max(starts.shape[0] - 1, 1))


def tile_ready(x: Tensor) -> Tensor:
    """x, or a copy where a descriptor cannot reach its rows: address and strides must be multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    fits = aligned and x.stride(-1) == 1 and (x.stride(-3) > 0 or x.shape[-3] == 1)  # no row stands for several
    return x if fits else x.clone(memory_format=torch.contiguous_format)  # contiguous() may return x itself, misaligned as it is


def in_order(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What is read one number after the other, contiguous."""
    return tuple(x if x is None else x.contiguous() for x in tensors)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Of a sequence, a row and a head."""
    return (x.stride(0) if x.dim() == 4 else 0), x.stride(-3), x.stride(-2)


def slopes_stride(slopes: Tensor | None) -> int:
    return slopes.stride(0) if slopes is not None and slopes.dim() == 2 else 0


def dropout_arguments(probability: float, seed: int) -> tuple[int, int, int, float]:
    """The seed in signed halves, the threshold, and what is kept is multiplied by."""
    return *seed_halves(seed), threshold(probability), 1.0 / (1.0 - probability)


def flags_of(left: int, right: int, softcap: float, slopes: Tensor | None, probability: float) -> dict[str, bool]:
    return dict(
        HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, SOFTCAP=softcap > 0.0, ALIBI=slopes is not None, DROPOUT=probability > 0.0
    )


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the tables, the heads of the presets, and each feature."""
    claims = {"HMMA", "HGMMA", "UTCMMA", "TMA"}
    for dim in (32, 48, 64, 80, 96, 128, 192, 256):
        yield f"attention bfloat16 D{dim}", partial(_specimen, torch.bfloat16, dim), claims
    for dim in (32, 48, 64, 128, 192, 256):
        yield f"attention float32 D{dim}", partial(_specimen, torch.float32, dim), set()
    yield "attention float16 D128", partial(_specimen, torch.float16, 128), claims
    each: tuple[dict[str, Any], ...] = (dict(right=-1), dict(left=1024, packed=True), dict(softcap=30.0), dict(slopes=True,
    sinks=True))
    for features in each:
        yield f"attention bfloat16 D128 {', '.join(features)}", partial(_specimen, torch.bfloat16, 128, **features), claims
    for dim in (64, 128, 256):
        yield f"attention bfloat16 D{dim} everything", partial(_specimen, torch.bfloat16, dim, **_EVERYTHING), claims


_EVERYTHING: dict[str, Any] = dict(left=1024, packed=True, softcap=30.0, slopes=True, sinks=True, dropout_p=0.1)


def _specimen(
    dtype: torch.dtype,
    dim: int,
    left: int = -1,
    right: int = 0,
    packed: bool = False,
    softcap: float = 0.0,
    slopes: bool = False,
    sinks: bool = False,
    dropout_p: float = 0.0,
) -> object:
    shape = (4096,) if packed else (2, 4096)
    q, k = (torch.empty(*shape, heads, dim, dtype=dtype, device="meta") for heads in (32, 8))
    starts = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    alibi, sink = (torch.empty(32, device="meta") if wanted else None for wanted in (slopes, sinks))
    return forward(q, k, k, alibi, sink, starts, starts, left, right, dim**-0.5, softcap, dropout_p, 1, [0, 0, 0, 0])
