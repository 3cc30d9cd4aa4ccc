"""Cross entropy kernels: 6 bytes per bf16 logit, of which 2 in the statistics and 4 in the gradient.

`_statistics` reads a row once. Every lane (a few neighbouring columns: one vector load) keeps a maximum and a sum of
exponentials of its own, so nothing crosses threads until the row ends. `_merge` makes one number of what the programs of a
row found, for many rows at a time, and the loss. `_gradient` reads again and writes once, over the logits if asked to.
Where there are fewer rows than the GPU has places for programs, several programs share a row.

A row whose label is ignored is not read at all, and its gradient is 0, whatever the row holds.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.dispatch import rows_of
from megalm_kernels.launch import arch_of, launch, multiprocessors
from megalm_kernels.tables import lookup

LOWEST = tl.constexpr(-3.4028234663852886e38)  # a maximum to begin with: -inf minus itself would be NaN
MERGED_ROWS = 512  # rows of one program of `_merge`: four per thread


@triton.jit
def _exp(x):
    """exp with results below 1e-38 cut to 0: `tl.exp` spends three more instructions per logit on those."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _tanh(u):
    """tanh to the last bits of fp32: a polynomial (least squares on 0..0.55) where 1 - exp would cancel."""
    square = u * u
    series = 0.13320642709732056 + square * (-0.05266802757978439 + square * 0.016432009637355804)
    near = u + u * square * (-0.3333294093608856 + square * series)
    shrunk = _exp(-2.0 * tl.abs(u))
    far = (1.0 - shrunk) / (1.0 + shrunk)
    return tl.where(tl.abs(u) < 0.55, near, tl.where(u < 0, -far, far))


