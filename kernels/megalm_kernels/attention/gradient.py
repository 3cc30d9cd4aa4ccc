"""The backward of attention as the formula says, from the result and lse that it is given: what the kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor

from megalm_kernels.attention.call import Call, alibi_bias, visible
from megalm_kernels.attention.philox import keep_mask
from megalm_kernels.attention.reference import join, sequences


def attention_backward_reference(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and delta = sum(dout out) - dlse, laid out like lse; computed in fp32 (fp64 if q is).

    out and lse may be those of attention over more keys than k has: then these are that attention's gradients by this part.
    """
    with torch.autocast(q.device.type, enabled=False):  # which would multiply in less than fp32
        return _gradients(dout, dlse, q, k, v, out, lse, call)


def _gradients(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    delta = (out.to(wide) * dout.to(wide)).sum(-1).transpose(-1, -2)
    delta = delta if dlse is None else delta - dlse
    if not call.packed:
        return *_dense(dout, q, k, v, lse, delta, call), delta.to(lse.dtype)
    starts = call.cu_seqlens_q.tolist() if call.cu_seqlens_q is not None else []
    grads: list[list[Tensor]] = [[torch.zeros_like(x[:0])] for x in (q, k, v)]
    for (one_q, one_k, one_v, one), begin, end in zip(sequences(q, k, v, call), starts[:-1], starts[1:], strict=True):
        part = (dout[begin:end], one_q, one_k, one_v, lse[:, begin:end], delta[:, begin:end])
        d, a, b, c, s, t = (x.unsqueeze(0) for x in part)
        for grad, found in zip(grads, _dense(d, a, b, c, s, t, one), strict=True):
            grad.append(found[0])
    dq, dk, dv = (join(grad, (), x.shape[0])[0] for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, delta.to(lse.dtype)


def _dense(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    qf, kf, vf, df = (x.to(wide).transpose(1, 2) for x in (q, k, v, dout))
    kf, vf = kf.repeat_interleave(groups, 1), vf.repeat_interleave(groups, 1)
    scores = qf @ kf.transpose(-1, -2) * call.scale
    queries, keys = scores.shape[-2:]
    tanh = torch.tanh(scores / call.softcap) if call.softcap else scores
    scores = call.softcap * tanh if call.softcap else scores
    if call.alibi_slopes is not None:
        scores = scores + alibi_bias(queries, keys, call.alibi_slopes.to(wide))
    seen = visible(queries, keys, call, q.device)
    share = torch.exp(scores - lse[..., None].to(wide)).masked_fill(~seen, 0.0)
    dshare, given = df @ vf.transpose(-1, -2), share
    if call.dropout_p:
        shape = (scores.shape[0], scores.shape[1], queries, keys)
        keep = keep_mask(call.dropout_p, call.seed, call.origin, shape, q.device).to(wide) / (1 - call.dropout_p)
        dshare, given = dshare * keep, share * keep
    ds = share * (dshare - delta[..., None])
    ds = ds * (1 - tanh * tanh) * call.scale if call.softcap else ds * call.scale
    dq, dk, dv = ds @ kf, ds.transpose(-1, -2) @ qf, given.transpose(-1, -2) @ df
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2) for x in (dk, dv))
    return dq.transpose(1, 2).to(q.dtype), dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
