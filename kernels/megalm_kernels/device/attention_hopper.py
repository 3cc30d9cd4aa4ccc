"""The forward of dense attention for sm_90, in Gluon: one warp that loads, two groups of four warps that compute.

A program has 128 queries of one head, 64 for each group, and goes over the keys in blocks of 128, the last block first. The
loading warp brings K and V by TMA into two rings of STAGES buffers. Full and empty are said by mbarriers: `full` counts one
arrival and the bytes of the copy, `empty` one arrival per group, each after all four warps of it have done reading.

A group works on block j while the product of block j - 1 with V is still going on:

    scores of j by K    |  wait  |  softmax of j                         |  rescale
    product of j - 1 by V  .  .  .  .  .  .  .  .  .  .  .  .  .  wait   |

so that the tensor cores have work during the exponentials, of this group and of the other (Shah et al. 2024, section 3.2).
The block that the causal diagonal cuts is the first one, where every query sees itself: so no maximum is ever -inf, and
nothing in the loop is masked. Nothing here runs in the interpreter; tests/kernels/test_attention_hopper.py executes these very
functions in Python, with barriers that may be late, and attention/hopper.py tries the kernel before it is first used.
"""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from megalm_kernels import tables
from megalm_kernels.attention.hopper import ARCH, HEAD_DIMS, TILE
from megalm_kernels.device.attention_tiles import LN_2, LOG2_E, heads_at_once, place_in
from megalm_kernels.launch import arch_of, launch

_ROWS = gl.constexpr(64)  # queries of a group of warps

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # what Triton 3.9 and 3.6 call it
_store = tma.async_store if hasattr(tma, "async_load") else tma.async_copy_shared_to_global


