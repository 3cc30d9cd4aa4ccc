"""The only place that launches a Triton kernel: for real, or into a list that the compile gate reads.

Under `capture(arch)` nothing runs: the host code of an operation, called with tensors on the meta device, leaves here what
it would have launched on a GPU of that architecture. So the gate compiles what training launches, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megalm_kernels import compat

OPTIONS = {"enable_fp_fusion": True}  # a * b + c in one rounding; the default is about to change, and warns of it
INTERPRETED_ARCH = 90  # whose block sizes the interpreter uses
_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # A100, H100 and H200, B200
_INTERPRETED_MULTIPROCESSORS = 3  # few, so that small tensors are spread over all of them and unevenly


@dataclass(frozen=True)
class Launch:
    """One launch that was not done."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


@dataclass
class _Capture:
    arch: int
    launches: list[Launch] = field(default_factory=list)


_capture: _Capture | None = None


@contextmanager
def capture(arch: int) -> Iterator[list[Launch]]:
    """Collect launches for a GPU of `arch` (80, 90, 100, ...) instead of doing them."""
    global _capture
    before, _capture = _capture, _Capture(arch)
    try:
        yield _capture.launches
    finally:
        _capture = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run `kernel` on a grid of programs. meta: its compile-time arguments, num_warps, num_stages."""
    if _capture is not None:
        _capture.launches.append(Launch(kernel, grid, args, meta))
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda":
        from triton import set_allocator  # dispatch imports this file, and must not need triton

        set_allocator(_workspace)  # each time: it is per thread, and a backward runs in autograd's own
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **meta, **OPTIONS)
    else:
        kernel[grid](*args, **meta, **OPTIONS)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the tensor descriptors that programs make."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def seed_halves(seed: int) -> tuple[int, int]:
    """A seed of 64 bits as two signed integers of 32: a kernel would be compiled anew for a seed of another integer type."""
    low = seed & 0xFFFFFFFF
    return low - (low >> 31 << 32), seed >> 32


def arch_of(device: torch.device) -> int:
    """Compute capability as two digits and a half: 80, 90, 100. The interpreter's is `INTERPRETED_ARCH`."""
    if _capture is not None:
        return _capture.arch
    return capability(device.index or 0) if device.type == "cuda" else INTERPRETED_ARCH


def multiprocessors(device: torch.device) -> int:
    """How many programs run at the same time, at the least."""
    if _capture is not None:
        return _MULTIPROCESSORS.get(_capture.arch, 108)
    if compat.interpreting() or device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return _multiprocessors(device.index or 0)


@cache
def capability(index: int) -> int:
    """Of a GPU by its number: 90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
