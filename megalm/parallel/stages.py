"""Cut a model down to one pipeline stage: the same model with the other parts deleted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megalm.parallel.split import layers_of_stage


def apply_stage(model: nn.Module, stage: int, split: Sequence[int]) -> None:
    """Cut a model down to one stage, in place: other stages' layers go, the embedding unless first, the head unless last.

    split: layers of each stage along the model (split.py).
    """
    layers: Any = model.layers
    assert sum(split) == len(layers), f"{list(split)} is not a split of {len(layers)} layers"
    kept = {str(i) for i in layers_of_stage(stage, split)}
    for name in list(layers):
        if name not in kept:
            del layers[name]
    absent = ([] if stage == 0 else ["embedding", "position_embedding"]) + (
        [] if stage == len(split) - 1 else ["norm", "head"]
    )
    for name in absent:
        setattr(model, name, None)
