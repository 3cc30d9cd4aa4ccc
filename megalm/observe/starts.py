"""The starts of a run, and what the time since the first one went into."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from megalm.observe.folder import Run
from megalm.observe.words import clean, number, told

_ENDINGS = {"stopping", "failed", "stalled", "gave_up", "pruned", "finished"}
_ACTIVE = {"started", "saved", *_ENDINGS}  # written while the processes are there

EFFECTIVE = (
    "Effective time: time in steps that counted, divided by the wall time since the first start. A step counts if the run has "
    "not gone back behind it. Its time is the mean of the steps around it as metrics.jsonl has it, without evaluation and "
    "checkpoints. The wall time ends with the run, else with its last sign of life; waiting in a queue is part of it."
)


@dataclass
class Start:
    """One life of the run's processes."""

    attempt: str
    began: float
    ended: float  # the last sign of it
    first_step: int
    last_step: int | None = None  # reached in it, as far as it is told
    ending: str = ""  # how, in words; empty: it goes on
    kind: str = ""  # of the event that ended it
    ranks: int = 0
    hosts: list[str] = field(default_factory=list)
    job: str = ""

    @property
    def seconds(self) -> float:
        return max(0.0, self.ended - self.began)


@dataclass(frozen=True)
class Times:
    """Seconds since the first start; the four parts sum up to `wall`."""

    began: float
    wall: float
    counted: float  # in steps that counted
    saving: float  # in checkpoints
    between: float  # no start was there: the next one was waited for, or was loading
    other: float  # evaluation, first steps that went before nothing was saved, steps done again, waiting for a stalled rank

    @property
    def effective(self) -> float | None:
        """Share of the wall time; None where there was none."""
        return self.counted / self.wall if self.wall > 0 else None


def starts_of(run: Run) -> list[Start]:
    """From the events, in order. A run without any has none."""
    found: list[Start] = []
    for event in run.events:
        kind, time = event["kind"], event["time"]
        if kind == "started":
            reached = number(event.get("reached"))
            if found and reached is not None:
                found[-1].last_step = int(max(reached, found[-1].last_step or 0))
            found.append(_begin(event))
        elif found and kind in _ACTIVE:
            start, step = found[-1], number(event.get("step"))
            start.ended = max(start.ended, time)
            if step is not None:
                start.last_step = int(max(step, start.last_step or 0))
            if kind in _ENDINGS:
                start.kind, start.ending = kind, _ending(event)
    logged = [time for _, time in run.column("time")]
    for start, after in [*pairwise(found), *([(found[-1], None)] if found else [])]:
        latest = max((time for time in logged if after is None or time < after.began), default=start.began)
        start.ended = max(start.ended, latest)
        if after is not None:
            start.ended = min(start.ended, max(start.began, after.began))
            start.ending = start.ending or "went away without a word"
    if found and not found[-1].ending:
        found[-1].ended = max(found[-1].ended, run.progress.get("time", 0.0))
        found[-1].last_step = max(run.step, found[-1].last_step or 0)
    return found


def times_of(run: Run, starts: list[Start], runs_on: bool) -> Times | None:
    """None where no time is known. `runs_on`: it runs or is finished, so steps behind the last checkpoint count too."""
    logged = run.column("time")
    speeds = dict(run.column("seconds_per_step"))
    if starts:
        began, ended = starts[0].began, max(start.ended for start in starts)
    elif logged and logged[0][0] in speeds:  # of a version that wrote no events
        began, ended = logged[0][1] - logged[0][0] * speeds[logged[0][0]], logged[-1][1]
    else:
        return None
    wall = max(0.0, ended - began)
    saving = sum(number(event.get("seconds")) or 0.0 for event in run.events if event["kind"] == "saved")
    between = sum(max(0.0, after.began - before.ended) for before, after in pairwise(starts))
    between = min(between, wall)
    first = starts[0].first_step if starts else 0
    last = run.step if runs_on else run.progress.get("saved_step", run.step)
    counted = min(_in_steps(sorted(speeds.items()), first, last), wall - between)
    saving = min(saving, wall - between - counted)
    return Times(began, wall, counted, saving, between, max(0.0, wall - counted - saving - between))


def _in_steps(speeds: list[tuple[float, float]], first: float, last: float) -> float:
    """Seconds of the steps after `first` up to `last`; a measurement stands for the steps since the one before."""
    total, done, pace = 0.0, first, 0.0
    for step, pace in speeds:
        reached = min(step, last)
        if reached > done:
            total, done = total + (reached - done) * max(0.0, pace), reached
    return total + max(0.0, last - done) * max(0.0, pace)


def _begin(event: dict[str, Any]) -> Start:
    hosts = event.get("hosts")
    names = [clean(host, 80) for host in hosts[:4096]] if isinstance(hosts, list) else []
    ranks, step = number(event.get("ranks")) or 0, number(event.get("step")) or 0
    job = clean(event["job"], 40) if event.get("job") else ""
    time = event["time"]
    return Start(clean(event.get("attempt") or "0", 40), time, time, int(step), None, "", "", int(ranks), names, job)


def _ending(event: dict[str, Any]) -> str:
    if event["kind"] == "finished":
        return "finished"
    if event["kind"] == "pruned":
        return "given up by the search"
    if event["kind"] == "stopping":
        return f"asked to stop ({clean(event['signal'], 40)})" if event.get("signal") else "asked to stop"
    words = told({key: event[key] for key in ("reason", "message", "rank", "host") if key in event})
    return f"{event['kind'].replace('_', ' ')}: {words}" if words else event["kind"].replace("_", " ")
