"""The rank grid: pipeline slowest, tensor fastest; every group of every kind, and the real process groups."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist

from megalm.config.parallel import ParallelConfig
from megalm.parallel.topology import Grid, Group, build_topology
from megalm.testing import run_distributed

GRIDS = [Grid(*sizes) for sizes in ((1, 1, 1, 1), (1, 3, 1, 2), (3, 1, 2, 1), (2, 2, 2, 2), (2, 3, 1, 4), (1, 2, 3, 2))]
AXES = [("tensor",), ("context",), ("data", "context"), ("data",), ("pipeline",), ("pipeline", "tensor")]


def test_order_pipeline_then_data_then_context_then_tensor():
    grid = Grid(pipeline=2, data=3, context=2, tensor=4)
    places = list(itertools.product(range(2), range(3), range(2), range(4)))
    assert [grid.rank(*place) for place in places] == list(range(48))


def test_groups_of_2_2_2_written_out():
    grid = Grid(2, 2, 1, 2)
    assert grid.groups("tensor") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.groups("data") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("pipeline") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert grid.groups("pipeline", "tensor") == [(0, 1, 4, 5), (2, 3, 6, 7)]
    assert grid.embedding_groups() == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_embedding_groups_are_first_and_last_stage_only():
    assert Grid(3, 1, 1, 2).embedding_groups() == [(0, 4), (1, 5)]
    assert Grid(4, 2, 1, 1).embedding_groups() == [(0, 6), (1, 7)]
    assert Grid(2, 1, 2, 1).embedding_groups() == [(0, 2), (1, 3)]
    assert Grid(1, 2, 1, 2).embedding_groups() == [(0,), (1,), (2,), (3,)]  # one stage: nobody to share with


def test_context_lies_between_data_and_tensor_written_out():
    grid = Grid(1, 2, 2, 2)
    assert grid.groups("context") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.groups("data") == [(0, 4), (1, 5), (2, 6), (3, 7)]
    assert grid.groups("data", "context") == [(0, 2, 4, 6), (1, 3, 5, 7)]


def test_experts_are_dealt_out_to_neighbours_among_the_ranks_with_the_same_weights():
    grid = Grid(2, 2, 2, 1)
    assert grid.expert_groups(2) == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert grid.expert_data_groups(2) == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert grid.expert_groups(4) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert grid.expert_data_groups(4) == [(rank,) for rank in range(8)]
    assert grid.expert_data_groups(1) == grid.groups("data", "context")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("axes", AXES, ids="x".join)
def test_groups_of_a_kind_divide_the_world(grid, axes):
    groups = grid.groups(*axes)
    assert sorted(itertools.chain(*groups)) == list(range(grid.world_size))
    size = 1
    for axis in axes:
        size *= getattr(grid, axis)
    assert {len(ranks) for ranks in groups} == {size}
    assert all(list(ranks) == sorted(ranks) for ranks in groups)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_axes_meet_in_one_rank_only(grid):
    for one, other in itertools.combinations(("tensor", "context", "data", "pipeline"), 2):
        for a, b in itertools.product(grid.groups(one), grid.groups(other)):
            assert len(set(a) & set(b)) <= 1


def test_ends_of_a_group():
    assert [(g.is_first, g.is_last) for g in (Group((4, 6, 8), r) for r in range(3))] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    alone = Group((5,), 0)
    assert alone.is_first and alone.is_last and alone.size == 1 and alone.handle is None


KINDS = ("tensor", "context", "batch", "data", "pipeline", "model", "embedding", "expert", "expert_data")


def places(rank: int, world_size: int) -> dict:
    """For some layouts: the groups of this rank as numbers, and as what their process groups sum and order."""
    seen = {}
    for name, config in {
        "tp2_pp2": ParallelConfig(tensor_parallel=2, pipeline_parallel=2),
        "tp2_sp": ParallelConfig(tensor_parallel=2, sequence_parallel=True),
        "sp_without_tp": ParallelConfig(sequence_parallel=True),
        "cp2_ep2": ParallelConfig(context_parallel=2, expert_parallel=2),
    }.items():
        topology = build_topology(config, torch.device("cpu"))
        groups = {kind: getattr(topology, kind) for kind in KINDS}
        for kind, group in groups.items():
            assert group.ranks[group.rank] == rank == topology.rank, kind
            assert (group.handle is None) == (group.size == 1), kind
            if group.handle is not None:
                met: list = [None] * group.size
                dist.all_gather_object(met, rank, group=group.handle)
                assert tuple(met) == group.ranks, kind
                assert dist.get_rank(group.handle) == group.rank, kind
        numbers = {kind: group.ranks for kind, group in groups.items()}
        seen[name] = {**numbers, "sequence": topology.sequence_parallel, "world": topology.world_size}
    return seen


@pytest.mark.dist
def test_real_groups_on_four_ranks():
    by_rank = run_distributed(places, 4)
    three = by_rank[3]["tp2_pp2"]
    assert three == {
        "tensor": (2, 3),
        "context": (3,),
        "batch": (3,),
        "data": (3,),
        "expert": (3,),
        "expert_data": (3,),
        "pipeline": (1, 3),
        "model": (0, 1, 2, 3),
        "embedding": (1, 3),
        "sequence": False,
        "world": 4,
    }
    assert by_rank[2]["tp2_sp"]["data"] == (0, 2) and by_rank[2]["tp2_sp"]["model"] == (2, 3)
    assert by_rank[2]["tp2_sp"]["embedding"] == (2,)
    assert all(seen["tp2_sp"]["sequence"] and not seen["sp_without_tp"]["sequence"] for seen in by_rank)
    assert by_rank[1]["sp_without_tp"]["data"] == (0, 1, 2, 3)
    mixed = by_rank[3]["cp2_ep2"]
    assert (mixed["context"], mixed["batch"], mixed["data"]) == ((2, 3), (1, 3), (0, 1, 2, 3))
    assert (mixed["expert"], mixed["expert_data"]) == ((2, 3), (1, 3))


def misfit(rank: int, world_size: int) -> str:
    try:
        build_topology(ParallelConfig(tensor_parallel=2), torch.device("cpu"))
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.dist
def test_a_layout_that_does_not_fill_the_world_is_refused():
    assert "does not fill 3 processes" in run_distributed(misfit, 3)[0]
