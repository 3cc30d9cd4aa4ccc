"""What becomes of a job when its processes have ended: one table, without side effects.

Only a start that fails without a new checkpoint counts towards giving up: a job that loses a node every hour and saves
every ten minutes gets there. Neither does one count that was asked to stop and has saved, was preempted or found a bad node.
One that was stopped at its time limit and has saved nothing counts: the next one would get no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from megalm.errors import ExitCode


class Action(Enum):
    """END: with the decision's exit code. AGAIN: back to the queue, or to the next job of the chain."""

    END = "end"
    AGAIN = "again"


@dataclass(frozen=True)
class Start:
    """How one start of the job went."""

    code: int = ExitCode.FAILED  # the ranks' together, see `verdict`
    finished: bool = False  # the run has said so
    asked: bool = False  # to stop, by the time limit or by preemption
    timed_out: bool = False  # it was the time limit
    can_save: bool = True  # the verb goes on where it was stopped
    cancelled: bool = False  # by scancel
    progressed: bool = False  # a new checkpoint since it began
    bad_nodes: Sequence[str] = ()  # found before anything was started
    all_bad: bool = False  # every node was found bad: the fault is not the nodes'


@dataclass(frozen=True)
class Decision:
    """What to do, in words too."""

    action: Action
    code: int
    reason: str
    failures: int = 0  # in a row without a new checkpoint, this start included
    exclude: Sequence[str] = field(default_factory=tuple)
    cancelled: bool = False  # it is the user who ends the job


def verdict(codes: Sequence[int]) -> int:
    """One exit code for the ranks' codes (negative: a signal): what forbids another start wins, then what failed."""
    for code in (ExitCode.HOPELESS, ExitCode.REFUSED):
        if code in codes:
            return code
    if any(code not in (ExitCode.FINISHED, ExitCode.SAVED) for code in codes) or not codes:
        return ExitCode.FAILED
    return ExitCode.SAVED if ExitCode.SAVED in codes else ExitCode.FINISHED


def what_next(start: Start, failures: int, starts: int, max_failures: int, max_starts: int) -> Decision:
    """`failures`: in a row before this start; `starts`: of the job so far, this one included."""
    end, again = Action.END, Action.AGAIN
    if start.finished or start.code == ExitCode.FINISHED:
        return Decision(end, ExitCode.FINISHED, "finished")
    if start.cancelled:
        return Decision(end, start.code, "cancelled", failures, cancelled=True)
    if start.code == ExitCode.REFUSED and starts == 1 and not start.progressed:  # later it is a node that has changed
        return Decision(end, start.code, "refused: the same command would be refused again", failures)
    if start.code == ExitCode.HOPELESS:
        return Decision(end, start.code, "hopeless: the run would fail in the same way again", failures)
    in_vain = start.timed_out and not start.progressed and start.code != ExitCode.SAVED
    if in_vain and not start.can_save:
        return Decision(end, ExitCode.FAILED, "not done at the time limit, and it would begin anew: more slurm.minutes", failures)
    innocent = (start.asked and not in_vain) or start.code == ExitCode.SAVED or (bool(start.bad_nodes) and not start.all_bad)
    failures = 0 if start.progressed else failures + (not innocent)
    if failures >= max_failures and not innocent:
        return Decision(end, ExitCode.FAILED, f"{failures} failed starts in a row without a new checkpoint", failures)
    if starts >= max_starts:
        return Decision(end, ExitCode.FAILED, f"start {starts} was the last of slurm.max_starts={max_starts}", failures)
    if start.bad_nodes and not start.all_bad:
        return Decision(again, ExitCode.FAILED, f"bad nodes: {', '.join(start.bad_nodes)}", failures, tuple(start.bad_nodes))
    if innocent:
        return Decision(again, ExitCode.SAVED, "asked to stop", failures)
    if not failures:
        return Decision(again, ExitCode.FAILED, "failed, after a new checkpoint", failures)
    if in_vain:
        reason = f"start {failures} of {max_failures} that had saved nothing by its time limit: see checkpoint.save_every"
        return Decision(again, ExitCode.FAILED, reason, failures)
    return Decision(again, ExitCode.FAILED, f"failed start {failures} of {max_failures} without a new checkpoint", failures)
