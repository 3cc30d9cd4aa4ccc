"""Attention over some of the keys and over the rest, put together (Milakov and Gimelshein 2018; Dao 2022, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm_kernels.arguments import refuse


def merge_attention(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """What attention over all keys would have given, from results and lse over disjoint sets of them; differentiable.

    Each part: out (B, S, H, D) and lse (B, H, S) fp32, or packed (T, H, D) and (H, T). A part that saw no key has lse -inf.
    Computed in fp32 (fp64 if out is); the result has out's dtype, so to add up many parts, keep them in fp32. Not for parts
    with sinks, which count one per part.
    """
    if not parts:
        raise refuse("merge_attention", "parts", "empty", "at least one pair of result and lse")
    outs = [out for out, _ in parts]
    for out, lse in parts:
        wanted = (*out.shape[:-3], out.shape[-2], out.shape[-3])
        if tuple(lse.shape) != wanted or out.shape != outs[0].shape:
            raise refuse("merge_attention", "a part", f"{tuple(out.shape)} with lse {tuple(lse.shape)}", f"lse {wanted}")
    lses = torch.stack([lse for _, lse in parts])
    largest = lses.detach().amax(0)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    weights = torch.exp(lses - largest)
    total = weights.sum(0)
    nothing = total == 0.0
    safe = total.masked_fill(nothing, 1.0)
    lse, shares = (largest + safe.log()).masked_fill(nothing, -torch.inf), weights / safe
    merged = sum(share.transpose(-1, -2)[..., None] * out.to(share.dtype) for share, out in zip(shares, outs, strict=True))
    return merged.to(outs[0].dtype).contiguous(), lse


def merge_into(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Take one more part into out and lse, in place: what is there so far is needed once, however many parts come. No gradient.

    out (..., S, H, D) fp32 or fp64, of which lse (..., H, S) -inf and any finite value are the start; part_out of any dtype.
    A part's share is 1 / (1 + exp(lse - part_lse)), and the rest what is left of 1: so shares add up to 1 in any number of
    merges. Exact where one of both saw nothing. Unchecked, like what is inside a kernel.
    """
    share = torch.sigmoid(part_lse - lse).nan_to_num_(0.0)  # -inf - -inf: nobody saw anything
    out.lerp_(part_out.to(out.dtype), share.transpose(-1, -2)[..., None].to(out.dtype))
    torch.logaddexp(lse, part_lse, out=lse)
