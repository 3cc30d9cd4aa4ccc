"""Attention of the newest tokens over a key/value cache: few queries, many keys, no gradient.

Query i of Sq stands at key length - Sq + i of its sample and sees it and those before it. Each key and value is read once:
2 D bytes times the size of an element for each of a sample's keys and key heads, against 4 D G Sq operations on them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megalm_kernels.arguments import (
    check_device,
    check_dtype,
    check_integer,
    check_kernel_dtype,
    check_not_negative,
    check_shape,
    refuse,
)
from megalm_kernels.attention.call import ALL, Call
from megalm_kernels.dispatch import implementation, kernel_op, register, triton_obstacle

_NAME = "decode_attention"
MOST_QUERIES = 16  # of a sample
WIDEST = 256  # head that the kernel takes


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    window_left: int = ALL,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """q (B, Sq, H, D) of the newest tokens, k and v (B, Smax, Hkv, D) with H a multiple of Hkv -> (B, Sq, H, D).

    Sq is 1 to 16. k and v: the cache, any strides but channels next to each other; memory past a sample's length is not read.
    lengths (B,) int32, on the same device: how many keys each sample has, with those of the newest tokens; default: all Smax.
    One that is negative or above Smax raises ValueError where that can be known without waiting for a GPU, if `lengths` is on
    the CPU; on a GPU its sample becomes NaN. A query that stands before the first key sees none and gives 0.
    window_left: a query sees so many keys before its own; -1: all. scale, softcap, alibi_slopes (H,) or (B, H) fp32, sinks (H,):
    as of `flash_attention`. Results of two runs are equal to the bit.

    Raises ValueError; also for inputs that require a gradient, unless under torch.no_grad().
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None and isinstance(q, Tensor) and q.dim() else scale
    _check(q, k, v, lengths, alibi_slopes, sinks)
    check_integer(_NAME, "window_left", window_left, least=ALL, bits=31)
    check_not_negative(_NAME, "scale", scale)  # type: ignore[arg-type]
    check_not_negative(_NAME, "softcap", softcap)
    return implementation(_NAME)(q, k, v, lengths, window_left, scale, softcap, alibi_slopes, sinks)


