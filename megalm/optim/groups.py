"""Which parameters decay: matrices do; biases, norm scales and other vectors do not."""

from __future__ import annotations

from torch import nn

from megalm.parallel.engine import ParameterGroup, shape_of


def build_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[ParameterGroup]:
    """Decay and no-decay groups, in the model's order; an empty one is left out.

    Under ZeRO-3 a parameter that is shared out is empty and looks like a vector: `shape_of` knows what it was.
    """
    matrices = {name: p for name, p in parameters.items() if len(shape_of(p)) >= 2}
    vectors = {name: p for name, p in parameters.items() if len(shape_of(p)) < 2}
    groups = [ParameterGroup(matrices, weight_decay), ParameterGroup(vectors, 0.0)]
    return [group for group in groups if group.parameters]
