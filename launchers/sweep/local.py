"""The points of a sweep on this machine: each a process of its own, a few at a time, and a table of how they do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megalm.config.machine import count_gpus, uses_cuda
from megalm.errors import ConfigError, ExitCode, Problem
from megalm.launchers.sweep.point import Point, failure, unique
from megalm.launchers.sweep.table import Table
from megalm.observe.words import clean
from megalm.parallel.signals import StopRequest
from megalm.parallel.workers import ends_with_parent

CONSOLE = "console.log"
_WORDS = 4  # lines of the console that are shown of a point that failed
_LOOK_SECONDS, _SAVE_SECONDS = 0.25, 120.0
Watch = Callable[[Sequence[Point]], None]


@dataclass
class _Running:
    point: Point
    process: subprocess.Popen[bytes]
    place: int  # which share of the machine it has


@dataclass
class Pool:
    """Runs points, `jobs` at a time."""

    points: list[Point]
    jobs: int
    running: list[_Running] = field(default_factory=list)

    def start_next(self) -> None:
        """Fill the free places with points that wait."""
        waiting: Iterator[Point] = (point for point in self.points if point.status == "waiting")
        taken = {run.place for run in self.running}
        for place in (place for place in range(self.jobs) if place not in taken):
            point = next(waiting, None)
            if point is None:
                return
            self.running.append(_Running(point, _start(point, place, self.jobs), place))
            point.status = "running"

    def collect(self) -> None:
        """Note those that have ended."""
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            _close(run.point, int(run.process.returncode))

    def end(self, number: int) -> None:
        """Send a signal to each point; SIGKILL goes to all that it has started too."""
        for run in self.running:
            with suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(run.process.pid, number)
                else:
                    run.process.send_signal(number)


def run_points(points: Sequence[Point], jobs: int, table: str, watch: Watch | None = None) -> None:
    """Runs those that have no result yet, until all have ended; their status says how.

    jobs: at a time, 0: what fits. watch: called at every look. Raises KeyboardInterrupt after Ctrl-C or TERM, when all the
    points have saved and ended; a second Ctrl-C kills them.
    """
    own = unique(points)
    pool = Pool(own, jobs or places(own))
    with StopRequest() as stop, Table(own, table) as shown:
        try:
            while any(point.status == "waiting" for point in own) or pool.running:
                if stop.signal:
                    _stop(pool, shown)
                    raise KeyboardInterrupt
                pool.start_next()
                time.sleep(_LOOK_SECONDS)
                pool.collect()
                if watch is not None:
                    watch(own)
                shown.show()
        except BaseException:
            pool.end(signal.SIGKILL)
            for run in pool.running:
                run.process.wait()
            raise


def _stop(pool: Pool, shown: Table) -> None:
    """Asks all to save and end, and waits for them."""
    pool.end(signal.SIGTERM)
    begun, asked = time.monotonic(), time.monotonic()
    while pool.running and time.monotonic() < begun + _SAVE_SECONDS:
        if time.monotonic() > asked + 1:  # one that was just starting did not listen yet
            pool.end(signal.SIGTERM)
            asked = time.monotonic()
        time.sleep(_LOOK_SECONDS)
        pool.collect()
        shown.show()


def places(points: Sequence[Point]) -> int:
    """How many points this machine has room for at a time: by its GPUs, or where they use none by its cores."""
    ranks = max((point.config.cluster.num_processes for point in points), default=1)
    on_gpus = any(uses_cuda(point.config) for point in points)
    size = count_gpus() if on_gpus else len(os.sched_getaffinity(0))
    return max(1, min(size // max(1, ranks), len(points)))


def _start(point: Point, place: int, jobs: int) -> subprocess.Popen[bytes]:
    """Its process, in a process group of its own: Ctrl-C reaches the sweep alone, which then asks."""
    command = command_of(point)
    cluster, environ = point.config.cluster, dict(os.environ)
    if not cluster.threads and jobs > 1:
        cores = len(os.sched_getaffinity(0)) // (jobs * max(1, cluster.num_processes))
        command.append(f"cluster.threads={max(1, cores)}")
    if uses_cuda(point.config) and jobs > 1:
        environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus_of(place, jobs))
    with open(point.folder / CONSOLE, "ab") as console:
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=ends_with_parent,
        )


def command_of(point: Point) -> list[str]:
    """What runs a point here."""
    return [sys.executable, "-m", "megalm.launchers.cli", "pretrain", *point.arguments]


def gpus_of(place: int, jobs: int) -> list[str]:
    """The names of the GPUs that a place has to itself. Raises ConfigError if there are more places than GPUs."""
    count = count_gpus()
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    each = count // jobs
    if not each:
        rule = "every point that runs at the same time needs a GPU of its own"
        raise ConfigError(Problem("hydra.launcher.jobs", jobs, rule, f"1 to {count}", f"hydra.launcher.jobs={count}"))
    return names[place * each : (place + 1) * each]


def _close(point: Point, code: int) -> None:
    """Its status, by how its process ended and what it left behind."""
    result: Any = point.result()
    if code == ExitCode.FINISHED and result is not None:
        point.status = result.status
    elif code in (ExitCode.SAVED, -signal.SIGTERM):
        point.status, point.note = "stopped", "goes on when the sweep is started again"
    else:
        said = "ended without a result.json" if code == ExitCode.FINISHED else _ended(code)
        point.status, point.note = "failed", said
        known = code in (ExitCode.REFUSED, ExitCode.HOPELESS)
        point.error = failure(point, said + _last_words(point), code if known else ExitCode.FAILED)


def _last_words(point: Point) -> str:
    """Of its console: most often they say what to mend."""
    with open(point.folder / CONSOLE, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    said = [" ".join(clean(line).split()) for line in lines if line.strip() and not line.endswith(("1 problem", "problems"))]
    words = said[-_WORDS:]
    return f'; its last words: {" / ".join(words)}' if words else ""


def _ended(code: int) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
