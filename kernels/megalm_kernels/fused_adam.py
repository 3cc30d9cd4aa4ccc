"""AdamW on one flat buffer (Loshchilov and Hutter 2019), in place.

g = grad_scale grad;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
p = p (1 - lr weight_decay) - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

What p is, by what is given beside `param`:

    nothing           param itself: fp32, or bf16 or fp16 rounded to the nearest, which loses what is below its last bit
    master            an fp32 master copy; param (bf16 or fp16) is rounded from it
    remainder         param (bf16) and the int16 remainder are the two halves of an fp32 master: 2 bytes less, and exact
    stochastic_seed   param (bf16), rounded by chance so that what is lost is right on average

Bytes moved per parameter, gradients in the dtype of param: 28 in fp32; with master 28, with remainder 26, by chance 22.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megalm_kernels.arguments import (
    check_device,
    check_dtype,
    check_integer,
    check_not_negative,
    check_probability,
    check_shape,
    kind_of,
    refuse,
)
from megalm_kernels.dispatch import implementation, kernel_op, register, triton_obstacle
from megalm_kernels.rounding import join_fp32, split_fp32, stochastic_round

_NAME = "fused_adam"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BF16, _FP32, _INT16 = (torch.bfloat16,), (torch.float32,), (torch.int16,)


def fused_adam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int | Tensor, lr: float | Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, master: Tensor | None = None, remainder: Tensor | None = None,
    stochastic_seed: int | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """One AdamW step, in place on param, exp_avg, exp_avg_sq and master or remainder. See above for what these do.

    param: fp32, bf16 or fp16; grad: any of these; exp_avg, exp_avg_sq, master: fp32; remainder: int16. All contiguous, of one
    shape and on one device. step: the number of this step, from 1. step, lr, grad_scale (multiplies the gradient) and
    found_inf (not 0: nothing changes) may be, the last two must be, fp32 tensors of one element on that device, which the
    host does not wait for: the step can be captured in a CUDA graph. stochastic_seed: 64 bits; with `step`, picks the chance.
    Raises ValueError for anything else.
    """
    _check(param, grad, exp_avg, exp_avg_sq, master, remainder, stochastic_seed)
    _check_scalars(param, step, lr, grad_scale, found_inf)
    check_probability(_NAME, "beta1", beta1)
    check_probability(_NAME, "beta2", beta2)
    check_not_negative(_NAME, "eps", eps)
    check_not_negative(_NAME, "weight_decay", weight_decay)
    implementation(_NAME)(
        param, grad, exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, weight_decay,
        master, remainder, stochastic_seed, grad_scale, found_inf,
    )  # fmt: skip


def _check(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor,
    master: Tensor | None, remainder: Tensor | None, stochastic_seed: int | None,
) -> None:  # fmt: skip
    """Raises ValueError for the first argument that is not as `fused_adam` says."""
    check_dtype(_NAME, "param", param, _FLOATS)
    beside = {"master": master, "remainder": remainder, "stochastic_seed": stochastic_seed}
    given = [name for name, what in beside.items() if what is not None]
    if len(given) > 1:
        raise refuse(_NAME, " and ".join(given), "given", "one of them at most")
    if remainder is not None or stochastic_seed is not None:
        check_dtype(_NAME, f"param (with {given[0]})", param, _BF16)
    if master is not None:
        check_dtype(_NAME, "param (with master)", param, (torch.bfloat16, torch.float16))
    tensors = {"param": (param, _FLOATS), "grad": (grad, _FLOATS), "exp_avg": (exp_avg, _FP32), "exp_avg_sq": (exp_avg_sq, _FP32)}
    tensors |= {} if master is None else {"master": (master, _FP32)}
    tensors |= {} if remainder is None else {"remainder": (remainder, _INT16)}
    for name, (x, dtypes) in tensors.items():
        check_dtype(_NAME, name, x, dtypes)
        check_device(_NAME, name, x, param)
        check_shape(_NAME, name, x, param.shape)
        if not x.is_contiguous():
            raise refuse(_NAME, name, f"a view with strides {x.stride()}", "contiguous")
    if stochastic_seed is not None:
        check_integer(_NAME, "stochastic_seed", stochastic_seed, bits=64)


def _check_scalars(
    param: Tensor, step: int | Tensor, lr: float | Tensor, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Raises ValueError unless those that are on the device are one fp32 number there, and those of the host in range."""
    on_device = {"grad_scale": grad_scale, "found_inf": found_inf}
    if isinstance(step, Tensor):
        on_device["step"] = step
    elif not isinstance(step, (int, Integral)):
        raise refuse(_NAME, "step", kind_of(step), "an int or a Tensor")
    elif step < 1:
        raise refuse(_NAME, "step", step, "at least 1")
    if isinstance(lr, Tensor):
        on_device["lr"] = lr
    elif not isinstance(lr, (float, int, Real)):
        raise refuse(_NAME, "lr", kind_of(lr), "a number or a Tensor")
    else:
        check_not_negative(_NAME, "lr", lr)
    for name, x in on_device.items():
        if x is not None:
            check_dtype(_NAME, name, x, _FP32)
            if x.numel() != 1:
                raise refuse(_NAME, f"the shape of {name}", tuple(x.shape), "one element")
            check_device(_NAME, name, x, param)


