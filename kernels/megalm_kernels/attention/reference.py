"""Attention as the formula says, with the whole matrix of scores: to be read, to be compared with, and for small sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megalm_kernels.attention.call import Call, alibi_bias, visible
from megalm_kernels.attention.philox import keep_mask


def attention_reference(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """Result, in q's dtype, and fp32 logarithms of the sums; computed in fp32 (fp64 if q is).

    q (B, Sq, H, D), k and v (B, Sk, Hkv, D) -> (B, Sq, H, D), (B, H, Sq). Packed: (T, H, D) -> (T, H, D), (H, T).
    """
    if not call.packed:
        return _dense(q, k, v, call)
    parts = [_dense(a.unsqueeze(0), b.unsqueeze(0), c.unsqueeze(0), one) for a, b, c, one in sequences(q, k, v, call)]
    if not parts:
        return torch.zeros_like(q), q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=_wide(q))
    out, lse = join([out[0] for out, _ in parts], [lse[0] for _, lse in parts], q.shape[0])
    assert lse is not None
    return out, lse


def join(outs: Sequence[Tensor], lses: Sequence[Tensor], rows: int) -> tuple[Tensor, Tensor | None]:
    """Packed sequences one behind the other; rows behind the last are padding: 0, with lse -inf."""
    out, lse = torch.cat(list(outs)), torch.cat(list(lses), dim=-1) if lses else None
    if out.shape[0] < rows:
        behind = rows - out.shape[0]
        out = F.pad(out, (0, 0, 0, 0, 0, behind))
        lse = None if lse is None else F.pad(lse, (0, behind), value=-torch.inf)
    return out, lse


def sequences(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Iterator[tuple[Tensor, Tensor, Tensor, Call]]:
    """Each packed sequence with a call of its own. The host waits for the device, to know where they are."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    sequence, head, query, key = call.origin
    for n in range(len(starts_q) - 1):
        slopes = call.alibi_slopes[n] if call.alibi_slopes is not None and call.alibi_slopes.dim() == 2 else call.alibi_slopes
        one = replace(
            call, origin=(sequence + n, head, query, key), alibi_slopes=slopes, cu_seqlens_q=None, cu_seqlens_k=None
        )
        yield (
            q[starts_q[n] : starts_q[n + 1]],
            k[starts_k[n] : starts_k[n + 1]],
            v[starts_k[n] : starts_k[n + 1]],
            one,
        )


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    with torch.autocast(q.device.type, enabled=False):  # which would multiply in less than fp32
        return _formula(q, k, v, call)


def _formula(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    wide = _wide(q)
    groups = q.shape[2] // k.shape[2]
    qf, kf, vf = (x.to(wide).transpose(1, 2) for x in (q, k, v))  # (B, H, S, D)
    kf, vf = kf.repeat_interleave(groups, 1), vf.repeat_interleave(groups, 1)
    scores = qf @ kf.transpose(-1, -2) * call.scale
    if call.softcap:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    queries, keys = scores.shape[-2:]
    if call.alibi_slopes is not None:
        scores = scores + alibi_bias(queries, keys, call.alibi_slopes.to(wide))
    scores = scores.masked_fill(~visible(queries, keys, call, q.device), -torch.inf)
    lse = _logsumexp(scores, call.sinks)
    share = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])  # of a row that sees nothing: zeros
    if call.dropout_p:
        shape = (scores.shape[0], scores.shape[1], queries, keys)
        share = share * keep_mask(call.dropout_p, call.seed, call.origin, shape, q.device) / (1 - call.dropout_p)
    return (share @ vf).transpose(1, 2).to(q.dtype), lse


def _logsumexp(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(B, H, Sq); -inf for a row that sees nothing. A sink is one more score, which has no value."""
    if sinks is not None:
        extra = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, extra), dim=-1)
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    nothing = (scores == -torch.inf).all(-1)  # logsumexp's gradient there is NaN: it sees zeros instead
    return scores.masked_fill(nothing[..., None], 0.0).logsumexp(-1).masked_fill(nothing, -torch.inf)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
