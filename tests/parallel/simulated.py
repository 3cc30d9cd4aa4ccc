"""Simulated ranks: threads of one process that meet in every collective, for groups far wider than a machine has cores.

The three collectives that tensor parallelism is made of are replaced below `megalm.parallel.collectives`, where they would
go to torch; everything above them is the code that really runs, autograd included (on a CPU a backward runs in the thread
that calls it). Sums are taken in the order of the ranks, so a run gives the same bits each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel import collectives
from megalm.parallel.topology import Group, Topology, tensor_topology

T = TypeVar("T")
PATIENCE = 30.0  # seconds until a rank gives up waiting for the others


class Meeting:
    """Where the ranks of one group meet. It stands in for a process group's handle."""

    def __init__(self, size: int):
        self.size, self.rank = size, threading.local()
        self.brought: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, self._combine, timeout=PATIENCE)

    def exchange(self, value: Tensor, combine: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """What `combine` makes of all ranks' values; the last rank to come computes it for all."""
        self.brought[self.rank.value], self.combine = value, combine
        self.barrier.wait()
        return self.result  # stays until all have come to the next exchange

    def _combine(self) -> None:
        self.result = self.combine(self.brought)


def _finished(async_op: bool) -> Any:
    return SimpleNamespace(wait=lambda: None) if async_op else None


def _all_reduce(x: Tensor, op: Any, group: Meeting, async_op: bool = False) -> Any:
    def combine(values: list[Tensor]) -> Tensor:
        stacked = torch.stack(values)
        return stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0)

    x.copy_(group.exchange(x.detach().clone(), combine))
    return _finished(async_op)


def _all_gather(out: Tensor, x: Tensor, group: Meeting, async_op: bool = False) -> Any:
    out.copy_(group.exchange(x.detach().clone(), torch.cat))
    return _finished(async_op)


def _reduce_scatter(out: Tensor, x: Tensor, group: Meeting, async_op: bool = False) -> Any:
    total = group.exchange(x.detach().clone(), lambda values: torch.stack(values).sum(0))
    out.copy_(total.chunk(group.size)[group.rank.value])
    return _finished(async_op)


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list]:
    """simulate(size, sequence_parallel, function) -> [function(topology of the rank) for every tensor parallel rank]."""
    replaced = SimpleNamespace(all_reduce=_all_reduce, ReduceOp=dist.ReduceOp)
    monkeypatch.setattr(collectives, "dist", replaced)
    monkeypatch.setattr(collectives, "_all_gather_flat", _all_gather)
    monkeypatch.setattr(collectives, "_reduce_scatter_flat", _reduce_scatter)
    return run


def run(size: int, sequence_parallel: bool, function: Callable[[Topology], T]) -> list[T]:
    """Raises what the first failing rank raised."""
    meeting = Meeting(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        meeting.rank.value = number
        try:
            results[number] = function(_topology(number, size, sequence_parallel, meeting))
        except threading.BrokenBarrierError:
            pass  # another rank's error broke it
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert all(result is not None for result in results), "the ranks waited for each other in vain"
    return results


def _topology(rank: int, size: int, sequence_parallel: bool, meeting: Meeting) -> Topology:
    ranks = tuple(range(size))
    tensor = Group(ranks, rank, meeting)  # type: ignore[arg-type]
    return tensor_topology(tensor, torch.device("cpu"), sequence_parallel)
