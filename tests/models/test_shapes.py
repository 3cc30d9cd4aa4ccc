"""Names and shapes from a configuration are those of the built model, whole and cut into stages."""

from __future__ import annotations

import itertools

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.registry import build_model
from megalm.models.shapes import stage_shapes
from megalm.parallel.stages import apply_stage

EXPERTS = {"num_experts": 8, "experts_per_token": 2, "expert_ffn_size": 11, "num_shared_experts": 2, "num_dense_layers": 1}
LATENT = {"kv_latent_size": 13, "rope_head_dim": 2, "value_head_dim": 7}
CASES = list(itertools.product(("gpt", "llama"), (False, True), ("",)))
CASES += [("llama", False, "experts"), ("llama", True, "latent"), ("llama", False, "latent queries experts")]


def odd_config(architecture: str, tied: bool, parts: str) -> ModelConfig:
    """No two sizes are equal, so that nothing can be taken for something else."""
    more = {**(EXPERTS if "experts" in parts else {}), **(LATENT if "latent" in parts else {})}
    more |= {"q_latent_size": 19} if "queries" in parts else {}
    return ModelConfig(architecture, 37, 24, 4, 6, 2, 5, 17, 9, tie_embeddings=tied, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("architecture", "tied", "parts"), CASES)
def test_a_whole_model(architecture: str, tied: bool, parts: str) -> None:
    config = odd_config(architecture, tied, parts)
    with torch.device("meta"):
        model = build_model(config)
    built = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    assert list(stage_shapes(config, range(4)).items()) == built


@pytest.mark.parametrize(("architecture", "tied", "parts"), CASES)
@pytest.mark.parametrize("split", [(1, 3), (2, 0, 2), (0, 4)])
def test_stages(architecture: str, tied: bool, parts: str, split: tuple[int, ...]) -> None:
    config = odd_config(architecture, tied, parts)
    for stage in range(len(split)):
        with torch.device("meta"):
            model = build_model(config)
        apply_stage(model, stage, split)
        layers = range(sum(split[:stage]), sum(split[: stage + 1]))
        found = stage_shapes(config, layers, stage == 0, stage == len(split) - 1)
        assert list(found.items()) == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
