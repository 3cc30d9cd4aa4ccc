"""Which rank does what: the grid of pipeline x data x context x tensor ranks and its process groups, one frozen object.

Order from slowest to fastest: pipeline, data, context, tensor. Tensor parallel ranks are neighbours (they talk most),
pipeline neighbours are farthest apart (they talk least). World size = product; the data parallel size is derived, never set.

Ranks that differ along data and context have the same weights; the experts are dealt out to expert parallel neighbours among
them. So a run with experts has two kinds of weights, and two groups over which their gradients are summed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megalm.config.parallel import ParallelConfig


@dataclass(frozen=True)
class Group:
    """Ranks that work together along one axis, seen from one of them."""

    ranks: tuple[int, ...]  # global ranks, in the order of the axis
    rank: int  # this process's place in `ranks`
    handle: dist.ProcessGroup | None = None  # None: a group of one, where every collective is the identity

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.size - 1


@dataclass(frozen=True)
class Topology:
    """This process's place in the grid."""

    rank: int
    world_size: int
    device: torch.device
    tensor: Group
    context: Group  # ranks that have parts of the same samples' tokens
    batch: Group  # ranks along data alone: they read other samples
    data: Group  # data x context: ranks with the same weights, experts apart
    pipeline: Group
    model: Group  # all ranks that hold the weights once: pipeline x tensor
    embedding: Group  # first and last pipeline stage of one (data, context, tensor) place: they share tied embeddings
    expert: Group  # neighbours in `data` that the experts are dealt out to
    expert_data: Group  # ranks of `data` with the same experts
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Grid:
    """The same numbers for every rank, without processes: used by the planner and the tests too."""

    pipeline: int
    data: int
    context: int
    tensor: int

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    def rank(self, pipeline: int, data: int, context: int, tensor: int) -> int:
        """The global rank at a place in the grid."""
        return ((pipeline * self.data + data) * self.context + context) * self.tensor + tensor

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups of ranks that differ only along `axes`, each in grid order."""
        sizes = {"pipeline": self.pipeline, "data": self.data, "context": self.context, "tensor": self.tensor}
        fixed = [axis for axis in sizes if axis not in axes]
        found = []
        for place in itertools.product(*(range(sizes[axis]) for axis in fixed)):
            where = dict(zip(fixed, place, strict=True))
            along = itertools.product(*(range(sizes[axis]) for axis in axes))
            found.append(tuple(self.rank(**where, **dict(zip(axes, p, strict=True))) for p in along))
        return found

    def embedding_groups(self) -> list[tuple[int, ...]]:
        """First and last stage of every (data, context, tensor) place; one rank where there is one stage."""
        return [tuple(dict.fromkeys((ranks[0], ranks[-1]))) for ranks in self.groups("pipeline")]

    def expert_groups(self, size: int) -> list[tuple[int, ...]]:
        """Ranks with the same weights in runs of `size`, to which the experts are dealt out."""
        return [ranks[i : i + size] for ranks in self.groups("data", "context") for i in range(0, len(ranks), size)]

    def expert_data_groups(self, size: int) -> list[tuple[int, ...]]:
        """Ranks that have the same experts."""
        return [ranks[i::size] for ranks in self.groups("data", "context") for i in range(size)]


def tensor_topology(tensor: Group, device: torch.device, sequence_parallel: bool = False) -> Topology:
    """One tensor group alone, without processes along the other axes."""
    rank = tensor.ranks[tensor.rank]
    one = Group((rank,), 0)
    others = dict.fromkeys(("context", "batch", "data", "pipeline", "embedding", "expert", "expert_data"), one)
    return Topology(rank, tensor.size, device, tensor, model=tensor, **others, sequence_parallel=sequence_parallel)


def build_topology(config: ParallelConfig, device: torch.device, timeout: timedelta | None = None) -> Topology:
    """Make the process groups of this run. Collective: every rank of the initialised default group calls it.

    `timeout` of the groups' collectives: torch gives new groups the backend's default, not that of the default group.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()

    def group(all_ranks: list[tuple[int, ...]]) -> Group:
        return _build_group(all_ranks, rank, device, timeout)

    data = world_size // config.ranks_per_sample
    grid = Grid(config.pipeline_parallel, data, config.context_parallel, config.tensor_parallel)
    assert grid.world_size == world_size, f"{grid} does not fill {world_size} processes"
    replicas = group(grid.groups("data", "context"))
    return Topology(
        rank=rank,
        world_size=world_size,
        device=device,
        tensor=group(grid.groups("tensor")),
        context=group(grid.groups("context")),
        batch=group(grid.groups("data")) if config.context_parallel > 1 else replicas,
        data=replicas,
        pipeline=group(grid.groups("pipeline")),
        model=group(grid.groups("pipeline", "tensor")),
        embedding=group(grid.embedding_groups()),
        expert=group(grid.expert_groups(config.expert_parallel)),
        expert_data=group(grid.expert_data_groups(config.expert_parallel)) if config.expert_parallel > 1 else replicas,
        sequence_parallel=config.sequence_parallel and config.tensor_parallel > 1,
    )


def _build_group(
    all_ranks: list[tuple[int, ...]], rank: int, device: torch.device, timeout: timedelta | None
) -> Group:
    """Make every group of one kind (each rank must take part in making all of them); return this rank's."""
    mine = Group((rank,), 0)
    for ranks in all_ranks:
        handle = dist.new_group(list(ranks), timeout=timeout) if len(ranks) > 1 else None
        if rank in ranks:
            mine = Group(ranks, ranks.index(rank), handle)
    if mine.handle is not None:
        # NCCL makes a communicator at its first use, and then needs all its ranks: a pipeline's first transfer has two.
        dist.all_reduce(torch.zeros(1, device=device), group=mine.handle)
    return mine
