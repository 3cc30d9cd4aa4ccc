"""Split a plain model over the tensor parallel ranks, by a plan of module names (see models/plans.py).

Modules are replaced or wrapped in place and keep their names. Each parameter learns what it is through `Shard`, which is
all that initialisation, the norm of the gradients and the checkpoints need to know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.collectives import all_reduce, copy_to_region, gather_sequence, scatter_sum, sum_from_region
from megalm.parallel.topology import Group, Topology
from megalm.parallel.weight_gradients import WeightGradients
from megalm_kernels.linear import linear


@dataclass(frozen=True)
class Shard:
    """Which part of the whole parameter a rank holds, and how its gradient arises."""

    global_shape: tuple[int, ...]
    dim: int | None = None  # split dim; None: every tensor parallel rank holds all of it
    start: int = 0  # first index held along `dim`
    partial: bool = False  # its gradient is that of a part only, of the sequence or the features: sum it over the tensor group
    padding: int = 0  # indices at the end of `dim` that fill the part up and are not in the whole: always zero
    copies: int = 1  # ranks that hold this same slice; the gradient is the sum of theirs
    copy: int = 0  # which of them this is
    first_expert: int | None = None  # dim 0 is of experts, of which this rank has those from here on; None: it is not, or all

    @property
    def offset(self) -> tuple[int, ...]:
        """Where this part begins in the whole."""
        begins = {0: self.first_expert or 0, self.dim: self.start}
        return tuple(begins.get(dim, 0) for dim in range(len(self.global_shape)))

    @property
    def is_dealt_out(self) -> bool:
        """Whether it is of experts of which other ranks have others."""
        return self.first_expert is not None

    @property
    def is_partial(self) -> bool:
        """Whether the gradient is complete only once it is summed over the tensor group."""
        return self.partial or self.copies > 1

    def of_expert(self, index: int) -> tuple[int, Shard]:
        """Of stacked experts, the index-th that is held: its number, and which part of its matrix."""
        dim = None if self.dim is None else self.dim - 1
        return (self.first_expert or 0) + index, Shard(self.global_shape[1:], dim, self.start)

    def slice_of(self, whole: Tensor, shape: tuple[int, ...]) -> Tensor:
        """This rank's part of the whole tensor; `shape` is the part's, padding included."""
        if self.first_expert is not None:
            whole = whole.narrow(0, self.first_expert, shape[0])
        if self.dim is None:
            return whole
        return self.pad(whole.narrow(self.dim, min(self.start, whole.shape[self.dim]), shape[self.dim] - self.padding))

    def real(self, part: Tensor) -> Tensor:
        """The part without its padding: what the whole has of it."""
        return part if not self.padding else part.narrow(self.dim or 0, 0, part.shape[self.dim or 0] - self.padding)

    def real_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The same of a local shape."""
        return tuple(size - self.padding if dim == self.dim else size for dim, size in enumerate(shape))

    def pad(self, part: Tensor) -> Tensor:
        """The inverse of `real`."""
        if not self.padding:
            return part
        shape = list(part.shape)
        shape[self.dim or 0] = self.padding
        return torch.cat([part, part.new_zeros(shape)], self.dim or 0)


def shard_of(parameter: nn.Parameter) -> Shard:
    """What `parameter` is a part of; a parameter that no plan touched is whole."""
    return getattr(parameter, "shard", None) or Shard(tuple(parameter.shape))


def local_slice(parameter: nn.Parameter, shape: tuple[int, ...], whole: Tensor) -> Tensor:
    """The part of `whole` that belongs to `parameter`, whose local shape is `shape`."""
    return shard_of(parameter).slice_of(whole, shape)


def sum_partial_gradients(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor], group: Group) -> None:
    """Complete, in place, gradients that arise in parts on the ranks of the tensor group: one all-reduce for all of them.

    Slices of the sequence: the parts add up as they are. Copies of one slice: each rank adds in its slice's place of the
    whole, which is small (there are more ranks than key/value heads) and needs no group of its own.
    """
    if not parameters:
        return
    wholes = []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        shard = shard_of(parameter)
        whole = gradient
        if shard.copies > 1:
            whole = gradient.new_zeros(shard.global_shape)
            shard.slice_of(whole, tuple(gradient.shape)).copy_(gradient)
        wholes.append(whole)
    flat = all_reduce(torch.cat([whole.flatten() for whole in wholes]), group)
    for parameter, gradient, whole, total in zip(
        parameters, gradients, wholes, flat.split([whole.numel() for whole in wholes]), strict=True
    ):
        gradient.copy_(local_slice(parameter, tuple(gradient.shape), total.view(whole.shape)))


