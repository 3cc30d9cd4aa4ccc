"""Attention over some of the keys, and its gradient given the result over all of them: what a ring of ranks is made of.

Neither is differentiable by itself: who puts parts together has a backward of its own. With P = exp(scores - lse), the shares in
the whole attention, a part's gradients need nothing of the other parts but the whole result and lse (Liu et al. 2023).

They run on what was chosen for attention. On a GPU torch's own operators hand out no lse that all of them agree on, and Triton's
kernels, which take a whole ring's as it is, run in their place, as for a call with return_lse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megalm_kernels.attention.call import ALL, Call
from megalm_kernels.attention.gradient import attention_backward_reference
from megalm_kernels.attention.operators import attention_backward_op, attention_forward_op, attention_triton, suits
from megalm_kernels.attention.public import make_call
from megalm_kernels.attention.reference import attention_reference, join, sequences
from megalm_kernels.attention.sdpa import attention_by_formula, cpu_flash, cpu_flash_backward
from megalm_kernels.dispatch import implementation, triton_obstacle

_ROWS = 256  # queries that share a mask on a CPU


@torch.no_grad()
def attention_part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] = (ALL, ALL),
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Result and lse, as `flash_attention` gives them with these arguments.

    q (B, Sq, H, D), k and v (B, Sk, Hkv, D) -> (B, Sq, H, D) in q's dtype and (B, H, Sq) fp32, -inf for a query that sees no
    key; packed (T, H, D) and (H, T). Raises ValueError as `flash_attention` does.
    """
    call = make_call(q, k, v, causal, window, scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, return_lse=True)
    kind = _kind(q)
    if kind == "triton":
        return attention_forward_op(q, k, v, None, None, cu_seqlens_q, cu_seqlens_k, *_numbers(call))
    if kind == "reference":
        return attention_reference(q, k, v, call)
    if not call.packed:
        return _forward(q, k, v, call)
    nothing = q.new_empty((q.shape[1], 0), dtype=_wide(q))
    parts = [_forward(a[None], b[None], c[None], one) for a, b, c, one in sequences(q, k, v, call)]
    out, lse = join([q[:0], *(out[0] for out, _ in parts)], [nothing, *(lse[0] for _, lse in parts)], q.shape[0])
    assert lse is not None
    return out, lse


@torch.no_grad()
def attention_part_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    causal: bool = True,
    window: tuple[int, int] = (ALL, ALL),
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What these keys add to the gradient of q, and these queries to those of k and v; in their dtypes.

    dout, out and lse, at q's rows, belong to attention over all keys. The rest as in `attention_part`.
    """
    call = make_call(q, k, v, causal, window, scale, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    kind = _kind(q)
    if kind == "triton":
        numbers = _numbers(call)
        return attention_backward_op(dout, None, q, k, v, out, lse, None, cu_seqlens_q, cu_seqlens_k, *numbers)[:3]
    if kind == "reference":
        return attention_backward_reference(dout, None, q, k, v, out, lse, call)[:3]
    if not call.packed:
        return _backward(dout, q, k, v, out, lse, call)
    grads: list[list[Tensor]] = [[x[:0]] for x in (q, k, v)]
    starts = [] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    for (a, b, c, one), begin, end in zip(sequences(q, k, v, call), starts[:-1], starts[1:], strict=True):
        whole = (dout[None, begin:end], out[None, begin:end], lse[None, :, begin:end])
        found = _backward(whole[0], a[None], b[None], c[None], *whole[1:], one)
        for grad, part in zip(grads, found, strict=True):
            grad.append(part[0])
    dq, dk, dv = (join(grad, (), x.shape[0])[0] for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


def _kind(q: Tensor) -> str:
    """triton, reference, or torch, which is the CPU's kernel."""
    chosen = implementation("attention")
    if chosen is attention_triton or chosen is attention_by_formula:
        return "triton" if chosen is attention_triton else "reference"
    if q.device.type == "cpu":
        return "torch"
    fits = suits(q.shape[-1]) and q.dtype != torch.float64 and not triton_obstacle(q.device.type)
    return "triton" if fits else "reference"


