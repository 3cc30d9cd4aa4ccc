"""Initial weights are a function of seed and name, and have the spread that they should."""

from __future__ import annotations

import math

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.init import initial_value
from megalm.models.registry import build_model

CONFIG = ModelConfig(num_layers=8, init_std=0.02)


def draw(name: str, seed: int = 7, shape: tuple[int, ...] = (300, 400)) -> torch.Tensor:
    return initial_value(name, shape, CONFIG, seed)


def test_order_and_other_random_numbers_do_not_matter() -> None:
    names = ["embedding.weight", "layers.0.attention.q.weight", "head.weight"]
    first = {name: draw(name) for name in names}
    torch.manual_seed(99)
    for name in reversed(names):
        torch.randn(5)
        assert torch.equal(draw(name), first[name])


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    draw("embedding.weight")
    assert torch.equal(before, torch.get_rng_state())


def test_names_and_seeds_give_unrelated_weights() -> None:
    names = ["layers.0.attention.q.weight", "layers.1.attention.q.weight", "layers.0.attention.k.weight"]
    draws = [draw(name) for name in names] + [draw(names[0], seed=8)]
    correlations = torch.corrcoef(torch.stack([x.flatten() for x in draws])) - torch.eye(4)
    assert correlations.abs().max() < 5 / math.sqrt(300 * 400)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embedding.weight", 0.02),
        ("position_embedding.weight", 0.02),
        ("head.weight", 0.02),
        ("layers.3.attention.q.weight", 0.02),
        ("layers.3.mlp.up.weight", 0.02),
        ("layers.3.mlp.gate.weight", 0.02),
        ("layers.3.attention.out.weight", 0.02 / 4),  # 8 layers add 16 times: 1 / sqrt(16)
        ("layers.3.mlp.down.weight", 0.02 / 4),
    ],
)
def test_spread(name: str, std: float) -> None:
    x = draw(name)
    assert float(x.std()) == pytest.approx(std, rel=0.01)
    assert abs(float(x.mean())) < 5 * std / math.sqrt(x.numel())
    assert float(((x / std) ** 4).mean()) == pytest.approx(3, rel=0.05)  # normal, not uniform


def test_scales_are_one_and_biases_zero() -> None:
    for architecture in ("gpt", "llama"):
        config = ModelConfig(architecture, hidden_size=16, num_layers=2)
        for name, parameter in build_model(config).named_parameters():
            if parameter.dim() == 1:
                expected = 0.0 if name.endswith("bias") else 1.0
                assert torch.equal(initial_value(name, tuple(parameter.shape), config, 0), torch.full_like(parameter, expected))


def test_frozen() -> None:
    """What this seed gave when it was written. Numbers and not a hash: torch's normals differ between CPUs in the last bit."""
    x = draw("layers.1.mlp.down.weight", shape=(48, 64)).flatten()
    expected = [0.0022200848, -0.0002277063, 0.0001652618, 0.0018115071]
    torch.testing.assert_close(x[:4], torch.tensor(expected), rtol=0, atol=1e-7)
    assert float(x.abs().sum()) == pytest.approx(12.0601997, rel=1e-6)
