"""Expert parallel: the experts are dealt out to neighbours among the ranks with the same weights (GShard, Lepikhin et al. 2020).

Each rank routes its own tokens, to experts on all ranks of the group. Rank r of n has the r-th run of N / n experts:

    rows by expert   --all-to-all-->   rows by rank, then by expert   --sort-->   rows by expert   -- my experts -->
    -- the same way back -->           rows by expert, as they left

How many rows go where is known only when the router has spoken: the ranks tell each other first, and the host has to wait for
that. A rank that gets no rows calls its experts all the same: their gradients are zeros, not missing, and every collective that
its neighbours wait for takes place.

With tensor parallelism all ranks of a tensor group do the same exchange, of whole vectors on the way there and of parts of the
sum on the way back. With context parallelism other ranks have tokens of the same microbatch: `ContextMicrobatch`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megalm.parallel.collectives import all_gather, all_reduce, all_to_all
from megalm.parallel.context_parallel import local_tokens
from megalm.parallel.tensor_parallel import shard_of
from megalm.parallel.topology import Group, Topology


class ExpertExchange:
    """Takes rows to the ranks of their experts, and what these make of them back."""

    def __init__(self, group: Group):
        self.group = group

    def __call__(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
        """rows (R, E) sorted by expert, counts (N,) int64 of each expert's -> (R, E)."""
        to_ranks = counts.view(self.group.size, -1)  # (ranks, experts of each)
        arriving = torch.empty_like(to_ranks)  # (ranks, my experts)
        dist.all_to_all_single(arriving.view(-1), counts, group=self.group.handle)
        sent, received = torch.stack([to_ranks.sum(1), arriving.sum(1)]).tolist()  # sync
        order, back = by_expert(arriving, sum(received))
        y = all_to_all(rows, self.group, sent, received)
        y = _Permute.apply(experts(_Permute.apply(y, order, back), arriving.sum(0)), back, order)
        return all_to_all(y, self.group, received, sent)


def by_expert(counts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Order of rows by expert that lie by rank, then by expert, and the inverse. counts (ranks, experts) -> (rows,) each."""
    ranks, experts = counts.shape
    numbers = torch.arange(experts, device=counts.device).repeat(ranks)
    expert_of_row = numbers.repeat_interleave(counts.flatten(), output_size=rows)
    order = expert_of_row.argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(rows, device=order.device)
    return order, back


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward is a gather too, where torch's own would add up with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.back), None, None


class ContextMicrobatch:
    """A microbatch whose samples' tokens the ranks of a context group share."""

    def __init__(self, group: Group, method: str):
        self.group, self.method, self.size = group, method, group.size
        self._places: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks, a new tensor."""
        return all_reduce(x.clone(), self.group)

    def gather(self, x: Tensor) -> Tensor:
        """What all ranks have, in the order of the sample. x (B, S / size, ...) -> (B, S, ...)."""
        return all_gather(x, self.group, dim=1).index_select(1, self._order(x.shape[1] * self.size, x.device)[0])

    def local(self, whole: Tensor) -> Tensor:
        """This rank's tokens. whole (B, S, ...) -> (B, S / size, ...)."""
        return whole.index_select(1, self._order(whole.shape[1], whole.device)[1])

    def _order(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where a sample's tokens lie among those of one rank after the other, and the places of this rank's in the sample."""
        if (length, device) not in self._places:
            places = [local_tokens(self.method, self.size, rank, length) for rank in range(self.size)]
            self._places[length, device] = torch.cat(places).argsort().to(device), places[self.group.rank].to(device)
        return self._places[length, device]


def apply_expert_parallel(model: nn.Module, plan: dict[str, str], topology: Topology, method: str) -> None:
    """Deal the experts of `model` out over topology.expert, in place; after tensor parallelism, before the weights are drawn.

    plan: its rows of style `experts` name the modules of stacked experts. method: how context parallelism cuts a sample.
    """
    ends = [end for end, style in plan.items() if style == "experts"]
    for path, experts in list(model.named_modules()):
        if not any(path == end or path.endswith("." + end) for end in ends):
            continue
        moe: Any = model.get_submodule(path.rpartition(".")[0])
        if topology.context.size > 1:
            moe.router.microbatch = ContextMicrobatch(topology.context, method)
        if topology.expert.size > 1:
            moe.exchange = ExpertExchange(topology.expert)
            for name, parameter in list(experts.named_parameters(recurse=False)):
                setattr(experts, name, _deal_out(parameter, topology.expert))


def _deal_out(parameter: nn.Parameter, group: Group) -> nn.Parameter:
    """This rank's run of the experts, which are stacked along dim 0."""
    assert parameter.shape[0] % group.size == 0, f"{parameter.shape[0]} experts do not divide by {group.size}"
    number = parameter.shape[0] // group.size
    part = nn.Parameter(torch.empty(number, *parameter.shape[1:], device=parameter.device, dtype=parameter.dtype))
    part.shard = replace(shard_of(parameter), first_expert=group.rank * number)  # type: ignore[attr-defined]
    return part
