"""What a run's last words, its silence and its process make of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megalm.errors import ExitCode
from megalm.observe.folder import Run
from megalm.observe.verdict import is_alive, judge, last_sign, patience_of
from megalm.parallel.workers import this_host

NOW = 1_000_000.0


def run_of(*kinds: str, silent: float = 1.0, finished: bool = False, saved: int = 0, step: int = 0, **config: Any) -> Run:
    """A run at step 50 whose last event, and progress, are `silent` seconds old. `step`: at which it started."""
    events = [{"kind": kind, "time": NOW - silent, "step": step if kind == "started" else 50} for kind in kinds]
    progress = {"step": 50.0, "steps": 100.0, "saved_step": float(saved), "time": NOW - silent}
    return Run(Path("r"), config, events=events, progress=progress, finished=finished)


@pytest.mark.parametrize(
    ("run", "alive", "state", "code"),
    [
        (run_of("started"), None, "running", 0),
        (run_of("started", "saved"), True, "running", 0),
        (run_of("started", silent=61), None, "stalled", 1),
        (run_of("started", silent=61), True, "stalled", 1),
        (run_of("started", silent=61, **{"cluster.stall_seconds": 100}), None, "running", 0),
        (run_of("started", silent=11), False, "failed", 1),
        (run_of("started", silent=9), False, "running", 0),
        (run_of("started", "failed"), None, "failed", 1),
        (run_of("started", "failed", "restarted"), None, "running", 0),
        (run_of("started", "failed", "restarted", silent=359), None, "running", 0),
        (run_of("started", "failed", "restarted", silent=361), None, "stalled", 1),
        (run_of("started", step=49, silent=61), None, "stalled", 1),
        (run_of("started", step=50, silent=61), None, "running", 0),
        (run_of("started", step=50, silent=61, **{"cluster.rendezvous_seconds": 0.5}), None, "stalled", 1),
        (run_of("started", "failed", "started"), None, "running", 0),
        (run_of("started", "stopping"), None, "running", 0),
        (run_of("started", "stopping", saved=50, silent=61), None, "stopped", 75),
        (run_of("started", "stopping", saved=40, silent=61), None, "failed", 1),
        (run_of("started", "stopping", "saved", saved=50), False, "stopped", 75),
        (run_of("started", "stopping", saved=50), True, "running", 0),
        (run_of("started", "stopping", "requeued"), None, "waiting", 75),
        (run_of("started", "failed", "gave_up"), None, "gave up", 3),
        (run_of("started", "finished", silent=9999), False, "finished", 0),
        (run_of("started", finished=True, silent=9999), None, "finished", 0),
        (Run(Path("r")), None, "stalled", 1),
        (run_of(), None, "running", 0),
    ],
)
def test_verdicts(run: Run, alive: bool | None, state: str, code: int) -> None:
    verdict = judge(run, NOW, alive)
    assert (verdict.state, verdict.code) == (state, ExitCode(code))


def test_the_reason_is_told() -> None:
    run = run_of("started", "failed")
    run.events[-1] |= {"reason": "rank died", "host": "n7"}
    assert judge(run, NOW, None).why == "rank died; step 50, host n7"


@pytest.mark.parametrize(("saved", "state"), [(50, "stopped"), (40, "failed"), (0, "failed")])
def test_a_jobs_supervisor_asks_without_knowing_the_step(saved: int, state: str) -> None:
    run = run_of("started", "stopping", saved=saved, silent=61)
    del run.events[-1]["step"]
    assert judge(run, NOW, False).state == state


def test_a_job_that_was_cancelled_or_pruned() -> None:
    run = run_of("started", "gave_up")
    run.events[-1]["code"] = 75
    assert (judge(run, NOW, None).state, judge(run, NOW, None).code) == ("stopped", 75)
    run.events[-1] |= {"code": 1, "cancelled": True, "reason": "cancelled"}
    assert (judge(run, NOW, None).state, judge(run, NOW, None).code) == ("stopped", 1), "not all is saved"
    assert judge(run, NOW, None).why == "cancelled; step 50, code 1"
    said = judge(run_of("started", "pruned", silent=9999), NOW, False)
    assert (said.state, said.why, said.code) == ("pruned", "given up by the search, at step 50", 0) and said.is_over
    assert judge(run_of("started", "pruned", "started"), NOW, None).state == "running", "somebody trains it on"


def test_a_clock_that_is_ahead() -> None:
    assert judge(run_of("started", silent=-500), NOW, None).state == "running"


def test_patience_grows_with_slow_steps() -> None:
    run = run_of("started")
    assert patience_of(run, run.events[-1]) == 60
    run.columns["seconds_per_step"] = [(10.0, 30.0)]
    assert patience_of(run, run.events[-1]) == 300
    slow = run_of("started", **{"train.global_batch_size": 8, "data.seq_length": 100})
    slow.progress["tokens_per_second"] = 40.0
    assert patience_of(slow, slow.events[-1]) == 200
    assert last_sign(run) == NOW - 1


def test_a_process_of_this_machine() -> None:
    run = Run(Path("r"), events=[{"kind": "started", "time": 1.0, "pid": os.getpid(), "hosts": [this_host(), "b"]}])
    assert is_alive(run) is True
    run.events[0]["pid"] = 999_999_999
    assert is_alive(run) is False
    run.events[0]["hosts"] = ["another-machine"]
    assert is_alive(run) is None
    run.events[0] |= {"hosts": [this_host()], "pid": "../../etc"}
    assert is_alive(run) is None
    assert is_alive(Run(Path("r"))) is None
