"""Norms over the last dim, with what a transformer does just before them in the same pass over memory.

    h = residual + dropout(x)             returned when there is a residual; without one and without dropout h is x
    rms_norm     y = h / sqrt(mean(h^2) + eps) * w                            (Zhang and Sennrich 2019)
    layer_norm   y = (h - mean(h)) / sqrt(var(h) + eps) * w + bias            (Ba et al. 2016)
    zero_centred: w = 1 + weight, so that weight decay pulls towards the identity

Statistics are fp32 and are those of h as it is stored, so that the backward, which reads the stored h, agrees with them.
A dropout mask is a function of (seed, row id, column) and nothing else: no block size, layout or generator changes it, and
the backward computes it again instead of reading it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm_kernels.arguments import (
    check_device,
    check_dtype,
    check_integer,
    check_kernel_dtype,
    check_not_negative,
    check_probability,
    check_shape,
    refuse,
)
from megalm_kernels.dispatch import implementation, kernel_op, register, rows_of, triton_obstacle

RESOLUTION = 24  # bits of the uniform number that dropout compares with its probability
Result = Tensor | tuple[Tensor, Tensor]


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    zero_centred: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    rows: Tensor | None = None,
) -> Result:
    """Root mean square norm. x (..., E), weight (E,) -> y in x's shape and dtype; with `residual`, (y, h).

    residual: (..., E) as x, any float dtype, which h has too. dropout: probability with which an element of x becomes 0.
    rows: (T,) int64, ids of the T rows of x (default 0 .. T-1) that with `seed` decide the mask. Raises ValueError; also for
    fp64 where Triton was chosen.
    """
    _check("rms_norm", x, weight, None, eps, residual, dropout, seed, rows)
    return implementation("rms_norm")(x, weight, eps, residual, zero_centred, dropout, seed, rows)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    zero_centred: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    rows: Tensor | None = None,
) -> Result:
    """Layer norm. bias (E,) of weight's dtype; the rest as for `rms_norm`."""
    _check("layer_norm", x, weight, bias, eps, residual, dropout, seed, rows)
    return implementation("layer_norm")(x, weight, bias, eps, residual, zero_centred, dropout, seed, rows)


class RMSNorm(nn.Module):
    """Root mean square norm with a learned scale. x (..., E). zero_centred: the scale is 1 + weight, which begins at 0."""

    def __init__(self, size: int, eps: float = 1e-5, *, zero_centred: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.eps, self.zero_centred = eps, zero_centred

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, zero_centred=self.zero_centred)  # type: ignore[return-value]


class LayerNorm(nn.Module):
    """Layer norm with a learned scale and bias. x (..., E). zero_centred: the scale is 1 + weight, which begins at 0."""

    def __init__(self, size: int, eps: float = 1e-5, *, zero_centred: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centred else torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps, self.zero_centred = eps, zero_centred

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, zero_centred=self.zero_centred)  # type: ignore[return-value]


