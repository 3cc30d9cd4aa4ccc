"""Collectives over a Group, plain and as autograd pairs; in a group of one all of them are the identity.

The pairs are conjugate (Shoeybi et al. 2019; with sequence parallelism Korthikanti et al. 2022):

    copy_to_region     f   identity forward,       all-reduce backward
    sum_from_region    g   all-reduce forward,     identity backward
    gather_sequence    f'  all-gather forward,     reduce-scatter backward
    scatter_sum        g'  reduce-scatter forward, all-gather backward
    all_to_all             all-to-all forward,     all-to-all backward, the other way
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.topology import Group

# torch 2.13 renamed the two; the old names warn there and the new ones are missing before.
_ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


Meanwhile = Callable[[], None]
"""Work to do while a collective is on its way."""


def _all_gather_flat(*args: Any, **kwargs: Any) -> Any:
    """Looked up at every call, for a heartbeat may have wrapped it by then (heartbeat.py)."""
    return getattr(dist, _ALL_GATHER)(*args, **kwargs)


def _reduce_scatter_flat(*args: Any, **kwargs: Any) -> Any:
    """Looked up at every call."""
    return getattr(dist, _REDUCE_SCATTER)(*args, **kwargs)


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM, meanwhile: Meanwhile | None = None) -> Tensor:
    """Reduce over the group, in place; returns x."""
    if group.size > 1:
        work = dist.all_reduce(x, op=op, group=group.handle, async_op=meanwhile is not None)
        if meanwhile is not None and work is not None:
            meanwhile()
            work.wait()
    return x


def all_gather(x: Tensor, group: Group, dim: int = 0) -> Tensor:
    """Join every rank's x along `dim`."""
    if group.size == 1:
        return x
    parts = torch.empty((group.size, *x.shape), dtype=x.dtype, device=x.device)
    _all_gather_flat(parts.view(-1), x.contiguous().view(-1), group=group.handle)
    if x.shape[:dim].numel() == 1:  # nothing in front of `dim`: the parts lie in order already
        shape = list(x.shape)
        shape[dim] *= group.size
        return parts.view(shape)
    return torch.cat(parts.unbind(0), dim=dim)


def reduce_scatter(x: Tensor, group: Group, dim: int = 0, meanwhile: Meanwhile | None = None) -> Tensor:
    """Sum over the group; this rank keeps its slice of `dim`, which must divide by the group's size."""
    if group.size == 1:
        return x
    parts = x.contiguous() if x.shape[:dim].numel() == 1 else torch.stack(x.chunk(group.size, dim))
    out = torch.empty(x.numel() // group.size, dtype=x.dtype, device=x.device)
    work = _reduce_scatter_flat(out, parts.view(-1), group=group.handle, async_op=meanwhile is not None)
    if meanwhile is not None:
        meanwhile()
        work.wait()
    shape = list(x.shape)
    shape[dim] //= group.size
    return out.view(shape)


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, meanwhile: Meanwhile | None) -> Tensor:
        ctx.group, ctx.meanwhile = group, meanwhile
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.group, meanwhile=ctx.meanwhile), None, None


class _SumFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, in_place: bool) -> Tensor:
        if in_place:
            ctx.mark_dirty(x)
            return all_reduce(x, group)
        return all_reduce(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int, meanwhile: Meanwhile | None) -> Tensor:
        ctx.group, ctx.dim, ctx.meanwhile = group, dim, meanwhile
        return all_gather(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return reduce_scatter(grad, ctx.group, ctx.dim, ctx.meanwhile), None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return reduce_scatter(x, group, dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return all_gather(grad, ctx.group, ctx.dim), None, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, send: list[int] | None, receive: list[int] | None) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return _exchange(x, group, send, receive)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, ctx.group, ctx.receive, ctx.send), None, None, None


def _exchange(x: Tensor, group: Group, send: list[int] | None, receive: list[int] | None) -> Tensor:
    rows = x.shape[0] if receive is None else sum(receive)
    out = torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.handle)
    return out


def copy_to_region(x: Tensor, group: Group, meanwhile: Meanwhile | None = None) -> Tensor:
    """f: enter a region that the group computes in parts from the whole x. `meanwhile` runs during the backward's sum."""
    return _CopyToRegion.apply(x, group, meanwhile) if group.size > 1 else x


def sum_from_region(x: Tensor, group: Group, in_place: bool = False) -> Tensor:
    """g: leave it; the parts' contributions are summed. `in_place`: nobody else needs the part x, which is contiguous."""
    return _SumFromRegion.apply(x, group, in_place) if group.size > 1 else x


def gather_sequence(x: Tensor, group: Group, dim: int = 1, meanwhile: Meanwhile | None = None) -> Tensor:
    """f with sequence parallelism: the slices of the sequence are joined. x (B, S / size, ...) -> (B, S, ...)."""
    return _GatherSequence.apply(x, group, dim, meanwhile) if group.size > 1 else x


def scatter_sum(x: Tensor, group: Group, dim: int = 1) -> Tensor:
    """g with sequence parallelism: sum, and keep one slice of the sequence. x (B, S, ...) -> (B, S / size, ...)."""
    return _ScatterSum.apply(x, group, dim) if group.size > 1 else x


def all_to_all(
    x: Tensor, group: Group, send: Sequence[int] | None = None, receive: Sequence[int] | None = None
) -> Tensor:
    """Rows of x go to the ranks in order, and those that the ranks send here come in order. x (rows, ...).

    send, receive: how many rows go to and come from each rank, by place in the group; None: as many for each.
    """
    if group.size == 1:
        return x
    return _AllToAll.apply(x, group, None if send is None else list(send), None if receive is None else list(receive))
