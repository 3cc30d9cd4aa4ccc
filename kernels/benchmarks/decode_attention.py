"""Attention of the newest tokens over a full key/value cache: 32 heads of 128, which share 32 key heads, 8 or 4.

Bytes: every key and value once, q and the result. The forward is all there is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megalm_kernels.attention.decode import decode_attention, decode_attention_reference
from megalm_kernels.benchmarks.harness import OURS, Case, Function, Provider, Work, find

_SHAPES = {  # samples, queries of each, keys, heads, key heads, channels
    "tiny": [(2, 1, 16, 4, 2, 32), (2, 3, 16, 4, 2, 32)],
    "quick": [(64, 1, 4096, 32, 8, 128)],
    "full": [
        *((1, 1, keys, 32, key_heads, 128) for keys in (2048, 8192, 32768) for key_heads in (32, 4)),
        *((16, 1, keys, 32, key_heads, 128) for keys in (2048, 8192) for key_heads in (32, 4)),
        *((64, 1, keys, 32, 4, 128) for keys in (2048, 8192)),
        *((64, queries, 4096, 32, 8, 128) for queries in (1, 4, 16)),
    ],
}


def cases(sizes: str) -> Iterator[Case]:
    """bf16."""
    for shape in _SHAPES[sizes]:
        yield _case(*shape)


def _case(samples: int, queries: int, keys: int, heads: int, key_heads: int, channels: int) -> Case:
    moved = 2 * channels * samples * 2 * (keys * key_heads + queries * heads)
    flops = 4 * samples * queries * keys * heads * channels

    def make(device: torch.device) -> list[Tensor]:
        shapes = [(samples, queries, heads, channels), *[(samples, keys, key_heads, channels)] * 2]
        return [torch.randn(shape, device=device).bfloat16() for shape in shapes]

    return Case(
        "decode_attention", f"{samples} x {queries} of {keys} x {heads}/{key_heads} x {channels}", torch.bfloat16, make,
        decode_attention_reference,
        [
            Provider(OURS, lambda: decode_attention, {"decode_attention": OURS}),
            Provider("torch", lambda: decode_attention, {"decode_attention": "torch"}),
            Provider("reference", lambda: decode_attention_reference),
            Provider("flash-attn 2", lambda: _flash_attn("flash_attn")),
            Provider("flash-attn 3", lambda: _flash_attn("flash_attn_interface")),
        ],
        Work(moved, flops),
    )  # fmt: skip


def _flash_attn(module: str) -> Function:
    attend = find(module, "flash_attn_with_kvcache")
    return lambda q, k, v: attend(q, k, v, causal=True)