def fused_adam_reference(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, *, step: int | Tensor, lr: float | Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, master: Tensor | None = None, remainder: Tensor | None = None,
    stochastic_seed: int | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """The formulas above, one line each, in fp32 or, if the moments are fp64, in fp64. Reads the device scalars: it waits."""
    if found_inf is not None and float(found_inf) != 0.0:
        return
    t, rate = int(step), float(lr)
    p, store = (param, param.copy_) if param.dtype == torch.float64 else _fp32_of(param, master, remainder, stochastic_seed, t)
    p, g = p.to(exp_avg.dtype), grad.to(exp_avg.dtype) * (1.0 if grad_scale is None else grad_scale.to(exp_avg.dtype))
    exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**t)).add_(eps)
    store((p * (1 - rate * weight_decay)).addcdiv_(exp_avg, denominator, value=-rate / (1 - beta1**t)))


def _fp32_of(
    param: Tensor, master: Tensor | None, remainder: Tensor | None, seed: int | None, step: int | Tensor
) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """What the step starts from, in fp32 and not in param's memory, and the function that puts the result where it belongs."""
    if master is not None:
        return master, lambda p: (master.copy_(p), param.copy_(p))
    if remainder is not None:
        halves = (param, remainder)
        return join_fp32(*halves), lambda p: [x.copy_(half) for x, half in zip(halves, split_fp32(p), strict=True)]
    if seed is not None:
        return param.float(), lambda p: param.copy_(stochastic_round(p, seed, step))
    return param.to(torch.float32, copy=True), param.copy_


def _fused_adam_torch(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int | Tensor, lr: float | Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, master: Tensor | None = None, remainder: Tensor | None = None,
    stochastic_seed: int | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    """torch's own fused AdamW, on fp32; what is in 16 bits is widened before and rounded behind it."""
    first = torch.full((), -1.0, device=param.device)  # torch counts it up itself
    steps_done = first + (step.reshape(()) if isinstance(step, Tensor) else step)
    g = grad.float() if grad_scale is None else grad.float() * grad_scale
    p, store = (param, None) if param.dtype == torch.float32 else _fp32_of(param, master, remainder, stochastic_seed, step)
    skip = None if found_inf is None else (found_inf.reshape(()) != 0).float()  # torch compares with 1
    adamw(
        [p], [g], [exp_avg], [exp_avg_sq], [], [steps_done], fused=True, amsgrad=False, grad_scale=None, found_inf=skip,
        beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
    )  # fmt: skip
    if store is not None:
        before = None if skip is None else param.clone()
        store(p)
        if skip is not None and before is not None:  # rounding again, by chance or of a param set by hand, would change it
            param.copy_(torch.where(skip != 0, before, param))


@kernel_op(_NAME, "fused_adam:fused_adam", mutates=("param", "exp_avg", "exp_avg_sq", "master", "remainder"))
def _fused_adam_op(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, remainder: Tensor | None,
    step_on_device: Tensor | None, lr_on_device: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, stochastic_seed: int | None,
) -> None:  # fmt: skip
    _fused_adam_torch(
        param, grad, exp_avg, exp_avg_sq, step if step_on_device is None else step_on_device,
        lr if lr_on_device is None else lr_on_device, beta1, beta2, eps, weight_decay,
        master, remainder, stochastic_seed, grad_scale, found_inf,
    )  # fmt: skip


_fused_adam_op.register_fake(lambda *args, **kwargs: None)


def _fused_adam_triton(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int | Tensor, lr: float | Tensor,
    beta1: float, beta2: float, eps: float, weight_decay: float, master: Tensor | None = None, remainder: Tensor | None = None,
    stochastic_seed: int | None = None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None,
) -> None:  # fmt: skip
    steps, rates = (x if isinstance(x, Tensor) else None for x in (step, lr))
    _fused_adam_op(
        param, grad, exp_avg, exp_avg_sq, master, remainder, steps, rates, grad_scale, found_inf,
        0 if isinstance(step, Tensor) else step, 0.0 if isinstance(lr, Tensor) else lr,
        beta1, beta2, eps, weight_decay, _signed(stochastic_seed),
    )  # fmt: skip


def _signed(seed: int | None) -> int | None:
    """64 bits as the int64 that operators of torch take."""
    return seed if seed is None or seed < 1 << 63 else seed - (1 << 64)


register(_NAME, "torch", _fused_adam_torch)
register(_NAME, "triton", _fused_adam_triton, triton_obstacle)
