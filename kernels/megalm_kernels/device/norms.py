"""Kernels of the norms. The formulas stand in ../norms.py.

forward   a program takes a tile of whole rows and reads it once. Rows that registers cannot hold go through a loop: a pass for
          the statistics and h, then one for y, which finds the row in the cache.
backward  the programs, one or two per multiprocessor, stride over the rows; each keeps its share of the weight's gradient in
          registers and writes it out once, and a second kernel adds the shares up in order. No atomics, so the same bits in
          every run. Rows that registers cannot hold: one kernel takes the two means over the row that dx needs, then the
          same kernel as above works on tiles of columns with these means given; 10 bytes per element in place of 6.

Bytes per element in 16 bit: forward 4, with a residual 8; backward 6, with the gradient of h 8.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.device.column_sums import column_sums
from megalm_kernels.dispatch import rows_of
from megalm_kernels.launch import arch_of, launch, multiprocessors, seed_halves
from megalm_kernels.norms import RESOLUTION, threshold
from megalm_kernels.tables import lookup

_SHIFT = tl.constexpr(32 - RESOLUTION)


@triton.jit
def _keep(ids, columns, seed_low, seed_high, drop_below):
    """`keep_mask` of ../norms.py, bit for bit. ids (R,) int64, columns (C,) -> (R, C)."""
    seed = (seed_high.to(tl.uint64) << 32) | (seed_low.to(tl.uint64) & 0xFFFFFFFF)
    key = _mix64(_mix64(ids.to(tl.uint64) * 0x9E3779B97F4A7C15) + seed)
    column = columns.to(tl.uint32) * 0x9E3779B1
    bits = _mix32(column[None, :] + key.to(tl.uint32)[:, None])
    bits = _mix32(bits ^ (key >> 32).to(tl.uint32)[:, None])
    return (bits >> _SHIFT).to(tl.int32) >= drop_below


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _mix32(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _ids(IDS, rows, inside):
    """What dropout calls these rows."""
    if IDS is None:
        ids = rows
    else:
        ids = tl.load(IDS + rows, mask=inside, other=0)
    return ids


@triton.jit
def _scale(WEIGHT, columns, inside, ZERO_CENTRED: tl.constexpr):
    weight = tl.load(WEIGHT + columns, mask=inside, other=0.0).to(tl.float32)
    return weight + 1.0 if ZERO_CENTRED else weight


@triton.jit
def _sum_before_norm(
    X, RESIDUAL, IDS, rows, columns, mask, inside, stride_x, stride_residual,
    seed_low, seed_high, drop_below, factor, DROP: tl.constexpr,
):  # fmt: skip
    """residual + dropout(x) of a tile, in fp32."""
    h = tl.load(X + rows[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if DROP:
        keep = _keep(_ids(IDS, rows, inside), columns, seed_low, seed_high, drop_below)
        h = tl.where(keep, h * tl.cast(factor, tl.float32), 0.0)
    if RESIDUAL is not None:
        h += tl.load(RESIDUAL + rows[:, None] * stride_residual + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    return h


@triton.jit(do_not_specialize=["seed_low", "seed_high", "drop_below"])
def _norm_forward(
    X, WEIGHT, BIAS, RESIDUAL, IDS, Y, H, MEAN, SCALE, T, N, stride_x, stride_residual, eps,
    seed_low, seed_high, drop_below, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, ZERO_CENTRED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """y = (h - mean) / sqrt(mean((h - mean)^2) + eps) * w + bias of ROWS whole rows; mean = 0 unless CENTRED."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside, real = rows < T, columns < N
    mask = inside[:, None] & real[None, :]
    at = rows[:, None] * N + columns[None, :]
    h = _sum_before_norm(
        X, RESIDUAL, IDS, rows, columns, mask, inside, stride_x, stride_residual, seed_low, seed_high, drop_below, factor, DROP
    )
    if H is not None:
        stored = h.to(H.dtype.element_ty)
        tl.store(H + at, stored, mask=mask)
        h = stored.to(tl.float32)
    if CENTRED:
        mean = tl.sum(h, 1) / N
        tl.store(MEAN + rows, mean, mask=inside)
        h = tl.where(real[None, :], h - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(h * h, 1) / N + tl.cast(eps, tl.float32))
    tl.store(SCALE + rows, scale, mask=inside)
    y = h * scale[:, None] * _scale(WEIGHT, columns, real, ZERO_CENTRED)[None, :]
    if BIAS is not None:
        y += tl.load(BIAS + columns, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "drop_below"])
