"""Pipeline schedules: pure functions (ranks, microbatches, chunks) -> for each rank, the list of what it does.

A schedule says only what is computed and in which order. `with_communication` simulates all ranks together and inserts
the transfers where they happen; the same list drives the executor, the pictures and the tests.

Stages are numbered along the model. With placement `loop`, stage s lives on rank s % ranks, as its chunk s // ranks. With
placement `v` the model goes down the ranks and back up: two chunks, so that first and last stage share a rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"  # BACKWARD is INPUT and WEIGHT in one
LOOP, V_SHAPE = "loop", "v"


class Action(NamedTuple):
    """Compute one microbatch on one stage: forward, backward, or one half of the backward."""

    kind: str
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


class Transfer(NamedTuple):
    """An activation (kind F) or its gradient (kind B) of one microbatch that moves from one stage to a neighbour."""

    kind: str
    source: int
    target: int
    microbatch: int


class Exchange(NamedTuple):
    """Transfers that a rank posts together, in an order that all ranks agree on."""

    transfers: tuple[Transfer, ...]


@dataclass(frozen=True)
class Schedule:
    """The compute actions of every rank."""

    num_ranks: int
    num_chunks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]  # by rank
    placement: str = LOOP

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    def rank_of(self, stage: int) -> int:
        """The rank where a stage lives."""
        row, column = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - column if self.placement == V_SHAPE and row % 2 else column

    def stages_of(self, rank: int) -> list[int]:
        """The stages of one rank, along the model: its chunks 0, 1, ..."""
        return stages_of(rank, self.num_ranks, self.num_chunks, self.placement)

    def output_of(self, action: Action) -> Transfer | None:
        """What an action hands to a neighbouring stage; None at the ends of the model and for a weight gradient."""
        if action.kind == WEIGHT:
            return None
        kind, step = (FORWARD, 1) if action.kind == FORWARD else (BACKWARD, -1)
        target = action.stage + step
        return Transfer(kind, action.stage, target, action.microbatch) if 0 <= target < self.num_stages else None

    def input_of(self, action: Action) -> Transfer | None:
        """What an action needs from a neighbouring stage; None at the ends of the model and for a weight gradient."""
        if action.kind == WEIGHT:
            return None
        kind, step = (FORWARD, 1) if action.kind == FORWARD else (BACKWARD, -1)
        source = action.stage - step
        return Transfer(kind, source, action.stage, action.microbatch) if 0 <= source < self.num_stages else None


def stages_of(rank: int, ranks: int, chunks: int, placement: str = LOOP) -> list[int]:
    """The stages of one rank, in the order of the model."""
    return [c * ranks + (ranks - 1 - rank if placement == V_SHAPE and c % 2 else rank) for c in range(chunks)]


def forward_only(ranks: int, microbatches: int, chunks: int = 1, placement: str = LOOP) -> Schedule:
    """Every forward, chunk after chunk: evaluation."""
    per_rank = [
        [Action(FORWARD, s, m) for s in stages_of(r, ranks, chunks, placement) for m in range(microbatches)]
        for r in range(ranks)
    ]
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)), placement)


def gpipe(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """All forwards, then all backwards (Huang et al. 2019); with chunks, looped breadth-first (Lamy-Poirier 2023)."""
    per_rank = []
    for r in range(ranks):
        stages = stages_of(r, ranks, chunks)
        forwards = [Action(FORWARD, s, m) for s in stages for m in range(microbatches)]
        backwards = [Action(BACKWARD, s, m) for s in reversed(stages) for m in range(microbatches)]
        per_rank.append(forwards + backwards)
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)))


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
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)))


def interleaved(ranks: int, microbatches: int, chunks: int) -> Schedule:
    """Interleaved 1F1B (Narayanan et al. 2021): each rank has several chunks, so the bubble shrinks by their number.

    Microbatches go through the chunks in rounds. A round has at least `ranks` of them (fewer only if there are no more):
    a shorter one would leave the next chunk waiting for a microbatch that is still on its way, for ever. So any number of
    microbatches works: they are shared out evenly over the rounds.
    """
    count = max(1, microbatches // ranks)
    rounds = [range(i * microbatches // count, (i + 1) * microbatches // count) for i in range(count)]
    longest = max(len(members) for members in rounds)
    per_rank = []
    for r in range(ranks):
        stages = stages_of(r, ranks, chunks)
        forwards = [Action(FORWARD, s, m) for members in rounds for s in stages for m in members]
        backwards = [Action(BACKWARD, s, m) for members in rounds for s in reversed(stages) for m in members]
        warmup = min(2 * (ranks - r - 1) + (chunks - 1) * longest, len(forwards))
        actions = forwards[:warmup]
        for forward, backward in zip(forwards[warmup:], backwards, strict=False):
            actions += [forward, backward]
        per_rank.append(actions + backwards[len(forwards) - warmup :])
    return Schedule(ranks, chunks, microbatches, tuple(map(tuple, per_rank)))


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
}


def with_communication(schedule: Schedule) -> list[list[Action | Exchange]]:
    """Simulate all ranks in ticks of one action each and insert every transfer into both its ranks' lists.

    Both sides of a transfer enter their lists in the same tick and in one global order. So each pair of ranks posts the
    same operations in the same order (NCCL matches by order, it has no tags), and no list waits for something that comes
    later in that order: a rank that blocks in every send until it is received cannot deadlock. Raises ValueError if the
    schedule itself can never finish, naming the action at which each rank is stuck.
    """
    lists: list[list[Action | Exchange]] = [[] for _ in range(schedule.num_ranks)]
    todo = [list(reversed(actions)) for actions in schedule.actions]
    delivered: set[Transfer] = set()
    done: set[Action] = set()
    while any(todo):
        ran = [
            (r, todo[r].pop())
            for r in range(schedule.num_ranks)
            if todo[r] and _ready(todo[r][-1], schedule, delivered, done)
        ]
        if not ran:
            stuck = ", ".join(f"rank {r} at {actions[-1]}" for r, actions in enumerate(todo) if actions)
            raise ValueError(f"this schedule can never finish: {stuck}")
        outgoing: list[list[Transfer]] = [[] for _ in range(schedule.num_ranks)]
        for rank, action in ran:
            lists[rank].append(action)
            done.add(action)
            transfer = schedule.output_of(action)
            if transfer is not None:
                delivered.add(transfer)
                target = schedule.rank_of(transfer.target)
                for side in {rank, target} if target != rank else ():
                    outgoing[side].append(transfer)
        for rank, transfers in enumerate(outgoing):
            if transfers:
                lists[rank].append(Exchange(tuple(transfers)))
    return lists


def _ready(action: Action, schedule: Schedule, delivered: set[Transfer], done: set[Action]) -> bool:
    """Its input is there and, for a backward, its own forward is done."""
    needed = schedule.input_of(action)
    forward_done = action.kind == FORWARD or Action(FORWARD, action.stage, action.microbatch) in done
    return forward_done and (needed is None or needed in delivered)
