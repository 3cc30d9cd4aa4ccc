"""The models by name."""

from __future__ import annotations

from megalm.config.model import ModelConfig
from megalm.models.decoder import Decoder
from megalm.models.gpt import GPT
from megalm.models.llama import Llama

MODELS: dict[str, type[Decoder]] = {"gpt": GPT, "llama": Llama}


def build_model(config: ModelConfig) -> Decoder:
    """A plain model on torch's current default device; `with torch.device("meta")` builds one without memory."""
    return MODELS[config.architecture](config)
