"""An fp32 number in 16 bits: its two halves, which together are exact, and rounding by chance, which is right on average.

The plain form of what the kernel in device/fused_adam.py does, to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NAN = 0x7FC00000  # the one whose halves are (a NaN, 0); a GPU makes 0x7FFFFFFF, which would round to -0
_LOW32, _LOW16 = 0xFFFFFFFF, 0xFFFF


def split_fp32(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (fp32, any shape) as (bf16, int16), from which `join_fp32` makes x again, bit by bit; a NaN becomes the usual one.

    The first is x to the nearest bf16, with ties away from zero, and the second is the low half of x's bits. Ties to even,
    which hardware does, could not be undone: an even half with a low half of 0x8000 would come from two numbers.
    """
    bits = torch.where(torch.isnan(x), _NAN, x.view(torch.int32))
    high = (bits >> 16) + ((bits >> 15) & 1)
    return high.to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)


def join_fp32(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 number whose halves `split_fp32` gave; high bf16, low int16."""
    bits = high.view(torch.int16).to(torch.int32) - (low < 0).to(torch.int32)  # a low half above the middle rounded up
    return ((bits << 16) | (low.to(torch.int32) & _LOW16)).view(torch.float32)


def stochastic_round(x: Tensor, seed: int, step: int | Tensor) -> Tensor:
    """x (fp32) to one of its two neighbours in bf16, to the nearer one the more likely, so that the mean is x.

    The chance is of (seed, step, index of the element): no order or tiling changes it. Gupta et al. 2015,
    "Deep Learning with Limited Numerical Precision".
    """
    chance = random16(x.numel(), seed, step, x.device).view(x.shape)
    bits = (x.view(torch.int32).long() & _LOW32) + chance
    bits = torch.where(torch.isnan(x), _NAN, bits)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def random16(count: int, seed: int, step: int | Tensor, device: torch.device | None = None) -> Tensor:
    """`count` random numbers below 2^16, int64: four from each Philox call, in order (Salmon et al. 2011, 4x32, 10 rounds)."""
    call = torch.arange((count + 3) // 4, device=device)
    zero = torch.zeros_like(call)
    third = zero + (step.long() if isinstance(step, Tensor) else step)
    words = _philox([call & _LOW32, call >> 32, third & _LOW32, zero], seed & _LOW32, (seed >> 32) & _LOW32)
    return torch.stack(words, dim=1).flatten()[:count] >> 16


def _philox(counter: list[Tensor], key0: int, key1: int) -> list[Tensor]:
    """Ten rounds on four words (int64, below 2^32); a product's bits 63 to 32 survive int64's overflow."""
    a, b, c, d = counter
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b = ((second >> 32) & _LOW32) ^ b ^ key0, second & _LOW32
        c, d = ((first >> 32) & _LOW32) ^ d ^ key1, first & _LOW32
        key0, key1 = (key0 + 0x9E3779B9) & _LOW32, (key1 + 0xBB67AE85) & _LOW32
    return [a, b, c, d]
