"""What the attention kernels share: which tiles of the score matrix are visited, and what is done to one.

A program has a block of queries (forward, dQ) or of keys (dK and dV) of one head of one sequence, and goes through the other
side in blocks. Tiles come as tensor descriptors that a program makes of its own head's rows: the copy engine of sm_90 reads
them, on sm_80 Triton makes pointers of them, and either way what lies outside is read as 0 and not written. So lengths,
strides and widths need no masks of their own.
"""

from collections.abc import Callable, Iterator

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
L2_BYTES = 24 * 2**20  # of keys and values that programs running together read again and again: half an H100's L2
_ROUNDS = tl.constexpr(7)  # philox.py's


@triton.jit
def key_blocks(
    row, queries, keys, left, right, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Where the keys lie that queries row .. row + BLOCK_Q - 1 see: (begin, full, end_full, end).

    Tiles of BLOCK_K keys in [full, end_full) are seen by all of them; those in [begin, full) and [end_full, end) need the mask.
    begin, full and end_full are multiples of BLOCK_K.
    """
    place = row + keys - queries  # of the first query
    last = min(row + BLOCK_Q, queries) - 1 + keys - queries
    begin, full, end_full, end = 0, 0, keys, keys
    if HAS_RIGHT:
        end = min(keys, max(last + right + 1, 0))
        end_full = min(keys, max(place + right + 1, 0))
    if HAS_LEFT:
        begin = min(max(place - left, 0), keys) // BLOCK_K * BLOCK_K
        full = (min(max(last - left, 0), end) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    end_full = max(end_full // BLOCK_K * BLOCK_K, full)
    return begin, full, end_full, end


@triton.jit
def query_blocks(
    column, queries, keys, left, right,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Where the queries lie that see any of the keys column .. column + BLOCK_K - 1: (begin, full, end_full, end).

    Tiles of BLOCK_Q queries in [full, end_full) see all of these keys; those in [begin, full) and [end_full, end) need the mask.
    begin, full and end_full are multiples of BLOCK_Q, except where full and end_full are end.
    """
    shift = keys - queries  # a query's place less its row
    beyond = min(column + BLOCK_K, keys)
    begin, full, end_full, end = 0, 0, queries, queries
    if HAS_LEFT:
        end = min(max(beyond + left - shift, 0), queries)
        end_full = min(max(column + left - shift + 1, 0), queries) // BLOCK_Q * BLOCK_Q
    if HAS_RIGHT:
        begin = min(max(column - right - shift, 0), queries) // BLOCK_Q * BLOCK_Q
        full = min((max(beyond - 1 - right - shift, 0) + BLOCK_Q - 1) // BLOCK_Q * BLOCK_Q, end)
    return begin, full, max(end_full, full), end


@triton.jit
def place_in(program, blocks, heads, width, LAST_FIRST: tl.constexpr = True):
    """(block, head) of a program. `width` heads at a time run through all their blocks, and what they read stays in the L2.
    First come the blocks that have most to do under a causal mask: the last ones of queries, the first ones of keys."""
    group = program // (blocks * width)
    here = min(width, heads - group * width)
    rest = program - group * blocks * width
    block = rest // here
    if LAST_FIRST:
        block = blocks - 1 - block
    return block, group * width + rest % here


@triton.jit
def packed_block(slot, STARTS, sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr):
    """(sequence, block in it) of a slot. Sequence s has slots from starts[s] // BLOCK + s on, which are at least as many as its
    blocks; so slots can be counted without knowing lengths, and some stay empty."""
    n = tl.arange(0, SEQUENCES)
    first = tl.load(STARTS + n, mask=n < sequences, other=0) // BLOCK + n
    sequence = tl.sum(((first <= slot) & (n < sequences)).to(tl.int32), axis=0) - 1
    return sequence, slot - tl.load(STARTS + sequence) // BLOCK - sequence


@triton.jit
def part_of(
    program, blocks, heads, width, STARTS, sequences, BLOCK: tl.constexpr, SEQUENCES: tl.constexpr, LAST_FIRST: tl.constexpr
):
    """(sequence, head, heads of a sequence, block) of a program. heads: of all sequences together if they are not packed."""
    if SEQUENCES:
        slot, head = place_in(program, blocks, heads, width, LAST_FIRST)
        sequence, block = packed_block(slot, STARTS, sequences, BLOCK, SEQUENCES)
    else:
        block, head = place_in(program, blocks, heads, width, LAST_FIRST)
        heads = heads // sequences
        sequence, head = head // heads, head % heads
    return sequence, head, heads, block


@triton.jit
def span(STARTS, sequence, length, SEQUENCES: tl.constexpr):
    """(first row, rows) of a sequence in memory that packed sequences share; else its rows begin at 0."""
    start = sequence.to(tl.int64) * 0
    if SEQUENCES:
        start = tl.load(STARTS + sequence).to(tl.int64)
        length = tl.load(STARTS + sequence + 1) - start.to(tl.int32)
    return start, length


@triton.jit
def visible(places, columns, keys, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Which keys are seen from which places (a query's place is its row + Sk - Sq); broadcast against each other."""
    seen = columns < keys
    if HAS_RIGHT:
        seen = seen & (columns <= places + right)
    if HAS_LEFT:
        seen = seen & (columns >= places - left)
    return seen


@triton.jit
def products(
    A, a_row, a_column, B, b_row, b_column, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, D: tl.constexpr, PART: tl.constexpr
):
    """a b^T of two tiles of rows in fp32, PART channels at a time: without tensor cores whole rows would not fit in registers."""
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for channel in tl.range(0, D, PART):
        a, b = A.load([a_row, a_column + channel]), B.load([b_row, b_column + channel])
        total = tl.dot(a, b.T, total, input_precision="ieee")
    return total


@triton.jit
def scored(s, places, columns, scale, softcap, slope, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr):
    """From q k^T to scores: (t, factor, tanh), where t * factor is the score in base 2; tanh is that of the cap.

    The factor is left to the caller, to whom the product costs nothing: it subtracts the maximum in the same instruction.
    """
    factor = scale * LOG2_E
    tanh = s
    if SOFTCAP:
        tanh = 2.0 * tl.sigmoid(s * (2.0 * scale / softcap)) - 1.0
        s = tanh
        factor = softcap * LOG2_E
    if ALIBI:
        s = s * factor - slope * LOG2_E * tl.abs(places - columns).to(tl.float32)
        factor = 1.0
    return s, factor, tanh


@triton.jit
def keeps(queries, columns, head, sequence, seed_low, seed_high, drop_below):
    """What dropout keeps of a tile: Philox of (query, key, head, sequence), its first word (philox.py)."""
    seed = (seed_high.to(tl.uint64) << 32) | (seed_low.to(tl.uint64) & 0xFFFFFFFF)
    here = queries * 0 + columns * 0
    word, _, _, _ = tl.philox(seed, queries + here, columns + here, head + here, sequence + here, n_rounds=_ROUNDS)
    return word.to(tl.int64) >= drop_below.to(tl.int64)


def heads_at_once(q: Tensor, k: Tensor) -> int:
    """How many query heads run together, so that their keys and values stay in the L2."""
    of_one_head = 2 * k.shape[-3] * k.shape[-1] * k.element_size()
    return max(1, L2_BYTES // of_one_head) * (q.shape[-2] // k.shape[-2])


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Those of the kernels that use it have it."""
    return iter(())
