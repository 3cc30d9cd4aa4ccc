"""The L2 norm in two stages: one partial sum per block of every tensor, then one program over all partials.

The order of the additions depends on the sizes alone, not on the GPU or on which program ends first: no atomics.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.launch import arch_of, launch
from megalm_kernels.tables import lookup


@triton.jit(do_not_specialize=["offset"])
def _sum_of_squares(X, PARTIALS, n, offset, BLOCK: tl.constexpr):
    """PARTIALS[offset + program] = sum of x^2 over its block, in fp32."""
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(PARTIALS + offset + block, tl.sum(x * x))


@triton.jit
def _root_of_sum(PARTIALS, OUT, n, BLOCK: tl.constexpr):
    """OUT = sqrt(sum of PARTIALS), by one program."""
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n, BLOCK):
        i = tl.cast(first, tl.int64) + tl.arange(0, BLOCK)
        total += tl.load(PARTIALS + i, mask=i < n, other=0.0)
    tl.store(OUT, tl.sqrt_rn(tl.sum(total)))


def l2_norm(tensors: list[Tensor]) -> Tensor:
    """Launch both stages over dense tensors of one device; fp32 scalar there."""
    device = tensors[0].device
    settings = lookup("l2_norm", arch_of(device))
    blocks = [triton.cdiv(x.numel(), settings["BLOCK"]) for x in tensors]
    partials = torch.empty(sum(blocks), dtype=torch.float32, device=device)
    offset = 0
    for x, count in zip(tensors, blocks, strict=True):
        if count:
            launch(_sum_of_squares, (count,), x, partials, x.numel(), offset, **settings)
        offset += count
    out = torch.empty((), dtype=torch.float32, device=device)
    launch(_root_of_sum, (1,), partials, out, partials.numel(), **settings)
    return out


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """A list of tensors by dtype, and one flat buffer that int32 cannot index."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield f"l2_norm {str(dtype)[6:]}", partial(_specimen, dtype, [2**20, 2**20]), {"LDG.128"}
    yield "l2_norm float32, 2^31 elements", partial(_specimen, torch.float32, [2**31]), {"LDG.128"}


def _specimen(dtype: torch.dtype, sizes: list[int]) -> None:
    l2_norm([torch.empty(size, dtype=dtype, device="meta") for size in sizes])
