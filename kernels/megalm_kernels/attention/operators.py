"""The Triton kernels of attention as operators of torch, with their gradients; on a CPU the formula stands in for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalm_kernels.arguments import refuse
from megalm_kernels.attention.call import Call, check_support
from megalm_kernels.attention.decode import decode, takes
from megalm_kernels.attention.gradient import attention_backward_reference
from megalm_kernels.attention.reference import attention_reference
from megalm_kernels.dispatch import kernel_op, register, triton_obstacle

HEAD_DIMS = (32, 64, 80, 96, 128, 192, 256)  # those that the compile gate looks at; others that suit work, maybe less well


@kernel_op("attention_forward", "attention_forward:forward")
def attention_forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    seed: int,
    origin: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """Result and lse; deterministic: for the backward."""
    call = _call(alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap, dropout_p, seed, origin)
    out, lse = attention_reference(q, k, v, call)
    return out.contiguous(), lse.float().contiguous()


@kernel_op("attention_backward", "attention_backward:backward")
def attention_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    left: int,
    right: int,
    scale: float,
    softcap: float,
    dropout_p: float,
    seed: int,
    origin: list[int],
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and delta: the row sums of dout out, less dlse, laid out like lse.

    out and lse may be those of attention over more keys than these (a part of a ring): so they are taken as they are.
    """
    call = _call(alibi_slopes, None, cu_seqlens_q, cu_seqlens_k, left, right, scale, softcap, dropout_p, seed, origin)
    dq, dk, dv, delta = attention_backward_reference(dout, dlse, q, k, v, out, lse, call)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), delta.contiguous()


def _call(
    alibi_slopes: Tensor | None, sinks: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    left: int, right: int, scale: float, softcap: float, dropout_p: float, seed: int, origin: list[int],
) -> Call:  # fmt: skip
    sequence, head, query, key = origin
    return Call(
        left, right, scale, softcap, alibi_slopes, sinks, dropout_p, seed, (sequence, head, query, key), cu_seqlens_q,
        cu_seqlens_k
    )


@attention_forward_op.register_fake
def _(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=torch.float32, device=q.device)
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), lse


@attention_backward_op.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, ...]:  # fmt: skip
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv, torch.empty_like(lse)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, slopes, sinks, starts_q, starts_k, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, slopes, sinks, starts_q, starts_k)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, slopes, sinks, starts_q, starts_k = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = None if dlse is None else dlse.masked_fill(lse == -torch.inf, 0.0)  # of a query that sees nothing, whatever comes
    dq, dk, dv, delta = attention_backward_op(dout, dlse, q, k, v, out, lse, slopes, starts_q, starts_k, *ctx.numbers)
    dsinks = None
    if sinks is not None:
        share = torch.exp(sinks.float()[:, None] - lse).masked_fill(lse == -torch.inf, 0.0)  # of the softmax; it has no value
        dsinks = -(share * delta).sum(-1)
        dsinks = (dsinks if starts_q is not None else dsinks.sum(0)).to(sinks.dtype)
    return dq, dk, dv, None, dsinks, None, None, *(None for _ in ctx.numbers)


attention_forward_op.register_autograd(_differentiate, setup_context=_save)


def suits(head_dim: int) -> bool:
    """Whether the kernels have it: a row of a head must be a multiple of 16 bytes."""
    return 0 < head_dim <= max(HEAD_DIMS) and head_dim % 8 == 0


def attention_triton(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
    """Result and, unless it is a call for the decoding kernel, lse."""
    check_support("triton", q, call)
    if not suits(q.shape[-1]):
        wanted = "a multiple of 8 up to 256 (others: kernels.attention=sdpa or use(attention=\"sdpa\"))"
        raise refuse("attention with Triton", "the head dimension", q.shape[-1], wanted)
    if takes(q, k, v, call):
        return decode(q, k, v, call), None
    numbers = (call.left, call.right, call.scale, call.softcap, call.dropout_p, call.seed, list(call.origin), call.deterministic)
    return attention_forward_op(q, k, v, call.alibi_slopes, call.sinks, call.cu_seqlens_q, call.cu_seqlens_k, *numbers)


register("attention", "triton", attention_triton, triton_obstacle)
