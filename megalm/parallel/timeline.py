"""When every action of a schedule runs, if each takes a fixed time and transfers take none; and what papers say of it.

Times are of one action on one chunk, in any unit. A rank's idle share of the whole step is its bubble: the optimizer
waits for all ranks, so filling and draining count. The zero-bubble papers count the time between a rank's first and last
action only (their optimizer does not wait); that is `inner_bubble`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from megalm.parallel.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action, Progress, Schedule


class Times(NamedTuple):
    """What one action on one chunk takes; a whole backward takes input + weight."""

    forward: float = 1.0
    input: float = 1.0
    weight: float = 1.0

    def of(self, kind: str) -> float:
        """The time of an action of this kind."""
        return {FORWARD: self.forward, BACKWARD: self.input + self.weight, INPUT: self.input, WEIGHT: self.weight}[kind]

    def per_chunk(self, chunks: int) -> Times:
        """If these are the times of all of a rank's layers: those of one of its chunks."""
        return Times(*(time / chunks for time in self))


class Span(NamedTuple):
    """An action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A step, simulated or measured: what every rank did and when."""

    spans: tuple[tuple[Span, ...], ...]  # by rank, in order

    @cached_property
    def start(self) -> float:
        """When the first action of all starts."""
        return min((span.start for spans in self.spans for span in spans), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """From the first start to the last end."""
        return max((span.end for spans in self.spans for span in spans), default=0.0) - self.start

    @cached_property
    def busy(self) -> list[float]:
        """By rank: the time in which it computes."""
        return [sum(span.end - span.start for span in spans) for spans in self.spans]

    @property
    def idle(self) -> float:
        """Idle time of the busiest rank over the whole step."""
        return self.makespan - max(self.busy, default=0.0)

    @property
    def bubble(self) -> float:
        """Idle share of the step of the busiest rank."""
        return self.idle / self.makespan if self.makespan else 0.0

    @property
    def inner_bubble(self) -> float:
        """The same from each rank's own first start to its own last end, the longest of those: the papers' measure."""
        own = max((spans[-1].end - spans[0].start for spans in self.spans if spans), default=0.0)
        return 1 - max(self.busy) / own if own else 0.0


def peaks(schedule: Schedule) -> list[int]:
    """By rank: the most activations of chunks it holds at once, each from its forward until its (weights') backward."""
    return [int(max(held(actions, [ACTIVATIONS] * schedule.num_stages), default=0)) for actions in schedule.actions]


ACTIVATIONS = {FORWARD: 1, BACKWARD: -1, INPUT: 0, WEIGHT: -1}  # a microbatch's, whatever of it is still there


def held(actions: Iterable[Action], weights: Sequence[Mapping[str, float]]) -> Iterator[float]:
    """What a rank holds after each of its actions. weights: by stage, what each kind of action adds to it."""
    return itertools.accumulate(weights[action.stage][action.kind] for action in actions)


def losses_in_flight(schedule: Schedule) -> int:
    """Microbatches whose loss is there and whose backward has not begun, at the most."""
    last = schedule.num_stages - 1
    nothing, one = dict.fromkeys((FORWARD, BACKWARD, INPUT, WEIGHT), 0), {FORWARD: 1, BACKWARD: -1, INPUT: -1, WEIGHT: 0}
    return int(max(held(schedule.actions[schedule.rank_of(last)], [*[nothing] * last, one])))


EQUAL = Times()


def simulate(schedule: Schedule, times: Times = EQUAL) -> Timeline:
    """Every action starts as soon as its rank and its inputs are free. Raises ValueError if the schedule cannot finish."""
    return Timeline(tuple(map(tuple, _run(schedule, times))))


def _run(schedule: Schedule, times: Times) -> list[list[Span]]:
    count, last = schedule.num_microbatches, schedule.num_stages - 1
    forwarded, returned = [0.0] * (count * (last + 1)), [0.0] * (count * (last + 1))  # when, by stage and microbatch
    lasts = {kind: times.of(kind) for kind in (FORWARD, BACKWARD, INPUT, WEIGHT)}
    spans: list[list[Span]] = [[] for _ in schedule.actions]
    progress, left = Progress(schedule), list(range(schedule.num_ranks))
    while left:
        moved = False
        for rank in left:
            actions, mine = schedule.actions[rank], spans[rank]
            now = mine[-1].end if mine else 0.0
            while len(mine) < len(actions) and progress.is_ready(action := actions[len(mine)]):
                kind, stage, microbatch = action
                at, start = stage * count + microbatch, now
                if kind == FORWARD:
                    start = max(start, forwarded[at - count]) if stage else start
                elif kind != WEIGHT and stage < last:
                    start = max(start, returned[at + count])
                now, moved = start + lasts[kind], True
                if kind != WEIGHT:
                    (forwarded if kind == FORWARD else returned)[at] = now
                progress.note(action)
                mine.append(Span(action, start, now))
        left = [rank for rank in left if len(spans[rank]) < len(schedule.actions[rank])]
        if left and not moved:
            raise ValueError("this schedule can never finish")
    return spans


def published_idle(name: str, ranks: int, microbatches: int, chunks: int, times: Times) -> float | None:
    """Idle time of a rank in a step, by the papers' formulae; None where they do not say.

    Times per chunk, backward = input + weight. gpipe, 1f1b: Narayanan et al. 2019 and 2021, (p-1)(F+B). interleaved, bfs:
    Narayanan et al. 2021 and Lamy-Poirier 2023, the same of one chunk. zbh1: Qi et al. 2023, table 1: (p-1)(F+I-W), where
    weights' gradients take no longer than the others. zbv: none inside a rank if all three take as long (Qi et al. 2023,
    section 6); what stays is the way to the last rank, (p-1)F. dualpipev: DeepSeek-AI's table has (p-1)(F&B + B - 3W) with
    a pair F&B that ends at once; run in sequence, a forward hands on before its partner ends: (p-1)F for equal times.
    """
    forward, back, weight = times
    whole = (ranks - 1) * (forward + back + weight)
    equal = forward == back == weight
    if name == "1f1b" or (name == "gpipe" and chunks == 1):
        return whole
    if name in ("gpipe", "bfs") and microbatches >= ranks:
        return whole
    if name == "interleaved" and microbatches % ranks == 0:
        return whole
    if name == "zbh1" and microbatches >= ranks and weight <= min(forward, back):
        return (ranks - 1) * (forward + back - weight)
    if equal and ((name == "zbv" and microbatches >= 2 * ranks - 1) or (name == "dualpipev" and microbatches >= 2 * ranks)):
        return (ranks - 1) * forward
    return None
