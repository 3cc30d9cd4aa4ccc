"""The GPT against its formulas, written out independently in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megalm.config.model import ModelConfig


def reference(weights: dict[str, Tensor], config: ModelConfig, tokens: Tensor) -> Tensor:
    """Logits, with loops over heads and no shared code."""
    S, D = tokens.shape[1], config.head_dim
    unseen = torch.full((S, S), -torch.inf, dtype=torch.float64).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / ((centred**2).mean(-1, keepdim=True) + config.norm_eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    x = weights["embedding.weight"][tokens] + weights["position_embedding.weight"][:S]
    for i in range(config.num_layers):
        at = f"layers.{i}.attention"
        h = norm(x, f"{at}_norm")
        q, k, v = (linear(h, f"{at}.{p}") for p in "qkv")
        heads = []
        for cut in (slice(n * D, n * D + D) for n in range(config.num_heads)):
            heads.append((q[..., cut] @ k[..., cut].mT / math.sqrt(D) + unseen).softmax(-1) @ v[..., cut])
        x = x + linear(torch.cat(heads, -1), f"{at}.out")
        u = linear(norm(x, f"layers.{i}.mlp_norm"), f"layers.{i}.mlp.up")
        gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))  # GPT-2's approximation
        x = x + linear(gelu, f"layers.{i}.mlp.down")
    return norm(x, "norm") @ weights.get("head.weight", weights["embedding.weight"]).T


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"num_heads": 2, "head_dim": 5, "norm_eps": 0.1}])
def test_logits_and_all_gradients(changes: dict, build, tokens, gradients) -> None:
    model = build("gpt", **changes)
    mine = dict(model.named_parameters())
    exact = {name: p.detach().double().requires_grad_() for name, p in mine.items()}
    logits, expected = model(tokens), reference(exact, model.config, tokens)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-5)
    found = gradients(mine, logits)
    for name, gradient in gradients(exact, expected).items():
        atol = 1e-5 * max(1.0, float(gradient.abs().max()))  # at least 1: the key biases' gradients are zero
        torch.testing.assert_close(found[name].double(), gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def test_the_key_bias_has_no_gradient(build, tokens, gradients) -> None:
    """Moving all keys together does not move the softmax: what parity leaves out of its verdict."""
    model = build("gpt").double()
    found = gradients(dict(model.named_parameters()), model(tokens))
    sizes = {name: float(g.abs().max()) for name, g in found.items()}
    keys = {name for name in sizes if name.endswith("attention.k.bias")}
    assert max(sizes[name] for name in keys) < 1e-12 < 1e-3 < min(size for name, size in sizes.items() if name not in keys)


def test_positions_are_looked_up(build, tokens) -> None:
    model = build("gpt")
    moved = model(tokens, torch.arange(4, 16))
    model.position_embedding.weight.data = model.position_embedding.weight.data.roll(-4, 0)
    torch.testing.assert_close(model(tokens), moved)
