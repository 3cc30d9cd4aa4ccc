"""Cut a model into pipeline stages: which layers each has, and the same model with the other parts deleted."""

from __future__ import annotations

from typing import Any

from torch import nn


def layers_of_stage(stage: int, num_stages: int, num_layers: int) -> range:
    """The layers of one stage: as even as possible, in order."""
    return range(stage * num_layers // num_stages, (stage + 1) * num_layers // num_stages)


def apply_stage(model: nn.Module, stage: int, num_stages: int) -> None:
    """Cut a model down to one stage, in place: other stages' layers go, the embedding unless first, the head unless last."""
    layers: Any = model.layers
    kept = {str(i) for i in layers_of_stage(stage, num_stages, len(layers))}
    for name in list(layers):
        if name not in kept:
            del layers[name]
    absent = ([] if stage == 0 else ["embedding", "position_embedding"]) + (
        [] if stage == num_stages - 1 else ["norm", "head"]
    )
    for name in absent:
        setattr(model, name, None)
