"""How a run is doing: finished, pruned, running, stopped, waiting, stalled, failed; by its files and its process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.errors import ExitCode
from megalm.observe.folder import Run
from megalm.observe.words import duration, number, told
from megalm.parallel.workers import this_host

_DECISIVE = {"started", "stopping", "failed", "stalled", "restarted", "requeued", "gave_up", "pruned", "finished"}
_QUIET_SECONDS, _QUIET_STEPS = 60.0, 10.0  # a run that says nothing for so long, or for so many of its steps, has stalled
_MEETING_SECONDS = 300.0  # the default of cluster.rendezvous_seconds
_GONE_SECONDS = 10.0  # before a process that is not there counts as ended: its last words may be on their way


@dataclass(frozen=True)
class Verdict:
    """What `megalm status` says and exits with."""

    state: str  # finished, pruned, running, stopped, waiting, stalled, failed, gave up
    why: str
    code: ExitCode

    @property
    def is_over(self) -> bool:
        """Nothing will come unless somebody starts it again."""
        return self.state in ("finished", "pruned", "gave up", "stopped")


def last_sign(run: Run) -> float | None:
    """When the run last wrote something, seconds since the epoch."""
    times = [run.progress.get("time"), run.events[-1]["time"] if run.events else None, run.last("time")]
    return max((time for time in times if time is not None), default=None)


def patience_of(run: Run, last: dict[str, Any]) -> float:
    """Seconds of silence after which the run has stalled: `cluster.stall_seconds` if it is set, else some of its steps.

    last: the event that decides. Until the first step of a start, the time that its ranks have to meet comes on top.
    """
    speed = run.progress.get("tokens_per_second") or 0.0
    pace = run.last("seconds_per_step") or (run.tokens_per_step / speed if speed > 0 else 0.0)
    limit = number(run.config.get("cluster.stall_seconds")) or max(_QUIET_SECONDS, _QUIET_STEPS * pace)
    starts = last["kind"] == "restarted" or (last["kind"] == "started" and run.step <= (number(last.get("step")) or 0))
    return limit + ((number(run.config.get("cluster.rendezvous_seconds")) or _MEETING_SECONDS) if starts else 0.0)


def is_alive(run: Run) -> bool | None:
    """Whether rank 0's process is there; None if it ran on another machine, or it is not known where."""
    started: dict[str, Any] = next((event for event in reversed(run.events) if event["kind"] == "started"), {})
    hosts, pid = started.get("hosts"), number(started.get("pid"))
    if pid is None or not isinstance(hosts, list) or not hosts or hosts[0] != this_host():
        return None
    return Path("/proc", str(int(pid))).exists()


def judge(run: Run, now: float, alive: bool | None) -> Verdict:
    """By the last event that decides, and by how long the run has been silent. `alive`: as `is_alive` says."""
    event: dict[str, Any] = next((event for event in reversed(run.events) if event["kind"] in _DECISIVE), {"kind": ""})
    kind, sign, patience = event["kind"], last_sign(run), patience_of(run, event)
    silent = max(0.0, now - sign) if sign is not None else None
    gone = alive is False and (silent or 0.0) > _GONE_SECONDS
    if run.finished or kind == "finished":
        early = f"stopped early, at step {run.step:,}"
        return Verdict("finished", f"all {run.steps:,} steps are done" if run.step >= run.steps else early, ExitCode.FINISHED)
    if kind == "pruned":
        return Verdict("pruned", f"given up by the search, at step {run.step:,}", ExitCode.FINISHED)
    if kind == "gave_up":
        saved = event.get("code") == ExitCode.SAVED
        if saved or event.get("cancelled"):
            return Verdict("stopped", told(event), ExitCode.SAVED if saved else ExitCode.FAILED)
        return Verdict("gave up", told(event) or "no more restarts", ExitCode.HOPELESS)
    if kind == "requeued":
        return Verdict("waiting", "in the queue; it goes on from its last checkpoint", ExitCode.SAVED)
    if kind in ("failed", "stalled"):
        return Verdict("failed", told(event) or "without a reason", ExitCode.FAILED)
    if kind == "stopping" and (alive is False or silent is None or silent > patience):  # it cannot save any more
        asked = number(event.get("step"))  # that of a job's supervisor knows no step: the last one that was done counts
        if run.progress.get("saved_step", 0) >= (run.step if asked is None else asked):
            return Verdict("stopped", "as asked, everything is saved; the same command goes on from there", ExitCode.SAVED)
        return Verdict("failed", "it ended before it had saved", ExitCode.FAILED)
    if gone:
        return Verdict("failed", "its process is gone, without a word", ExitCode.FAILED)
    if silent is None:
        return Verdict("stalled", "there is no sign of life in its files", ExitCode.FAILED)
    if silent > patience:
        return Verdict("stalled", f"no sign of life for {duration(silent)}; it may also have been killed", ExitCode.FAILED)
    doing = {"stopping": "it saves, and stops", "restarted": "it starts again"}
    return Verdict("running", doing.get(kind, ""), ExitCode.FINISHED)
