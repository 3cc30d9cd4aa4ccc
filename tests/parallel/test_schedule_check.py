"""The validator: every planted fault is refused and named, sound schedules pass, and both cost little."""

from __future__ import annotations

import re
import time

import pytest

from megalm.parallel.actions import BACKWARD, FORWARD, Action, Exchange, Lists, Schedule, Transfer, with_communication
from megalm.parallel.schedule_check import check_lists, check_schedule
from megalm.parallel.schedules import SCHEDULES, build_schedule, forward_only, gpipe, one_forward_one_backward
from tests.parallel.test_schedules import chunks_for


def of(*rows: str, microbatches: int = 1, chunks: int = 1, **more) -> Schedule:
    """A schedule from cells, a text per rank: `0F0 0B0`."""
    cells = [[re.fullmatch(r"(\d+)(\w)(\d+)", cell) for cell in row.split()] for row in rows]
    actions = tuple(tuple(Action(c[2], int(c[1]), int(c[3])) for c in row if c) for row in cells)
    return Schedule(len(rows), chunks, microbatches, actions, **more)


def test_a_sound_schedule_gives_its_lists():
    schedule = of("0F0 0I0 0W0", "1F0 1B0")
    assert check_schedule(schedule) == with_communication(schedule)
    assert check_schedule(forward_only(2, 3)) == with_communication(forward_only(2, 3))


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        (of("0F0 0B0", "1F0"), "rank 1: 1B0 is missing"),
        (of("0F0 0I0", "1F0 1B0"), "rank 0: 0W0 is missing"),
        (of("0B0", "1F0 1B0"), "rank 0: 0B0 comes before its forward 0F0; rank 0: 0F0 is missing"),
        (of("0F0 0F0 0B0", "1F0 1B0"), "rank 0: 0F0 is there twice"),
        (of("0F0 0W0 0I0", "1F0 1B0"), "rank 0: 0W0 comes before its other half 0I0"),
        (of("0F0 0B0 0W0", "1F0 1B0"), "rank 0: 0W0: the backward of stage 0, microbatch 0 is there whole (B) and in halves"),
        (of("0F0 0I0 0B0", "1F0 1B0"), "rank 0: 0B0: the backward of stage 0, microbatch 0 is there whole (B) and in halves"),
        (of("0F0 0B0 1F0", "1B0"), "rank 0: 1F0 runs here, but stage 1 lives on rank 1"),
        (of("0F0 0B0", "1F0 1B0", microbatches=2), "rank 0: 0F1 is missing"),
        (of("0F0 0B0 0F1", "1F0 1B0"), "rank 0: 0F1 names microbatch 1; the microbatches are 0 to 0"),
        (of("0F0 0B0 2F0", "1F0 1B0"), "rank 0: 2F0 names stage 2; the stages are 0 to 1"),
        (of("0F0 0B0 0X0", "1F0 1B0"), "rank 0: 0X0 is of unknown kind 'X'"),
        (of("0F0 0F1 0B0 0B1", microbatches=2, max_in_flight=(1,)), "0F1 is activation 2 to be held at once, the bound is 1"),
        (of("0F0 0F1 0I0 0F2 0W0 0I1 0W1 0I2 0W2", microbatches=3, max_in_flight=(2,)), "0F2 is activation 3"),
        (of("0F0 0B0", trains=False), "0B0 is a backward in a schedule of forwards"),
        (of("0F0 0B0 1F0 1B0", chunks=2), "this schedule can never finish: rank 0 at 0B0"),
        (of("0F0 0B0 0F1 0B1", "1F1 1F0 1B0 1B1", microbatches=2), "this schedule can never finish: rank 0 at 0B0"),
        (Schedule(2, 1, 1, ((),)), "there are 1 lists for 2 ranks"),
        (of(*["5F0"] * 9), "; and 13 more"),
    ],
)
def test_planted_faults_are_named(schedule, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        check_schedule(schedule)


# --- the simulated backend --------------------------------------------------------------------------------------------

DOWN, UP = Transfer(FORWARD, 0, 1, 1), Transfer(BACKWARD, 1, 0, 0)
FIRST = Exchange((Transfer(FORWARD, 0, 1, 0),))


def two_ranks(rank_0: list, rank_1: list) -> tuple[Schedule, Lists]:
    """1F1B up to the moment where rank 0 has 0F1 to send and rank 1 has 1B0; then what each posts."""
    F, B = FORWARD, BACKWARD
    start = [Action(F, 0, 0), FIRST, Action(F, 0, 1)], [FIRST, Action(F, 1, 0), Action(B, 1, 0)]
    return one_forward_one_backward(2, 2), [[*start[0], *rank_0], [*start[1], *rank_1]]


def test_a_pair_that_posts_in_two_orders():
    """Fine with buffers; NCCL would deliver the wrong tensor."""
    schedule, lists = two_ranks([Exchange((DOWN,)), Exchange((UP,))], [Exchange((UP,)), Exchange((DOWN,))])
    with pytest.raises(ValueError, match="meet with"):
        check_lists(schedule, lists)
    together = two_ranks([Exchange((DOWN, UP))], [Exchange((UP, DOWN))])[1]
    with pytest.raises(ValueError, match="meet with"):
        check_lists(schedule, together)
    check_lists(schedule, two_ranks([Exchange((UP, DOWN))], [Exchange((UP, DOWN))])[1])


def test_a_receiver_that_never_posts():
    schedule, lists = two_ranks([Exchange((DOWN,))], [])
    with pytest.raises(ValueError, match="deadlock: rank 0 in"):
        check_lists(schedule, lists)


def test_a_circle_of_three_ranks():
    """Each rank sends before it receives: one after the other they wait in a circle, as one group they do not."""
    ring, F = gpipe(3, 3, 2), FORWARD  # stage 2 on rank 2 hands over to stage 3 on rank 0
    a, b, c = [[Transfer(F, stage, stage + 1, m) for m in range(3)] for stage in range(3)]

    def lists(together: bool) -> Lists:
        sends = [(a[2], c[0]), (b[1], a[2]), (c[0], b[1])]
        last = [[Exchange(pair)] if together else [Exchange((t,)) for t in pair] for pair in sends]
        return [
            [Action(F, 0, 0), Exchange((a[0],)), Action(F, 0, 1), Exchange((a[1],)), Action(F, 0, 2), *last[0]],
            [Exchange((a[0],)), Action(F, 1, 0), Exchange((b[0],)), Exchange((a[1],)), Action(F, 1, 1), *last[1]],
            [Exchange((b[0],)), Action(F, 2, 0), *last[2]],
        ]

    check_lists(ring, lists(together=True))
    for schedule_lists, one_by_one in ((lists(together=False), False), (lists(together=True), True)):
        with pytest.raises(ValueError, match=r"deadlock: rank 0 in .*; rank 1 in .*; rank 2 in"):
            check_lists(ring, schedule_lists, one_by_one)


@pytest.mark.parametrize(
    ("rank_0", "words"),
    [
        ([Action(FORWARD, 0, 0), Action(BACKWARD, 0, 0)], "0B0 runs before its input is computed"),
        ([Exchange((Transfer(FORWARD, 0, 1, 0),))], "is sent before it is computed"),
        ([Action(FORWARD, 0, 0), Exchange((Transfer(FORWARD, 2, 3, 0),))], "is no transfer of rank 0"),
    ],
)
def test_what_a_list_may_not_do(rank_0, words):
    with pytest.raises(ValueError, match=words):
        check_lists(one_forward_one_backward(4, 1), [rank_0, [], [], []])


def test_input_that_is_computed_but_has_not_travelled():
    F = FORWARD
    lists: Lists = [[Action(F, 0, 0), FIRST, Action(F, 0, 1)], [FIRST, Action(F, 1, 0), Action(F, 1, 1)]]
    with pytest.raises(ValueError, match="1F1 runs before its input is on rank 1"):
        check_lists(one_forward_one_backward(2, 2), lists)


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_64_stages_and_512_microbatches_take_less_than_two_seconds(name):
    """Building the schedule, the lists and checking them; CPU time, so that a busy machine does not count."""
    chunks = chunks_for(name, 2)
    begin = time.process_time()
    check_schedule(build_schedule(name, 64 // chunks, 512, chunks))
    assert time.process_time() - begin < 2
