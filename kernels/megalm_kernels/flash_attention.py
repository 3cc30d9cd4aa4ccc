"""Softmax attention: y = softmax(q k^T * scale) v, causal or not, with fewer key/value heads than query heads (GQA)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.dispatch import implementation, register


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    """Attention over the sequence. q (B, Sq, H, D), k and v (B, Sk, Hkv, D) with H a multiple of Hkv; result (B, Sq, H, D).

    `causal`: the last query sees every key, the one before it one key fewer, and so on (bottom right alignment, which
    is what decoding with a key/value cache needs). `scale`: 1 / sqrt(D) if not given.
    """
    return implementation("flash_attention")(q, k, v, causal, scale)


def flash_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, scale: float | None = None
) -> Tensor:
    """The formula, in fp32, with the whole score matrix."""
    scale = scale or 1 / math.sqrt(q.shape[-1])
    groups = q.shape[2] // k.shape[2]
    qf, kf, vf = q.float(), k.float().repeat_interleave(groups, 2), v.float().repeat_interleave(groups, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", qf, kf) * scale
    if causal:
        scores = scores.masked_fill(~_causal_mask(q.shape[1], k.shape[1], q.device), -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), vf).to(q.dtype)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Sq, Sk) bool, True where the query may look."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _flash_attention_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    square = q.shape[2] == k.shape[2]
    mask = _causal_mask(q.shape[2], k.shape[2], q.device) if causal and not square else None
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and square, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)


register("flash_attention", "torch", _flash_attention_torch)
