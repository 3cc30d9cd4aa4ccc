"""The parameters of a stage as one rank holds them, in numbers: what the formulae of volume.py count."""

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
    exact: bool = True  # False: the bytes depend on what the router chooses, and `size` is what an even choice gives


@dataclass(frozen=True)
class Part:
    """One rank's part of a parameter."""

    name: str
    numel: int  # padding included
    is_matrix: bool  # it decays
    partial: int = 0  # elements that it adds to the sum of partial gradients over the tensor group
    dealt_out: bool = False  # of experts that other ranks have others of

    @property
    def path(self) -> str:
        """The module that has it."""
        return self.name.rpartition(".")[0]


def cut(shapes: Mapping[str, tuple[int, ...]], plan: Mapping[str, str], config: RunConfig) -> list[Part]:
    """The parameters cut by a tensor parallel plan ({end of a module's path: style}), the experts dealt out."""
    return [_part(name, shape, _style(name, plan), config) for name, shape in shapes.items()]


def _style(name: str, plan: Mapping[str, str]) -> str | None:
    path = name.rpartition(".")[0]
    return next((style for end, style in plan.items() if path == end or path.endswith("." + end)), None)


def _part(name: str, shape: tuple[int, ...], style: str | None, config: RunConfig) -> Part:
    ranks, kv_heads, dealt = config.parallel.tensor_parallel, config.model.num_kv_heads, config.parallel.expert_parallel
    whole, is_matrix = prod(shape), len(shape) > 1
    if style == "experts":
        return Part(name, whole // dealt // ranks, is_matrix, dealt_out=dealt > 1)
    if ranks == 1:
        return Part(name, whole, is_matrix)
    if style == "heads" and ranks > kv_heads:  # neighbouring ranks hold copies, whose gradients are summed as a whole
        return Part(name, whole // kv_heads, is_matrix, whole)
    if style in ("column", "heads", "part") or (style == "row" and is_matrix):
        return Part(name, whole // ranks, is_matrix)
    if style in ("vocab", "logits"):
        return Part(name, -(-shape[0] // ranks) * prod(shape[1:]), is_matrix)
    return Part(name, whole, is_matrix, whole if style == "inside" or config.parallel.sequence_parallel else 0)


def is_repeated(path: str, config: RunConfig) -> bool:
    """Whether a module is in a block, or a part of one, whose forward the backward repeats."""
    train = config.train
    if train.recompute == "none" or not path.startswith("layers.") or int(path.split(".")[1]) % train.recompute_every:
        return False
    part = path.split(".")[2]
    return train.recompute != "modules" or ("norms" if part.endswith("_norm") else part) in train.recompute_modules


def repeated_with(path: str, config: RunConfig) -> str:
    """The path of what is repeated as one: the block, or with `modules` the part of it."""
    return ".".join(path.split(".")[: 3 if config.train.recompute == "modules" else 2])
