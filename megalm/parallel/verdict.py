"""What to think of a run's ranks, seen together: all well, ended, failed, stalled; who is the cause; and the report. No torch.

A rank that hangs drags all others into hanging: they wait for it in a collective. So the one that has been silent the longest
need not be the cause. In this order:

    stopped    the process is in state T: somebody or something has stopped it
    behind     it has begun fewer collectives of a group than the others of this group, and is in none
    outside    it is in no collective, and others wait inside one
    behind     and in another collective: it may wait for somebody else, but nobody looks guiltier
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megalm.errors import ExitCode, MegalmError, Problem, RunError
from megalm.parallel.heartbeat_file import Collective, Pulse

STOPPED_SECONDS = 3.0  # a process that has been stopped for so long is not waited for any longer
_MOVED = "batch_isend_irecv"  # neighbours of a pipeline rightly count differently


@dataclass(frozen=True)
class RankStatus:
    """One rank, as the agent of its node sees it."""

    rank: int
    host: str
    pid: int
    code: int | None = None  # exit code; -9: killed by SIGKILL; None: it runs
    state: str = ""  # of the process, as in /proc: R running, S sleeping, D waiting for a device, T stopped
    idle: float = 0.0  # seconds without a sign of life
    pulse: Pulse = field(default_factory=Pulse)
    note: dict[str, Any] | None = None  # what it left of an error
    tail: str = ""  # last lines of its log, if it ended without a note

    def to_plain(self) -> dict[str, Any]:
        """For a line of JSON."""
        return asdict(self)

    @staticmethod
    def of_plain(plain: dict[str, Any]) -> RankStatus:
        """Raises TypeError or KeyError if it is none."""
        pulse = dict(plain["pulse"])
        pulse["collectives"] = tuple(Collective(**c) for c in pulse["collectives"])
        return RankStatus(**{**plain, "pulse": Pulse(**pulse)})


@dataclass(frozen=True)
class Patience:
    """Seconds without a sign of life after which a rank has stalled."""

    step: float = 0.0  # in training; 0: three times the longest step, at least 30 s
    start: float = 900.0  # until the first step is done: imports, rendezvous, reading weights, compiling
    slow: float = 600.0  # in an evaluation, a save, and at the end

    def of(self, pulse: Pulse) -> float:
        """For a rank that last said this."""
        if pulse.phase == "start":
            return self.start
        step = self.step or max(30.0, 3 * pulse.longest_step)
        return step if pulse.phase == "train" else max(step, self.slow)


def judge(statuses: Sequence[RankStatus], patience: Patience, asked: bool) -> str:
    """running, ended, stopped (asked, before it listened), failed or stalled."""
    codes = [status.code for status in statuses]
    if asked and any(code in (-signal.SIGUSR1, -signal.SIGTERM) for code in codes):
        return "stopped"
    if any(code not in (None, ExitCode.FINISHED, ExitCode.SAVED) for code in codes):
        return "failed"
    if all(code is not None for code in codes):
        return "ended"
    return "stalled" if any(has_stalled(status, patience) for status in statuses) else "running"


def has_stalled(status: RankStatus, patience: Patience) -> bool:
    """Whether a rank has been silent for too long."""
    return status.code is None and status.idle > limit_of(status, patience)


def limit_of(status: RankStatus, patience: Patience) -> float:
    """Seconds that a rank may be silent."""
    limit = patience.of(status.pulse)
    return min(limit, STOPPED_SECONDS) if status.state == "T" else limit


def exit_code(statuses: Sequence[RankStatus]) -> ExitCode:
    """Of ranks that have ended well: FINISHED if all have, else SAVED."""
    return ExitCode.FINISHED if all(status.code == ExitCode.FINISHED for status in statuses) else ExitCode.SAVED


def culprits(statuses: Sequence[RankStatus]) -> list[RankStatus]:
    """Of ranks that run and hang, those that the others wait for, as far as one can see."""
    running = [status for status in statuses if status.code is None]
    most: dict[str, int] = {}
    for status in running:
        for one in status.pulse.collectives:
            most[one.group] = max(most.get(one.group, 0), one.sequence)

    def is_behind(status: RankStatus) -> bool:
        return any(c.sequence < most[c.group] and c.operation != _MOVED for c in status.pulse.collectives)

    stopped = [status for status in running if status.state == "T"]
    behind = [status for status in running if is_behind(status)]
    outside = [status for status in running if not status.pulse.inside]
    some = len(outside) < len(running)
    both = [status for status in behind if status in outside]
    return stopped or both or (outside if some else []) or behind or sorted(running, key=lambda s: -s.idle)[:1]


def failure(statuses: Sequence[RankStatus], log_dir: str, next_start: str) -> tuple[MegalmError, RankStatus]:
    """The cause, and its rank: a worker killed by a signal leaves no note and was first; else the earliest note."""
    bad = [status for status in statuses if status.code not in (None, ExitCode.FINISHED, ExitCode.SAVED)]
    worst = max((status.code or 0 for status in bad if status.code in (ExitCode.REFUSED, ExitCode.HOPELESS)), default=0)
    for status in bad:
        if (status.code or 0) < 0 and status.note is None:  # gloo may abort after an error was noted
            name = signal.Signals(-(status.code or 0)).name
            rule = "every worker must run to the end; all the others were ended"
            fix = f"look at {log_dir}/rank-{status.rank}.log; the same command again {next_start}"
            return RunError(Problem(f"rank {status.rank}", f"killed by {name}", rule, "", fix)), status
    noted = [status for status in statuses if status.note is not None]
    if not noted:
        first = bad[0]
        rule = f"every worker must run to the end; last lines of its log: {first.tail}"
        error = RunError(Problem(f"rank {first.rank}", f"ended with exit code {first.code}", rule, "", "megalm doctor"))
        error.exit_code = worst or int(ExitCode.FAILED)
        return error, first
    first = min(noted, key=lambda status: (status.note or {})["time"])
    note = first.note or {}
    error = RunError(*(Problem(**problem) for problem in note["problems"]))
    error.kind, error.exit_code = f"{note['kind']} on rank {note['rank']}", worst or note["exit_code"]
    return error, first


def stall(statuses: Sequence[RankStatus], patience: Patience, report: str, next_start: str) -> tuple[RunError, RankStatus]:
    """What is said of a run that hangs, and the rank that is to blame."""
    guilty = culprits(statuses)
    first = guilty[0]
    what = "; ".join(describe(status) for status in guilty[:4]) + (f"; and {len(guilty) - 4} more" if len(guilty) > 4 else "")
    rule = f"every rank must give a sign of life within {limit_of(first, patience):g} s: {what}"
    fix = f"see {report} and the stacks beside it; the same command again {next_start}"
    error = RunError(Problem(f"rank {first.rank}", "stopped" if first.state == "T" else "stalled", rule, "", fix))
    return error, first


def describe(status: RankStatus) -> str:
    """A rank in one line."""
    last = status.pulse.last_collective
    if last is None:
        where = "before its first collective"
    else:
        where = f"{'inside' if status.pulse.inside else 'after'} {last.operation} number {last.sequence} of {last.group}"
    stopped = ", stopped (state T)" if status.state == "T" else ""
    return (
        f"rank {status.rank} on {status.host} (pid {status.pid}{stopped}), silent for {status.idle:.1f} s "
        f"in {status.pulse.phase} after step {status.pulse.step}, {where}"
    )


def report(title: str, statuses: Sequence[RankStatus], guilty: Sequence[int]) -> str:
    """The whole picture, as text: a line per rank, then every group's last collectives where they differ."""
    head = f"{'rank':>5}  {'host':16} {'pid':>8} {'ended':>6} {'state':5} {'step':>7}  {'phase':9} {'silent':>8}  last collective"
    lines = [title, "", head]
    for status in sorted(statuses, key=lambda s: s.rank):
        last, code = status.pulse.last_collective, "" if status.code is None else str(status.code)
        place = "in   " if status.pulse.inside else "after"
        where = f"{place} {last.operation} {last.sequence} of {last.group}" if last else "none"
        mark = "  <--" if status.rank in guilty else ""
        lines.append(
            f"{status.rank:>5}  {status.host:16} {status.pid:>8} {code:>6} {status.state:5} {status.pulse.step:>7}  "
            f"{status.pulse.phase:9} {status.idle:>6.1f} s  {where}{mark}"
        )
    groups: dict[str, dict[int, Collective]] = {}
    for status in statuses:
        for one in status.pulse.collectives:
            groups.setdefault(one.group, {})[status.rank] = one
    lines += ["", "groups whose ranks are not at the same collective:"]
    for name, members in sorted(groups.items()):
        if len({(c.sequence, c.operation) for c in members.values()}) > 1:
            lines.append(f"  {name}: " + ", ".join(f"rank {r}: {c.operation} {c.sequence}" for r, c in sorted(members.items())))
    return "\n".join(lines) + "\n"