@gluon.jit
def _slot(step, STAGES: gl.constexpr):
    """Which buffer of a ring has its step-th tile, and the parity of the phase in which it is filled."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def _fill(descriptor, row, column, step, buffers, full, empty, STAGES: gl.constexpr):
    """Load the step-th tile of a ring as soon as its buffer is free; on a new barrier the wait ends at once."""
    stage, parity = _slot(step, STAGES)
    mbarrier.wait(empty.index(stage), parity ^ 1)
    mbarrier.expect(full.index(stage), descriptor.block_type.nbytes)
    _load(descriptor, [row, column], full.index(stage), buffers.index(stage))


@gluon.jit
def _produce(descriptors, rings, queries, places, visited, STAGES: gl.constexpr):
    """Load what the groups need in the order in which they wait for it: K of a block before V of the block before."""
    q_desc, k_desc, v_desc = descriptors
    k_buffers, k_full, k_empty, v_buffers, v_full, v_empty = rings
    q_buffers, q_full = queries
    q_row, q_column, k_row, k_column = places
    for group in gl.static_range(2):
        mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
        _load(q_desc, [q_row + group * _ROWS, q_column], q_full.index(group), q_buffers.index(group))
    keys: gl.constexpr = k_desc.block_type.shape[0]
    last = k_row + (visited - 1) * keys
    _fill(k_desc, last, k_column, 0, k_buffers, k_full, k_empty, STAGES)
    for step in range(1, visited):
        _fill(k_desc, last - step * keys, k_column, step, k_buffers, k_full, k_empty, STAGES)
        _fill(v_desc, last - (step - 1) * keys, k_column, step - 1, v_buffers, v_full, v_empty, STAGES)
    _fill(v_desc, k_row, k_column, visited - 1, v_buffers, v_full, v_empty, STAGES)


@gluon.jit
def _consume(group, rings, queries, out_desc, LSE, places, visited, scale, STAGES: gl.constexpr, CAUSAL: gl.constexpr):
    """Softmax in base 2 of 64 rows: `largest` so far times log2(e), `total` of 2^(score - largest)."""
    k_buffers, k_full, k_empty, v_buffers, v_full, v_empty = rings
    q_buffers, q_full = queries
    q_row, q_column, lse_row = places
    keys: gl.constexpr = k_buffers.type.shape[1]
    channels: gl.constexpr = k_buffers.type.shape[2]
    dtype: gl.constexpr = q_buffers.dtype
    by_k: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, keys, 16])
    by_v: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, channels, 16])
    shares: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=by_v, k_width=2)
    row_of: gl.constexpr = gl.SliceLayout(1, by_k)
    out_row_of: gl.constexpr = gl.SliceLayout(1, by_v)

    scale2 = scale * LOG2_E
    rows = group * _ROWS + gl.arange(0, _ROWS, row_of)
    nothing = gl.zeros([_ROWS, keys], gl.float32, by_k)
    acc = gl.zeros([_ROWS, channels], gl.float32, by_v)
    q = q_buffers.index(group)
    mbarrier.wait(q_full.index(group), 0)
    mbarrier.wait(k_full.index(0), 0)
    going = warpgroup_mma(q, k_buffers.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[going])
    mbarrier.arrive(k_empty.index(0), count=1)
    if CAUSAL:
        columns = gl.arange(0, keys, gl.SliceLayout(0, by_k))
        s = gl.where(gl.expand_dims(rows, 1) >= gl.expand_dims(columns, 0), s, -float("inf"))
    largest = gl.max(s, 1) * scale2
    p = gl.exp2(s * scale2 - gl.expand_dims(largest, 1))
    total = gl.sum(p, 1)
    a = gl.convert_layout(p.to(dtype), shares)

    for step in range(1, visited):
        stage, parity = _slot(step, STAGES)
        before, before_parity = _slot(step - 1, STAGES)
        mbarrier.wait(k_full.index(stage), parity)
        going = warpgroup_mma(q, k_buffers.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), before_parity)
        adding = warpgroup_mma(a, v_buffers.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[going])
        mbarrier.arrive(k_empty.index(stage), count=1)
        new = gl.maximum(largest, gl.max(s, 1) * scale2)
        p = gl.exp2(s * scale2 - gl.expand_dims(new, 1))
        shrink = gl.exp2(largest - new)
        total = total * shrink + gl.sum(p, 1)
        largest = new
        a_next = gl.convert_layout(p.to(dtype), shares)
        # Once more, and at once: ptxas moves the exponentials below a wait for products, but not below a wait for a barrier.
        mbarrier.wait(v_full.index(before), before_parity)
        acc = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, out_row_of), 1)
        a = a_next

    stage, parity = _slot(visited - 1, STAGES)
    mbarrier.wait(v_full.index(stage), parity)
    adding = warpgroup_mma(a, v_buffers.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[adding])
    gl.store(LSE + lse_row + rows, (largest + gl.log2(total)) * LN_2)
    acc = acc / gl.expand_dims(gl.convert_layout(total, out_row_of), 1)
    q.store(acc.to(dtype))  # nobody else reads these rows of q, and this group has
    fence_async_shared()
    _store(out_desc, [q_row + group * _ROWS, q_column], q)
    tma.store_wait(0)


@gluon.jit
def _ring(descriptor, STAGES: gl.constexpr):
    """STAGES buffers of a tile, and for each a barrier that says full and one that says empty."""
    tile: gl.constexpr = descriptor.block_type.shape
    buffers = gl.allocate_shared_memory(descriptor.dtype, [STAGES, tile[0], tile[1]], descriptor.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    return buffers, full, empty


@gluon.jit(do_not_specialize=["tiles", "blocks", "heads", "group_size", "sequences", "together"])
def _forward_hopper(
    q_desc,
    k_desc,
    v_desc,
    out_desc,
    LSE,
    scale,
    tiles,
    blocks,
    heads,
    group_size,
    sequences,
    together,
    STAGES: gl.constexpr,
    CAUSAL: gl.constexpr,
    COMPUTE_REGISTERS: gl.constexpr,
    LOAD_REGISTERS: gl.constexpr,
):
    """out = softmax(scale q k^T) v for one tile of queries; `blocks` of keys, each head of k for `group_size` heads of q."""
    tile, place = place_in(gl.program_id(0), tiles, sequences * heads, together)  # the longest rows first
    sequence, head = place // heads, place % heads
    visited = blocks
    if CAUSAL:
        visited = blocks - (tiles - 1 - tile)
    queries: gl.constexpr = 2 * q_desc.block_type.shape[0]
    keys: gl.constexpr = k_desc.block_type.shape[0]
    channels: gl.constexpr = k_desc.block_type.shape[1]
    q_row = (sequence * tiles + tile) * queries
    k_row = sequence * blocks * keys
    lse_row = gl.cast(place * tiles + tile, gl.int64) * queries

    k_buffers, k_full, k_empty = _ring(k_desc, STAGES)
    v_buffers, v_full, v_empty = _ring(v_desc, STAGES)
    q_buffers = gl.allocate_shared_memory(q_desc.dtype, [2, q_desc.block_type.shape[0], channels], q_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for group in gl.static_range(2):
        mbarrier.init(q_full.index(group), count=1)
    fence_async_shared()  # the TMA sees the barriers as they are now

    rings = (k_buffers, k_full, k_empty, v_buffers, v_full, v_empty)
    tiles_of_q = (q_buffers, q_full)
    out_places = (q_row, head * channels, lse_row)
    in_places = (q_row, head * channels, k_row, head // group_size * channels)
    gl.warp_specialize(
        [
            (_consume, (0, rings, tiles_of_q, out_desc, LSE, out_places, visited, scale, STAGES, CAUSAL)),
            (_consume, (1, rings, tiles_of_q, out_desc, LSE, out_places, visited, scale, STAGES, CAUSAL)),
            (_produce, ((q_desc, k_desc, v_desc), rings, tiles_of_q, in_places, visited, STAGES)),
        ],
        [4, 1],
        [COMPUTE_REGISTERS, LOAD_REGISTERS],
    )


def forward(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out in q's dtype, natural lse (B, H, Sq) fp32) of q (B, Sq, H, D), k and v (B, Sk, Hkv, D); hopper.takes() says of which.

    Only (left, right) = (-1, -1) and (-1, 0). Rows of q, k and v may be apart, as in a fused projection; else they are copied.
    """
    q, k, v = (_in_rows(x) for x in (q, k, v))
    batch, queries, heads, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    settings = tables.lookup("attention_hopper", arch_of(q.device), channels)
    tiles = queries // TILE
    launch(
        _forward_hopper,
        (tiles * batch * heads,),
        _descriptor(q, _ROWS.value),
        _descriptor(k, TILE),
        _descriptor(v, TILE),
        _descriptor(out, _ROWS.value),
        lse,
        scale,
        tiles,
        k.shape[1] // TILE,
        heads,
        heads // k.shape[2],
        batch,
        heads_at_once(q, k),
        CAUSAL=right == 0,
        **settings,
    )
    return out, lse


