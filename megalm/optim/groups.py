"""Which parameters decay: matrices do; biases, norm scales and other vectors do not."""

from __future__ import annotations

from torch import nn

from megalm.parallel.engine import ParameterGroup


def build_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[ParameterGroup]:
    """Decay and no-decay groups, in the model's order; an empty one is left out.

    Call it before an engine takes the parameters: under ZeRO-3 their shapes are empty and everything looks like a vector.
    """
    matrices = {name: p for name, p in parameters.items() if p.dim() >= 2}
    vectors = {name: p for name, p in parameters.items() if p.dim() < 2}
    groups = [ParameterGroup(matrices, weight_decay), ParameterGroup(vectors, 0.0)]
    return [group for group in groups if group.parameters]
