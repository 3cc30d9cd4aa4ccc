"""Counted parameters are the built model's, and the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import megalm.conf
from megalm.config.model import ModelConfig
from megalm.models.count import (
    count_block_parameters,
    count_flops_per_token,
    count_head_activations,
    count_matmul_parameters,
    count_parameters,
    count_stage_flops_per_token,
    count_stage_parameters,
)
from megalm.models.registry import build_model
from megalm_kernels import cross_entropy

PRESETS = {path.stem: path for path in sorted(Path(megalm.conf.__path__[0], "model").glob("*.yaml"))}


def preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load(PRESETS[name].read_text()))


def test_there_are_presets() -> None:
    assert {"tiny", "tiny_gpt", "gpt2_small", "llama_125m", "llama_7b", "llama_70b"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_count_is_what_the_built_model_has(name: str) -> None:
    config = preset(name)
    with torch.device("meta"):
        model = build_model(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("architecture", ["gpt", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_count_of_odd_shapes(architecture: str, tied: bool) -> None:
    config = ModelConfig(architecture, 101, 40, 3, 6, 2, 10, 52, 19, tie_embeddings=tied)
    model = build_model(config)
    assert count_parameters(config) == sum(p.numel() for p in model.parameters())
    matrices = [p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embedding" not in name]
    assert count_matmul_parameters(config) == sum(matrices) + (101 * 40 if tied else 0)


@pytest.mark.parametrize("architecture", ["gpt", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_add_up(architecture: str, tied: bool) -> None:
    """To the model, but for the second copy of a tied embedding; FLOPs to the model's."""
    config = ModelConfig(architecture, 101, 40, 5, 6, 2, 10, 52, 19, tie_embeddings=tied)
    parts = [(range(2), True, False), (range(2, 5), False, False), (range(5, 5), False, True)]
    copy = 101 * 40 if tied else 0
    assert sum(count_stage_parameters(config, *part) for part in parts) == count_parameters(config) + copy
    flops = [count_stage_flops_per_token(config, 19, layers, last) for layers, _, last in parts]
    assert sum(flops) == count_flops_per_token(config, 19)
    assert flops[2] == 6 * 101 * 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
def test_what_the_head_keeps(dtype: torch.dtype, triton: bool, pretend_kernels: Callable[[], None]) -> None:
    """Against the tensors that autograd saves, the norm's input with them; torch saves logits as fp32 probabilities."""
    if triton:
        pretend_kernels()
    config = ModelConfig("gpt", 301, 64, 1, 4, max_seq_length=32)
    model = build_model(config).to(dtype)
    x, labels = torch.randn(2, 32, 64, dtype=dtype, requires_grad=True), torch.randint(301, (64,))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.is_floating_point() and t.untyped_storage().data_ptr() not in weights:
            saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        cross_entropy(model.head(model.norm(x)).flatten(0, 1), labels).sum()
    kept = sum(t.untyped_storage().nbytes() for t in saved.values())
    assert kept / 64 == pytest.approx(count_head_activations(config, dtype.itemsize, triton=triton), rel=0.015)


# From the papers and the released weights. GPT-2's vocabulary is 50257 before padding; Llama 2's is 32000.
PUBLISHED = {
    ("gpt2_small", 50257): 124_439_808,
    ("gpt2_medium", 50257): 354_823_168,
    ("gpt2_large", 50257): 774_030_080,
    ("gpt2_xl", 50257): 1_557_611_200,
    ("llama_1b", 128256): 1_235_814_400,
    ("llama_3b", 128256): 3_212_749_824,
    ("llama_7b", 32000): 6_738_415_616,
    ("llama_8b", 128256): 8_030_261_248,
    ("llama_13b", 32000): 13_015_864_320,
    ("llama_70b", 32000): 68_976_648_192,
    ("llama_70b", 128256): 70_553_706_496,
    ("llama_405b", 128256): 405_853_388_800,
}


@pytest.mark.parametrize(("name", "vocab_size"), PUBLISHED)
def test_published_counts(name: str, vocab_size: int) -> None:
    assert count_parameters(replace(preset(name), vocab_size=vocab_size)) == PUBLISHED[name, vocab_size]


def test_flops_by_hand() -> None:
    config = ModelConfig("llama", 1000, 64, 2, 4, 2, 16, 128)
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128  # q and out; k and v; gate, up and down
    assert count_block_parameters(config) == block
    # Forward: 2 FLOPs per weight; scores and values 2 + 2 per query element and key, of which half are behind the
    # causal mask. Backward is twice the forward.
    forward = 2 * (2 * block + 1000 * 64) + 2 * 4 * 64 * 512 / 2
    assert count_flops_per_token(config, 512) == 3 * forward


def test_an_embedding_lookup_costs_nothing() -> None:
    tied, untied = (ModelConfig(tie_embeddings=tied) for tied in (True, False))
    assert count_flops_per_token(tied, 128) == count_flops_per_token(untied, 128)
