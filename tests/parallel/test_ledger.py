"""The ledger sees every collective, from wherever it is called, and says of which group it was. DeepSpeed's: test_counting."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megalm.config.parallel import ParallelConfig
from megalm.parallel import collectives
from megalm.parallel.ledger import Ledger
from megalm.parallel.topology import build_topology
from megalm.parallel.volume import Count, add_up, wire_bytes
from megalm.parallel.volume_parts import Call
from megalm.testing import run_distributed


def every_collective(rank: int, world_size: int) -> dict:
    """On two ranks that are tensor parallel: what was counted, by who called."""
    topology = build_topology(ParallelConfig(tensor_parallel=2), torch.device("cpu"))
    other = dist.new_group([0, 1])
    seen = {}

    def counted(name: str, call) -> None:
        with Ledger(topology) as ledger:
            call()
        seen[name] = ledger.volume()

    x = torch.ones(2, 6, dtype=torch.bfloat16)
    counted("ours", lambda: _ours(x, topology))
    counted("backward", lambda: collectives.copy_to_region(torch.ones(3, requires_grad=True), topology.tensor).sum().backward())
    counted("asynchronous", lambda: collectives.all_reduce(torch.ones(3), topology.tensor, meanwhile=lambda: None))
    counted("exchange", lambda: _exchange(rank, topology.tensor.handle))
    counted("world", lambda: dist.broadcast(torch.ones(2), 0))
    counted("barrier", lambda: dist.barrier(topology.model.handle))
    counted("unknown", lambda: dist.all_reduce(torch.ones(2), group=other))
    counted("alone", lambda: dist.all_reduce(torch.ones(2), group=[dist.new_group([0]), dist.new_group([1])][rank]))
    counted("lists", lambda: dist.all_gather([torch.empty(5), torch.empty(5)], torch.ones(5)))
    counted("objects", lambda: dist.all_gather_object([None, None], "x"))
    counted("nothing", lambda: torch.ones(3) + 1)
    return seen


def _ours(x: torch.Tensor, topology) -> None:
    collectives.all_reduce(x.clone(), topology.tensor)
    collectives.all_gather(x, topology.tensor, dim=1)
    collectives.all_gather(x, topology.tensor)
    collectives.reduce_scatter(x, topology.tensor)
    collectives.all_reduce(x.clone(), topology.data)  # of one rank: the identity


def _exchange(rank: int, handle) -> None:
    sent, received = torch.ones(4), torch.empty(8)
    first = [dist.P2POp(dist.isend, sent, 1, handle), dist.P2POp(dist.irecv, received, 1, handle)]
    second = [dist.P2POp(dist.irecv, sent, 0, handle), dist.P2POp(dist.isend, received, 0, handle)]
    for work in dist.batch_isend_irecv(second if rank else first):
        work.wait()


@pytest.mark.dist
def test_every_collective_is_seen() -> None:
    first, second = run_distributed(every_collective, 2)
    bfloat16 = {("tensor", "all_reduce"): Count(1, 24), ("tensor", "all_gather"): Count(2, 96)}
    assert first["ours"] == second["ours"] == bfloat16 | {("tensor", "reduce_scatter"): Count(1, 24)}
    assert first["backward"] == first["asynchronous"] == {("tensor", "all_reduce"): Count(1, 12)}
    assert first["exchange"] == {("tensor", "send"): Count(1, 16), ("tensor", "recv"): Count(1, 32)}
    assert second["exchange"] == {("tensor", "send"): Count(1, 32), ("tensor", "recv"): Count(1, 16)}
    assert first["world"] == {("world", "broadcast"): Count(1, 8)}
    assert first["barrier"] == {("model", "barrier"): Count(1, 0)}
    assert first["unknown"] == {("ranks 0,1", "all_reduce"): Count(1, 8)}
    assert first["lists"] == {("world", "all_gather"): Count(1, 40)}
    assert first["objects"][("world", "all_gather")].calls == 2, "their sizes first"
    assert first["alone"] == first["nothing"] == {}


def test_adding_up() -> None:
    calls = [Call("data", "send", 1, 5), Call("data", "recv", 0, 9), Call("data", "send", 2, 10)]
    assert add_up(calls) == {("data", "send"): Count(3, 25)}


def test_what_a_ring_sends() -> None:
    """Of 12 bytes on 4 ranks, pieces of 3: an all-reduce is a reduce-scatter and an all-gather, of 3 pieces each."""
    sent = {name: wire_bytes(name, 12, 4) for name in ("reduce_scatter", "all_gather", "all_reduce", "send", "recv", "barrier")}
    assert sent == {"reduce_scatter": 9, "all_gather": 9, "all_reduce": 18, "send": 12, "recv": 0, "barrier": 0}
