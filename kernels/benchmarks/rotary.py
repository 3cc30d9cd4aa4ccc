"""Rotary embedding of queries and keys, as a layer needs them: 32 and 8 heads of 128.

Bytes per element, s the size of one: 2 s (read x, write y) and the tables of cosines and sines once; the backward the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm_kernels.benchmarks.harness import Case, Function, Provider, Work, find, standard
from megalm_kernels.rotary import rotary, rotary_reference

_SHAPES = {  # batch, sequence, heads, key heads, channels
    "tiny": [(2, 8, 4, 2, 16)],
    "quick": [(4, 4096, 32, 8, 128)],
    "full": [(8, 2048, 32, 8, 128), (4, 4096, 32, 8, 128), (4, 4096, 32, 8, 64), (1, 32768, 32, 8, 128)],
}


def cases(sizes: str) -> Iterator[Case]:
    """Half-split pairs in bf16 everywhere; fp32 and interleaved pairs on the first shape."""
    for shape in _SHAPES[sizes]:
        yield _case(shape, torch.bfloat16, False)
    yield _case(_SHAPES[sizes][0], torch.float32, False)
    yield _case(_SHAPES[sizes][0], torch.bfloat16, True)


def _case(shape: tuple[int, int, int, int, int], dtype: torch.dtype, interleaved: bool) -> Case:
    batch, length, heads, key_heads, channels = shape
    moved = 2 * batch * length * (heads + key_heads) * channels * dtype.itemsize + length * channels * 4

    def make(device: torch.device) -> list[Tensor]:
        q, k = (torch.randn(batch, length, count, channels, device=device).to(dtype) for count in (heads, key_heads))
        powers = torch.arange(0, channels, 2, device=device) / channels
        angles = torch.arange(length, device=device)[:, None] / 10000.0**powers
        return [q, k, angles.cos(), angles.sin()]

    def call(function: Function) -> Function:
        return lambda q, k, cos, sin: tuple(function(x, cos, sin, interleaved=interleaved) for x in (q, k))

    reference = call(rotary_reference)
    peers = [] if interleaved else [Provider("liger", _liger)]
    text = f"{batch} x {length} x ({heads}+{key_heads}) x {channels}{' pairs' * interleaved}"
    return Case(
        "rotary", text, dtype, make, reference, standard("rotary", call(rotary), reference, *peers),
        Work(moved), Work(moved), gradients=(0, 1),
    )  # fmt: skip


def _liger() -> Function:
    """Both in one launch, in place, on (B, H, S, D)."""
    turn = find("liger_kernel.ops.rope", "LigerRopeFunction").apply

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        found = turn(q.transpose(1, 2), k.transpose(1, 2), cos[None], sin[None], None, 1, q.shape[-1])
        return tuple(x.transpose(1, 2) for x in found)

    return turned