def _in_rows(x: Tensor) -> Tensor:
    """x (B, S, H, D) itself if it is a matrix (B S, H D) in memory that a TMA descriptor can describe, else a copy."""
    batch, length, heads, channels = x.shape
    of_batch, of_row, of_head, of_channel = x.stride()
    one_matrix = of_channel == 1 and of_head == channels and (batch == 1 or of_batch == length * of_row)
    aligned = of_row >= heads * channels and of_row * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0
    return x if one_matrix and aligned else x.clone(memory_format=torch.contiguous_format)


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """Of the matrix, in tiles of some rows of one head."""
    batch, length, heads, channels = x.shape
    layout = _layout(rows, channels, x.dtype)
    return TensorDescriptor(x, [batch * length, heads * channels], [x.stride(1), 1], [rows, channels], layout)


@cache
def _layout(rows: int, channels: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a tile in shared memory, as TMA writes it and wgmma reads it; with the host's time at stake, found once."""
    return gl.NVMMASharedLayout.get_default_for([rows, channels], gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the table, of sm_90 alone."""
    for dtype, channels, right in product((torch.bfloat16, torch.float16), HEAD_DIMS, (-1, 0)):
        label = f"attention {dtype} D{channels}{' causal' * (right == 0)}, warp-specialised"

        def call(dtype: torch.dtype = dtype, channels: int = channels, right: int = right) -> None:
            q = torch.empty(2, 4096, 32, channels, dtype=dtype, device="meta")
            kv = torch.empty(2, 4096, 8, channels, dtype=dtype, device="meta")
            if arch_of(q.device) == ARCH:
                forward(q, kv, kv, -1, right, channels**-0.5)

        yield label, call, {"HGMMA", "TMA", "USETMAXREG"}
