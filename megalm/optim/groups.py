"""Which parameters decay: matrices do; biases, norm scales and other vectors do not."""

from __future__ import annotations

from torch import nn

from megalm.parallel.engine import ParameterGroup, shape_of
from megalm.parallel.tensor_parallel import shard_of


def build_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[ParameterGroup]:
    """Decay and no-decay groups, and those of experts that are dealt out; each in the model's order, an empty one is left out.

    Under ZeRO-3 a parameter that is shared out is empty and looks like a vector: `shape_of` knows what it was.
    """
    found: dict[tuple[bool, bool], dict[str, nn.Parameter]] = {}
    for name, parameter in parameters.items():
        kind = shard_of(parameter).is_dealt_out, len(shape_of(parameter)) < 2
        found.setdefault(kind, {})[name] = parameter
    return [
        ParameterGroup(group, 0.0 if is_vector else weight_decay, experts)
        for (experts, is_vector), group in sorted(found.items(), key=lambda item: item[0])
    ]
