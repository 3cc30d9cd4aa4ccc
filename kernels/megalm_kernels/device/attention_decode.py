"""Attention of a few queries over a long cache: the keys are split over programs, whose partial results a second kernel merges.

Every key and value is read once, and that is the time it takes: so what counts is that all multiprocessors read. A program of
`_attend` has one sample, one key head and a range of its keys; the queries of all heads that share the key head, and of all
newest tokens, are the rows of its matrix products, which the tensor cores want at least 16 of. It leaves its result and the
logarithm (in base 2) of its sum, in fp32. `_merge` weighs those of a row in a fixed order (Milakov and Gimelshein 2018).
With one range there is nothing to merge, and `_attend` writes the result itself.

How many ranges there are depends on shapes alone, so that the host need not know lengths; how long they are, each program
works out from its sample's length. So a short sample in a long cache is shared out as evenly as a long one.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.device.attention_tiles import LOG2_E, scored
from megalm_kernels.launch import arch_of, launch, multiprocessors
from megalm_kernels.tables import lookup

PROGRAMS = 4  # per multiprocessor, where there are keys enough
FEWEST_KEYS = 128  # of a range of a full cache: a partial result costs as much as a few keys
MOST_SPLITS = 128  # that `_merge` can weigh
NARROWEST = 16  # rows and columns of a matrix product


@triton.jit
def _tile(BASE, row_offsets, ROWS_IN, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """Rows at these offsets, as wide as a head; 0 where there is none."""
    column = tl.arange(0, WIDE)[None, :]
    mask = ROWS_IN[:, None]
    if HEAD != WIDE:
        mask = mask & (column < HEAD)
    return tl.load(BASE + row_offsets[:, None] + column, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["keys", "queries", "groups", "key_heads", "splits", "tiles", "left"])
def _attend(
    Q, K, V, OUT, LSE, LENGTHS, SLOPES, SINKS,
    keys, queries, groups, key_heads, splits, tiles, left, scale, softcap,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head, slopes_batch,
    HEAD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (sample, key head, split, tile of rows). OUT: the result; or parts (B Sq H, splits, D), with LSE of as many."""
    program = tl.program_id(0)
    tile = program % tiles
    split = program // tiles % splits
    key_head = (program // tiles // splits % key_heads).to(tl.int64)
    sample = (program // tiles // splits // key_heads).to(tl.int64)
    scale = tl.cast(scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)

    length = keys
    if LENGTHS is not None:
        length = tl.load(LENGTHS + sample)
    possible = (length >= 0) & (length <= keys)
    length = tl.where(possible, length, 0)
    first = 0
    if WINDOW:
        first = tl.maximum(length - queries - left, 0)
    span = tl.cdiv(tl.cdiv(length - first, BLOCK), splits) * BLOCK
    begin = first + split * span
    end = tl.minimum(begin + span, length)

    row = tile * ROWS + tl.arange(0, ROWS)
    exists = row < queries * groups
    query = row // groups
    head = key_head * groups + row % groups
    place = (length - queries + query)[:, None]
    q = _tile(Q + sample * q_batch, query.to(tl.int64) * q_row + head * q_head, exists, HEAD, WIDE)
    slope = 0.0
    if SLOPES is not None:
        slope = tl.load(SLOPES + sample * slopes_batch + head, mask=exists, other=0.0)[:, None]

    K += sample * k_batch + key_head * k_head
    V += sample * v_batch + key_head * v_head
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDE], tl.float32)
    for start in tl.range(begin, end, BLOCK):
        at = tl.cast(start, tl.int64) + tl.arange(0, BLOCK)
        k = _tile(K, at * k_row, at < end, HEAD, WIDE)
        column = (start + tl.arange(0, BLOCK))[None, :]
        score, factor, _ = scored(
            tl.dot(q, tl.trans(k), input_precision="ieee"), place, column, scale, softcap, slope, CAPPED, SLOPES is not None
        )
        seen = column <= place  # which is in the sample; and ranges are whole blocks, so no key is in two of them
        if WINDOW:
            seen = seen & (column >= place - left)
        score = tl.where(seen, score * factor, float("-inf"))
        before = largest
        largest = tl.maximum(largest, tl.max(score, 1))
        base = tl.where(largest == float("-inf"), 0.0, largest)
        share = tl.exp2(score - base[:, None])
        shrink = tl.exp2(before - base)
        total = total * shrink + tl.sum(share, 1)
        v = _tile(V, at * v_row, at < end, HEAD, WIDE)
        out = tl.dot(share.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")

    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.where(possible, total, float("nan"))  # a length that the cache does not have
    result = (sample * queries + query) * (key_heads * groups) + head
    if SPLIT:
        result = result * splits + split
        empty = total == 0.0
        log = base + tl.log2(tl.where(empty, 1.0, total))
        tl.store(LSE + result, tl.where(empty, float("-inf"), log), mask=exists)
        exists = exists & (total > 0.0)
    elif SINKS is not None:
        total += tl.exp2(tl.load(SINKS + head, mask=exists, other=0.0).to(tl.float32) * LOG2_E - base)
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    column = tl.arange(0, WIDE)[None, :]
    mask = exists[:, None]
    if HEAD != WIDE:
        mask = mask & (column < HEAD)
    tl.store(OUT + result[:, None] * HEAD + column, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits", "heads"])
def _merge(
    PARTS, LSE, SINKS, OUT, splits, heads,
    HEAD: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row of the result): out = sum_s 2^(lse_s - largest) part_s / (sum_s 2^(lse_s - largest) + sink's)."""
    row = tl.program_id(0).to(tl.int64)
    LSE += row * splits
    PARTS += row * splits * HEAD
    split = tl.arange(0, SPLITS)
    lse = tl.load(LSE + split, mask=split < splits, other=float("-inf"))
    largest = tl.max(lse, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.sum(tl.exp2(lse - largest), 0)
    if SINKS is not None:
        total += tl.exp2(tl.load(SINKS + row % heads).to(tl.float32) * LOG2_E - largest)
    out = tl.zeros([BLOCK, WIDE], tl.float32)
    for start in tl.range(0, splits, BLOCK):
        at = start + tl.arange(0, BLOCK)
        log = tl.load(LSE + at, mask=at < splits, other=float("-inf"))
        part = _tile(PARTS, at * HEAD, log > float("-inf"), HEAD, WIDE)  # of an empty range nothing was written
        out += tl.exp2(log - largest)[:, None] * part
    merged = tl.sum(out, 0) / tl.where(total == 0.0, 1.0, total)
    column = tl.arange(0, WIDE)
    tl.store(OUT + row * HEAD + column, merged.to(OUT.dtype.element_ty), mask=column < HEAD)


def decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window_left: int, scale: float, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The result, contiguous, in q's dtype."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    batch, queries, heads, width = q.shape
    keys, key_heads = k.shape[1:3]
    q = q if q.stride(-1) == 1 else q.contiguous()
    groups, wide = heads // key_heads, max(NARROWEST, triton.next_power_of_2(width))
    several = queries * groups > NARROWEST and q.element_size() == 2
    name = f"attention_decode_{8 * q.element_size()}" + "_several" * several
    settings = lookup(name, arch_of(q.device), wide)
    tiles = triton.cdiv(queries * groups, settings["ROWS"])
    splits = _splits(batch * key_heads * tiles, keys, q.device)
    slopes_batch = 0
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
        slopes_batch = heads if alibi_slopes.dim() == 2 else 0
    lengths, sinks = (x if x is None else x.contiguous() for x in (lengths, sinks))
    parts = lse = out
    if splits > 1:
        lse = torch.empty(batch * queries * heads, splits, dtype=torch.float32, device=q.device)
        parts = torch.empty(*lse.shape, width, dtype=torch.float32, device=q.device)
    launch(
        _attend, (batch * key_heads * splits * tiles,), q, k, v, parts, lse, lengths, alibi_slopes, None if splits > 1 else sinks,
        keys, queries, groups, key_heads, splits, tiles, min(window_left, keys), scale, softcap,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], slopes_batch,
        HEAD=width, WIDE=wide, WINDOW=window_left >= 0, CAPPED=softcap > 0.0, SPLIT=splits > 1, **settings,
    )  # fmt: skip
    if splits > 1:
        settings = lookup("attention_decode_merge", arch_of(q.device), wide)
        constants = dict(HEAD=width, WIDE=wide, SPLITS=MOST_SPLITS, **settings)
        launch(_merge, (lse.shape[0],), parts, lse, sinks, out, splits, heads, **constants)
    return out


def _splits(programs: int, keys: int, device: torch.device) -> int:
    """Ranges of keys per sample: so many that every multiprocessor has programs, if there are keys enough for them."""
    wanted = triton.cdiv(PROGRAMS * multiprocessors(device), programs)
    return max(1, min(wanted, keys // FEWEST_KEYS, MOST_SPLITS))


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the tables, without features and with all of them."""

    def case(
        width: int, dtype: torch.dtype, heads: int, key_heads: int, samples: int = 4, queries: int = 1, **features: int
    ) -> Callable[[], None]:
        def run() -> None:
            q = torch.empty(samples, queries, heads, width, dtype=dtype, device="meta")
            k = torch.empty(samples, 4096, key_heads, width, dtype=dtype, device="meta")
            lengths = torch.empty(samples, dtype=torch.int32, device="meta") if features else None
            slopes = torch.empty(heads, dtype=torch.float32, device="meta") if features else None
            sinks = torch.empty(heads, dtype=dtype, device="meta") if features else None
            decode(q, k, k, lengths, features.get("left", -1), 0.1, features.get("softcap", 0.0), slopes, sinks)

        return run

    everything = dict(left=1024, softcap=30)
    for width in (64, 128, 256):
        for dtype, queries in ((torch.bfloat16, 1), (torch.bfloat16, 8), (torch.float32, 1)):
            label = f"decode_attention {width} {str(dtype).removeprefix('torch.')}, {queries} queries"
            yield label, case(width, dtype, 32, 8, queries=queries), {"LDG.128"}
            yield f"{label}, everything", case(width, dtype, 32, 8, queries=queries, **everything), {"LDG.128"}
    yield "decode_attention 80 bfloat16", case(80, torch.bfloat16, 32, 8), {"LDG.128"}  # padded to a power of two
    yield "decode_attention 128 bfloat16, one range", case(128, torch.bfloat16, 32, 8, samples=256), {"LDG.128"}