def _check(
    operation: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout: float,
    seed: int,
    rows: Tensor | None,
) -> None:
    check_dtype(operation, "x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise refuse(operation, "the shape of x", tuple(x.shape), "(..., E) with E at least 1")
    check_dtype(operation, "weight", weight)
    check_shape(operation, "weight", weight, x.shape[-1:])
    check_device(operation, "weight", weight, x)
    if bias is not None:
        check_dtype(operation, "bias", bias, (weight.dtype,))
        check_shape(operation, "bias", bias, x.shape[-1:])
        check_device(operation, "bias", bias, x)
    if residual is not None:
        check_dtype(operation, "residual", residual)
        check_shape(operation, "residual", residual, x.shape)
        check_device(operation, "residual", residual, x)
    if rows is not None:
        check_dtype(operation, "rows", rows, (torch.int64,))
        check_shape(operation, "rows", rows, (x.shape[:-1].numel(),))
        check_device(operation, "rows", rows, x)
    check_not_negative(operation, "eps", eps)
    check_probability(operation, "dropout", dropout)
    check_integer(operation, "seed", seed, bits=62)


# The dropout mask. device/norms.py has the same in Triton.

GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15, the increment of splitmix64, as int64
_MASK32 = 0xFFFFFFFF


def keep_mask(seed: int, rows: Tensor, columns: int, probability: float) -> Tensor:
    """True where dropout keeps an element. rows (T,) int64 -> (T, columns) bool.

    A row's 64-bit key is splitmix64's finaliser (Steele, Lea and Flood 2014) of its id and the seed; its two halves enter
    murmur3's 32-bit finaliser (Appleby 2011) one after the other, because 32-bit products are cheap on a GPU.
    """
    key = mix64(mix64(rows * GOLDEN) + seed)
    low, high = (key & _MASK32)[:, None], ((key >> 32) & _MASK32)[:, None]
    column = torch.arange(columns, device=rows.device) * 0x9E3779B1
    bits = _mix32(_mix32((column + low) & _MASK32) ^ high)
    return bits >> (32 - RESOLUTION) >= threshold(probability)


def threshold(probability: float) -> int:
    """Numbers of RESOLUTION bits below this are dropped."""
    return int(probability * (1 << RESOLUTION))


def mix64(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps around as unsigned does."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & ((1 << 33) - 1))  # >> copies the sign on int64


def _mix32(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


def _dropped(x: Tensor, dropout: float, seed: int, rows: Tensor | None) -> Tensor:
    """dropout(x) over the rows of x (..., E)."""
    if dropout == 0.0:
        return x
    ids = torch.arange(x.shape[:-1].numel(), device=x.device) if rows is None else rows
    keep = keep_mask(seed, ids, x.shape[-1], dropout).view(x.shape)
    return torch.where(keep, x * (1.0 / (1.0 - dropout)), 0.0)


# The implementation in torch's operators.


def before_norm(x: Tensor, residual: Tensor | None, dropout: float, seed: int, rows: Tensor | None) -> Tensor:
    """h, rounded once."""
    if residual is None or dropout == 0.0:
        return _dropped(x, dropout, seed, rows) if residual is None else (residual + x).to(residual.dtype)
    return (residual + _dropped(x.to(_wide(x, residual)), dropout, seed, rows)).to(residual.dtype)


def operands(h: Tensor, weight: Tensor, bias: Tensor | None, zero_centred: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in one dtype, as torch wants them: at least fp32 where they differ or 1 + weight would be rounded."""
    if h.dtype == weight.dtype and not zero_centred:
        return h, weight, bias
    wide = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
    scale = weight.to(wide) + 1.0 if zero_centred else weight.to(wide)
    return h.to(wide), scale, None if bias is None else bias.to(wide)


def _rms_norm_torch(
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None,
    zero_centred: bool,
    dropout: float,
    seed: int,
    rows: Tensor | None,
) -> Result:
    h = before_norm(x, residual, dropout, seed, rows)
    operand, scale, _ = operands(h, weight, None, zero_centred)
    y = F.rms_norm(operand, (x.shape[-1],), scale, eps).to(x.dtype)
    return y if residual is None else (y, h)


def _layer_norm_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    zero_centred: bool,
    dropout: float,
    seed: int,
    rows: Tensor | None,
) -> Result:
    h = before_norm(x, residual, dropout, seed, rows)
    operand, scale, shift = operands(h, weight, bias, zero_centred)
    y = F.layer_norm(operand, (x.shape[-1],), scale, shift, eps).to(x.dtype)
    return y if residual is None else (y, h)


register("rms_norm", "torch", _rms_norm_torch)
register("layer_norm", "torch", _layer_norm_torch)

# The formulas that the kernels compute, and the kernels as operators of torch.


def norm_forward_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    rows: Tensor | None,
    dropout: float,
    seed: int,
    centred: bool,
    zero_centred: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h (empty where it is x), mean (empty unless centred), 1 / std. x, residual (T, E); mean, 1 / std (T,).

    fp32, and fp64 where x or residual is.
    """
    like = x if residual is None else residual
    dtype = _wide(x, like)
    h = _dropped(rows_of(x).to(dtype), dropout, seed, rows)
    h = (h if residual is None else residual.to(dtype) + h).to(like.dtype)
    value = h.to(dtype)
    mean = value.mean(-1)
    value = value - mean[:, None] if centred else value
    scale = torch.rsqrt(value.square().mean(-1) + eps)
    y = value * scale[:, None] * _scale_of(weight, zero_centred, dtype)
    y = (y if bias is None else y + bias.to(dtype)).to(x.dtype)
    kept = h if residual is not None or dropout > 0.0 else h.new_empty(0)
    return y.contiguous(), kept.contiguous(), mean if centred else mean.new_empty(0), scale


def norm_backward_reference(
    grad: Tensor,
    grad_h: Tensor | None,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    has_bias: bool,
    separate: bool,
    dropout: float,
    seed: int,
    centred: bool,
    zero_centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual (empty unless `separate`: else it is that of x), weight, bias (empty without one).

    grad and grad_h, those of y and h, and h itself are (T, E); mean and scale come from the forward.
        dh = scale * (w grad - xhat mean(w grad xhat) - [centred] mean(w grad)) + grad_h,   xhat = (h - mean) * scale
    """
    dtype = scale.dtype
    wide = rows_of(grad).to(dtype)
    value = h.to(dtype) - mean[:, None] if centred else h.to(dtype)
    value = value * scale[:, None]
    scaled = wide * _scale_of(weight, zero_centred, dtype)
    dh = scaled - value * (scaled * value).mean(-1, keepdim=True)
    dh = (dh - scaled.mean(-1, keepdim=True) if centred else dh) * scale[:, None]
    dh = dh if grad_h is None else dh + grad_h.to(dtype)
    dweight = (wide * value).sum(0).to(weight.dtype)
    dbias = wide.sum(0).to(weight.dtype) if has_bias else weight.new_empty(0)
    dresidual = dh.to(h.dtype) if separate else h.new_empty(0)
    dx = _dropped(dh, dropout, seed, rows).to(grad.dtype, copy=True)
    return dx.contiguous(), dresidual.contiguous(), dweight, dbias


def _wide(x: Tensor, like: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, like.dtype), torch.float32)


def _scale_of(weight: Tensor, zero_centred: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1.0 if zero_centred else weight.to(dtype)


norm_forward = kernel_op("norm_forward", "norms:forward")(norm_forward_reference)
norm_backward = kernel_op("norm_backward", "norms:backward")(norm_backward_reference)


@norm_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: object,
    residual: Tensor | None,
    rows: object,
    dropout: float,
    seed: int,
    centred: bool,
    *_: Any,
) -> Any:
    like = x if residual is None else residual
    h = like.new_empty(like.shape if residual is not None or dropout > 0.0 else (0,))
    scale = x.new_empty(x.shape[:1], dtype=_wide(x, like))
    return x.new_empty(x.shape), h, scale.new_empty(x.shape[:1] if centred else (0,)), scale


@norm_backward.register_fake
def _(
    grad: Tensor,
    grad_h: object,
    h: Tensor,
    weight: Tensor,
    mean: Tensor,
    scale: Tensor,
    rows: object,
    has_bias: bool,
    separate: bool,
    *_: Any,
) -> Any:
    dresidual = h.new_empty(h.shape if separate else (0,))
    return (
        grad.new_empty(grad.shape),
        dresidual,
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape if has_bias else (0,)),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, rows, *ctx.mask, ctx.centred, ctx.zero_centred, _eps = inputs
    y, h, mean, scale = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, scale)
    ctx.has_bias, ctx.has_residual, ctx.like_y, ctx.stored = bias is not None, residual is not None, y.dtype, h.dim() == 2
    ctx.save_for_backward(h if ctx.stored else x, weight, mean, scale, rows)


def _backward(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    h, weight, mean, scale, rows = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(h, dtype=ctx.like_y)
    grad_h = grad_h if ctx.stored else None  # of an h without elements, torch.compile would pass a gradient without any
    separate = ctx.has_residual and (ctx.mask[0] > 0.0 or h.dtype != grad.dtype)
    dx, dresidual, dweight, dbias = norm_backward(
        grad, grad_h, h, weight, mean, scale, rows, ctx.has_bias, separate, *ctx.mask, ctx.centred, ctx.zero_centred
    )
    dresidual = (dresidual if separate else dx) if ctx.has_residual else None
    return dx, dweight, dbias if ctx.has_bias else None, dresidual, *(None,) * 6


norm_forward.register_autograd(_backward, setup_context=_save)


def _norm(
    formula: Callable[..., tuple[Tensor, ...]],
    centred: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    zero_centred: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    rows: Tensor | None = None,
) -> Result:
    """`norm_forward` or its reference on x of any number of dims."""
    flat = None if residual is None else residual.reshape(-1, x.shape[-1])
    y, h, *_ = formula(x.reshape(-1, x.shape[-1]), weight, bias, flat, rows, dropout, seed, centred, zero_centred, eps)
    return y.view(x.shape) if residual is None else (y.view(x.shape), h.view(x.shape))


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5, **features: Any) -> Result:
    """The formula, in fp32 (fp64 where x is); the arguments of `rms_norm`."""
    return _norm(norm_forward_reference, False, x, weight, None, eps, **features)


def layer_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5, **features: Any) -> Result:
    """The formula, in fp32 (fp64 where x is); the arguments of `layer_norm`."""
    return _norm(norm_forward_reference, True, x, weight, bias, eps, **features)


def _check_kernel_dtypes(operation: str, x: Tensor, weight: Tensor, residual: Tensor | None) -> None:
    """Not the bias, which has weight's."""
    check_kernel_dtype(operation, "x", x)
    check_kernel_dtype(operation, "weight", weight)
    if residual is not None:
        check_kernel_dtype(operation, "residual", residual)


def _rms_norm_triton(x: Tensor, weight: Tensor, eps: float, *features: Any) -> Result:
    _check_kernel_dtypes("rms_norm", x, weight, features[0])
    return _norm(norm_forward, False, x, weight, None, eps, *features)


def _layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *features: Any) -> Result:
    _check_kernel_dtypes("layer_norm", x, weight, features[0])
    return _norm(norm_forward, True, x, weight, bias, eps, *features)


register("rms_norm", "triton", _rms_norm_triton, triton_obstacle)
register("layer_norm", "triton", _layer_norm_triton, triton_obstacle)
