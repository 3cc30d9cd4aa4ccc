"""One AdamW step in one kernel: every element is read once and written once, 16 bytes at a time.

The scalars come from the host as numbers, or from the device as one-element tensors, so that a captured graph sees a new
step and a new learning rate. A program serves BLOCK elements; all programs compute the few scalars again, which costs less
than a second launch.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from megalm_kernels.launch import arch_of, launch
from megalm_kernels.tables import lookup


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for a scalar x <= 0, to the last bits of fp32 also near 0, where 1 - tl.exp(x) keeps 3 digits of 8."""
    series = 1.0 + x / 8.0
    for k in tl.static_range(7, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _random16(first, seed_low, seed_high, step, BLOCK: tl.constexpr):
    """BLOCK random numbers below 2^16 for the elements from `first` on (a multiple of 4): four from each Philox call."""
    call = first // 4 + tl.arange(0, BLOCK // 4)
    zero = tl.zeros([BLOCK // 4], tl.uint32)
    low, high = (call & 0xFFFFFFFF).to(tl.uint32), (call >> 32).to(tl.uint32)
    key_low, key_high = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    a, b, c, d = tl.philox_impl(low, high, zero + step.to(tl.uint32, bitcast=True), zero, key_low, key_high)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK]) >> 16  # a thread has the four of one call


@triton.jit
def _join_fp32(high, low):
    """The fp32 number of two int16 halves; see rounding.py."""
    bits = high.to(tl.int32) - (low < 0).to(tl.int32)
    return ((bits << 16) | (low.to(tl.int32) & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["step", "seed_low", "seed_high"])
def _fused_adam(
    P, G, M, V, MASTER, REMAINDER, STEP, LR, GRAD_SCALE, FOUND_INF, n, step, lr, correction1, correction2_root,
    log_beta1, log_beta2, gain1, gain2, eps, weight_decay, seed_low, seed_high, STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m += gain1 (g - m); v += gain2 (g^2 - v); p -= lr wd p + lr / correction1 m / (sqrt(v) / correction2_root + eps).

    gain = 1 - beta, which the host computes in fp64: 1 - fp32(0.999) is off by 5e-5 of itself.
    """
    if FOUND_INF is not None:
        n = tl.where(tl.load(FOUND_INF) == 0.0, n, 0)
    if STEP is not None:
        t = tl.load(STEP)
        step = t.to(tl.int32)
        correction1 = _one_minus_exp(t * log_beta1)
        correction2_root = tl.sqrt(_one_minus_exp(t * log_beta2))
    if LR is not None:
        lr = tl.load(LR)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = tl.max_contiguous(first + tl.arange(0, BLOCK), 4)  # a thread has the same 4 elements of every array, of 2 bytes or 4
    inside = i < n
    g = tl.load(G + i, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    m = tl.load(M + i, mask=inside, other=0.0)
    v = tl.load(V + i, mask=inside, other=0.0)
    if MASTER is not None:
        p = tl.load(MASTER + i, mask=inside, other=0.0)
    elif REMAINDER is not None:
        p = _join_fp32(tl.load(P + i, mask=inside, other=0), tl.load(REMAINDER + i, mask=inside, other=0))
    else:
        p = tl.load(P + i, mask=inside, other=0.0).to(tl.float32)
    if GRAD_SCALE is not None:
        g = g * tl.load(GRAD_SCALE)
    m = m + gain1 * (g - m)
    v = v + gain2 * (g * g - v)
    denominator = tl.sqrt(v) / correction2_root + eps
    p = p - (lr * weight_decay) * p - (lr / correction1) * (m / denominator)
    tl.store(M + i, m, mask=inside)
    tl.store(V + i, v, mask=inside)
    if MASTER is not None:
        tl.store(MASTER + i, p, mask=inside)
    if REMAINDER is not None:
        bits = tl.where(p == p, p.to(tl.int32, bitcast=True), 0x7FC00000)
        tl.store(REMAINDER + i, bits.to(tl.int16), mask=inside)
        tl.store(P + i, ((bits >> 16) + ((bits >> 15) & 1)).to(tl.int16), mask=inside)
    elif STOCHASTIC:
        chance = _random16(first, seed_low, seed_high, step, BLOCK)
        bits = tl.where(p == p, p.to(tl.uint32, bitcast=True) + chance, 0x7FC00000)
        tl.store(P + i, (bits & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16), mask=inside)
    else:
        tl.store(P + i, p.to(P.dtype.element_ty), mask=inside)


def fused_adam(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, remainder: Tensor | None,
    step_on_device: Tensor | None, lr_on_device: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, stochastic_seed: int | None,
) -> None:  # fmt: skip
    """Launch one step; arguments as of `megalm_kernels.fused_adam`, checked there."""
    n = param.numel()
    if n == 0:
        return
    settings = lookup("fused_adam", arch_of(param.device))
    on_host = step_on_device is None
    correction1, correction2 = (1 - beta**step if on_host else 1.0 for beta in (beta1, beta2))
    log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    seed = stochastic_seed or 0
    launch(
        _fused_adam, (triton.cdiv(n, settings["BLOCK"]),),
        param if remainder is None else param.view(torch.int16), grad, exp_avg, exp_avg_sq, master, remainder,
        step_on_device, lr_on_device, grad_scale, found_inf, n, _signed(step), float(lr), correction1, math.sqrt(correction2),
        log_beta1, log_beta2, 1.0 - beta1, 1.0 - beta2, float(eps), float(weight_decay), _signed(seed), _signed(seed >> 32),
        STOCHASTIC=stochastic_seed is not None, **settings,
    )  # fmt: skip


def _signed(x: int) -> int:
    """The low 32 bits as an int32, of which Triton makes one type and so one kernel."""
    return (x & 0xFFFFFFFF ^ 0x80000000) - 0x80000000


def specimens() -> Iterator[tuple[str, Callable[[], object], set[str]]]:
    """What training launches, by dtype of param and grad and by kind of master; with scalars of the host, and of the device."""
    kinds = [(torch.float32, torch.float32, ""), (torch.float32, torch.bfloat16, ""), (torch.bfloat16, torch.bfloat16, "")]
    kinds += [(torch.float16, torch.float16, "master")]
    for kind in ("master", "remainder", "chance"):
        kinds += [(torch.bfloat16, torch.float32, kind), (torch.bfloat16, torch.bfloat16, kind)]
    for (dtype, grad, kind), on_device in product(kinds, (False, True)):
        label = f"fused_adam {str(dtype)[6:]}, grad {str(grad)[6:]}, {kind or 'no master'}{', all on device' * on_device}"
        yield label, partial(_specimen, dtype, grad, kind, on_device), {"LDG.128", "STG.128"}
    beyond_int32 = partial(_specimen, torch.float32, torch.float32, "", False, 2**31)
    yield "fused_adam float32, 2^31 elements", beyond_int32, {"LDG.128", "STG.128"}


def _specimen(dtype: torch.dtype, grad: torch.dtype, kind: str, on_device: bool, n: int = 4096) -> None:
    def tensor(dtype: torch.dtype, size: int = n) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    scalar = tensor(torch.float32, 1) if on_device else None
    master = tensor(torch.float32) if kind == "master" else None
    remainder = tensor(torch.int16) if kind == "remainder" else None
    fused_adam(
        tensor(dtype), tensor(grad), tensor(torch.float32), tensor(torch.float32), master, remainder,
        scalar, scalar, scalar, scalar, 5, 1e-3, 0.9, 0.95, 1e-8, 0.1, 17 if kind == "chance" else None,
    )  # fmt: skip
