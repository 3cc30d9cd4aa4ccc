"""Schedules as lists: complete, in a legal order, bounded in memory, and in the order that torch has."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
from torch.distributed.pipelining.schedules import ScheduleInterleavedZeroBubble

from megalm.config import parallel as config
from megalm.parallel.schedule_check import check_lists, check_schedule, find_faults
from megalm.parallel.schedules import (
    BACKWARD,
    FORWARD,
    LOOP,
    SCHEDULES,
    V_SHAPE,
    Exchange,
    breadth_first,
    build_schedule,
    forward_only,
    gpipe,
    interleaved,
    one_forward_one_backward,
)
from megalm.parallel.timeline import peaks
from megalm.parallel.zero_bubble import zbh1

SIZES = list(itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 4, 8)))


def chunks_for(name: str, wanted: int) -> int:
    """What the schedule can have."""
    return 2 if name in config.TWO_CHUNKS else wanted if name in config.CHUNKED else 1


# --- the order of the computing ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)), ranks=st.integers(1, 8), microbatches=st.integers(1, 24), chunks=st.integers(1, 4)
)
def test_any_schedule_of_any_size_is_legal(name, ranks, microbatches, chunks):
    """Complete, in order, within its bound of activations, and without deadlock even if each transfer blocks by itself."""
    schedule = SCHEDULES[name](ranks, microbatches, chunks_for(name, chunks))
    assert find_faults(schedule) == []
    check_lists(schedule, check_schedule(schedule), one_by_one=True)
    assert len(schedule.max_in_flight) == ranks


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_the_bound_of_activations_is_the_peak(name, ranks, microbatches):
    schedule = SCHEDULES[name](ranks, microbatches, chunks_for(name, 2))
    assert all(peak <= bound for peak, bound in zip(peaks(schedule), schedule.max_in_flight, strict=True))
    if microbatches >= 2 * ranks:
        assert max(peaks(schedule)) == max(schedule.max_in_flight)


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_1f1b_holds_at_most_ranks_minus_rank_microbatches(ranks, microbatches):
    schedule = one_forward_one_backward(ranks, microbatches)
    assert peaks(schedule) == [min(ranks - rank, microbatches) for rank in range(ranks)]
    assert set(peaks(gpipe(ranks, microbatches))) == {microbatches}


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_interleaved_holds_its_warm_up_and_one_more(ranks, microbatches, chunks):
    """Narayanan et al. 2021: 2 (p - r - 1) + (v - 1) p chunks warm up; with rounds of p microbatches."""
    held = peaks(interleaved(ranks, microbatches, chunks))
    longest = -(-microbatches // max(1, microbatches // ranks))
    warmup = [2 * (ranks - rank - 1) + (chunks - 1) * longest for rank in range(ranks)]
    assert held == [min(w + 1, microbatches * chunks) for w in warmup]


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
@pytest.mark.parametrize(("make", "way"), [(gpipe, 1), (breadth_first, -1)])
def test_all_forwards_then_all_backwards_in_reverse_chunks(make, way, ranks, microbatches, chunks):
    for actions in make(ranks, microbatches, chunks).actions:
        half = len(actions) // 2
        assert {a.kind for a in actions[:half]} == {FORWARD} and {a.kind for a in actions[half:]} == {BACKWARD}
        forward = [(a.stage, a.microbatch) for a in actions[:half]]
        assert forward == sorted(forward)
        assert [(-a.stage, way * a.microbatch) for a in actions[half:]] == sorted((-s, way * m) for s, m in forward)


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(1, 1, 1), (2, 3, 1), (3, 2, 2), (2, 7, 3)])
def test_forward_only_is_gpipe_without_backwards(ranks, microbatches, chunks):
    wanted = [{a for a in actions if a.kind == FORWARD} for actions in gpipe(ranks, microbatches, chunks).actions]
    assert [set(actions) for actions in forward_only(ranks, microbatches, chunks).actions] == wanted


@pytest.mark.parametrize("placement", ["loop", "v"])
def test_a_long_evaluation_keeps_few_activations_waiting(placement):
    ranks, schedule = 4, forward_only(4, 64, 2, placement)
    for rank, steps in enumerate(check_schedule(schedule)):
        waiting, most = set(), 0
        for step in steps:
            if isinstance(step, Exchange):
                waiting |= {t for t in step.transfers if schedule.rank_of(t.target) == rank}
            else:
                waiting.discard(schedule.input_of(step))
            most = max(most, len(waiting))
        assert most <= ranks


def test_1f1b_of_3_ranks_written_out():
    lists = [" ".join(map(str, actions)) for actions in one_forward_one_backward(3, 4).actions]
    assert lists == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


@pytest.mark.parametrize(("ours", "theirs"), [("1f1b", "1F1B"), ("gpipe", "GPipe")])
@pytest.mark.parametrize(("ranks", "microbatches"), [(p, m) for p, m in SIZES if m >= p])
def test_the_same_order_of_kinds_as_torch(ours, theirs, ranks, microbatches):
    """Kinds only: torch 2.13 numbers the microbatches of 1F1B wrongly in the lists it draws (not in what it runs)."""
    reference = get_schedule_ops(theirs, ranks, microbatches)
    for mine, other in zip(SCHEDULES[ours](ranks, microbatches, 1).actions, reference, strict=True):
        kinds = [a.computation_type.value for a in other if a is not None and a.microbatch_index is not None]
        assert [a.kind for a in mine] == kinds


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (2, 8), (3, 6), (4, 8)])
def test_interleaved_has_the_order_of_torch(ranks, microbatches, chunks):
    """Stages and kinds of all actions, where torch has the schedule: microbatches a multiple of the ranks."""
    reference = get_schedule_ops("Interleaved1F1B", ranks, microbatches, chunks)
    for mine, other in zip(interleaved(ranks, microbatches, chunks).actions, reference, strict=True):
        theirs = [(a.computation_type.value, a.stage_index) for a in other if a is not None and a.microbatch_index is not None]
        assert [(a.kind, a.stage) for a in mine] == theirs


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 1), (2, 4), (3, 5), (4, 8), (4, 13)])
@pytest.mark.parametrize(("name", "theirs"), [("bfs", "LoopedBFS"), ("zbv", "ZBVZeroBubble"), ("dualpipev", "DualPipeV")])
def test_the_very_order_of_torch(name, theirs, ranks, microbatches):
    """Kinds, stages and microbatches of all actions; what torch overlaps, in its order. DualPipeV: where torch has it."""
    if name == "dualpipev" and microbatches < 2 * ranks:
        with pytest.raises(ValueError, match="at least as many microbatches as stages"):
            get_schedule_ops(theirs, ranks, microbatches, 2)
        return
    reference = get_schedule_ops(theirs, ranks, microbatches, 2)
    for mine, other in zip(SCHEDULES[name](ranks, microbatches, 2).actions, reference, strict=True):
        assert [(a.kind, a.stage, a.microbatch) for a in mine] == flat(other)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 24)])
def test_zbh1_has_the_order_of_torchs_zb1p(ranks, microbatches):
    """torch wants two chunks of ZB1P, one is ZB-H1: only the list of a rank is asked for."""
    for rank, mine in enumerate(zbh1(ranks, microbatches).actions):
        theirs = object.__new__(ScheduleInterleavedZeroBubble)
        theirs.__dict__.update(pp_group_size=ranks, n_local_stages=1, rank=rank, _n_microbatches=microbatches)
        theirs.__dict__.update(number_of_rounds=microbatches // ranks, microbatches_per_round=ranks)
        order = flat(theirs._calculate_single_rank_operations(rank))
        assert [(a.kind, a.stage, a.microbatch) for a in mine] == order


def flat(actions: list) -> list[tuple[str, int, int]]:
    """torch's list without idle places, its overlapped pairs one after the other."""
    single = (part for a in actions if a is not None for part in (a.sub_actions or (a,)))
    return [(a.computation_type.value, a.stage_index, a.microbatch_index) for a in single if a.microbatch_index is not None]


