"""Small models with the weights that a run would give them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megalm.config.model import ModelConfig
from megalm.models.decoder import Decoder
from megalm.models.init import initial_value
from megalm.models.registry import build_model

Build = Callable[..., Decoder]


@pytest.fixture
def build() -> Build:
    """Builds a model of the given shape; large weights, so that a fault anywhere shows in the logits."""

    def make(architecture: str = "llama", **changes: object) -> Decoder:
        shape = dict(vocab_size=37, hidden_size=24, num_layers=3, num_heads=4, max_seq_length=16, init_std=0.3)
        config = ModelConfig(architecture=architecture, **{**shape, **changes})  # type: ignore[arg-type]
        model = build_model(config)
        for name, parameter in model.named_parameters():
            parameter.data.copy_(initial_value(name, tuple(parameter.shape), config, seed=3))
            if parameter.dim() == 1:  # scales of 1 and biases of 0 would hide that they are not used
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        return model

    return make


@pytest.fixture
def tokens() -> torch.Tensor:
    """(2, 12) tokens below 37."""
    return torch.randint(37, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def gradients() -> Callable[[dict[str, torch.Tensor], torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of a loss that depends on every output in another way."""

    def compute(parameters: dict[str, torch.Tensor], output: torch.Tensor) -> dict[str, torch.Tensor]:
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        return dict(zip(parameters, torch.autograd.grad((output * weights).sum(), [*parameters.values()]), strict=True))

    return compute
