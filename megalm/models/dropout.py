"""Dropout masks without a generator: a hash of (seed, site, sample, position, channel) decides each element.

No state to save, none to restore when activations are recomputed, and no dependence on which rank computes which part
of the batch, the sequence or the layers. The hash is the finaliser of splitmix64 (Steele, Lea and Flood 2014), whose
output bits are each flipped by about half of the input bits; two rounds separate the keys that differ in one bit only.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: the increment of splitmix64
_MULTIPLY_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MULTIPLY_2 = -7723592293110705685  # 0x94D049BB133111EB
_RESOLUTION = 24  # bits of the uniform number: exact in fp32


def keep_mask(seed: int, site: int, samples: Tensor, positions: Tensor, channels: int, probability: float) -> Tensor:
    """True where an element is kept. samples (B,), positions (S,) int64 -> (B, S, channels) bool."""
    key = _mix(samples * _GOLDEN + ((seed * 1_000_003 + site) & (2**62 - 1)))
    row = _mix(key[:, None] + positions[None, :] * _GOLDEN)  # (B, S)
    channel = torch.arange(channels, device=samples.device) * _GOLDEN
    bits = _mix(row[:, :, None] + channel) & ((1 << _RESOLUTION) - 1)
    return bits >= int(probability * (1 << _RESOLUTION))


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps around as unsigned does."""
    x = (x ^ _shift_right(x, 30)) * _MULTIPLY_1
    x = (x ^ _shift_right(x, 27)) * _MULTIPLY_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
