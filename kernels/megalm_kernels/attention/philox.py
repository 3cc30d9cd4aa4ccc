"""Dropout of attention: Philox 4x32 with 7 rounds (Salmon et al. 2011), keyed by the place in the matrix of scores.

The counter is (query, key, head, sequence), the key the seed; the first of the four words decides. So the mask is a function of
the place alone: the same for every tiling, for the backward, and for a rank that has some of the heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 7
_MULTIPLIERS, _KEYS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def keep_mask(
    probability: float, seed: int, origin: tuple[int, int, int, int], shape: tuple[int, int, int, int], device: torch.device
) -> Tensor:
    """(B, H, Sq, Sk) bool, False with `probability`; origin: what the four counters of its first element are."""
    places = [start + torch.arange(size, device=device) for start, size in zip(origin, shape, strict=True)]
    sequence, head, query, key = torch.meshgrid(*places, indexing="ij")
    words = _philox([query, key, head, sequence], seed)
    return words >= threshold(probability)


def threshold(probability: float) -> int:
    """Words of 32 bits below it are dropped."""
    return round(probability * 2**32)


def _philox(counter: list[Tensor], seed: int) -> Tensor:
    """The first word."""
    c0, c1, c2, c3 = (c & _WORD for c in counter)
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(ROUNDS):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEYS[0]) & _WORD, (k1 + _KEYS[1]) & _WORD
    return c0


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 x 32 bit product, in int64, which 16-bit parts do not overflow."""
    middle = (a & 0xFFFF) * b
    upper = (a >> 16) * b + (middle >> 16)
    low = ((upper << 16) | (middle & 0xFFFF)) & _WORD
    return upper >> 16, low
