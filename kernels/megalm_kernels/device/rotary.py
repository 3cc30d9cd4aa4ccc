"""The kernel of rotary.py: a tile of tokens times heads, so that a row of angles serves several heads."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels import tables
from megalm_kernels.launch import arch_of, launch


@triton.jit(do_not_specialize=["tokens", "heads", "num_angles", "blocks"])  # counts, of which no address depends on a factor
def _turn(
    X,
    Y,
    COS,
    SIN,
    POSITIONS,
    tokens,
    heads,
    num_angles,
    blocks,
    x_batch,
    x_token,
    x_head,
    y_batch,
    y_token,
    y_head,
    positions_batch,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HALF_COLS: tl.constexpr,
    REST_COLS: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """(a, b) -> (a cos - b sin, b cos + a sin) for one tile of TOKENS x HEADS rows of one sequence; -sin if INVERSE.

    `blocks` tiles of tokens per sequence. The last REST channels are copied; POSITIONS None: token i has the i-th angles.
    """
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.arange(0, TOKENS * HEADS)
    token = ((tl.program_id(0) % blocks) * TOKENS + row // HEADS).to(tl.int64)
    head = (tl.program_id(1) * HEADS + row % HEADS).to(tl.int64)
    inside = (token < tokens) & (head < heads)
    position, known = token, inside
    if POSITIONS is not None:
        position = tl.load(POSITIONS + batch * positions_batch + token, mask=inside, other=0)
        known = inside & (position >= 0) & (position < num_angles)  # else the angle is NaN, and nothing beyond is read

    column = tl.arange(0, HALF_COLS)[None, :]
    angle = position[:, None] * HALF + column
    has_angle = known[:, None] & (column < HALF)
    cos = tl.load(COS + angle, mask=has_angle, other=float("nan")).to(tl.float32)
    sin = tl.load(SIN + angle, mask=has_angle, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin

    x_row = X + (batch * x_batch + token * x_token + head * x_head)[:, None]
    y_row = Y + (batch * y_batch + token * y_token + head * y_head)[:, None]
    if REST > 0:
        rest = tl.arange(0, REST_COLS)[None, :]
        is_rest = inside[:, None] & (rest < REST)
        tl.store(y_row + 2 * HALF + rest, tl.load(x_row + 2 * HALF + rest, mask=is_rest), mask=is_rest)
    if INTERLEAVED:
        both = tl.arange(0, 2 * HALF_COLS)[None, :]
        turned = inside[:, None] & (both < 2 * HALF)
        pairs = tl.load(x_row + both, mask=turned, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(pairs, (TOKENS * HEADS, HALF_COLS, 2)))
        y = tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (TOKENS * HEADS, 2 * HALF_COLS))
        tl.store(y_row + both, y.to(Y.dtype.element_ty), mask=turned)
    else:
        turned = inside[:, None] & (column < HALF)
        a = tl.load(x_row + column, mask=turned, other=0.0).to(tl.float32)
        b = tl.load(x_row + HALF + column, mask=turned, other=0.0).to(tl.float32)
        tl.store(y_row + column, (a * cos - b * sin).to(Y.dtype.element_ty), mask=turned)
        tl.store(y_row + HALF + column, (b * cos + a * sin).to(Y.dtype.element_ty), mask=turned)


def turn(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> Tensor:
    """A turned copy of x (B, S, H, D) or (T, H, D), contiguous."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, y, cos, sin, positions, interleaved, inverse)
    return y


def turn_in_place(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> None:
    """Turn x itself; the channels that are not turned are not touched."""
    if x.stride(-1) != 1:
        x.copy_(turn(x, cos, sin, positions, interleaved, inverse))
        return
    _launch(x, x, cos, sin, positions, interleaved, inverse)


def _launch(x: Tensor, y: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool) -> None:
    if x.numel() == 0:
        return
    in_place = y is x
    x, y = (t if t.dim() == 4 else t.unsqueeze(0) for t in (x, y))
    batch, tokens, heads, channels = x.shape
    half = cos.shape[1]
    rest = 0 if in_place else channels - 2 * half
    half_cols = triton.next_power_of_2(half)
    settings = dict(tables.lookup("rotary", arch_of(x.device), half_cols))
    rows = settings.pop("ROWS")
    block_heads = min(rows, _divisor(heads))
    block_tokens = min(rows // block_heads, triton.next_power_of_2(tokens))
    blocks = triton.cdiv(tokens, block_tokens)
    grid = (batch * blocks, triton.cdiv(heads, block_heads))
    per_sequence = positions is not None and positions.dim() == 2
    launch(
        _turn,
        grid,
        x,
        y,
        cos.contiguous(),
        sin.contiguous(),
        positions if positions is None else positions.contiguous(),
        tokens,
        heads,
        cos.shape[0],
        blocks,
        *x.stride()[:3],
        *y.stride()[:3],
        tokens if per_sequence else 0,
        HALF=half,
        REST=rest,
        HALF_COLS=half_cols,
        REST_COLS=triton.next_power_of_2(max(rest, 1)),
        TOKENS=block_tokens,
        HEADS=block_heads,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        **settings,
    )


def _divisor(heads: int) -> int:
    """Heads per tile, a power of two: one that divides them leaves no lane without work, unless it is small."""
    exact = heads & -heads
    return exact if exact >= 4 else triton.next_power_of_2(heads)


# By channels, the numbers of heads that q and k have in the presets, whole and split; of the others a power of two stands for.
_HEADS = {32: (4,), 64: (1, 4, 8, 32), 128: (1, 2, 4, 8, 16, 32)}
_LATENT = ((16, 16, 1), (48, 16, 4), (192, 64, 2), (192, 64, 16), (192, 64, 128))  # channels, turned ones and heads


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the table, with and without each feature."""
    claims = {"LDG.128", "STG.128"}
    for dtype in (torch.bfloat16, torch.float32):
        for channels in (256, 512):
            yield f"rotary {dtype} D{channels}", partial(_specimen, dtype, channels, channels), claims
        for (channels, numbers), inverse in product(_HEADS.items(), (False, True)):
            for heads in numbers:
                label = f"rotary {dtype} D{channels} of {heads} heads{' backward' * inverse}"
                yield label, partial(_specimen, dtype, channels, channels, heads, inverse=inverse), claims
        for (channels, turned, heads), inverse in product(_LATENT, (False, True)):
            label = f"rotary {dtype} D{channels}, {turned} of them, of {heads} heads{' backward' * inverse}"
            whole = claims if channels > 16 else {"LDG.128"}  # so few channels are stored by half as many bytes
            yield label, partial(_specimen, dtype, channels, turned, heads, inverse=inverse), whole
        for inverse in (False, True):
            label = f"rotary {dtype} interleaved{' backward' * inverse}"
            yield label, partial(_specimen, dtype, 128, 128, interleaved=True, inverse=inverse), claims
        yield f"rotary {dtype} partial, positions", partial(_specimen, dtype, 128, 64, positions=True), claims
        yield f"rotary {dtype} D80 backward", partial(_specimen, dtype, 80, 80, inverse=True), claims


def _specimen(
    dtype: torch.dtype,
    channels: int,
    turned: int,
    heads: int = 32,
    positions: bool = False,
    interleaved: bool = False,
    inverse: bool = False,
) -> Tensor:
    x = torch.empty(2, 4096, heads, channels, dtype=dtype, device="meta")
    angles = torch.empty(4096, turned // 2, device="meta")
    places = torch.empty(2, 4096, dtype=torch.int64, device="meta") if positions else None
    return turn(x, angles, angles, places, interleaved, inverse)
