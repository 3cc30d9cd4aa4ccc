"""Simulated time: equal to the papers' formulae where they speak, and to sleeping ranks on this machine."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel import pipeline
from megalm.parallel.actions import BACKWARD, FORWARD, Action, Schedule, with_communication
from megalm.parallel.schedules import SCHEDULES, build_schedule
from megalm.parallel.timeline import EQUAL, Span, Timeline, Times, held, peaks, published_idle, simulate
from megalm.parallel.topology import Group
from megalm.parallel.weight_gradients import WeightGradients
from megalm.testing import run_distributed
from tests.parallel.test_schedules import SIZES, chunks_for

UNEQUAL = [EQUAL, Times(1, 1.5, 0.5), Times(2, 1, 1), Times(1, 2, 1), Times(3, 2, 2)]


@pytest.mark.parametrize("times", UNEQUAL)
@pytest.mark.parametrize("name", SCHEDULES)
def test_idle_time_is_the_papers(name, times):
    """Wherever `published_idle` says a number; and it says one for every schedule."""
    told = 0
    for (ranks, microbatches), chunks in itertools.product([*SIZES, (4, 13), (8, 16), (8, 24)], (1, 2, 3, 4)):
        if chunks != chunks_for(name, chunks) or (name == "interleaved" and chunks == 1):
            continue
        published = published_idle(name, ranks, microbatches, chunks, times)
        if published is not None:
            assert simulate(build_schedule(name, ranks, microbatches, chunks), times).idle == pytest.approx(published)
            told += 1
    assert told or (name in ("zbv", "dualpipev") and times != EQUAL)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 2), (4, 8), (8, 16)])
def test_shares_written_out(ranks, microbatches):
    """Narayanan et al. 2021: (p - 1) / (m + p - 1) for 1F1B, the same over v m + p - 1 for v chunks; ZB-H1 has a third."""
    bubbles = {name: simulate(build_schedule(name, ranks, microbatches, chunks_for(name, 2))) for name in SCHEDULES}
    p, m = ranks, microbatches
    assert bubbles["1f1b"].bubble == pytest.approx((p - 1) / (m + p - 1))
    assert bubbles["interleaved"].bubble == pytest.approx((p - 1) / (2 * m + p - 1))
    assert 3 * bubbles["zbh1"].idle == pytest.approx(bubbles["1f1b"].idle)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 3), (4, 8), (8, 15), (8, 40)])
def test_zbv_has_no_idle_time_inside_a_rank(ranks, microbatches):
    timeline = simulate(build_schedule("zbv", ranks, microbatches, 2))
    assert timeline.inner_bubble == pytest.approx(0)
    assert all(spans[-1].end - spans[0].start == pytest.approx(6 * microbatches) for spans in timeline.spans)


def test_a_pair_that_hands_on_at_its_end_has_the_bubble_of_deepseeks_table():
    """(p - 1) (F&B + B - 3W). In sequence our forwards hand on before their partners end, which is better: (p - 1) F."""
    ranks, microbatches = 4, 10
    schedule = build_schedule("dualpipev", ranks, microbatches, 2)
    delayed = _with_pairs_as_one(schedule)
    assert delayed == pytest.approx((ranks - 1) * (3 + 2 - 3))
    assert simulate(schedule).idle == pytest.approx(ranks - 1)


def _with_pairs_as_one(schedule: Schedule) -> float:
    """Idle time of equal times if a forward and the whole backward behind it start together and end together."""
    ends: dict[Action, float] = {}
    clock, work = [0.0] * schedule.num_ranks, [list(actions) for actions in schedule.actions]

    def needs(action: Action) -> list[Action]:
        kind, stage, m = action
        if kind == FORWARD:
            return [Action(FORWARD, stage - 1, m)] if stage else []
        if kind == "W":
            return []
        after = [Action(k, stage + 1, m) for k in ("B", "I") if Action(k, stage + 1, m) in every]
        return [Action(FORWARD, stage, m), *after]

    every = {action for actions in schedule.actions for action in actions}
    while any(work):
        for rank, queue in enumerate(work):
            while queue:
                both = len(queue) > 1 and queue[0].kind == FORWARD and queue[1].kind == BACKWARD
                group = queue[: 1 + both]
                outside = [a for action in group for a in needs(action) if a not in group]
                if any(a not in ends for a in outside):
                    break
                start = max([clock[rank], *(ends[a] for a in outside)])
                clock[rank] = start + sum({"F": 1, "B": 2, "I": 1, "W": 1}[a.kind] for a in group)
                ends.update(dict.fromkeys(group, clock[rank]))
                del queue[: len(group)]
    return max(clock) - 6 * schedule.num_microbatches


def test_times_and_measures_of_a_small_timeline():
    span = Span(Action(FORWARD, 0, 0), 1.0, 2.0)
    timeline = Timeline(((span, Span(Action(BACKWARD, 0, 0), 4.0, 5.0)), (span._replace(start=1.5),)))
    assert (timeline.start, timeline.makespan, timeline.busy, timeline.idle) == (1.0, 4.0, [2.0, 0.5], 2.0)
    assert (timeline.bubble, timeline.inner_bubble) == (0.5, 0.5)
    assert (Timeline(((),)).bubble, Timeline(((),)).inner_bubble) == (0.0, 0.0)
    assert Times(1, 2, 3).of(BACKWARD) == 5
    assert Times(2, 4, 6).per_chunk(2) == Times(1, 2, 3)


def test_activations_are_held_until_the_weights_have_their_gradient():
    order = "F0 F1 I0 F2 W0 I1 W1 I2 W2"
    actions = tuple(Action(word[0], 0, int(word[1])) for word in order.split())
    assert peaks(Schedule(1, 1, 3, (actions,))) == [3]


def test_what_is_held_is_what_each_kind_adds_on_its_stage():
    actions = [Action(kind, stage, 0) for kind, stage in (("F", 0), ("F", 1), ("I", 1), ("B", 0), ("W", 1))]
    weights = [{"F": 1, "B": -1, "I": 0, "W": -1}, {"F": 10, "B": -10, "I": 20, "W": -30}]
    assert list(held(actions, weights)) == [1, 11, 31, 30, 0]


def test_a_schedule_that_cannot_finish_has_no_timeline():
    upside_down = Schedule(1, 1, 1, ((Action(BACKWARD, 0, 0), Action(FORWARD, 0, 0)),))
    for look in (simulate, with_communication):
        with pytest.raises(ValueError, match="can never finish"):
            look(upside_down)


# --- measured ---------------------------------------------------------------------------------------------------------

RANKS, MICROBATCHES, TRIES = 4, 8, 4
SECONDS = 0.04  # of a forward, and of each half of a backward, of all of a rank's layers


class Sleep(torch.autograd.Function):
    """A stage that takes its time: forward, then inputs' half and, unless a schedule puts it off, weights' half."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, queue: WeightGradients, seconds: float) -> Tensor:
        ctx.queue, ctx.seconds = queue, seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        time.sleep(ctx.seconds)
        if ctx.queue.holds:
            ctx.queue.add([], dy, dy)
        else:
            time.sleep(ctx.seconds)
        return dy, None, None