def _numbers(call: Call) -> tuple[Any, ...]:
    """What the operators take behind the tensors."""
    return call.left, call.right, call.scale, call.softcap, call.dropout_p, call.seed, list(call.origin), call.deterministic


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- the CPU's kernel knows the square causal mask; any other it wants as a matrix, and gets it for some rows at a time -------

_Tile = tuple[slice, slice, bool, Tensor | None]  # queries, keys, causal, mask to be added


def _tiles(q: Tensor, k: Tensor, call: Call) -> Iterator[_Tile]:
    """The queries that see a key, with the keys that they may see: all at once, or _ROWS at a time where a mask is needed."""
    queries, keys = q.shape[1], k.shape[1]
    shift = keys - queries  # from a query's number to its place
    if 0 in (*q.shape, *k.shape):
        return
    if call.causal and not shift:
        yield slice(queries), slice(keys), True, None
    elif (call.left == ALL or call.left >= keys - 1) and (call.right == ALL or call.right >= max(queries, keys) - 1):
        yield slice(queries), slice(keys), False, None
    else:
        seeing = 0 if call.right == ALL else max(0, -shift - call.right)
        for start in range(seeing, queries, _ROWS):
            stop = min(start + _ROWS, queries)
            first = 0 if call.left == ALL else max(0, start + shift - call.left)
            last = keys if call.right == ALL else min(keys, stop + shift + call.right)
            yield slice(start, stop), slice(first, last), False, _mask(start + shift, stop + shift, first, last, call, q)


def _mask(start: int, stop: int, first: int, last: int, call: Call, q: Tensor) -> Tensor:
    """(queries, keys) of the queries at places start..stop and the keys first..last: 0, or -inf where one may not look."""
    ahead = torch.arange(first, last, device=q.device) - torch.arange(start, stop, device=q.device)[:, None]
    unseen = torch.zeros_like(ahead, dtype=torch.bool)
    if call.right != ALL:
        unseen |= ahead > call.right
    if call.left != ALL:
        unseen |= ahead < -call.left
    return torch.zeros_like(ahead, dtype=q.dtype).masked_fill_(unseen, -torch.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """q (B, Sq, H, D), k and v (B, Sk, Hkv, D) -> (B, Sq, H, D), (B, H, Sq)."""
    out, lse = None, None
    for rows, columns, causal, mask in _tiles(q, k, call):
        parts = (x.transpose(1, 2) for x in (q[:, rows], k[:, columns], v[:, columns]))
        y, s = cpu_flash(*parts, 0.0, causal, attn_mask=mask, scale=call.scale)
        if y.shape[2] == q.shape[1]:
            return y.transpose(1, 2), s
        if out is None or lse is None:
            out, lse = _nothing(q)
        out[:, rows], lse[:, :, rows] = y.transpose(1, 2), s
    return _nothing(q) if out is None or lse is None else (out, lse)


def _nothing(q: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries that see no key."""
    batch, queries, heads, _ = q.shape
    return torch.zeros_like(q), q.new_full((batch, heads, queries), -torch.inf, dtype=_wide(q))


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; keys that several tiles see add up in fp32."""
    sums: list[Tensor] = []
    for rows, columns, causal, mask in _tiles(q, k, call):
        given = (dout[:, rows], q[:, rows], k[:, columns], v[:, columns], out[:, rows])
        parts = (x.transpose(1, 2) for x in given)
        dq, *dkv = cpu_flash_backward(*parts, lse[:, :, rows], 0.0, causal, attn_mask=mask, scale=call.scale)
        if (dq.shape[2], dkv[0].shape[2]) == (q.shape[1], k.shape[1]):
            return dq.transpose(1, 2), dkv[0].transpose(1, 2), dkv[1].transpose(1, 2)
        sums = sums or [torch.zeros_like(q), *(torch.zeros_like(x, dtype=_wide(x)) for x in (k, v))]
        sums[0][:, rows] = dq.transpose(1, 2)
        for total, part in zip(sums[1:], dkv, strict=True):
            total[:, columns] += part.transpose(1, 2)
    if not sums:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    return sums[0], sums[1].to(k.dtype), sums[2].to(v.dtype)
