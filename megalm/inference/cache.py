"""Keys and values of the tokens seen so far, so that each new token costs one step."""

from __future__ import annotations

import torch
from torch import Tensor


class GrowingCache:
    """A key/value cache in one buffer per layer, made at its full length when a layer first writes to it."""

    def __init__(self, max_length: int):
        self.max_length = max_length
        self._buffers: dict[int, tuple[Tensor, Tensor]] = {}
        self._lengths: dict[int, int] = {}

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, S_new, ...) of one layer, keys and values or what they are made of; return views of all so far."""
        if layer not in self._buffers:
            whole = k.new_empty(k.shape[0], self.max_length, *k.shape[2:])
            self._buffers[layer] = whole, v.new_empty(v.shape[0], self.max_length, *v.shape[2:])
            self._lengths[layer] = 0
        start, end = self._lengths[layer], self._lengths[layer] + k.shape[1]
        assert end <= self.max_length, f"cache of {self.max_length} tokens is full"
        keys, values = self._buffers[layer]
        keys[:, start:end], values[:, start:end] = k, v
        self._lengths[layer] = end
        return keys[:, :end], values[:, :end]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return max(self._lengths.values(), default=0)


def next_positions(cache: GrowingCache, count: int, device: torch.device) -> Tensor:
    """Positions of the next `count` tokens. (count,) int64."""
    return torch.arange(cache.length, cache.length + count, device=device)
