"""What a pipeline schedule is made of: actions, their order on every rank, and the transfers between stages.

A schedule says only what is computed and in which order. `with_communication` simulates all ranks together and inserts
the transfers where they happen; the same list drives the executor, the pictures and the tests.

Stages are numbered along the model. With placement `loop`, stage s lives on rank s % ranks, as its chunk s // ranks. With
placement `v` the model goes down the ranks and back up: two chunks, so that first and last stage share a rank. A user's
schedule may place them otherwise: then the placement is the rank of every stage.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

FORWARD, BACKWARD, INPUT, WEIGHT = "F", "B", "I", "W"  # BACKWARD is INPUT and WEIGHT in one
KINDS = (FORWARD, BACKWARD, INPUT, WEIGHT)
LOOP, V_SHAPE = "loop", "v"
_SHOWN = 8  # ranks named in an error


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


Placement = str | tuple[int, ...]  # LOOP, V_SHAPE, or the rank of every stage
Lists = list[list[Action | Exchange]]  # by rank: what it computes and what it exchanges, in order


@dataclass(frozen=True)
class Schedule:
    """The compute actions of every rank."""

    num_ranks: int
    num_chunks: int
    num_microbatches: int
    actions: tuple[tuple[Action, ...], ...]  # by rank
    placement: Placement = LOOP
    max_in_flight: tuple[int, ...] = ()  # by rank: chunks' activations held at once, a bound; empty: none is declared
    trains: bool = True  # False: forwards only

    @property
    def num_stages(self) -> int:
        return self.num_ranks * self.num_chunks

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients are actions of their own."""
        return any(action.kind == WEIGHT for actions in self.actions for action in actions)

    @cached_property
    def ranks_of_stages(self) -> tuple[int, ...]:
        """The rank of every stage."""
        if isinstance(self.placement, tuple):
            return self.placement
        rows = [divmod(stage, self.num_ranks) for stage in range(self.num_stages)]
        back = self.placement == V_SHAPE
        return tuple(self.num_ranks - 1 - column if back and row % 2 else column for row, column in rows)

    def rank_of(self, stage: int) -> int:
        """The rank where a stage lives."""
        return self.ranks_of_stages[stage]

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


def stages_of(rank: int, ranks: int, chunks: int, placement: Placement = LOOP) -> list[int]:
    """The stages of one rank, in the order of the model."""
    if isinstance(placement, tuple):
        return [stage for stage, owner in enumerate(placement) if owner == rank]
    return [c * ranks + (ranks - 1 - rank if placement == V_SHAPE and c % 2 else rank) for c in range(chunks)]


def needs_of(action: Action, num_stages: int) -> str:
    """The actions that this one waits for, in words."""
    kind, stage, microbatch = action
    if kind == WEIGHT:
        return f"{stage}I{microbatch}"
    if kind == FORWARD:
        return f"{stage - 1}F{microbatch}" if stage else "nothing"
    after = f" and the backward of stage {stage + 1}" if stage + 1 < num_stages else ""
    return f"{stage}F{microbatch}{after}"


class Progress:
    """What has been computed so far, to ask which action can run; one byte per stage and microbatch."""

    def __init__(self, schedule: Schedule):
        self.count, self.last = schedule.num_microbatches, schedule.num_stages - 1
        self.forwarded = bytearray(schedule.num_stages * self.count)  # forward done
        self.returned = bytearray(schedule.num_stages * self.count)  # gradient of the input known

    def is_ready(self, action: Action) -> bool:
        """Its input is there and, for a backward, its own forward is done; for a weight gradient, its other half."""
        kind, stage, microbatch = action
        at = stage * self.count + microbatch
        if kind == FORWARD:
            return stage == 0 or self.forwarded[at - self.count] == 1
        if kind == WEIGHT:
            return self.returned[at] == 1
        return self.forwarded[at] == 1 and (stage == self.last or self.returned[at + self.count] == 1)

    def note(self, action: Action) -> None:
        """This action is done."""
        if action.kind == FORWARD:
            self.forwarded[action.stage * self.count + action.microbatch] = 1
        elif action.kind != WEIGHT:
            self.returned[action.stage * self.count + action.microbatch] = 1


def with_communication(schedule: Schedule) -> Lists:
    """Simulate all ranks in ticks of one action each and insert every transfer into both its ranks' lists.

    Both sides of a transfer enter their lists in the same tick and in one global order. So each pair of ranks posts the
    same operations in the same order (NCCL matches by order, it has no tags), and no list waits for something that comes
    later in that order: a rank that blocks in every send until it is received cannot deadlock. Raises ValueError if the
    schedule itself can never finish, naming the action at which each rank is stuck.
    """
    lists: Lists = [[] for _ in range(schedule.num_ranks)]
    heads = [0] * schedule.num_ranks
    progress, ranks_of = Progress(schedule), schedule.ranks_of_stages
    left = [rank for rank, actions in enumerate(schedule.actions) if actions]
    while left:
        ran = [(r, a) for r in left if progress.is_ready(a := schedule.actions[r][heads[r]])]
        if not ran:
            stuck = [(r, schedule.actions[r][heads[r]]) for r in left[:_SHOWN]]
            places = [f"rank {r} at {a}, which needs {needs_of(a, schedule.num_stages)}" for r, a in stuck]
            more = f"; and {len(left) - _SHOWN} more ranks" if len(left) > _SHOWN else ""
            raise ValueError(f"this schedule can never finish: {'; '.join(places)}{more}")
        outgoing: dict[int, list[Transfer]] = {}
        for rank, action in ran:
            lists[rank].append(action)
            heads[rank] += 1
            progress.note(action)
            transfer = schedule.output_of(action)
            if transfer is not None and (target := ranks_of[transfer.target]) != rank:
                outgoing.setdefault(rank, []).append(transfer)
                outgoing.setdefault(target, []).append(transfer)
        for rank, transfers in outgoing.items():
            lists[rank].append(Exchange(tuple(transfers)))
        left = [rank for rank in left if heads[rank] < len(schedule.actions[rank])]
    return lists
