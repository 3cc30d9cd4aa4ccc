"""Schedules as lists: complete, in a legal order, bounded in memory, and free of deadlock under blocking transfers."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megalm.parallel.schedules import (
    BACKWARD,
    FORWARD,
    SCHEDULES,
    Action,
    Exchange,
    Schedule,
    Transfer,
    forward_only,
    gpipe,
    interleaved,
    one_forward_one_backward,
    with_communication,
)

SIZES = list(itertools.product((1, 2, 3, 4, 7), (1, 2, 3, 4, 8)))
CASES = [
    *(pytest.param(one_forward_one_backward(p, m), id=f"1f1b-{p}-{m}") for p, m in SIZES),
    *(pytest.param(gpipe(p, m, v), id=f"gpipe-{p}-{m}-{v}") for p, m in SIZES for v in (1, 2, 3)),
    *(pytest.param(interleaved(p, m, v), id=f"interleaved-{p}-{m}-{v}") for p, m in SIZES for v in (1, 2, 3)),
]
ALL = [*CASES, *(pytest.param(forward_only(p, m, v), id=f"forward-{p}-{m}-{v}") for p, m in SIZES for v in (1, 2))]


# --- the order of the computing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", CASES)
def test_every_forward_and_backward_once_on_its_own_rank(schedule):
    for rank, actions in enumerate(schedule.actions):
        stages = [s for s in range(schedule.num_stages) if schedule.rank_of(s) == rank]
        wanted = itertools.product((FORWARD, BACKWARD), stages, range(schedule.num_microbatches))
        assert Counter(actions) == Counter(Action(*a) for a in wanted)


@pytest.mark.parametrize("schedule", CASES)
def test_forward_before_its_backward(schedule):
    for actions in schedule.actions:
        at = {action: i for i, action in enumerate(actions)}
        assert all(at[Action(FORWARD, a.stage, a.microbatch)] <= i for a, i in at.items())


def most_in_flight(actions: tuple[Action, ...]) -> int:
    counts = itertools.accumulate(1 if a.kind == FORWARD else -1 for a in actions)
    return max(counts)


@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_1f1b_holds_at_most_ranks_minus_rank_microbatches(ranks, microbatches):
    schedule = one_forward_one_backward(ranks, microbatches)
    held = [most_in_flight(actions) for actions in schedule.actions]
    assert held == [min(ranks - rank, microbatches) for rank in range(ranks)]
    assert {most_in_flight(actions) for actions in gpipe(ranks, microbatches).actions} == {microbatches}


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize(("ranks", "microbatches"), SIZES)
def test_interleaved_holds_its_warm_up_and_one_more(ranks, microbatches, chunks):
    """Narayanan et al. 2021: 2 (p - r - 1) + (v - 1) p chunks warm up; with rounds of p microbatches."""
    held = [most_in_flight(actions) for actions in interleaved(ranks, microbatches, chunks).actions]
    longest = -(-microbatches // max(1, microbatches // ranks))
    warmup = [2 * (ranks - rank - 1) + (chunks - 1) * longest for rank in range(ranks)]
    assert held == [min(w + 1, microbatches * chunks) for w in warmup]


@pytest.mark.parametrize("schedule", [p for p in CASES if str(p.id).startswith("gpipe")])
def test_gpipe_runs_all_forwards_then_all_backwards_in_reverse_chunks(schedule):
    for actions in schedule.actions:
        half = len(actions) // 2
        assert {a.kind for a in actions[:half]} == {FORWARD} and {a.kind for a in actions[half:]} == {BACKWARD}
        forward = [(a.stage, a.microbatch) for a in actions[:half]]
        assert forward == sorted(forward)
        assert [(-a.stage, a.microbatch) for a in actions[half:]] == sorted((-s, m) for s, m in forward)


@pytest.mark.parametrize(("ranks", "microbatches", "chunks"), [(1, 1, 1), (2, 3, 1), (3, 2, 2)])
def test_forward_only_is_gpipe_without_backwards(ranks, microbatches, chunks):
    wanted = [[a for a in actions if a.kind == FORWARD] for actions in gpipe(ranks, microbatches, chunks).actions]
    assert [list(actions) for actions in forward_only(ranks, microbatches, chunks).actions] == wanted


def test_1f1b_of_3_ranks_written_out():
    lists = [" ".join(map(str, actions)) for actions in one_forward_one_backward(3, 4).actions]
    assert lists == [
        "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3",
        "1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3",
        "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3",
    ]


def test_1f1b_refuses_chunks():
    with pytest.raises(AssertionError, match="one chunk per rank"):
        one_forward_one_backward(2, 4, 2)


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


# --- time: the bubble -------------------------------------------------------------------------------------------------


def makespan(schedule: Schedule, forward_time: float, backward_time: float) -> float:
    """When the last rank ends, if every action starts as soon as its rank and its input are free."""
    ends: dict[Action, float] = {}
    clock = [0.0] * schedule.num_ranks
    todo = [deque(actions) for actions in schedule.actions]
    while any(todo):
        for rank, queue in enumerate(todo):
            while queue and all(a in ends for a in inputs_of(queue[0], schedule)):
                action = queue.popleft()
                start = max([clock[rank], *(ends[a] for a in inputs_of(action, schedule))])
                clock[rank] = ends[action] = start + (forward_time if action.kind == FORWARD else backward_time)
    return max(clock)


def inputs_of(action: Action, schedule: Schedule) -> list[Action]:
    """The actions whose results this one needs, written apart from the code under test."""
    s, m = action.stage, action.microbatch
    if action.kind == FORWARD:
        return [Action(FORWARD, s - 1, m)] if s else []
    return [Action(FORWARD, s, m), *([Action(BACKWARD, s + 1, m)] if s + 1 < schedule.num_stages else [])]


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("forward_time", "backward_time"), [(1, 1), (1, 2)])
@pytest.mark.parametrize(("ranks", "microbatches"), [(p, m) for p, m in SIZES if m >= p])
def test_idle_share_is_the_papers(name, forward_time, backward_time, ranks, microbatches):
    schedule = SCHEDULES[name](ranks, microbatches, 1)
    total = makespan(schedule, forward_time, backward_time)
    busy = microbatches * (forward_time + backward_time)
    assert (total - busy) / total == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("make", [gpipe, interleaved])
def test_chunks_shrink_the_bubble(make, chunks):
    ranks, microbatches = 4, 8
    total = makespan(make(ranks, microbatches, chunks), 1 / chunks, 2 / chunks)
    assert (total - 3 * microbatches) / total == pytest.approx((ranks - 1) / (microbatches * chunks + ranks - 1))


# --- communication ----------------------------------------------------------------------------------------------------

Lists = list[list[Action | Exchange]]


class Deadlock(Exception):
    """No rank can go on."""


def rendezvous(schedule: Schedule, lists: Lists, one_by_one: bool) -> None:
    """Run the lists on a backend without buffers: a transfer moves only while both its ranks stand at it.

    Operations between two ranks are matched in order, without tags, as NCCL does. `one_by_one`: each transfer of an
    Exchange blocks by itself (harder than any real backend); else an Exchange is one group (ncclGroupStart/End), in which
    transfers to different ranks go on in any order and which ends when all have moved. Raises Deadlock.
    """
    work = [deque(split(items, one_by_one)) for items in lists]
    arrived: list[set[Transfer]] = [set() for _ in lists]
    made: list[set[Transfer]] = [set() for _ in lists]
    waiting = [open_group(queue, rank, schedule) for rank, queue in enumerate(work)]
    while any(work):
        moved = False
        for rank, queue in enumerate(work):
            while queue and isinstance(queue[0], Action):
                compute(queue.popleft(), schedule, made[rank], arrived[rank])
                waiting[rank], moved = open_group(queue, rank, schedule), True
            for other, line in waiting[rank].items():
                theirs = waiting[other].get(rank)
                while line and theirs:
                    assert line[0] == theirs[0], f"ranks {rank} and {other} meet with {line[0]} and {theirs[0]}"
                    transfer = line.popleft()
                    theirs.popleft()
                    source, target = schedule.rank_of(transfer.source), schedule.rank_of(transfer.target)
                    assert transfer in made[source], f"{transfer} is sent before it is computed"
                    arrived[target].add(transfer)
                    moved = True
            if queue and isinstance(queue[0], Exchange) and not any(waiting[rank].values()):
                queue.popleft()
                waiting[rank], moved = open_group(queue, rank, schedule), True
        if not moved:
            raise Deadlock(str([queue[0] if queue else None for queue in work]))


def split(items: list[Action | Exchange], one_by_one: bool) -> Iterator[Action | Exchange]:
    for item in items:
        if isinstance(item, Exchange) and one_by_one:
            yield from (Exchange((transfer,)) for transfer in item.transfers)
        else:
            yield item


def open_group(queue: deque, rank: int, schedule: Schedule) -> dict[int, deque[Transfer]]:
    """The transfers that `rank` now offers, by the rank it offers them to."""
    lines: dict[int, deque[Transfer]] = {}
    if queue and isinstance(queue[0], Exchange):
        for transfer in queue[0].transfers:
            ends = schedule.rank_of(transfer.source), schedule.rank_of(transfer.target)
            assert rank in ends and ends[0] != ends[1]
            lines.setdefault(ends[1] if ends[0] == rank else ends[0], deque()).append(transfer)
    return lines


def compute(action: Action, schedule: Schedule, made: set[Transfer], arrived: set[Transfer]) -> None:
    source = action.stage + (-1 if action.kind == FORWARD else 1)
    if 0 <= source < schedule.num_stages:
        needed = Transfer(action.kind, source, action.stage, action.microbatch)
        assert needed in arrived or needed in made, f"{action} runs before its input is here"
    target = action.stage + (1 if action.kind == FORWARD else -1)
    made.add(Transfer(action.kind, action.stage, target, action.microbatch))


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
        rendezvous(schedule, lists, one_by_one)


@pytest.mark.parametrize("schedule", ALL)
def test_communication_is_complete_ordered_and_never_deadlocks(schedule):
    check_communication(schedule)


def test_the_simulated_backend_finds_a_deadlock():
    """Both ranks send first and receive later: fine with buffers, stuck without."""
    schedule = one_forward_one_backward(2, 2)
    forward, backward = Transfer(FORWARD, 0, 1, 1), Transfer(BACKWARD, 1, 0, 0)
    rank_0 = [Action(FORWARD, 0, 0), Exchange((Transfer(FORWARD, 0, 1, 0),)), Action(FORWARD, 0, 1), Exchange((forward,))]
    rank_1 = [Exchange((Transfer(FORWARD, 0, 1, 0),)), Action(FORWARD, 1, 0), Action(BACKWARD, 1, 0), Exchange((backward,))]
    with pytest.raises(AssertionError, match="meet with"):  # one pair, two orders: NCCL would deliver the wrong tensor
        rendezvous(schedule, [[*rank_0, Exchange((backward,))], [*rank_1, Exchange((forward,))]], True)
    with pytest.raises(Deadlock):  # the receiver never posts
        rendezvous(schedule, [rank_0, rank_1[:3]], True)


def test_the_simulated_backend_finds_a_circle_of_three_ranks():
    ring = gpipe(3, 1, 2)  # stage 2 on rank 2 hands over to stage 3 on rank 0
    a, b, c = Transfer(FORWARD, 0, 1, 0), Transfer(FORWARD, 1, 2, 0), Transfer(FORWARD, 2, 3, 0)
    first = [[Action(FORWARD, 0, 0)], [], []]
    orders = [(a, c), (b, a), (c, b)]  # each rank sends before it receives
    lists = [[*first[r], *(Exchange((t,)) for t in orders[r])] for r in range(3)]
    with pytest.raises(Deadlock):
        rendezvous(ring, lists, True)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)),
    ranks=st.integers(1, 9),
    microbatches=st.integers(1, 12),
    chunks=st.integers(1, 4),
)
def test_any_schedule_communicates_safely(name, ranks, microbatches, chunks):
    check_communication(SCHEDULES[name](ranks, microbatches, 1 if name == "1f1b" else chunks))


@st.composite
def legal_schedules(draw: st.DrawFn) -> Schedule:
    """Any order of actions that one pass over all ranks could have run: not only the shapes that we ship."""
    ranks, microbatches, chunks = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    empty = Schedule(ranks, chunks, microbatches, ())
    kinds = (FORWARD, BACKWARD)
    left = {Action(k, s, m) for k in kinds for s in range(empty.num_stages) for m in range(microbatches)}
    actions: list[list[Action]] = [[] for _ in range(ranks)]
    while left:
        able = sorted((a for a in left if not left & set(inputs_of(a, empty))), key=str)
        action = draw(st.sampled_from(able))
        left.remove(action)
        actions[empty.rank_of(action.stage)].append(action)
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, actions)))


@settings(max_examples=60, deadline=None)
@given(schedule=legal_schedules())
def test_any_legal_order_communicates_safely(schedule):
    check_communication(schedule)


def test_a_schedule_that_cannot_finish_names_where_each_rank_is_stuck():
    F, B = FORWARD, BACKWARD
    upside_down = Schedule(2, 1, 1, ((Action(F, 0, 0), Action(B, 0, 0)), (Action(B, 1, 0), Action(F, 1, 0))))
    with pytest.raises(ValueError, match="never finish: rank 0 at 0B0, rank 1 at 1B0"):
        with_communication(upside_down)
    crossed = Schedule(
        2, 1, 2, ((Action(F, 0, 0), Action(B, 0, 0), Action(F, 0, 1)), (Action(F, 1, 1), Action(F, 1, 0), Action(B, 1, 0)))
    )
    with pytest.raises(ValueError, match="rank 0 at 0B0, rank 1 at 1F1"):
        with_communication(crossed)


def test_the_last_stages_backward_waits_for_its_own_forward():
    """It needs no neighbour's gradient, so only this rule keeps it back."""
    with pytest.raises(ValueError, match="rank 0 at 0B0"):
        with_communication(Schedule(1, 1, 1, ((Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)),)))
