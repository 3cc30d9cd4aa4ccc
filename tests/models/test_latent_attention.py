"""Latent attention against its formula, written out independently: loops over heads and tokens, fp64, complex rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalm.config.model import ModelConfig
from megalm.inference.cache import GrowingCache
from megalm.models.decoder import Decoder
from megalm.models.latent_attention import LatentAttention

# No two sizes are equal but where they must be; the second has the paper's shape: values narrower than keys, queries on latents.
STRAIGHT = {"head_dim": 10, "kv_latent_size": 7, "rope_head_dim": 4}
NARROW = {"head_dim": 10, "kv_latent_size": 7, "q_latent_size": 9, "rope_head_dim": 6, "value_head_dim": 5}
SHAPES = [STRAIGHT, NARROW, {**NARROW, "window": 3}, {**STRAIGHT, "value_head_dim": 10, "rope_theta": 50.0, "norm_eps": 0.1}]


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt() * weight


def turn(x: Tensor, place: int, theta: float) -> Tensor:
    """One token's pairs as complex numbers. x (R,), halves convention."""
    half = len(x) // 2
    angles = place * torch.tensor([theta ** (-2 * j / len(x)) for j in range(half)], dtype=torch.float64)
    turned = torch.complex(x[:half], x[half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag])


def formula(w: dict[str, Tensor], c: ModelConfig, x: Tensor) -> Tensor:
    """What attention makes of one sequence. x (S, E), fp64."""
    R, P, V, L = c.rope_head_dim, c.head_dim - c.rope_head_dim, c.value_head_dim, c.kv_latent_size
    wide = x
    if c.q_latent_size:
        wide = norm(x @ w["q_down.weight"].T, w["q_norm.weight"], c.norm_eps)
    q = wide @ w["q_up.weight" if c.q_latent_size else "q.weight"].T
    down = x @ w["kv_down.weight"].T
    up = norm(down[:, :L], w["kv_norm.weight"], c.norm_eps) @ w["kv_up.weight"].T
    shared = [turn(down[t, L:], t, c.rope_theta) for t in range(len(x))]
    rows = []
    for t in range(len(x)):
        seen = range(max(0, t - c.window) if c.window else 0, t + 1)
        heads = []
        for h in range(c.num_heads):
            mine = q[t, h * c.head_dim : (h + 1) * c.head_dim]
            turned = turn(mine[:R], t, c.rope_theta)
            keys = [up[s, h * (P + V) : h * (P + V) + P] for s in seen]
            scores = torch.stack([turned @ shared[s] + mine[R:] @ key for s, key in zip(seen, keys, strict=True)])
            values = torch.stack([up[s, h * (P + V) + P : (h + 1) * (P + V)] for s in seen])
            heads.append((scores / c.head_dim**0.5).softmax(0) @ values)
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w["out.weight"].T


def attention_of(model: Decoder) -> LatentAttention:
    attention = model.layers["0"].attention
    assert isinstance(attention, LatentAttention)
    return attention


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("changes", SHAPES, ids=["straight", "narrow", "window", "wide"])
def test_output_and_all_gradients(changes: dict, fuse: bool, build, gradients) -> None:
    model = build(num_layers=1, **changes)
    attention, x = attention_of(model), torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(5))
    attention.fuse = fuse
    mine: dict[str, Tensor] = {"x": x.requires_grad_(), **dict(attention.named_parameters())}
    exact = {name: p.detach().double().requires_grad_() for name, p in mine.items()}
    found = attention(x, model.rope(torch.arange(9)))
    expected = torch.stack([formula(exact, model.config, sample) for sample in exact["x"]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    results = gradients(mine, found)
    for name, gradient in gradients(exact, expected).items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(results[name].double(), gradient, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("changes", [NARROW, {**STRAIGHT, "window": 3}], ids=["narrow", "window"])
@pytest.mark.parametrize("cuts", [[1] * 12, [5, 1, 1, 5]])
def test_with_a_cache_as_without(changes: dict, cuts: list[int], build, tokens: Tensor) -> None:
    model, cache, start, parts = build(**changes), GrowingCache(12), 0, []
    for size in cuts:
        parts.append(model(tokens[:, start : start + size], torch.arange(start, start + size), cache=cache))
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)


def test_the_cache_keeps_what_is_small(build, tokens: Tensor) -> None:
    """Per token and layer kv_latent_size + rope_head_dim numbers, for all heads together."""
    kept: list[int] = []

    class Watching(GrowingCache):
        def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            kept.append(k[0, 0].numel() + v[0, 0].numel())
            return super().extend(layer, k, v)

    build(**NARROW)(tokens, cache=Watching(12))
    assert kept == [7 + 6] * 3


def test_a_slice_of_the_heads_works_alone(build) -> None:
    """What tensor parallelism relies on: with whole latents, the output is the sum over slices of the heads."""
    whole, x, total = build(num_layers=1, **NARROW), torch.randn(2, 5, 24), torch.zeros(2, 5, 24)
    rope = whole.rope(torch.arange(5))
    for half in range(2):
        part = attention_of(build(num_layers=1, **NARROW))
        for name in ("q_up", "kv_up"):
            getattr(part, name).weight.data = getattr(attention_of(whole), name).weight.data.chunk(2)[half]
        part.out.weight.data = attention_of(whole).out.weight.data.chunk(2, 1)[half]
        total += part(x, rope)
    torch.testing.assert_close(total, attention_of(whole)(x, rope))
