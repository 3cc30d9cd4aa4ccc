"""Dropout masks without a generator: a hash of (seed, site, sample, position, channel) decides each element.

No state to save, none to restore when activations are recomputed, and no dependence on which rank computes which part
of the batch, the sequence or the layers. The hash is the finaliser of splitmix64 (Steele, Lea and Flood 2014), whose
output bits are each flipped by about half of the input bits; two rounds separate the keys that differ in one bit only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalm_kernels.norms import GOLDEN, RESOLUTION, mix64, threshold


def keep_mask(seed: int, site: int, samples: Tensor, positions: Tensor, channels: int, probability: float) -> Tensor:
    """True where an element is kept. samples (B,), positions (S,) int64 -> (B, S, channels) bool."""
    key = mix64(samples * GOLDEN + ((seed * 1_000_003 + site) & (2**62 - 1)))
    row = mix64(key[:, None] + positions[None, :] * GOLDEN)  # (B, S)
    channel = torch.arange(channels, device=samples.device) * GOLDEN
    bits = mix64(row[:, :, None] + channel) & ((1 << RESOLUTION) - 1)
    return bits >= threshold(probability)
