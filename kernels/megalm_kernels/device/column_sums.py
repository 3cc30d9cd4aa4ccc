"""The second half of a gradient that programs add up in parts: one row of fp32 partial sums each, summed here in order."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.launch import arch_of, launch
from megalm_kernels.tables import lookup


@triton.jit(do_not_specialize=["rows"])  # the programs of a GPU: no kernel of its own for each count
def _column_sums(PARTIALS, Y, rows, columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of the columns of PARTIALS (rows, columns), always in the same order."""
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, rows, ROWS):
        row = tl.cast(first, tl.int64) + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(PARTIALS + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(Y + column, tl.sum(total, axis=0).to(Y.dtype.element_ty), mask=column < columns)


def column_sums(partials: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of the columns of partials (P, N) fp32, contiguous -> (N,) of dtype."""
    y = torch.empty(partials.shape[1], dtype=dtype, device=partials.device)
    settings = lookup("column_sums", arch_of(y.device))
    launch(_column_sums, (triton.cdiv(y.numel(), settings["BLOCK"]),), partials, y, *partials.shape, **settings)
    return y


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """Those of its callers have it."""
    return iter(())
