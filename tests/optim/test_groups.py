"""Matrices decay, vectors do not, in the model's order and each once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megalm.config.model import ModelConfig
from megalm.models.registry import MODELS, build_model
from megalm.optim.groups import build_groups


@pytest.mark.parametrize("architecture", MODELS)
def test_matrices_decay_and_vectors_do_not(architecture: str) -> None:
    model = build_model(ModelConfig(architecture, hidden_size=8, num_layers=2))
    parameters = dict(model.named_parameters())
    decaying, still = build_groups(parameters, 0.3)
    assert (decaying.weight_decay, still.weight_decay) == (0.3, 0.0)
    assert all(name.endswith("weight") and "norm" not in name for name in decaying.parameters)
    assert all("norm" in name or name.endswith("bias") for name in still.parameters)
    assert sorted([*decaying.parameters, *still.parameters]) == sorted(parameters)
    for group in (decaying, still):
        assert list(group.parameters) == [name for name in parameters if name in group.parameters]
        assert all(group.parameters[name] is parameters[name] for name in group.parameters)


@pytest.mark.parametrize(("shape", "decay"), [((2, 3), 0.3), ((3,), 0.0)])
def test_an_empty_group_is_left_out(shape: tuple[int, ...], decay: float) -> None:
    (group,) = build_groups({"x": nn.Parameter(torch.zeros(shape))}, 0.3)
    assert group.weight_decay == decay
