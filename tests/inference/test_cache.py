"""The cache keeps what it was given, layer by layer."""

from __future__ import annotations

import pytest
import torch

from megalm.inference.cache import GrowingCache, next_positions


def test_it_returns_everything_so_far() -> None:
    cache, k, v = GrowingCache(7), torch.randn(2, 7, 3, 4), torch.randn(2, 7, 3, 4)
    assert cache.length == 0
    for start, end in ((0, 4), (4, 5), (5, 7)):
        assert next_positions(cache, 2, torch.device("cpu")).tolist() == [start, start + 1]
        for layer in (3, 8):  # a stage's layers need not begin at 0
            keys, values = cache.extend(layer, k[:, start:end] + layer, v[:, start:end] - layer)
            assert torch.equal(keys, k[:, :end] + layer) and torch.equal(values, v[:, :end] - layer)
        assert cache.length == end


def test_it_takes_the_dtype_of_the_keys() -> None:
    keys, _ = GrowingCache(2).extend(0, *torch.zeros(2, 1, 1, 1, 4, dtype=torch.bfloat16))
    assert keys.dtype == torch.bfloat16


def test_too_many_tokens() -> None:
    with pytest.raises(AssertionError, match="cache of 2 tokens is full"):
        GrowingCache(2).extend(0, *torch.zeros(2, 1, 3, 1, 4))
