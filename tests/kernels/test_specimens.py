"""The compile gate's specimens are what training launches: every preset's shapes, on one rank and split over eight."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import megalm.conf
from megalm.config.model import ModelConfig
from megalm_kernels.device import (
    activations,
    attention_backward,
    attention_forward,
    cross_entropy,
    fused_adam,
    grouped_linear,
    norms,
    rotary,
)
from megalm_kernels.launch import Launch, capture
from megalm_kernels.specimens import collect, identity

PRESETS = sorted(path.stem for path in Path(megalm.conf.__path__[0], "model").glob("*.yaml"))
SAMPLES, LENGTH = 2, 512


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_training(config: ModelConfig, ranks: int, dtype: torch.dtype) -> None:
    """What a step of this model launches on one of `ranks` tensor parallel ranks, kernel by kernel."""
    tokens, hidden, gpt = SAMPLES * LENGTH, config.hidden_size, config.architecture == "gpt"
    settings = (0.0, 0, gpt, False)
    for width in {hidden, config.kv_latent_size, config.q_latent_size} - {0}:
        x, weight = meta(tokens, width, dtype=dtype), meta(width, dtype=dtype)
        _, _, mean, scale = norms.forward(x, weight, weight if gpt else None, None, None, *settings, 1e-5)
        norms.backward(x, None, x, weight, mean, scale, None, gpt, False, *settings)
    if not gpt:
        heads, kv_heads, turned = config.num_heads // ranks, max(1, config.num_kv_heads // ranks), config.rope_head_dim
        shapes = [(heads, config.head_dim), (1, turned) if config.kv_latent_size else (kv_heads, config.head_dim)]
        angles = meta(config.max_seq_length, (turned or config.head_dim) // 2, dtype=torch.float32)
        for shape, inverse in itertools.product(shapes, (False, True)):
            rotary.turn(meta(SAMPLES, LENGTH, *shape, dtype=dtype), angles, angles, None, False, inverse)
        gate = meta(tokens, config.ffn_size // ranks, dtype=dtype)
        activations.gated(gate, gate, False)
        activations.gated_backward(gate, gate, gate, False)
    if config.num_experts:
        launch_experts(config, ranks, dtype)
    launch_attention(config, ranks, dtype)
    columns = -(-config.vocab_size // ranks)
    logits, labels = meta(tokens, columns, dtype=dtype), meta(tokens, dtype=torch.int64)
    if ranks == 1:
        _, largest, total = cross_entropy.losses(logits, labels, 0.0, 0.0, -100, 0.0, False)
    else:
        largest, total, *_ = cross_entropy.statistics(logits, labels, columns, config.vocab_size, 0.0, -100, False)
    cross_entropy.gradient(logits, labels, largest, total, total, 0, config.vocab_size, 0.0, 0.0, -100, 0.0)
    flat = meta(4096, dtype=torch.float32)
    fused_adam.fused_adam(flat, flat, flat, flat, None, None, None, None, None, None, 7, 1e-4, 0.9, 0.95, 1e-8, 0.1, None)


def launch_experts(config: ModelConfig, ranks: int, dtype: torch.dtype) -> None:
    """Whose width is cut over tensor parallel ranks, and who are dealt out over expert parallel ones; many tokens and few."""
    width = config.expert_ffn_size // ranks
    for experts in (config.num_experts, max(1, config.num_experts // ranks)):
        starts = meta(experts + 1, dtype=torch.int32)
        for rows in (SAMPLES * LENGTH, 256 * experts):
            outside, inside = meta(rows, config.hidden_size, dtype=dtype), meta(rows, width, dtype=dtype)
            up = meta(experts, width, config.hidden_size, dtype=dtype)
            down = meta(experts, config.hidden_size, width, dtype=dtype)
            for x, y, weight in ((outside, inside, up), (inside, outside, down)):
                grouped_linear.products(x, weight, starts, False)
                grouped_linear.products(y, weight, starts, True)
                grouped_linear.weight_products(y, x, starts)


def launch_attention(config: ModelConfig, ranks: int, dtype: torch.dtype) -> None:
    """Causal; q, k and v are parts of one projection, of which rotary makes tensors of their own."""
    heads, kv_heads, dim = config.num_heads // ranks, max(1, config.num_kv_heads // ranks), config.head_dim
    q, k, v = meta(SAMPLES, LENGTH, heads + 2 * kv_heads, dim, dtype=dtype).split((heads, kv_heads, kv_heads), dim=2)
    if config.architecture != "gpt":
        q, k = q.contiguous(), k.contiguous()
    if config.kv_latent_size:
        v = v.contiguous()  # filled up to the width of keys
    options = (None, None, -1, 0, dim**-0.5, 0.0, 0.0, 0, [0, 0, 0, 0])
    out, lse = attention_forward.forward(q, k, v, None, None, *options)
    attention_backward.backward(out, None, q, k, v, out, lse, None, *options, True)


def launches(preset: str) -> Iterator[tuple[str, Launch]]:
    values = yaml.safe_load(Path(megalm.conf.__path__[0], "model", f"{preset}.yaml").read_text())
    config = ModelConfig(**{**values, "vocab_size": values.get("vocab_size") or 32768})
    for ranks in (1, 8):
        if config.num_heads % ranks or config.ffn_size % ranks:
            continue
        for dtype in (torch.bfloat16, torch.float32):
            with capture(90) as caught:
                launch_training(config, ranks, dtype)
            for launch in caught:
                sizes = [arg for arg in launch.args if isinstance(arg, int)]
                yield f"{preset}, {ranks} ranks, {dtype}: {launch.kernel.__name__} {sizes} {launch.meta}", launch


@pytest.fixture(scope="module")
def covered() -> set[tuple]:
    return {identity(specimen.launch) for specimen in collect([90])[0]}


@pytest.mark.parametrize("preset", PRESETS)
def test_training_launches_nothing_that_the_gate_has_not_seen(preset: str, covered: set[tuple]) -> None:
    missing = [words for words, launch in launches(preset) if identity(launch) not in covered]
    assert missing == []