def _norm_forward_wide(
    X, WEIGHT, BIAS, RESIDUAL, IDS, Y, H, MEAN, SCALE, T, N, stride_x, stride_residual, eps,
    seed_low, seed_high, drop_below, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    CENTRED: tl.constexpr, ZERO_CENTRED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """As `_norm_forward`, with rows in blocks of columns: statistics (blocks joined as in Chan et al. 1979), then y."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    mean, squares = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        real = columns < N
        mask = inside[:, None] & real[None, :]
        h = _sum_before_norm(
            X,
            RESIDUAL,
            IDS,
            rows,
            columns,
            mask,
            inside,
            stride_x,
            stride_residual,
            seed_low,
            seed_high,
            drop_below,
            factor,
            DROP,
        )
        if H is not None:
            stored = h.to(H.dtype.element_ty)
            tl.store(H + rows[:, None] * N + columns[None, :], stored, mask=mask)
            h = stored.to(tl.float32)
        if CENTRED:
            before = tl.cast(start, tl.float32)
            count = tl.cast(tl.minimum(N - start, BLOCK), tl.float32)
            here = tl.sum(h, 1) / count
            apart = here - mean
            h = tl.where(real[None, :], h - here[:, None], 0.0)
            squares += apart * apart * before * (count / (before + count))
            mean += apart * (count / (before + count))
        squares += tl.sum(h * h, 1)
    scale = tl.rsqrt(squares / N + tl.cast(eps, tl.float32))
    tl.store(SCALE + rows, scale, mask=inside)
    if CENTRED:
        tl.store(MEAN + rows, mean, mask=inside)
    tl.debug_barrier()  # h, which other threads of this program have stored
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        real = columns < N
        mask = inside[:, None] & real[None, :]
        at = rows[:, None] * N + columns[None, :]
        if H is not None:
            h = tl.load(H + at, mask=mask, other=0.0).to(tl.float32)
        else:
            h = tl.load(X + rows[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        y = (h - mean[:, None]) * scale[:, None] * _scale(WEIGHT, columns, real, ZERO_CENTRED)[None, :]
        if BIAS is not None:
            y += tl.load(BIAS + columns, mask=real, other=0.0).to(tl.float32)[None, :]
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _normed(H, MEAN, rows, columns, mask, inside, stride_h, scale, CENTRED: tl.constexpr):
    """xhat = (h - mean) * scale of a tile; what it is outside does not count, the gradient there is 0."""
    h = tl.load(H + rows[:, None] * stride_h + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        h -= tl.load(MEAN + rows, mask=inside, other=0.0)[:, None]
    return h * scale[:, None]


@triton.jit
def _norm_row_means(
    GRAD, H, WEIGHT, MEAN, SCALE, MEANS, T, N, stride_grad, stride_h,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, CENTRED: tl.constexpr, ZERO_CENTRED: tl.constexpr,
):  # fmt: skip
    """MEANS (2, T): the means over a row of w grad xhat and of w grad, which dx needs."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = rows < T
    scale = tl.load(SCALE + rows, mask=inside, other=0.0)
    first, second = tl.zeros([ROWS, BLOCK], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(0, N, BLOCK, num_stages=STAGES):
        columns = start + tl.arange(0, BLOCK)
        real = columns < N
        mask = inside[:, None] & real[None, :]
        grad = tl.load(GRAD + rows[:, None] * stride_grad + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        scaled = grad * _scale(WEIGHT, columns, real, ZERO_CENTRED)[None, :]
        first += scaled * _normed(H, MEAN, rows, columns, mask, inside, stride_h, scale, CENTRED)
        if CENTRED:
            second += scaled
    tl.store(MEANS + rows, tl.sum(first, 1) / N, mask=inside)
    if CENTRED:
        tl.store(MEANS + T + rows, tl.sum(second, 1) / N, mask=inside)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "drop_below"])
def _norm_backward(
    GRAD, GRAD_H, H, WEIGHT, MEAN, SCALE, MEANS, IDS, DX, DRESIDUAL, DWEIGHT, DBIAS, T, N,
    stride_grad, stride_grad_h, stride_h, seed_low, seed_high, drop_below, factor,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    CENTRED: tl.constexpr, ZERO_CENTRED: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of columns, of every so many rows; the row of DWEIGHT, DBIAS (programs, N) is the program's.

    dh = scale * (w grad - xhat mean(w grad xhat) - [CENTRED] mean(w grad)) + grad_h. MEANS: these two, where a row is wider
    than the tile.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = columns < N
    weight = _scale(WEIGHT, columns, real, ZERO_CENTRED)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(program, tl.cdiv(T, ROWS), programs, num_stages=STAGES):
        rows = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = rows < T
        mask = inside[:, None] & real[None, :]
        at = rows[:, None] * N + columns[None, :]
        scale = tl.load(SCALE + rows, mask=inside, other=0.0)
        normed = _normed(H, MEAN, rows, columns, mask, inside, stride_h, scale, CENTRED)
        grad = tl.load(GRAD + rows[:, None] * stride_grad + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        dweight += grad * normed
        if DBIAS is not None:
            dbias += grad
        if DROP:  # in registers besides what the mask needs, it would make rows of 8192 spill
            weight = _scale(WEIGHT, columns, real, ZERO_CENTRED)[None, :]
        grad *= weight
        if MEANS is not None:
            first = tl.load(MEANS + rows, mask=inside, other=0.0)
        else:
            first = tl.sum(grad * normed, 1) / N
        dh = grad - normed * first[:, None]
        if CENTRED:
            if MEANS is not None:
                second = tl.load(MEANS + T + rows, mask=inside, other=0.0)
            else:
                second = tl.sum(grad, 1) / N
            dh -= second[:, None]
        dh *= scale[:, None]
        if GRAD_H is not None:
            dh += tl.load(GRAD_H + rows[:, None] * stride_grad_h + columns[None, :], mask=mask, other=0.0).to(tl.float32)
        if DRESIDUAL is not None:
            tl.store(DRESIDUAL + at, dh.to(DRESIDUAL.dtype.element_ty), mask=mask)
        if DROP:
            keep = _keep(_ids(IDS, rows, inside), columns, seed_low, seed_high, drop_below)
            dh = tl.where(keep, dh * tl.cast(factor, tl.float32), 0.0)
        tl.store(DX + at, dh.to(DX.dtype.element_ty), mask=mask)
    share = program.to(tl.int64) * N + columns
    tl.store(DWEIGHT + share, tl.sum(dweight, 0), mask=real)
    if DBIAS is not None:
        tl.store(DBIAS + share, tl.sum(dbias, 0), mask=real)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    dropout: float,
    seed: int,
    centred: bool,
    zero_centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_forward` on a device."""
    x, residual = rows_of(x), None if residual is None else rows_of(residual)
    (count, width), drop = x.shape, dropout > 0.0
    y = x.new_empty((count, width))
    like = x if residual is None else residual
    h = like.new_empty((count, width) if drop or residual is not None else 0)
    scale = x.new_empty(count, dtype=torch.float32)
    mean = scale.new_empty(count if centred else 0)
    settings = lookup(f"norm_forward_{8 * max(x.element_size(), like.element_size())}", arch_of(x.device), width)
    if count:
        launch(
            _norm_forward if settings["BLOCK"] >= width else _norm_forward_wide,
            (triton.cdiv(count, settings["ROWS"]),),
            x, weight.contiguous(), None if bias is None else bias.contiguous(), residual,
            None if rows is None else rows.contiguous(), y, h if h.numel() else None, mean if centred else None, scale,
            count, width, x.stride(0), 0 if residual is None else residual.stride(0), eps, *_mask_arguments(dropout, seed),
            CENTRED=centred, ZERO_CENTRED=zero_centred, DROP=drop, **settings,
        )  # fmt: skip
    return y, h, mean, scale


def backward(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    has_bias: bool,
    separate: bool,
    dropout: float,
    seed: int,
    centred: bool,
    zero_centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`norm_backward` on a device."""
    grad, h, grad_h = rows_of(grad), rows_of(h), None if grad_h is None else rows_of(grad_h)
    count, width = h.shape
    dx = grad.new_empty((count, width))
    dresidual = h.new_empty((count, width) if separate else 0)
    if not count:
        return dx, dresidual, weight.new_zeros(width), weight.new_zeros(width if has_bias else 0)
    weight, arch = weight.contiguous(), arch_of(h.device)
    table = f"norm_backward_{8 * max(grad.element_size(), h.element_size())}{'_dropout' if dropout else ''}"
    settings = dict(lookup(table, arch, width))
    tiles = triton.cdiv(width, settings["BLOCK"])
    programs = max(1, settings.pop("PROGRAMS") * multiprocessors(h.device) // tiles)
    programs = min(programs, triton.cdiv(count, settings["ROWS"]))
    flags = dict(CENTRED=centred, ZERO_CENTRED=zero_centred)
    statistics, means = (mean if centred else None, scale), None
    if tiles > 1:
        means = scale.new_empty((2 if centred else 1, count))
        wide = lookup("norm_row_means", arch, width)
        launch(
            _norm_row_means, (triton.cdiv(count, wide["ROWS"]),), grad, h, weight, *statistics, means, count, width,
            grad.stride(0), h.stride(0), **flags, **wide,
        )  # fmt: skip
    shares = scale.new_empty((1 + has_bias, programs, width))
    launch(
        _norm_backward, (programs, tiles), grad, grad_h, h, weight, *statistics, means,
        None if rows is None else rows.contiguous(), dx, dresidual if separate else None, shares[0],
        shares[1] if has_bias else None, count, width, grad.stride(0), 0 if grad_h is None else grad_h.stride(0), h.stride(0),
        *_mask_arguments(dropout, seed), DROP=dropout > 0.0, **flags, **settings,
    )  # fmt: skip
    dweight = column_sums(shares[0], weight.dtype)
    return dx, dresidual, dweight, column_sums(shares[1], weight.dtype) if has_bias else weight.new_empty(0)


def _mask_arguments(dropout: float, seed: int) -> tuple[int, int, int, float]:
    """The seed in halves, the threshold, what is kept is multiplied by."""
    return *seed_halves(seed), threshold(dropout), 1.0 / (1.0 - dropout)


_WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 65536)


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the tables in bf16 and fp32, bare and with everything; the widths that matter with each part alone too."""
    claims = {"LDG.128"}
    for dtype, width in product((torch.bfloat16, torch.float32), _WIDTHS):
        label = f"{str(dtype)[6:]} {width}"
        yield f"rms_norm {label}", partial(_specimen, dtype, width, False, False, False), claims
        yield f"layer_norm {label} residual, dropout, zero-centred", partial(_specimen, dtype, width, True, True, True), claims
        yield f"layer_norm {label}", partial(_specimen, dtype, width, True, False, False), claims
        if width >= 1024:
            yield f"rms_norm {label} residual", partial(_specimen, dtype, width, False, True, False), claims
            yield f"layer_norm {label} residual", partial(_specimen, dtype, width, True, True, False), claims
            for centred in (False, True) if dtype == torch.bfloat16 and width <= 8192 else ():
                name = f"{('rms_norm', 'layer_norm')[centred]} {label}, residual and weight float32"
                yield name, partial(_specimen, dtype, width, centred, True, False, torch.float32), claims


def _specimen(
    dtype: torch.dtype, width: int, centred: bool, with_residual: bool, drop: bool, wide: torch.dtype | None = None
) -> None:
    x = torch.empty(16384, width, dtype=dtype, device="meta")
    h = x.to(wide or dtype)
    weight, residual, dropout = h[0], h if with_residual else None, 0.1 if drop else 0.0
    rows = torch.empty(16384, dtype=torch.int64, device="meta") if drop else None
    settings = (dropout, 1, centred, drop)
    _, _, mean, scale = forward(x, weight, weight if centred else None, residual, rows, *settings, 1e-5)
    backward(x, residual, h, weight, mean, scale, rows, centred, drop, *settings)
