"""Softmax attention: y = softmax(scale q k^T + bias) v, over the whole batch or over packed sequences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megalm_kernels.arguments import (
    check_device,
    check_dtype,
    check_integer,
    check_not_negative,
    check_probability,
    check_shape,
    refuse,
)
from megalm_kernels.attention.call import ALL, Call
from megalm_kernels.attention.reference import attention_reference
from megalm_kernels.dispatch import implementation

_NAME = "flash_attention"


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] = (ALL, ALL),
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int = 0,
    origin: tuple[int, int, int, int] = (0, 0, 0, 0),
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
) -> Any:
    """Attention over the sequence. q (B, Sq, H, D), k and v (B, Sk, Hkv, D) with H a multiple of Hkv -> (B, Sq, H, D).

    Packed: q (Tq, H, D), k and v (Tk, Hkv, D) with cu_seqlens_q and cu_seqlens_k (N + 1,) int32, which say where each of N
    sequences begins and the last ends; a query sees keys of its own sequence only. Rows behind the last are padding: 0, and no
    gradient. Result (Tq, H, D).

    causal: the last query sees every key, the one before it one key fewer, and so on: aligned at the end, which is what
    decoding with a key/value cache needs. A query that sees no key gives 0.
    window (left, right): a query sees so many keys before and after its own place; -1: all. Causal leaves no right.
    scale: of the scores; 1 / sqrt(D) if not given. softcap c > 0: scores become c tanh(score / c).
    alibi_slopes (H,), (B, H) or (N, H) fp32: -slope |distance| is added to the scores (Press et al. 2021).
    sinks (H,): a score per head that takes its share of the softmax and gives no value; it has a gradient.
    dropout_p: shares are dropped by Philox of (seed, sequence, head, query, key); origin: where this call's first element
    stands among them, for a rank that has some of the heads or of the batch.
    deterministic: gradients repeat to the bit; without, a kernel may add them up in any order.
    return_lse: also the logarithms of the sums of exponentials, (B, H, Sq) or (H, Tq) fp32, -inf for a query that sees
    nothing; `merge_attention` puts parts together by them.

    Raises ValueError; also for what the implementation that was chosen does not have, with the one that has it.
    """
    q, k, v = _as_autocast_wants(q, k, v)
    call = make_call(
        q, k, v, causal, window, scale, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p, seed=seed,
        origin=tuple(origin), cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, deterministic=deterministic,
        return_lse=return_lse,
    )  # fmt: skip
    out, lse = implementation("attention")(q, k, v, call)
    return (out, lse) if return_lse else out


def flash_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] = (ALL, ALL),
    scale: float | None = None,
    **options: Any,
) -> Any:
    """The formula, with the whole matrix of scores, in fp32 (fp64 if q is); the arguments are those of `flash_attention`."""
    call = make_call(q, k, v, causal, window, scale, **options)
    out, lse = attention_reference(q, k, v, call)
    return (out, lse) if call.return_lse else out


def _as_autocast_wants(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch does with its own attention: in autocast's dtype, of which fp64 is left out."""
    if not isinstance(tensors[0], Tensor) or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    cast = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.dtype in cast else x for x in tensors)


def make_call(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: tuple[int, int], scale: float | None, **options: Any
) -> Call:
    """Everything checked. A scale of None is 1 / sqrt(D)."""
    packed = options.get("cu_seqlens_q") is not None or options.get("cu_seqlens_k") is not None
    _check_tensors(q, k, v, packed)
    left, right = _sides(causal, window)
    call = Call(left, right, 1 / math.sqrt(q.shape[-1]) if scale is None else scale, **options)
    check_not_negative(_NAME, "scale", call.scale)
    if not call.scale > 0:
        raise refuse(_NAME, "scale", call.scale, "more than 0")
    check_not_negative(_NAME, "softcap", call.softcap)
    check_probability(_NAME, "dropout_p", call.dropout_p)
    check_integer(_NAME, "seed", call.seed)
    if len(call.origin) != 4:
        raise refuse(_NAME, "origin", call.origin, "(sequence, head, query, key)")
    for place in call.origin:
        check_integer(_NAME, "origin", place, bits=31)
    if packed:
        _check_packed(q, k, call)
    _check_heads(q, call)
    return call


