"""The parameters of a stage as one tensor parallel rank holds them, in numbers: what the formulae of volume.py count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megalm.config.run import RunConfig


class Call(NamedTuple):
    """`times` collectives of `size` bytes each."""

    group: str
    operation: str
    times: int
    size: int


@dataclass(frozen=True)
class Part:
    """One tensor parallel rank's part of a parameter."""

    name: str
    numel: int  # padding included
    is_matrix: bool  # it decays
    partial: int = 0  # elements that it adds to the sum of partial gradients over the tensor group

    @property
    def path(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]


def cut(shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, str], config: RunConfig) -> list[Part]:
    """The parameters cut by a tensor parallel plan ({end of a module's path: style})."""
    return [_part(name, shape, _style(name, plan), config) for name, shape in shapes.items()]


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    path = name.rpartition(".")[0]
    return next((style for end, style in plan.items() if path == end or path.endswith("." + end)), None)


def _part(name: str, shape: tuple[int, ...], style: str | None, config: RunConfig) -> Part:
    ranks, kv_heads = config.parallel.tensor_parallel, config.model.num_kv_heads
    whole, is_matrix = prod(shape), len(shape) > 1
    if ranks == 1:
        return Part(name, whole, is_matrix)
    if style == "heads" and ranks > kv_heads:  # neighbouring ranks hold copies, whose gradients are summed as a whole
        return Part(name, whole // kv_heads, is_matrix, whole)
    if style in ("column", "heads") or (style == "row" and is_matrix):
        return Part(name, whole // ranks, is_matrix)
    if style in ("vocab", "logits"):
        return Part(name, -(-shape[0] // ranks) * prod(shape[1:]), is_matrix)
    return Part(name, whole, is_matrix, whole if config.parallel.sequence_parallel else 0)
