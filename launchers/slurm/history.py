"""What a job remembers between its starts, and who holds a run's folder: small JSON files in RUN_DIR/slurm.

    holder.json                the jobs that may write this run
    history-SUBMISSION.json    starts and failures of one submission: a job, or all jobs of its chain
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError, Problem, writing
from megalm.runfolder import read_progress, replace_file

FOLDER, _HOLDER, _LOCK = "slurm", "holder.json", ".lock"
_LOCK_SECONDS = 60


@dataclass
class History:
    """Of one submission."""

    starts: int = 0
    failures: int = 0  # in a row without a new checkpoint
    saved_step: int = 0  # when the present start began
    running: bool = False  # a start has begun and has not said how it ended: its node was lost
    excluded: list[str] = field(default_factory=list)
    verdict: int | None = None  # the exit code of the end, for the jobs of the chain that come after it
    ended_by: str = ""  # the job that ended so


def saved_step(run_dir: Path) -> int:
    """Of the newest complete checkpoint; 0 where there is none."""
    progress = read_progress(run_dir)
    return progress.saved_step if progress else 0


def read_history(run_dir: Path, submission: str) -> History:
    values = _read(run_dir / FOLDER / f"history-{submission}.json")
    known = {name: values[name] for name in asdict(History()) if name in values}
    return History(**known)


def write_history(run_dir: Path, submission: str, history: History) -> None:
    _write(run_dir / FOLDER / f"history-{submission}.json", asdict(history))


def begin(history: History, run_dir: Path) -> None:
    """Note a new start. One before it that never said how it ended has failed, if nothing was saved since."""
    now = saved_step(run_dir)
    if history.running:
        history.failures = 0 if now > history.saved_step else history.failures + 1
    history.starts += 1
    history.saved_step, history.running = now, True


@contextmanager
def folder_lock(run_dir: Path) -> Iterator[None]:
    """Between looking at who holds a run and writing that we do. Raises RunError where the folder cannot be written."""
    folder = run_dir / FOLDER
    with writing(run_dir):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "a", encoding="utf-8")  # noqa: SIM115  closed below
    try:
        for _ in range(10 * _LOCK_SECONDS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # some network file systems have no locks
                break
        yield
    finally:
        file.close()


def check_holder(run_dir: Path, mine: Sequence[str], is_alive: Callable[[str], bool]) -> None:
    """Raises ConfigError if a job that is alive holds the folder. `mine`: jobs that may."""
    holder = _read(run_dir / FOLDER / _HOLDER)
    others = [job for job in map(str, holder.get("jobs", [])) if job not in mine and is_alive(job)]
    if others:
        said = f"job {', '.join(others)} of {holder.get('user', '?')}, submitted on {holder.get('host', '?')}"
        rule = f"another job writes this run: {said}"
        fix = f"another train.run_dir, or scancel {others[0]}"
        raise ConfigError(Problem("train.run_dir", run_dir, rule, "", fix))


def hold(run_dir: Path, jobs: Sequence[str], host: str) -> None:
    """Write that these jobs write the run from now on."""
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # in a container
        user = str(os.getuid())
    _write(run_dir / FOLDER / _HOLDER, {"jobs": list(jobs), "user": user, "host": host, "time": time.time()})


def jobs_of(run_dir: Path) -> list[str]:
    """The jobs that were last submitted for a run."""
    return [str(job) for job in _read(run_dir / FOLDER / _HOLDER).get("jobs", [])]


def take_up(run_dir: Path, submission: str, job: str) -> tuple[History, int | None]:
    """What `job` goes on with, and the exit code if there is nothing left to do: an earlier job of its chain has ended.

    A script that is submitted again by hand, or requeued by hand after its end, begins anew.
    """
    history, held = read_history(run_dir, submission), jobs_of(run_dir)
    if job not in held:
        return History(), None
    if history.ended_by and history.ended_by != job:
        return history, history.verdict
    if history.ended_by:
        return History(excluded=history.excluded), None
    return history, None


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _write(path: Path, values: dict[str, Any]) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(values) + "\n")
