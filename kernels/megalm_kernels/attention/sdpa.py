"""Attention by torch's own operators: scaled_dot_product_attention, the same held to cuDNN, and the reference.

None of them gives NaN for a query that sees no key: such queries are the first of a sequence that has more queries than keys,
how many there are follows from the lengths, and they are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalm_kernels import compat
from megalm_kernels.arguments import refuse
from megalm_kernels.attention.call import ALL, Call, alibi_bias, check_support, lacking, visible
from megalm_kernels.attention.choice import order
from megalm_kernels.attention.operators import attention_triton, suits
from megalm_kernels.attention.reference import attention_reference, join, sequences
from megalm_kernels.dispatch import prefer, register, triton_obstacle
from megalm_kernels.launch import capability

_log = logging.getLogger(__name__)
Result = tuple[Tensor, Tensor | None]  # lse only where it is asked for
cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
cpu_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _attention_sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """Whatever torch picks. Packed sequences go one by one, and the host waits for the device to know where they are."""
    check_support("sdpa", q, call)
    return _each(_dense, q, k, v, call)


def _attention_cudnn(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """cuDNN's, or a ValueError: torch is not allowed another one. Packed as above."""
    check_support("cudnn", q, call)
    try:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return _each(_dense, q, k, v, call)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        shapes = f"{tuple(q.shape)} and {tuple(k.shape)}"
        wanted = "shapes that cuDNN has a kernel for (others: kernels.attention=sdpa or use(attention='sdpa'))"
        raise refuse("attention with cudnn", "the shape of q and k", shapes, wanted) from error


def attention_by_formula(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    check_support("reference", q, call)
    return attention_reference(q, k, v, call)


def _each(dense: Callable[..., Result], q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """One batch, or packed sequences one by one. # sync"""
    if not call.packed:
        return dense(q, k, v, call)
    parts = [dense(*(x.unsqueeze(0) for x in part), one) for *part, one in sequences(q, k, v, call)]
    if not parts:
        nothing = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q), nothing if call.return_lse else None
    outs, lses = [out[0] for out, _ in parts], [lse[0] for _, lse in parts if lse is not None]
    return join(outs, lses, q.shape[0])


def _dense(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
    """q (B, Sq, H, D), k and v (B, Sk, Hkv, D) -> (B, Sq, H, D), (B, H, Sq)."""
    blind = 0 if call.right == ALL else min(max(q.shape[1] - k.shape[1] - call.right, 0), q.shape[1])
    q, k, v = (q[:, blind:] if blind else q).transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    square = q.shape[2] == k.shape[2]
    causal = call.causal and square and call.alibi_slopes is None
    mask = None if causal else _mask(q, k.shape[2], call)
    lse = None
    if call.return_lse:
        y, lse = _with_lse(q, k, v, mask, causal, call.scale)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=call.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if blind:
        y = F.pad(y, (0, 0, blind, 0))
        lse = None if lse is None else F.pad(lse, (blind, 0), value=-torch.inf)
    return y.transpose(1, 2), lse


def _mask(q: Tensor, keys: int, call: Call) -> Tensor | None:
    """(Sq, Sk) bool; with ALiBi (1 or B, H, Sq, Sk) to be added; None if every query sees every key."""
    seen = None
    if call.left != ALL or call.right != ALL:
        seen = visible(q.shape[2], keys, call, q.device)
    if call.alibi_slopes is None:
        return seen
    slopes = call.alibi_slopes if call.alibi_slopes.dim() == 2 else call.alibi_slopes[None]
    bias = alibi_bias(q.shape[2], keys, slopes)
    bias = bias if seen is None else bias.masked_fill(~seen, -torch.inf)
    return bias if q.device.type == "cpu" and q.dtype != torch.float64 else bias.to(q.dtype)  # a GPU's wants q's dtype


def _with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The CPU's kernel gives the logarithms too, though torch's public function does not hand them out."""
    if 0 in (*q.shape, *k.shape):  # on which the kernel dies
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
        return y, q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    return AttentionWithLse.apply(q, k, v, mask, causal, scale)


class AttentionWithLse(torch.autograd.Function):
    """The CPU's kernel with a gradient for the logarithms, which torch's own does not have and `merge_attention` needs.

    With P the shares: ds = P (dout v^T - rowsum(dout out) + dlse). The kernel gives the last term for one more channel, of which
    v is 1, dout is dlse and out is 0.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Any:
        y, lse = cpu_flash(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        ctx.save_for_backward(q, k, v, y, lse, mask)
        ctx.causal, ctx.scale = causal, scale
        ctx.set_materialize_grads(False)
        return y, lse

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, y, lse, mask = ctx.saved_tensors
        dy = torch.zeros_like(y) if dy is None else dy
        channels = q.shape[-1]
        if dlse is not None:
            q, k, y = (F.pad(x, (0, 1)) for x in (q, k, y))
            v, dy = F.pad(v, (0, 1), value=1.0), torch.cat((dy, dlse[..., None].to(dy.dtype)), dim=-1)
        gradients = cpu_flash_backward(dy, q, k, v, y, lse, 0.0, ctx.causal, attn_mask=mask, scale=ctx.scale)
        return *(g[..., :channels] for g in gradients), None, None, None


def _cudnn_obstacle(device_type: str) -> str:
    if device_type != "cuda" or not torch.cuda.is_available():
        return "no GPU"
    if torch.version.hip or not torch.backends.cudnn.is_available():
        return "no cuDNN"
    arch = capability(torch.cuda.current_device())
    return f"the GPU is sm_{arch}, cuDNN's attention needs sm_80" if arch < 80 else ""


def _by_default(name: str, function: Callable[..., Result]) -> Callable[..., Result]:
    """Where nobody asked for it by name, a call that it does not have goes to triton, or to the reference."""

    def run(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Result:
        what = lacking(name, q, call)
        if name == "cudnn" and not what and (q.shape[-3] != k.shape[-3] or call.cu_seqlens_q is not call.cu_seqlens_k):
            what = "queries of other lengths than the keys"
        if not what:
            return function(q, k, v, call)
        other = "reference" if triton_obstacle(q.device.type) or not suits(q.shape[-1]) else "triton"
        _say(name, what, other)
        return (attention_reference if other == "reference" else attention_triton)(q, k, v, call)

    return run


@compat.assume_constant
def _say(name: str, what: str, other: str) -> bool:
    return _say_once(name, what, other)


@cache
def _say_once(name: str, what: str, other: str) -> bool:
    _log.warning("attention: %s has no kernel for %s; %s runs instead", name, what, other)
    return True


register("attention", "sdpa", _attention_sdpa, by_default=_by_default("sdpa", _attention_sdpa))
register("attention", "torch", _attention_sdpa)  # what backend=torch means here
register("attention", "cudnn", _attention_cudnn, _cudnn_obstacle, _by_default("cudnn", _attention_cudnn))
register("attention", "reference", attention_by_formula)
prefer("attention", order)