class ColumnParallelLinear(nn.Module):
    """A slice of a linear layer's output features. The input is whole (a `norm` in front of it made it so)."""

    def __init__(self, full: nn.Linear, split: Split, queue: WeightGradients | None):
        super().__init__()
        self.queue = queue
        self.weight = split(full.weight, 0)
        self.bias = None if full.bias is None else split(full.bias, 0)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.queue)


class RowParallelLinear(nn.Module):
    """A slice of a linear layer's input features; the ranks' products are summed, then the bias is added once.

    Not `summed`: without bias, this rank's product, which somebody else sums.
    """

    def __init__(self, full: nn.Linear, topology: Topology, queue: WeightGradients | None, summed: bool = True):
        super().__init__()
        assert summed or full.bias is None, "a bias is added to the sum"
        self.summed = summed
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel
        self.queue = queue
        self.weight = _split(topology)(full.weight, 1)
        self.bias = None if full.bias is None else _whole(full.bias, topology)

    def forward(self, x: Tensor) -> Tensor:
        if self.group.size == 1 or not self.summed:  # the bias with the product: one rounding, as in a plain layer
            return linear(x, self.weight, self.bias, self.queue)
        y = linear(x, self.weight, None, self.queue)
        y = scatter_sum(y, self.group) if self.sequence_parallel else sum_from_region(y, self.group, in_place=True)
        return y if self.bias is None else y + self.bias


class VocabParallelEmbedding(nn.Module):
    """A slice of the vocabulary's rows; a token that another rank holds contributes zero here."""

    def __init__(self, full: nn.Embedding, topology: Topology):
        super().__init__()
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel
        self.weight = _split(topology, pad=True)(full.weight, 0)
        self.start, self.length = shard_of(self.weight).start, self.weight.shape[0]  # ZeRO-3 empties the weight's shape

    def forward(self, tokens: Tensor) -> Tensor:
        elsewhere = (tokens < self.start) | (tokens >= self.start + self.length)
        rows = (tokens - self.start).masked_fill(elsewhere, 0)
        y = F.embedding(rows, self.weight).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        return scatter_sum(y, self.group) if self.sequence_parallel else sum_from_region(y, self.group, in_place=True)


class LeaveRegion(nn.Module):
    """g by itself: the ranks' parts are summed."""

    def __init__(self, topology: Topology):
        super().__init__()
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return scatter_sum(x, self.group) if self.sequence_parallel else sum_from_region(x, self.group)


class _EnterRegion:
    """Forward hook of a `norm`: its output enters a region that is split over the group."""

    def __init__(self, topology: Topology, queue: WeightGradients | None):
        self.group, self.sequence_parallel = topology.tensor, topology.sequence_parallel
        self.meanwhile = queue.run_behind_collective if queue is not None and queue.overlap else None

    def __call__(self, module: nn.Module, args: object, y: Tensor) -> Tensor:
        enter = gather_sequence if self.sequence_parallel else copy_to_region
        return enter(y, self.group, meanwhile=self.meanwhile)


Split = Callable[[Tensor, int], nn.Parameter]
LINEAR = ("column", "heads", "logits", "row", "part", "inside")  # the styles of matrix products
STYLES = (*LINEAR, "vocab", "norm", "sequence", "experts", "leave")


