"""Attention reads its number of heads off its weights, and a cache gives what the whole sequence gives."""

from __future__ import annotations

import pytest
import torch

from megalm.inference.cache import GrowingCache
from megalm.models.attention import Attention


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_slice_of_the_heads_works_alone(kv_heads: int) -> None:
    """What tensor parallelism relies on: the output is the sum over the slices."""
    torch.manual_seed(0)
    whole = Attention(24, 8, 4, 6, layer=0, bias=False)
    x, total = torch.randn(2, 5, 24), torch.zeros(2, 5, 24)
    parts = 4 // kv_heads
    for i in range(parts):
        part = Attention(24, 8 // parts, kv_heads, 6, layer=0, bias=False)
        for name in "qkv":
            size = getattr(part, name).weight.shape[0]
            getattr(part, name).weight.data = getattr(whole, name).weight.data[i * size : (i + 1) * size]
        part.out.weight.data = whole.out.weight.data.chunk(parts, 1)[i]
        total += part(x, None)
    torch.testing.assert_close(total, whole(x, None))


def test_bias_is_for_all_four_projections_or_none() -> None:
    assert [n for n, _ in Attention(8, 2, 2, 4, 0, bias=True).named_parameters() if "bias" in n] == [
        "q.bias", "k.bias", "v.bias", "out.bias",
    ]  # fmt: skip
    assert not [n for n, _ in Attention(8, 2, 2, 4, 0, bias=False).named_parameters() if "bias" in n]


@pytest.mark.parametrize("architecture", ["gpt", "llama"])
@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 1, 5], [11, 1]])
def test_with_a_cache_as_without(architecture: str, cuts: list[int], build, tokens) -> None:
    """Any way to feed the sequence in pieces gives the logits of the whole."""
    model, cache, start, parts = build(architecture, num_kv_heads=2 if architecture == "llama" else 4), GrowingCache(12), 0, []
    for size in cuts:
        end = start + size
        parts.append(model(tokens[:, start:end], torch.arange(start, end), cache=cache))
        start = end
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)
