"""Every row of a plan fits a module, and no module that must be split is forgotten."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.models.layers import Dropout, OnSequenceSlice
from megalm.models.plans import PLANS, TIED
from megalm.models.registry import MODELS, build_model
from megalm.parallel.tensor_parallel import STYLES
from megalm_kernels import LayerNorm, RMSNorm

EXPECTED = {
    nn.Linear: {"column", "heads", "logits", "row", "inside", "part"},
    nn.Embedding: {"vocab"},
    nn.Identity: {"leave"},
    RMSNorm: {"norm", "inside"},
    LayerNorm: {"norm"},
    Dropout: {"sequence"},
}
LATENT = {"kv_latent_size": 16, "rope_head_dim": 8}
VARIANTS: dict[str, tuple[str, dict[str, int]]] = {
    "gpt": ("gpt", {}),
    "llama": ("llama", {}),
    "latent": ("llama", LATENT),
    "experts": ("llama", {"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1}),
    "latent queries": ("llama", {**LATENT, "q_latent_size": 24}),
}


def styles(variant: str) -> dict[str, tuple[nn.Module, list[str]]]:
    """Module path -> module and the styles of the rows that match it."""
    architecture, parts = VARIANTS[variant]
    with torch.device("meta"):
        model = build_model(ModelConfig(architecture, num_layers=2, **parts))  # type: ignore[arg-type]
    plan = PLANS[architecture]
    return {
        path: (module, [style for end, style in plan.items() if path == end or path.endswith("." + end)])
        for path, module in model.named_modules()
    }


def test_every_model_has_a_plan_of_known_styles() -> None:
    assert set(PLANS) == set(MODELS)
    assert {style for plan in PLANS.values() for style in plan.values()} <= set(STYLES)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_module_with_weights_or_positions_has_its_style(variant: str) -> None:
    for path, (module, found) in styles(variant).items():
        if type(module) in EXPECTED or isinstance(module, OnSequenceSlice):
            assert len(found) == 1, f"{path}: {found}"
            assert found[0] in EXPECTED.get(type(module), {"sequence"}), path
        elif list(module.parameters(recurse=False)):
            assert found, path
        else:
            assert not found, f"{path}: only modules that do something themselves are in a plan"


@pytest.mark.parametrize("architecture", PLANS)
def test_every_row_matches_a_module(architecture: str) -> None:
    paths = {path for variant, (kind, _) in VARIANTS.items() if kind == architecture for path in styles(variant)}
    for end in PLANS[architecture]:
        assert any(path == end or path.endswith("." + end) for path in paths), end


@pytest.mark.parametrize("architecture", PLANS)
def test_the_residual_stream_comes_whole_out_of_every_region(architecture: str) -> None:
    """Between a norm (f) and the row parallel layer that ends the region (g) there are only column parallel ones."""
    plan = PLANS[architecture]
    assert plan["attention.out"] == plan["mlp.down"] == "row"
    assert plan["attention.q"] == plan["mlp.up"] == "column" and plan["attention.k"] == plan["attention.v"] == "heads"


@pytest.mark.parametrize("architecture", PLANS)
def test_tied_names_exist(architecture: str) -> None:
    model = build_model(ModelConfig(architecture, hidden_size=8, num_layers=1))
    names = dict(model.named_parameters())
    for copy, original in TIED.items():
        assert names[copy].shape == names[original].shape
