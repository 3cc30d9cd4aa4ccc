"""The points of a sweep as SLURM jobs: each with the script of a run that is submitted alone, many of a kind as one array."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megalm.errors import ConfigError, ExitCode, MegalmError, Problem, RunError, writing
from megalm.launchers.slurm import client, history
from megalm.launchers.slurm.plan import Job, check_path, job_of
from megalm.launchers.slurm.render import SCRIPT, directives, log_file, quote
from megalm.launchers.slurm.submit import ask_whether, check_folder, new_submission, say_kept_back, submit, write_script
from megalm.launchers.sweep.point import Point, failure, unique

_GREATEST = 1000  # index of an array, where the cluster's MaxArraySize is the usual one
Watch = Callable[[Sequence[Point]], None]


def submit_points(points: Sequence[Point], array_from: int, at_once: int) -> None:
    """Submits those that have no result and no job, and says so in their status.

    array_from: so many alike go as one array; 0: none does. at_once: of an array. Raises ConfigError with the problems of
    all points before any is submitted.
    """
    waiting = [point for point in unique(points) if point.status == "waiting"]
    waiting = [point for point in waiting if not _has_job(point)]
    if array_from and waiting:
        check_path(_root(waiting[0]), "hydra.sweep.dir")
    jobs = _jobs(waiting)
    alike: dict[tuple[str, ...], list[Point]] = {}
    for point in waiting:
        alike.setdefault(_wishes(jobs[point.number]), []).append(point)
    alone: list[Point] = []
    for group in alike.values():
        first = jobs[group[0].number]
        fits = first.slurm.chain <= 1 and max(point.number for point in group) <= _GREATEST
        if array_from and len(group) >= array_from and fits:
            _submit_array(group, jobs, at_once)
            continue
        alone += group
    asked: set[tuple[str, ...]] = set()  # sbatch judges the first of each kind
    for point in sorted(alone, key=lambda point: point.number):
        job = jobs[point.number]
        _submit_one(point, job, _wishes(job) not in asked)
        asked.add(_wishes(job))
    for point in unique(points):
        _say(point)
    _, secret = client.without_secrets(os.environ)
    say_kept_back(secret if waiting else [])


def _say(point: Point) -> None:
    result = point.result()
    value = f", {result.metric} {result.value:.4f} at step {result.step}" if result is not None else ""
    words = [point.status, *["before"] * point.before, *[point.note] * bool(point.note)]
    print(f"point {point.number}: {' '.join(words)}{value}; {point.folder}", flush=True)


def _has_job(point: Point) -> bool:
    """Whether a job of an earlier start is still there; notes it."""
    alive = [job for job in history.jobs_of(point.folder) if client.state_of(job) in client.LIVE]
    if alive:
        point.status, point.note = "submitted", f"before, job {alive[0]}"
    return bool(alive)


def _jobs(points: Sequence[Point]) -> dict[int, Job]:
    """{number: its job}. Raises ConfigError with every problem of every point."""
    jobs: dict[int, Job] = {}
    problems: list[Problem] = []
    for point in points:
        try:
            # the job's ranks must not submit it once more, where a yaml file says that it is for SLURM
            jobs[point.number] = job = job_of("pretrain", [*point.arguments, "cluster.name=local"], point.config)
            job.slurm.job_name = f"{job.slurm.job_name}-{point.number}"
            check_folder(job)
        except ConfigError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        raise ConfigError(*problems)
    return jobs


def _wishes(job: Job) -> tuple[str, ...]:
    """What sbatch is asked for, apart from names."""
    return tuple(line for line in directives(job) if not line.startswith(("--output=", "--job-name=")))


def _submit_one(point: Point, job: Job, ask: bool) -> None:
    try:
        done = submit(job, ask=ask)
    except MegalmError as error:
        point.status, point.note, point.error = "failed", "not submitted", error
        return
    point.status, point.note = "submitted", f"job {' '.join(done.jobs)}"


def _submit_array(points: list[Point], jobs: dict[int, Job], at_once: int) -> None:
    """One job whose elements are the points; each runs its own script, which can be submitted alone later."""
    first, root = jobs[points[0].number], _root(points[0])
    for point in points:
        write_script(jobs[point.number], new_submission())
    script = root / f"array-{points[0].number}.sh"
    numbers = ",".join(str(point.number) for point in points) + (f"%{at_once}" if at_once else "")
    name = first.slurm.job_name.rpartition("-")[0]
    lines = [f"--job-name={name}", f"--array={numbers}", f"--output={quote(log_file(root, '%A_%a', '%a'))}", *_wishes(first)]
    text = ["#!/bin/bash", *(f"#SBATCH {line}" for line in lines), ""]
    text += ["set -euo pipefail", f"exec bash {shlex.quote(str(root))}/\"$SLURM_ARRAY_TASK_ID\"/{SCRIPT}", ""]
    with writing(script):
        script.write_text("\n".join(text), encoding="utf-8")
    environ, _ = client.without_secrets(os.environ)
    ask_whether(first, script, environ)
    number = client.sbatch(script, environ)
    for point in points:
        key = f"{number}_{point.number}"
        history.hold(point.folder, [key], socket.gethostname())
        point.status, point.note = "submitted", f"job {key}"


def _root(point: Point) -> Path:
    return point.place.parent


def wait_for(points: Sequence[Point], seconds: float, watch: Watch | None = None) -> None:
    """Until the jobs of all points have ended. A job that SLURM knows no more has ended too: nobody waits for ever."""
    pending = [point for point in unique(points) if point.status == "submitted"]
    while pending:
        for point in list(pending):
            if not any(_state(job) in client.LIVE for job in history.jobs_of(point.folder)):
                pending.remove(point)
                _close(point)
                _say(point)
        if watch is not None:
            watch(unique(points))
        if pending:
            time.sleep(seconds)


def _state(job: str) -> str:
    """PENDING while the controller does not answer: it may be restarting."""
    with suppress(RunError):
        return client.state_of(job)
    return "PENDING"


def _close(point: Point) -> None:
    result = point.result()
    if result is not None:
        point.status, point.note = result.status, ""
        return
    said = f"its job ended without a result ({', '.join(history.jobs_of(point.folder))})"
    point.status, point.note, point.error = "failed", said, failure(point, said, ExitCode.FAILED)
