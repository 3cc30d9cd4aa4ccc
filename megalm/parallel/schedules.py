"""Pipeline schedules: pure functions (ranks, microbatches, chunks) -> for each rank, the list of what it does.

Whatever the sizes, a schedule is legal: any number of ranks and microbatches. This file has those whose backward is whole,
the table of all, and the way from a config's name to a schedule; `zero_bubble` has those that split the backward,
`schedule_file` a user's own.
"""

from __future__ import annotations

from collections.abc import Callable

from megalm.parallel.actions import (
    BACKWARD,
    FORWARD,
    INPUT,
    LOOP,
    V_SHAPE,
    WEIGHT,
    Action,
    Exchange,
    Lists,
    Placement,
    Schedule,
    Transfer,
    stages_of,
    with_communication,
)
from megalm.parallel.schedule_file import read_schedule
from megalm.parallel.zero_bubble import dualpipev, zbh1, zbv

__all__ = [
    "BACKWARD",
    "FORWARD",
    "INPUT",
    "LOOP",
    "V_SHAPE",
    "WEIGHT",
    "SCHEDULES",
    "Action",
    "Exchange",
    "Lists",
    "Placement",
    "Schedule",
    "Transfer",
    "build_schedule",
    "forward_only",
    "stages_of",
    "with_communication",
]


def forward_only(ranks: int, microbatches: int, chunks: int = 1, placement: Placement = LOOP) -> Schedule:
    """Every forward, in rounds of as many microbatches as there are ranks: evaluation.

    A round goes through all chunks before the next one starts, so few activations wait at a time.
    """
    rounds = [range(m, min(m + ranks, microbatches)) for m in range(0, microbatches, ranks)]
    per_rank = [
        [Action(FORWARD, s, m) for members in rounds for s in stages_of(r, ranks, chunks, placement) for m in members]
        for r in range(ranks)
    ]
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)), placement, trains=False)


def gpipe(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019); with chunks, one chunk after the other."""
    return _all_forwards_first(ranks, microbatches, chunks, list(range(microbatches)))


def breadth_first(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Looped breadth-first (Lamy-Poirier 2023): as gpipe, but what went forward last goes back first.

    A stage's microbatches run together, so ZeRO-3 gathers its weights once for all of them.
    """
    return _all_forwards_first(ranks, microbatches, chunks, list(reversed(range(microbatches))))


def _all_forwards_first(ranks: int, microbatches: int, chunks: int, way_back: list[int]) -> Schedule:
    per_rank = []
    for r in range(ranks):
        stages = stages_of(r, ranks, chunks)
        forwards = [Action(FORWARD, s, m) for s in stages for m in range(microbatches)]
        backwards = [Action(BACKWARD, s, m) for s in reversed(stages) for m in way_back]
        per_rank.append(forwards + backwards)
    held = (chunks * microbatches,) * ranks
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)), LOOP, held)


def one_forward_one_backward(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """1F1B (Narayanan et al. 2019): at most `ranks - rank` microbatches are in flight on a rank."""
    assert chunks == 1, "1f1b has one chunk per rank"
    per_rank = []
    for r in range(ranks):
        warmup = min(ranks - r - 1, microbatches)
        actions = [Action(FORWARD, r, m) for m in range(warmup)]
        for m in range(warmup, microbatches):
            actions += [Action(FORWARD, r, m), Action(BACKWARD, r, m - warmup)]
        actions += [Action(BACKWARD, r, m) for m in range(microbatches - warmup, microbatches)]
        per_rank.append(actions)
    held = tuple(min(ranks - r, microbatches) for r in range(ranks))
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)), LOOP, held)


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021): each rank has several chunks, so the bubble shrinks by their number.

    Microbatches go through the chunks in rounds. A round has at least `ranks` of them (fewer only if there are no more):
    a shorter one would leave the next chunk waiting for a microbatch that is still on its way, for ever. So any number of
    microbatches works: they are shared out evenly over the rounds.
    """
    count = max(1, microbatches // ranks)
    rounds = [range(i * microbatches // count, (i + 1) * microbatches // count) for i in range(count)]
    longest = max(len(members) for members in rounds)
    per_rank, held = [], []
    for r in range(ranks):
        stages = stages_of(r, ranks, chunks)
        forwards = [Action(FORWARD, s, m) for members in rounds for s in stages for m in members]
        backwards = [Action(BACKWARD, s, m) for members in rounds for s in reversed(stages) for m in members]
        warmup = min(2 * (ranks - r - 1) + (chunks - 1) * longest, len(forwards))
        actions = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            actions += [forward, backward]
        per_rank.append(actions + backwards[len(forwards) - warmup :])
        held.append(min(warmup + 1, len(forwards)))
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)), LOOP, tuple(held))


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "bfs": breadth_first,
    "zbh1": zbh1,
    "zbv": zbv,
    "dualpipev": dualpipev,
}


def build_schedule(name: str, ranks: int, microbatches: int, chunks: int, file: str = "") -> Schedule:
    """The schedule that a config names. `file`: of name `csv`.

    Raises ConfigError naming file, line, rule and fix for a user's schedule that cannot run.
    """
    return read_schedule(file, ranks, microbatches, chunks) if name == "csv" else SCHEDULES[name](ranks, microbatches, chunks)
