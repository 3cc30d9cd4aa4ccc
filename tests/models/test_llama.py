"""The llama against its formulas, written out independently in fp64 with complex numbers for the rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.models.llama import Llama
from megalm_kernels import rotary


def turn(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoPE as in the paper: pairs are complex numbers, multiplied by e^(i m theta_j). x (B, S, H, D), halves convention."""
    half = x.shape[-1] // 2
    z = torch.complex(x[..., :half], x[..., half:])
    frequencies = torch.tensor([theta ** (-2 * j / x.shape[-1]) for j in range(half)], dtype=torch.float64)
    turned = z * torch.exp(1j * positions.double()[:, None, None] * frequencies)
    return torch.cat([turned.real, turned.imag], dim=-1)


def reference(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits, with loops over heads and no shared code."""
    positions, D = torch.arange(tokens.shape[1]), config.head_dim
    unseen = torch.full((tokens.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / ((x * x).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    x = weights["embedding.weight"][tokens]
    for i in range(config.num_layers):
        w = {name.removeprefix(f"layers.{i}."): value for name, value in weights.items()}
        h = norm(x, f"layers.{i}.attention_norm.weight")
        q, k, v = (h @ w[f"attention.{p}.weight"].T for p in "qkv")
        heads = []
        for head in range(config.num_heads):
            group = head // (config.num_heads // config.num_kv_heads)
            mine, theirs = slice(head * D, head * D + D), slice(group * D, group * D + D)
            qh, kh = (turn(t.unsqueeze(2), positions, config.rope_theta).squeeze(2) for t in (q[..., mine], k[..., theirs]))
            heads.append((qh @ kh.mT / D**0.5 + unseen).softmax(-1) @ v[..., theirs])
        x = x + torch.cat(heads, -1) @ w["attention.out.weight"].T
        h = norm(x, f"layers.{i}.mlp_norm.weight")
        gate, up = h @ w["mlp.gate.weight"].T, h @ w["mlp.up.weight"].T
        x = x + (gate / (1 + torch.exp(-gate)) * up) @ w["mlp.down.weight"].T
    head_name = "head.weight" if "head.weight" in weights else "embedding.weight"
    return norm(x, "norm.weight") @ weights[head_name].T


SHAPES: list[dict] = [
    {},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "head_dim": 10},
    {"tie_embeddings": True, "rope_theta": 5e5},
    {"norm_eps": 0.1},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_and_all_gradients(changes: dict, build, tokens, gradients) -> None:
    model = build("llama", **changes)
    mine = dict(model.named_parameters())
    exact = {name: p.detach().double().requires_grad_() for name, p in mine.items()}
    logits, expected = model(tokens), reference(exact, model.config, tokens)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    found = gradients(mine, logits)
    for name, gradient in gradients(exact, expected).items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [2, 6, 64])
def test_rope_is_the_complex_formula_also_at_late_positions(theta: float, head_dim: int) -> None:
    with torch.device("meta"):
        model = Llama(ModelConfig(hidden_size=head_dim, num_heads=1, num_layers=1, rope_theta=theta))
    positions = torch.tensor([0, 1, 2, 1000, 131_071])
    x = torch.randn(2, 5, 3, head_dim)
    torch.testing.assert_close(
        model.rope(positions).turn(x).double(), turn(x.double(), positions, theta), rtol=0, atol=1e-6
    )


def test_rope_depends_on_the_distance_only(build) -> None:
    """q at m and k at n have the product that they have at m + 5 and n + 5: what makes the positions relative."""
    model, (q, k) = build("llama"), torch.randn(2, 1, 4, 1, 6)
    products = []
    for start in (0, 5):
        cos, sin, _ = model.rope(torch.arange(start, start + 4))
        products.append(rotary(q, cos, sin)[0, :, 0] @ rotary(k, cos, sin)[0, :, 0].T)
    torch.testing.assert_close(*products)


def test_positions_move_the_logits_only_through_rope(build, tokens) -> None:
    """A whole sequence that begins later gives the same logits."""
    model = build("llama")
    torch.testing.assert_close(model(tokens), model(tokens, torch.arange(4, 16)), rtol=1e-4, atol=1e-5)
