"""Small kernels for the tests of the compile gate: a sum that a block needs in registers, a product in shared memory."""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.launch import arch_of, launch
from megalm_kernels.tables import lookup


@triton.jit
def _centre(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(y + at, values - tl.sum(values, axis=0) / BLOCK, mask=at < n)


@triton.jit
def _product(x, y, n, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for start in range(0, n, SIZE):
        left = tl.load(x + rows[:, None] * n + start + rows[None, :])
        right = tl.load(x + (start + rows[:, None]) * SIZE + rows[None, :])
        total = tl.dot(left, right, total)
    tl.store(y + rows[:, None] * SIZE + rows[None, :], total)


def centre(x: Tensor) -> None:
    settings = lookup("centre", arch_of(x.device), x.numel())
    launch(_centre, (triton.cdiv(x.numel(), settings["BLOCK"]),), x, torch.empty_like(x), x.numel(), **settings)


def product(x: Tensor) -> None:
    settings = lookup("product", arch_of(x.device), x.shape[1])
    launch(_product, (1,), x, torch.empty_like(x), x.shape[1], **settings)


CLAIMS: dict[str, set[str]] = {"centre": {"LDG.128"}, "product": {"HMMA", "HGMMA", "UTCMMA"}}


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    for n in (1024, 65536):
        yield f"centre bf16 {n}", lambda n=n: centre(torch.empty(n, dtype=torch.bfloat16, device="meta")), CLAIMS["centre"]
    x = torch.empty(64, 4096, dtype=torch.bfloat16, device="meta")
    yield "product bf16", lambda: product(x), CLAIMS["product"]
