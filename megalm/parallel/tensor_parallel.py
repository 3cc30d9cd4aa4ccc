"""Split a plain model over the tensor parallel ranks, by a plan of module names (see models/plans.py).

Modules are replaced or wrapped in place and keep their names. Each parameter learns what it is through `Shard`, which is
all that initialisation, the norm of the gradients and the checkpoints need to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import copy_to_region, gather_sequence, scatter_sum, sum_from_region
from megalm.parallel.topology import Topology


@dataclass(frozen=True)
class Shard:
    """Which part of the whole parameter a rank holds, and how its gradient arises."""

    global_shape: tuple[int, ...]
    dim: int | None = None  # split dim; None: every tensor parallel rank holds all of it
    start: int = 0  # first index held along `dim`
    sequence_partial: bool = False  # its gradient covers a slice of the sequence only: sum it over the tensor group

    @property
    def offset(self) -> tuple[int, ...]:
        """Where this part begins in the whole."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(len(self.global_shape)))

    def slice_of(self, whole: Tensor, length: int) -> Tensor:
        """This rank's part of the whole tensor; `length` is the local size along `dim`."""
        return whole if self.dim is None else whole.narrow(self.dim, self.start, length)


def shard_of(parameter: nn.Parameter) -> Shard:
    """What `parameter` is a part of; a parameter that no plan touched is whole."""
    return getattr(parameter, "shard", None) or Shard(tuple(parameter.shape))


def local_slice(parameter: nn.Parameter, shape: tuple[int, ...], whole: Tensor) -> Tensor:
    """The part of `whole` that belongs to `parameter`, whose local shape is `shape`."""
    shard = shard_of(parameter)
    return shard.slice_of(whole, shape[shard.dim] if shard.dim is not None else 0)


class ColumnParallelLinear(nn.Module):
    """A slice of a linear layer's output features. The input is whole (a `norm` in front of it made it so)."""

    def __init__(self, full: nn.Linear, topology: Topology):
        super().__init__()
        self.weight = _split(full.weight, 0, topology)
        self.bias = None if full.bias is None else _split(full.bias, 0, topology)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowParallelLinear(nn.Module):
    """A slice of a linear layer's input features; the ranks' products are summed, then the bias is added once."""

    def __init__(self, full: nn.Linear, topology: Topology):
        super().__init__()
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel
        self.weight = _split(full.weight, 1, topology)
        self.bias = None if full.bias is None else _whole(full.bias, topology)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        y = scatter_sum(y, self.group) if self.sequence_parallel else sum_from_region(y, self.group)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """A slice of the vocabulary's rows; a token that another rank holds contributes zero here."""

    def __init__(self, full: nn.Embedding, topology: Topology):
        super().__init__()
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel
        self.weight = _split(full.weight, 0, topology)
        self.start, self.length = shard_of(self.weight).start, self.weight.shape[0]  # ZeRO-3 empties the weight's shape

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.start) | (tokens >= self.start + self.length)
        rows = (tokens - self.start).masked_fill(elsewhere, 0)
        y = F.embedding(rows, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return scatter_sum(y, self.group) if self.sequence_parallel else sum_from_region(y, self.group)


class _EnterRegion:
    """Forward hook of a `norm`: its output enters a region that is split over the group."""

    def __init__(self, topology: Topology):
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel

    def __call__(self, module: nn.Module, args: object, y: Tensor) -> Tensor:
        return gather_sequence(y, self.group) if self.sequence_parallel else copy_to_region(y, self.group)


def _split(parameter: Tensor, dim: int, topology: Topology) -> nn.Parameter:
    """An empty parameter of this rank's part of `dim`."""
    shape = list(parameter.shape)
    assert shape[dim] % topology.tensor.size == 0, f"{shape} does not divide by {topology.tensor.size} along {dim}"
    shape[dim] //= topology.tensor.size
    part = nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype))
    part.shard = Shard(tuple(parameter.shape), dim, topology.tensor.rank * shape[dim])  # type: ignore[attr-defined]
    return part


def _whole(parameter: nn.Parameter, topology: Topology) -> nn.Parameter:
    """Mark a parameter that every rank holds whole and that, with sequence parallelism, sees a slice of the sequence."""
    parameter.shard = Shard(tuple(parameter.shape), sequence_partial=topology.sequence_parallel)  # type: ignore[attr-defined]
    return parameter


def _split_norm(module: nn.Module, topology: Topology) -> nn.Module:
    module.register_forward_hook(_EnterRegion(topology))
    return _on_sequence_slice(module, topology)


def _on_sequence_slice(module: nn.Module, topology: Topology) -> nn.Module:
    for parameter in module.parameters():
        _whole(parameter, topology)
    if topology.sequence_parallel and hasattr(module, "sequence_slice"):
        module.sequence_slice = (topology.tensor.rank, topology.tensor.size)  # type: ignore[assignment]
    return module


STYLES = {
    "column": ColumnParallelLinear,
    "row": RowParallelLinear,
    "vocab": VocabParallelEmbedding,
    "norm": _split_norm,
    "sequence": _on_sequence_slice,
}


def apply_tensor_parallel(model: nn.Module, plan: dict[str, str], topology: Topology) -> None:
    """Split `model` in place by `plan`: {end of a module's path: style}. Nothing happens in a tensor group of one."""
    if topology.tensor.size == 1:
        return
    for path in [name for name, _ in model.named_modules()]:
        style = next((s for end, s in plan.items() if path == end or path.endswith("." + end)), None)
        if style is not None:
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, STYLES[style](getattr(owner, leaf), topology))  # type: ignore[operator]