# --- by name ----------------------------------------------------------------------------------------------------------


def test_every_name_of_the_config_has_a_schedule():
    assert {*SCHEDULES, "csv"} == set(config.SCHEDULES)
    split = {name for name in SCHEDULES if build_schedule(name, 2, 8, chunks_for(name, 2)).splits_backward}
    assert split == set(config.SPLIT_BACKWARD)


@pytest.mark.parametrize("name", SCHEDULES)
def test_placement_is_known_without_a_schedule(name):
    schedule = build_schedule(name, 3, 5, chunks_for(name, 2))
    assert schedule.placement == (V_SHAPE if name in config.TWO_CHUNKS else LOOP)
    for rank in range(3):
        assert all(schedule.rank_of(stage) == rank for stage in schedule.stages_of(rank))
    assert sorted(s for rank in range(3) for s in schedule.stages_of(rank)) == list(range(schedule.num_stages))


def test_v_goes_down_the_ranks_and_back_up():
    schedule = build_schedule("zbv", 3, 1, 2)
    assert [schedule.stages_of(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize("name", ["1f1b", "zbh1", "zbv", "dualpipev"])
def test_chunks_that_a_schedule_cannot_have(name):
    with pytest.raises(AssertionError, match="chunk"):
        build_schedule(name, 2, 4, 3)
