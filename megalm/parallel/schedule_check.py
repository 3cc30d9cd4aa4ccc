"""The one validator of schedules: what may not be in a schedule, and whether its transfers can deadlock.

Runs on every schedule before it starts; linear in the number of actions. Three looks:
1. at the actions of each rank: each once, on its own rank, in a legal order, within the declared bound of activations;
2. at all ranks together: whether the schedule can finish (`with_communication`);
3. at the final lists, with their transfers: on a backend without buffers, where a send blocks until it is received.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from typing import NamedTuple

from megalm.parallel.actions import (
    BACKWARD,
    FORWARD,
    INPUT,
    KINDS,
    WEIGHT,
    Action,
    Exchange,
    Lists,
    Progress,
    Schedule,
    Transfer,
    with_communication,
)
from megalm.parallel.timeline import ACTIVATIONS, held

_F, _B, _I, _W = 1, 2, 4, 8  # what of a microbatch on a stage has been seen
_BIT = {FORWARD: _F, BACKWARD: _B, INPUT: _I, WEIGHT: _W}
_COMPLETE = (_F | _B, _F | _I | _W)
_SHOWN = 4  # faults named in an error


class Fault(NamedTuple):
    """What is wrong with the actions of one rank."""

    rank: int
    text: str


def check_schedule(schedule: Schedule) -> Lists:
    """The lists to run, with their transfers. Raises ValueError naming rank, action and rule if they cannot be run."""
    faults = find_faults(schedule)
    if faults:
        shown = "; ".join(f"rank {fault.rank}: {fault.text}" for fault in faults[:_SHOWN])
        raise ValueError(f"{shown}{f'; and {len(faults) - _SHOWN} more' if len(faults) > _SHOWN else ''}")
    lists = with_communication(schedule)
    check_lists(schedule, lists)
    return lists


def find_faults(schedule: Schedule) -> list[Fault]:
    """Everything wrong with the actions, rank by rank; whether ranks wait for one another for ever is not looked at."""
    seen = bytearray(schedule.num_stages * schedule.num_microbatches)
    faults: list[Fault] = []
    if len(schedule.actions) != schedule.num_ranks:
        return [Fault(len(schedule.actions), f"there are {len(schedule.actions)} lists for {schedule.num_ranks} ranks")]
    for rank, actions in enumerate(schedule.actions):
        legal = []
        bound = schedule.max_in_flight[rank] if schedule.max_in_flight else len(actions)
        for action in actions:
            text = _judge(action, rank, schedule, seen)
            if text:
                faults.append(Fault(rank, text))
                continue
            seen[action.stage * schedule.num_microbatches + action.microbatch] |= _BIT[action.kind]
            legal.append(action)
        for action, count in zip(legal, held(legal, [ACTIVATIONS] * schedule.num_stages), strict=True):
            if count == bound + 1 and action.kind == FORWARD:
                faults.append(Fault(rank, f"{action} is activation {count} to be held at once, the bound is {bound}"))
    return faults + list(_missing(schedule, seen))


def _judge(action: Action, rank: int, schedule: Schedule, seen: bytearray) -> str:
    """What is wrong with an action where it stands; empty if nothing."""
    kind, stage, microbatch = action
    if kind not in KINDS:
        return f"{action} is of unknown kind {kind!r}; there are F, B, I and W"
    if not 0 <= stage < schedule.num_stages:
        return f"{action} names stage {stage}; the stages are 0 to {schedule.num_stages - 1}"
    if not 0 <= microbatch < schedule.num_microbatches:
        return f"{action} names microbatch {microbatch}; the microbatches are 0 to {schedule.num_microbatches - 1}"
    if schedule.ranks_of_stages[stage] != rank:
        return f"{action} runs here, but stage {stage} lives on rank {schedule.ranks_of_stages[stage]}"
    before = seen[stage * schedule.num_microbatches + microbatch]
    if before & _BIT[kind]:
        return f"{action} is there twice"
    if kind == FORWARD:
        return ""
    if not schedule.trains:
        return f"{action} is a backward in a schedule of forwards"
    if not before & _F:
        return f"{action} comes before its forward {stage}F{microbatch}"
    whole, halves = kind == BACKWARD, before & (_I | _W)
    if (whole and halves) or (not whole and before & _B):
        return f"{action}: the backward of stage {stage}, microbatch {microbatch} is there whole (B) and in halves (I, W)"
    if kind == WEIGHT and not before & _I:
        return f"{action} comes before its other half {stage}I{microbatch}"
    return ""


def _missing(schedule: Schedule, seen: bytearray) -> Iterator[Fault]:
    complete = _COMPLETE if schedule.trains else (_F,)
    for at, bits in enumerate(seen):
        if bits not in complete:
            stage, microbatch = divmod(at, schedule.num_microbatches)
            if not bits & _F:
                wanted = FORWARD
            elif bits & _I and not bits & _W:
                wanted = WEIGHT
            else:
                wanted = BACKWARD
            yield Fault(schedule.ranks_of_stages[stage], f"{stage}{wanted}{microbatch} is missing")


def check_lists(schedule: Schedule, lists: Lists, one_by_one: bool = False) -> None:
    """Run the lists on a backend without buffers: a transfer moves only while both its ranks stand at it.

    Operations between two ranks are matched in order, without tags, as NCCL does. An Exchange is one group
    (ncclGroupStart/End): transfers to different ranks go on in any order, and it ends when all have moved. `one_by_one`:
    each transfer blocks by itself, harder than any real backend. Raises ValueError naming ranks and transfers.
    """
    run = _Rendezvous(schedule)
    if one_by_one:
        lists = [list(_split(items)) for items in lists]
    heads, work = [0] * len(lists), list(range(len(lists)))
    while work:
        rank = work.pop()
        items, head = lists[rank], heads[rank]
        while head < len(items) and not run.waiting[rank]:
            item = items[head]
            head += 1
            if isinstance(item, Action):
                run.compute(item, rank)
            else:
                for transfer in item.transfers:
                    work += run.post(transfer, rank)
        heads[rank] = head
    stuck = [rank for rank, items in enumerate(lists) if run.waiting[rank] or heads[rank] < len(items)]
    if stuck:
        places = "; ".join(f"rank {rank} in {lists[rank][heads[rank] - 1]}" for rank in stuck[:_SHOWN])
        raise ValueError(f"deadlock: {places}")


def _split(items: list[Action | Exchange]) -> Iterator[Action | Exchange]:
    for item in items:
        if isinstance(item, Action):
            yield item
        else:
            yield from (Exchange((transfer,)) for transfer in item.transfers)


class _Rendezvous:
    """The simulated backend: what each rank has computed, received and offered."""

    def __init__(self, schedule: Schedule):
        self.ranks_of = schedule.ranks_of_stages
        self.progress = Progress(schedule)
        self.here = {FORWARD: set[int](), BACKWARD: set[int]()}  # by stage and microbatch: the input has arrived
        self.waiting = [0] * schedule.num_ranks  # by rank: transfers of its present group that have not moved
        self.offered: defaultdict[tuple[int, int], deque[Transfer]] = defaultdict(deque)  # by (from rank, to rank)

    def compute(self, action: Action, rank: int) -> None:
        """Run an action; its input must be on this rank by now."""
        kind, stage, microbatch = action
        if not self.progress.is_ready(action):
            raise ValueError(f"{action} runs before its input is computed")
        if kind != WEIGHT:
            direction, source = (FORWARD, stage - 1) if kind == FORWARD else (BACKWARD, stage + 1)
            far = 0 <= source < len(self.ranks_of) and self.ranks_of[source] != rank
            if far and stage * self.progress.count + microbatch not in self.here[direction]:
                raise ValueError(f"{action} runs before its input is on rank {rank}")
        self.progress.note(action)

    def post(self, transfer: Transfer, rank: int) -> list[int]:
        """Offer a transfer; it moves if the other rank has offered it. Returns the rank that can go on by that, if any."""
        kind, source, target, microbatch = transfer
        ends = self.ranks_of[source], self.ranks_of[target]
        if rank not in ends or ends[0] == ends[1]:
            raise ValueError(f"{transfer} is no transfer of rank {rank}")
        count = self.progress.count
        if rank == ends[0]:
            made = self.progress.forwarded if kind == FORWARD else self.progress.returned
            if not made[source * count + microbatch]:
                raise ValueError(f"{transfer} is sent before it is computed")
        other = ends[0] + ends[1] - rank
        line = self.offered[other, rank]
        if not line:
            self.offered[rank, other].append(transfer)
            self.waiting[rank] += 1
            return []
        if line[0] != transfer:
            raise ValueError(f"ranks {rank} and {other} meet with {transfer} and {line[0]}")
        line.popleft()
        self.here[kind].add(target * count + microbatch)
        self.waiting[other] -= 1
        return [other] if not self.waiting[other] else []