def _check(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, alibi_slopes: Tensor | None, sinks: Tensor | None) -> None:
    check_dtype(_NAME, "q", q)
    if q.dim() != 4 or not 1 <= q.shape[1] <= MOST_QUERIES:
        raise refuse(_NAME, "the shape of q", tuple(q.shape), f"(B, Sq, H, D) with Sq from 1 to {MOST_QUERIES}")
    for name, x in (("k", k), ("v", v)):
        check_dtype(_NAME, name, x, (q.dtype,))
        check_device(_NAME, name, x, q)
        if x.dim() != 4 or (x.shape[0], x.shape[3]) != (q.shape[0], q.shape[3]):
            raise refuse(_NAME, f"the shape of {name}", tuple(x.shape), f"({q.shape[0]}, Smax, Hkv, {q.shape[3]}), by that of q")
        if not _readable(x):
            raise refuse(_NAME, f"the strides of {name}", x.stride(), "1 for the last, the channels")
    check_shape(_NAME, "v", v, k.shape)
    heads = q.shape[2]
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise refuse(_NAME, "the number of heads of q", heads, f"a multiple of k's, {k.shape[2]}")
    if lengths is not None:
        _check_lengths(lengths, q, k.shape[1])
    if sinks is not None:
        check_dtype(_NAME, "sinks", sinks)
        check_shape(_NAME, "sinks", sinks, (heads,))
        check_device(_NAME, "sinks", sinks, q)
    if alibi_slopes is not None:
        check_dtype(_NAME, "alibi_slopes", alibi_slopes, (torch.float32,))
        check_shape(_NAME, "alibi_slopes", alibi_slopes, (heads,) if alibi_slopes.dim() == 1 else (q.shape[0], heads))
        check_device(_NAME, "alibi_slopes", alibi_slopes, q)
    for name, given in (("q", q), ("k", k), ("v", v), ("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if _differentiated(given):
            raise refuse(_NAME, name, "a tensor that requires a gradient", "none, or torch.no_grad(); flash_attention has one")


def _check_lengths(lengths: Tensor, q: Tensor, keys: int) -> None:
    check_dtype(_NAME, "lengths", lengths, (torch.int32,))
    check_shape(_NAME, "lengths", lengths, q.shape[:1])
    check_device(_NAME, "lengths", lengths, q)
    if lengths.device.type == "cpu" and lengths.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in lengths.aminmax())
        if low < 0 or high > keys:
            raise refuse(_NAME, "lengths", f"{low} to {high}", f"0 to {keys}, the keys of the cache")


def _readable(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _differentiated(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor | None = None,
    window_left: int = ALL,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula, with the whole matrix of scores, in fp32 (fp64 if q is); the arguments are those of `decode_attention`."""
    (batch, queries, heads, width), keys, wide = q.shape, k.shape[1], torch.promote_types(q.dtype, torch.float32)
    length = torch.full((batch,), keys, device=q.device) if lengths is None else lengths
    key = torch.arange(keys, device=q.device)
    place = (length[:, None] - queries + torch.arange(queries, device=q.device))[..., None]  # (B, Sq, 1)
    past = (key >= length[:, None])[..., None, None]
    kf, vf = (x.masked_fill(past, 0.0).to(wide).repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q.to(wide), kf) * (1 / math.sqrt(width) if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(wide)[..., None, None] * (place - key).abs()[:, None]
    seen = key <= place
    if window_left != ALL:
        seen = seen & (key >= place - window_left)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(wide)[:, None, None].expand(batch, heads, queries, 1)), -1)
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    share = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
    out = torch.einsum("bhij,bjhd->bihd", share[..., :keys], vf)
    possible = (length >= 0) & (length <= keys)
    return out.masked_fill(~possible[:, None, None, None], torch.nan).to(q.dtype)


@kernel_op("decode_attention", "attention_decode:decode")
def decode_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    window_left: int,
    scale: float,
    softcap: float,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """The result, contiguous."""
    return _reference(q, k, v, lengths, window_left, scale, softcap, alibi_slopes, sinks).contiguous()


@decode_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window_left: int, scale: float, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window_left: int, scale: float, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    return decode_attention_reference(
        q, k, v, lengths=lengths, window_left=window_left, scale=scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks
    )


def _decode_torch(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window_left: int, scale: float, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """torch's own attention for one query over all keys, which needs no mask; else the formula."""
    features = (lengths is not None, window_left != ALL, softcap, alibi_slopes is not None, sinks is not None)
    if any(features) or q.shape[1] > 1 or k.shape[1] == 0:
        return _reference(q, k, v, lengths, window_left, scale, softcap, alibi_slopes, sinks)
    attend = torch.nn.functional.scaled_dot_product_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def _decode_triton(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, window_left: int, scale: float, softcap: float,
    alibi_slopes: Tensor | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    check_kernel_dtype(_NAME, "q", q)
    if q.shape[-1] > WIDEST:
        wanted = f'at most {WIDEST} (others: use({_NAME}="torch"))'
        raise refuse(f"{_NAME} with Triton", "the width of a head", q.shape[-1], wanted)
    return decode_attention_op(q, k, v, lengths, window_left, scale, softcap, alibi_slopes, sinks)


def takes(q: Tensor, k: Tensor, v: Tensor, call: Call) -> bool:
    """Whether a call of attention with Triton is one that `decode` should run: few queries, more keys, nobody wants gradients."""
    if call.packed or call.right != 0 or call.dropout_p or call.return_lse:
        return False
    few = 1 <= q.shape[1] <= MOST_QUERIES and q.shape[1] < k.shape[1] and q.shape[-1] <= WIDEST
    return few and _readable(k) and _readable(v) and not any(map(_differentiated, (q, k, v, call.sinks)))


def decode(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """The result of a call that `takes` accepts, by the kernel."""
    return _decode_triton(q, k, v, None, call.left, call.scale, call.softcap, call.alibi_slopes, call.sinks)


register(_NAME, "torch", _decode_torch)
register(_NAME, "triton", _decode_triton, triton_obstacle)
