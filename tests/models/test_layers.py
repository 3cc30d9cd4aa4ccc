"""The small parts: norms and MLPs by their formulas, and the slices of a sequence."""

from __future__ import annotations

import pytest
import torch

from megalm.models.layers import GeluMLP, PositionEmbedding, SwigluMLP
from megalm_kernels import LayerNorm, RMSNorm


def test_rms_norm_uses_weight_and_eps() -> None:
    norm, x = RMSNorm(16, eps=0.5), torch.randn(3, 16)
    norm.weight.data.uniform_(0.5, 2)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_layer_norm_uses_weight_bias_and_eps() -> None:
    norm, x = LayerNorm(16, eps=0.5), torch.randn(3, 16) + 2
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.uniform_(-1, 1)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 0.5).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected)


def test_norms_start_as_the_identity_up_to_scale() -> None:
    x = torch.randn(5, 64)
    torch.testing.assert_close(RMSNorm(64, 1e-8)(x).square().mean(-1), torch.ones(5))
    y = LayerNorm(64, 1e-8)(x)
    torch.testing.assert_close(y.mean(-1), torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(5))


def test_mlps() -> None:
    x = torch.randn(2, 3, 8)
    swiglu = SwigluMLP(8, 12)
    gate, up = (x @ swiglu.get_parameter(f"{name}.weight").T for name in ("gate", "up"))
    torch.testing.assert_close(swiglu(x), gate * gate.sigmoid() * up @ swiglu.down.weight.T)
    gelu = GeluMLP(8, 12)
    inner = torch.nn.functional.gelu(x @ gelu.up.weight.T + gelu.up.bias, approximate="tanh")
    torch.testing.assert_close(gelu(x), inner @ gelu.down.weight.T + gelu.down.bias)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_position_embedding_on_a_sequence_slice(count: int) -> None:
    module = PositionEmbedding(16, 4)
    module.weight.data = torch.arange(64.0).view(16, 4)
    positions, parts = torch.arange(3, 11), []
    for index in range(count):
        module.sequence_slice = (index, count)
        parts.append(module(positions))
    assert torch.equal(torch.cat(parts), module.weight[3:11])