@triton.jit
def _capped(x, softcap, CAPPED: tl.constexpr):
    """softcap tanh(x / softcap)"""
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _statistics(
    x_ptr, labels_ptr, parts_ptr,
    rows, columns, real, per_program, x_stride, ignore_index, softcap,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, SUM: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the largest of its columns, the sum of exp(x - largest), the sum of x."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    softcap = tl.cast(softcap, tl.float32)
    x_ptr += row * x_stride
    begin = split * per_program
    end = tl.minimum(begin + per_program, columns)
    end = tl.where(tl.load(labels_ptr + row) == ignore_index, begin, end)
    offsets = tl.arange(0, BLOCK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    largest = tl.full([BLOCK // VECTOR], LOWEST, tl.float32)
    total = tl.zeros([BLOCK // VECTOR], tl.float32)
    plain_sum = tl.zeros([BLOCK // VECTOR], tl.float32)
    for start in tl.range(begin, end, BLOCK):
        i = start + offsets
        x = tl.load(x_ptr + i, mask=i < end, other=float("-inf")).to(tl.float32)
        x = _capped(x, softcap, CAPPED)
        inside = i < end
        if PADDED:
            inside = inside & (i < real)
        if PADDED or CAPPED:  # -inf capped is not -inf
            x = tl.where(inside, x, float("-inf"))
        if SUM:
            plain_sum += tl.sum(tl.where(inside, x, 0.0), 1)
        before = largest
        largest = tl.maximum(largest, tl.max(x, 1))
        total = total * _exp(before - largest) + tl.sum(_exp(x - largest[:, None]), 1)
    of_row = tl.max(largest, 0)
    total_of_row = tl.sum(total * _exp(largest - of_row), 0)
    parts_ptr += split * tl.cast(rows, tl.int64) + row
    kind = tl.num_programs(1) * tl.cast(rows, tl.int64)
    tl.store(parts_ptr, of_row)
    tl.store(parts_ptr + kind, total_of_row)
    if SUM:
        tl.store(parts_ptr + 2 * kind, tl.sum(plain_sum, 0))


@triton.jit
def _merge(
    x_ptr, labels_ptr, parts_ptr, losses_ptr, largest_ptr, total_ptr, target_ptr, sum_ptr,
    rows, real, splits, x_stride, first, vocab_size, ignore_index, softcap, label_smoothing, z_loss,
    CAPPED: tl.constexpr, SUM: tl.constexpr, LOSSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Every lane is a row: statistics of its programs' parts, the label's logit, the loss."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    softcap = tl.cast(softcap, tl.float32)
    kind = splits * tl.cast(rows, tl.int64)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    plain_sum = tl.zeros([ROWS], tl.float32)
    for split in tl.range(0, splits):
        at = parts_ptr + split * tl.cast(rows, tl.int64) + row
        part = tl.load(at, mask=mask, other=0.0)
        before = largest
        largest = tl.maximum(largest, part)
        total = total * _exp(before - largest) + tl.load(at + kind, mask=mask, other=1.0) * _exp(part - largest)
        if SUM:
            plain_sum += tl.load(at + 2 * kind, mask=mask, other=0.0)
    label = tl.load(labels_ptr + row, mask=mask, other=0)
    counted = label != ignore_index
    column = label - first
    here = mask & (column >= 0) & (column < real)
    target = tl.load(x_ptr + row * x_stride + tl.where(here, column, 0), mask=here, other=0.0).to(tl.float32)
    target = _capped(target, softcap, CAPPED)
    target = tl.where((label >= 0) & (label < vocab_size), target, float("nan"))  # a label that no vocabulary has
    largest = tl.where(counted, tl.where(total == 0.0, float("-inf"), largest), 0.0)
    total = tl.where(counted, total, 1.0)
    if LOSSES:
        smoothing = tl.cast(label_smoothing, tl.float32)
        log_total = tl.log(total)
        lse = largest + log_total
        loss = log_total + (largest - target) + tl.cast(z_loss, tl.float32) * lse * lse
        if SUM:
            loss += smoothing * (target - plain_sum / vocab_size)
        tl.store(losses_ptr + row, tl.where(counted, loss, 0.0), mask=mask)
    else:
        tl.store(target_ptr + row, tl.where(counted, target, 0.0), mask=mask)
        if SUM:
            tl.store(sum_ptr + row, tl.where(counted, plain_sum, 0.0), mask=mask)
    tl.store(largest_ptr + row, largest, mask=mask)
    tl.store(total_ptr + row, total, mask=mask)


@triton.jit
def _gradient(
    x_ptr, out_ptr, labels_ptr, largest_ptr, total_ptr, grad_ptr,
    columns, real, per_program, x_stride, out_stride, first, vocab_size, ignore_index, softcap, label_smoothing, z_loss,
    CAPPED: tl.constexpr, PADDED: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = (p (1 + 2 z lse) - (1 - s) [column = label] - s / V) grad (1 - tanh^2), p = exp(x - largest) / total."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    out_ptr += row * out_stride
    softcap = tl.cast(softcap, tl.float32)
    smoothing = tl.cast(label_smoothing, tl.float32)
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    largest = tl.where(counted, tl.load(largest_ptr + row), 0.0)
    total = tl.where(counted, tl.load(total_ptr + row), 1.0)
    grad = tl.where(counted, tl.load(grad_ptr + row).to(tl.float32), 0.0)
    grad = tl.where(counted & ((label < 0) | (label >= vocab_size)), float("nan"), grad)
    of_softmax = grad * (1.0 + 2.0 * tl.cast(z_loss, tl.float32) * (largest + tl.log(total))) / total
    of_label = grad * (1.0 - smoothing)
    of_all = grad * smoothing / vocab_size
    column = label - first
    column = tl.where((column >= 0) & (column < real), column, -1).to(tl.int32)
    begin = tl.program_id(1) * per_program
    end = tl.minimum(begin + per_program, columns)
    read_end = tl.where(counted, end, begin)
    for start in tl.range(begin, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < read_end, other=float("-inf")).to(tl.float32)
        slope = 1.0
        if CAPPED:
            ratio = _tanh(x / softcap)
            slope = 1.0 - ratio * ratio
            x = softcap * ratio
        dx = of_softmax * _exp(x - largest) - tl.where(i == column, of_label, 0.0)
        if SMOOTHED:
            dx -= of_all
        dx *= slope
        if PADDED:
            dx = tl.where(i < real, dx, 0.0)
        tl.store(out_ptr + i, dx.to(out_ptr.dtype.element_ty), mask=i < end)


def _split(rows: int, columns: int, block: int, device: torch.device) -> tuple[int, int]:
    """Programs of one row and columns of one program: several only where rows alone leave multiprocessors idle."""
    places, blocks = multiprocessors(device), triton.cdiv(columns, block)
    programs = 1 if rows >= 2 * places else min(blocks, triton.cdiv(4 * places, rows))
    per_program = triton.cdiv(blocks, programs) * block
    return triton.cdiv(columns, per_program), per_program


def _summarise(
    x: Tensor, labels: Tensor, first: int, vocab_size: int, softcap: float, ignore_index: int, with_sum: bool,
    outputs: tuple[Tensor, ...], label_smoothing: float = 0.0, z_loss: float = 0.0, losses: bool = False,
) -> None:  # fmt: skip
    """outputs: memory for losses, largest, total, target, sum (T,); which of them are written, `losses` decides."""
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    real = max(0, min(columns, vocab_size - first))
    settings = dict(lookup("cross_entropy_statistics", arch_of(x.device), columns))
    splits, per_program = _split(rows, columns, settings["BLOCK"], x.device)
    parts = torch.empty(2 + with_sum, splits, rows, dtype=torch.float32, device=x.device)
    capped = softcap != 0.0
    launch(
        _statistics, (rows, splits), x, labels, parts,
        rows, columns, real, per_program, x.stride(0), ignore_index, softcap,
        CAPPED=capped, PADDED=real < columns, SUM=with_sum, VECTOR=16 // x.element_size(), **settings,
    )  # fmt: skip
    launch(
        _merge, (triton.cdiv(rows, MERGED_ROWS),), x, labels, parts, *outputs,
        rows, real, splits, x.stride(0), first, vocab_size, ignore_index, softcap, label_smoothing, z_loss,
        CAPPED=capped, SUM=with_sum, LOSSES=losses, ROWS=MERGED_ROWS, num_warps=4,
    )  # fmt: skip


def statistics(
    logits: Tensor, labels: Tensor, first: int, vocab_size: int, softcap: float, ignore_index: int, with_sum: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """largest, total, label's logit, sum of logits (empty unless wanted) of a part of the vocabulary, fp32 (T,)."""
    x, rows = rows_of(logits), logits.shape[0]
    largest, total, target = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(3))
    logit_sum = torch.empty(rows if with_sum else 0, dtype=torch.float32, device=x.device)
    outputs = (largest, largest, total, target, logit_sum)
    _summarise(x, labels.contiguous(), first, vocab_size, softcap, ignore_index, with_sum, outputs)
    return largest, total, target, logit_sum


def losses(
    logits: Tensor, labels: Tensor, label_smoothing: float, z_loss: float, ignore_index: int, softcap: float, inplace: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of single tokens, and largest and total for the gradient, fp32 (T,)."""
    x, (rows, columns) = rows_of(logits), logits.shape
    found, largest, total = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(3))
    _summarise(
        x, labels.contiguous(), 0, columns, softcap, ignore_index, label_smoothing != 0.0,
        (found, largest, total, largest, largest), label_smoothing, z_loss, losses=True,
    )  # fmt: skip
    return found, largest, total


def gradient(
    logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, grad: Tensor, first: int, vocab_size: int,
    label_smoothing: float, z_loss: float, ignore_index: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Gradient of the logits, in new memory."""
    x, out = rows_of(logits), torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    scalars = (first, vocab_size, label_smoothing, z_loss, ignore_index, softcap)
    _write_gradient(x, out, labels, largest, total, grad, *scalars)
    return out


def gradient_inplace(
    logits: Tensor, labels: Tensor, largest: Tensor, total: Tensor, grad: Tensor, first: int, vocab_size: int,
    label_smoothing: float, z_loss: float, ignore_index: int, softcap: float,
) -> None:  # fmt: skip
    """The same over the logits."""
    scalars = (first, vocab_size, label_smoothing, z_loss, ignore_index, softcap)
    _write_gradient(logits, logits, labels, largest, total, grad, *scalars)


def _write_gradient(
    x: Tensor, out: Tensor, labels: Tensor, largest: Tensor, total: Tensor, grad: Tensor, first: int, vocab_size: int,
    label_smoothing: float, z_loss: float, ignore_index: int, softcap: float,
) -> None:  # fmt: skip
    rows, columns = x.shape
    if rows == 0 or columns == 0:
        return
    real = max(0, min(columns, vocab_size - first))
    settings = dict(lookup("cross_entropy_gradient", arch_of(x.device), columns))
    splits, per_program = _split(rows, columns, settings["BLOCK"], x.device)
    launch(
        _gradient, (rows, splits), x, out, labels.contiguous(), largest.contiguous(), total.contiguous(), grad.contiguous(),
        columns, real, per_program, x.stride(0), out.stride(0),
        first, vocab_size, ignore_index, softcap, label_smoothing, z_loss,
        CAPPED=softcap != 0.0, PADDED=real < columns, SMOOTHED=label_smoothing != 0.0, **settings,
    )  # fmt: skip


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Every row of the tables, in both dtypes, with every feature that costs registers."""

    def case(width: int, dtype: torch.dtype, padding: int, smoothing: float, softcap: float) -> Callable[[], object]:
        def run() -> None:
            x = torch.empty(4096, width, dtype=dtype, device="meta")
            labels = torch.empty(4096, dtype=torch.int64, device="meta")
            _, largest, total = losses(x, labels, smoothing, 1e-4, -100, softcap, False)
            statistics(x, labels, width, 2 * width - padding, softcap, -100, smoothing > 0)
            gradient(x, labels, largest, total, total, width, 2 * width - padding, smoothing, 1e-4, -100, softcap)

        return run

    for width in (1024, 131072):
        for dtype in (torch.bfloat16, torch.float32):
            label = f"cross_entropy {width} {str(dtype).removeprefix('torch.')}"
            yield label, case(width, dtype, 0, 0.0, 0.0), {"LDG.128"}
            yield f"{label}, smoothed", case(width, dtype, 0, 0.1, 0.0), {"LDG.128"}
            yield f"{label}, padded, smoothed, capped", case(width, dtype, 7, 0.1, 30.0), {"LDG.128"}