def _split(topology: Topology, pad: bool = False, heads: int = 0) -> Split:
    """What cuts a parameter along a dim into equal parts, one per tensor parallel rank.

    `pad`: where the size does not divide, the last ranks' parts are filled up. `heads`: the dim is made of so many heads,
    and where there are fewer of them than ranks, neighbouring ranks hold copies of one.
    """
    size, rank = topology.tensor.size, topology.tensor.rank
    copies = size // heads if heads and size > heads else 1

    def split(parameter: Tensor, dim: int) -> nn.Parameter:
        shape, whole = list(parameter.shape), parameter.shape[dim]
        assert pad or whole * copies % size == 0, f"{shape} does not divide by {size} along {dim}"
        length = -(-whole * copies // size)
        start = rank // copies * length
        padding = max(0, min(length, start + length - whole))
        shape[dim] = length
        part = nn.Parameter(torch.empty(shape, device=parameter.device, dtype=parameter.dtype))
        shard = Shard(tuple(parameter.shape), dim, min(start, whole), False, padding, copies, rank % copies)
        part.shard = shard  # type: ignore[attr-defined]
        return part

    return split


def _whole(parameter: nn.Parameter, topology: Topology) -> nn.Parameter:
    """Mark a parameter that every rank holds whole and that, with sequence parallelism, sees a slice of the sequence."""
    parameter.shard = Shard(tuple(parameter.shape), partial=topology.sequence_parallel)  # type: ignore[attr-defined]
    return parameter


def _inside(module: nn.Module, topology: Topology, queue: WeightGradients | None) -> nn.Module:
    """A whole module between f and g. What follows it is split, so its output's gradient arises in parts, and so its own."""

    def mark(parameter: Tensor, dim: int = 0) -> nn.Parameter:
        assert isinstance(parameter, nn.Parameter)
        parameter.shard = Shard(tuple(parameter.shape), partial=topology.tensor.size > 1)  # type: ignore[attr-defined]
        return parameter

    for parameter in module.parameters():
        mark(parameter)
    inside = ColumnParallelLinear(module, mark, queue) if isinstance(module, nn.Linear) else module
    inside.partial_output_gradient = topology.tensor.size > 1  # type: ignore[assignment]
    return inside


def _on_sequence_slice(module: nn.Module, topology: Topology) -> nn.Module:
    for parameter in module.parameters():
        _whole(parameter, topology)
    if topology.sequence_parallel and hasattr(module, "sequence_slice"):
        module.sequence_slice = (topology.tensor.rank, topology.tensor.size)  # type: ignore[assignment]
    return module


def _styled(style: str, module: Any, owner: Any, topology: Topology, queue: WeightGradients | None) -> nn.Module:
    """The module cut as `style` says; `owner` is the module that it is a part of."""
    match style:
        case "column":
            return ColumnParallelLinear(module, _split(topology), queue)
        case "heads":
            return ColumnParallelLinear(module, _split(topology, heads=module.out_features // owner.head_dim), queue)
        case "logits":
            return ColumnParallelLinear(module, _split(topology, pad=True), queue)
        case "row":
            return RowParallelLinear(module, topology, queue)
        case "part":
            return RowParallelLinear(module, topology, queue, summed=False)
        case "experts":  # stacked: dim 0 is the expert
            for name, dim in (("gate", 1), ("up", 1), ("down", 2)):
                setattr(module, name, _split(topology)(getattr(module, name), dim))
            return module
        case "leave":
            return LeaveRegion(topology)
        case "vocab":
            return VocabParallelEmbedding(module, topology)
        case "norm":
            module.register_forward_hook(_EnterRegion(topology, queue))
            return _on_sequence_slice(module, topology)
        case "inside":
            return _inside(module, topology, queue)
        case "sequence":
            return _on_sequence_slice(module, topology)
    raise AssertionError(f"no such style: {style}")


def apply_tensor_parallel(
    model: nn.Module, plan: dict[str, str], topology: Topology, queue: WeightGradients | None = None
) -> None:
    """Split `model` in place by `plan`: {end of a module's path: style}.

    In a tensor group of one nothing happens, but that with a queue the linear layers learn of it.
    """
    alone = topology.tensor.size == 1
    if alone and queue is None:
        return
    for path in [name for name, _ in model.named_modules()]:
        style = next((s for end, s in plan.items() if path == end or path.endswith("." + end)), None)
        if style is not None and (not alone or style in LINEAR):
            parent, _, leaf = path.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, leaf, _styled(style, getattr(owner, leaf), owner, topology, queue))
