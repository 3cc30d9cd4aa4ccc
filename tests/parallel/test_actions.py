"""Communication inserted into schedules: complete, ordered for each pair of ranks, and never in a deadlock."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.parallel.actions import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Action,
    Exchange,
    Lists,
    Schedule,
    Transfer,
    with_communication,
)
from megalm.parallel.schedule_check import check_lists
from megalm.parallel.schedules import SCHEDULES, forward_only
from tests.parallel.test_schedules import SIZES, chunks_for


def between(lists: Lists, schedule: Schedule, rank: int, other: int) -> list[Transfer]:
    """What `rank` posts towards `other`, in order."""
    posted = (t for item in lists[rank] if isinstance(item, Exchange) for t in item.transfers)
    return [t for t in posted if {schedule.rank_of(t.source), schedule.rank_of(t.target)} == {rank, other}]


def check_communication(schedule: Schedule) -> None:
    """Complete, unchanged in its computing, matched pair by pair, and without deadlock."""
    lists = with_communication(schedule)
    for rank, items in enumerate(lists):
        assert tuple(i for i in items if isinstance(i, Action)) == schedule.actions[rank]
        assert all(item.transfers for item in items if isinstance(item, Exchange))
    actions = [a for rank_actions in schedule.actions for a in rank_actions]
    crossing = Counter(
        t
        for t in map(schedule.output_of, actions)
        if t is not None and schedule.rank_of(t.source) != schedule.rank_of(t.target)
    )
    posted = Counter(t for items in lists for i in items if isinstance(i, Exchange) for t in i.transfers)
    assert posted == Counter({t: 2 * n for t, n in crossing.items()})  # once by its sender, once by its receiver
    for rank, other in itertools.combinations(range(schedule.num_ranks), 2):
        assert between(lists, schedule, rank, other) == between(lists, schedule, other, rank)
    for one_by_one in (True, False):
        check_lists(schedule, lists, one_by_one)


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
@pytest.mark.parametrize("name", [*SCHEDULES, "forward"])
def test_communication_is_complete_ordered_and_never_deadlocks(name, ranks, microbatches):
    for chunks in {1, 2, 3} if name == "forward" else {chunks_for(name, v) for v in (1, 2, 3)}:
        make = forward_only if name == "forward" else SCHEDULES[name]
        check_communication(make(ranks, microbatches, chunks))


def inputs_of(action: Action, schedule: Schedule) -> list[Action]:
    """The actions whose results this one needs, written apart from the code under test."""
    s, m = action.stage, action.microbatch
    if action.kind == FORWARD:
        return [Action(FORWARD, s - 1, m)] if s else []
    if action.kind == WEIGHT:
        return [Action(INPUT, s, m)]
    return [Action(FORWARD, s, m), *([Action(action.kind, s + 1, m)] if s + 1 < schedule.num_stages else [])]


@st.composite
def legal_schedules(draw: st.DrawFn) -> Schedule:
    """Any order of actions that one pass over all ranks could have run, on any placement: not only what we ship."""
    ranks, microbatches, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    placement = tuple(draw(st.permutations([rank for rank in range(ranks) for _ in range(chunks)])))
    empty = Schedule(ranks, chunks, microbatches, (), placement)
    kinds = draw(st.sampled_from([(FORWARD, BACKWARD), (FORWARD, INPUT, WEIGHT)]))
    left = {Action(k, s, m) for k in kinds for s in range(empty.num_stages) for m in range(microbatches)}
    actions: list[list[Action]] = [[] for _ in range(ranks)]
    while left:
        able = sorted((a for a in left if not left & set(inputs_of(a, empty))), key=str)
        action = draw(st.sampled_from(able))
        left.remove(action)
        actions[empty.rank_of(action.stage)].append(action)
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, actions)), placement)


@settings(max_examples=60, deadline=None)
@given(schedule=legal_schedules())
def test_any_legal_order_communicates_safely(schedule):
    check_communication(schedule)


def test_a_schedule_that_cannot_finish_names_where_each_rank_is_stuck():
    F, B = FORWARD, BACKWARD
    upside_down = Schedule(2, 1, 1, ((Action(F, 0, 0), Action(B, 0, 0)), (Action(B, 1, 0), Action(F, 1, 0))))
    with pytest.raises(ValueError, match="rank 0 at 0B0, which needs 0F0 and the backward of stage 1; rank 1 at 1B0"):
        with_communication(upside_down)
    crossed = Schedule(
        2, 1, 2, ((Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1)), (Action(F, 1, 1), Action(F, 1, 0), Action(B, 1, 0)))
    )
    with pytest.raises(ValueError, match=r"rank 0 at 0B0, .*; rank 1 at 1F1, which needs 0F1"):
        with_communication(crossed)


def test_the_last_stages_backward_waits_for_its_own_forward():
    """It needs no neighbour's gradient, so only this rule keeps it back."""
    with pytest.raises(ValueError, match="rank 0 at 0B0"):
        with_communication(Schedule(1, 1, 1, ((Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)),)))


def test_a_weight_gradient_waits_for_its_other_half():
    forward, back, weight = (Action(kind, 0, 0) for kind in (FORWARD, INPUT, WEIGHT))
    assert with_communication(Schedule(1, 1, 1, ((forward, back, weight),))) == [[forward, back, weight]]
    with pytest.raises(ValueError, match="rank 0 at 0W0, which needs 0I0"):
        with_communication(Schedule(1, 1, 1, ((forward, weight, back),)))


def test_of_many_stuck_ranks_a_few_are_named():
    stuck = tuple((Action(BACKWARD, rank, 0), Action(FORWARD, rank, 0)) for rank in range(12))
    with pytest.raises(ValueError, match=r"rank 7 at 7B0, .*; and 4 more ranks$"):
        with_communication(Schedule(12, 1, 1, stuck))