def _sides(causal: bool, window: tuple[int, int]) -> tuple[int, int]:
    """How many keys before and after its place a query sees."""
    if len(window) != 2:
        raise refuse(_NAME, "window", window, "(left, right)")
    for side in window:
        check_integer(_NAME, "window", side, least=ALL, bits=30)
    left, right = window
    if causal and right > 0:
        raise refuse(_NAME, "window", window, "(left, 0) or (left, -1) with causal=True, which leaves no keys to the right")
    return left, 0 if causal else right


def _check_tensors(q: Tensor, k: Tensor, v: Tensor, packed: bool) -> None:
    check_dtype(_NAME, "q", q)
    wanted = "(T, H, D), packed" if packed else "(B, S, H, D); or (T, H, D) with cu_seqlens_q and cu_seqlens_k"
    if q.dim() != (3 if packed else 4):
        raise refuse(_NAME, "the shape of q", tuple(q.shape), wanted)
    if q.shape[-1] == 0:
        raise refuse(_NAME, "the shape of q", tuple(q.shape), "at least one channel per head")
    for name, x in (("k", k), ("v", v)):
        check_dtype(_NAME, name, x, (q.dtype,))
        check_device(_NAME, name, x, q)
    if k.dim() != q.dim():
        raise refuse(_NAME, "the shape of k", tuple(k.shape), wanted)
    check_shape(_NAME, "v", v, k.shape)
    if (*k.shape[:-3], k.shape[-1]) != (*q.shape[:-3], q.shape[-1]):
        raise refuse(_NAME, "the shape of k", tuple(k.shape), f"q's sequences and channels, {tuple(q.shape)}")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise refuse(_NAME, "the number of heads of q", q.shape[-2], f"a multiple of k's, {k.shape[-2]}")


def _check_packed(q: Tensor, k: Tensor, call: Call) -> None:
    for name, starts in (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k)):
        if starts is None:
            raise refuse(_NAME, name, "None", "given, where the other one is")
        check_dtype(_NAME, name, starts, (torch.int32,))
        check_device(_NAME, name, starts, q)
        if starts.dim() != 1 or starts.shape[0] < 1:
            raise refuse(_NAME, f"the shape of {name}", tuple(starts.shape), "(N + 1,) for N sequences")
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    check_shape(_NAME, "cu_seqlens_k", call.cu_seqlens_k, call.cu_seqlens_q.shape)
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere, to look at the values is to wait for them
        _check_starts("cu_seqlens_q", call.cu_seqlens_q, q.shape[0])
        _check_starts("cu_seqlens_k", call.cu_seqlens_k, k.shape[0])


def _check_starts(name: str, starts: Tensor, tokens: int) -> None:
    """Otherwise rows belong to several sequences, or are not there."""
    values = starts.tolist()
    if values[0] != 0 or values[-1] > tokens or values != sorted(values):
        raise refuse(_NAME, name, values, f"0 and where each sequence ends, in rising order, {tokens} at the most")


def _check_heads(q: Tensor, call: Call) -> None:
    """What there is one of per head."""
    heads = q.shape[-2]
    if call.sinks is not None:
        check_dtype(_NAME, "sinks", call.sinks)
        check_shape(_NAME, "sinks", call.sinks, (heads,))
        check_device(_NAME, "sinks", call.sinks, q)
    slopes = call.alibi_slopes
    if slopes is None:
        return
    check_dtype(_NAME, "alibi_slopes", slopes, (torch.float32,))
    check_device(_NAME, "alibi_slopes", slopes, q)
    if slopes.requires_grad:
        raise refuse(_NAME, "alibi_slopes", "a tensor that requires a gradient", "fixed slopes")
    if slopes.dim() != 1:
        sequences = q.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1
        check_shape(_NAME, "alibi_slopes", slopes, (sequences, heads))
    else:
        check_shape(_NAME, "alibi_slopes", slopes, (heads,))