def sleep_through(rank: int, world_size: int) -> dict[str, list[float]]:
    """The measured bubble of each schedule, once per try, until one is near the formula's; the same on all ranks."""
    return {name: sleep_through_one(Group(tuple(range(world_size)), rank, dist.group.WORLD), name) for name in SCHEDULES}


def sleep_through_one(group: Group, name: str) -> list[float]:
    chunks = chunks_for(name, 2)
    schedule, queue, seconds = build_schedule(name, RANKS, MICROBATCHES, chunks), WeightGradients(), SECONDS / chunks
    pipeline.compute = lambda waiting: time.sleep(seconds * len(waiting))

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        x = torch.zeros(1, requires_grad=True) if hidden is None else hidden
        y = Sleep.apply(x, queue, seconds)
        return y.sum() if stage == schedule.num_stages - 1 else y

    spec = [pipeline.Spec((1,), torch.float32)]
    executor = pipeline.PipelineExecutor(schedule, group, lambda stage, microbatch: spec, torch.device("cpu"), queue)
    bubbles: list[float] = []
    while len(bubbles) < TRIES and not any(abs(b - simulate(schedule).bubble) < 0.05 for b in bubbles):
        dist.barrier()
        executor.record = []
        executor.run(forward)
        gathered: list[Any] = [None] * group.size
        dist.all_gather_object(gathered, [tuple(timed) for timed in executor.record])
        rows = [tuple(Span(Action(*timed[:3]), *timed[3:]) for timed in record) for record in gathered]
        bubbles.append(Timeline(tuple(rows)).bubble)
    return bubbles


@pytest.mark.slow
@pytest.mark.dist
def test_bubbles_of_sleeping_ranks_are_those_of_the_formulae():
    """Within 5 points, the best of a few steps: sleeping costs no processor, but other programs wake us late."""
    measured = run_distributed(sleep_through, RANKS)[0]
    for name in SCHEDULES:
        chunks = chunks_for(name, 2)
        expected = simulate(build_schedule(name, RANKS, MICROBATCHES, chunks)).bubble
        published = published_idle(name, RANKS, MICROBATCHES, chunks, EQUAL)
        assert published is not None
        assert expected == pytest.approx(published / (published + 3 * MICROBATCHES * chunks))
        print(f"{name}: {expected:.3f} by the formula, measured {', '.join(f'{bubble:.3f}' for bubble in measured[name])}")
        assert abs(measured[name][-1] - expected) < 0.05, name
