"""What a job's supervisor knows: where it runs, which signals have come, how its tasks ended."""

from __future__ import annotations

import json
import os
import secrets
import signal
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.errors import ConfigError, ExitCode, Problem
from megalm.launchers.slurm import client
from megalm.runfolder import note_event

_EARLY_SECONDS = 90.0  # SLURM sends a signal up to a minute before it is due; and the job had begun before the supervisor


class Wishes:
    """Signals that have come: noted here, acted on in the loop that waits for srun."""

    def __init__(self) -> None:
        self.save = 0.0  # when the first USR1 came, by the monotonic clock; 0: none did
        self.end = 0.0  # when the first TERM came
        self.began = time.monotonic()
        signal.signal(signal.SIGUSR1, self._note)
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: object) -> None:
        if number == signal.SIGUSR1:
            self.save = self.save or time.monotonic()
        else:
            self.end = self.end or time.monotonic()

    @property
    def any(self) -> bool:
        return bool(self.save or self.end)

    def is_time_limit(self, seconds: float, early: float) -> bool:
        """Whether the first one came at the end of the job's time, and not by preemption.

        seconds: of the job in all, where an older SLURM does not say when it ends. early: so long before it USR1 is sent.
        """
        said = os.environ.get("SLURM_JOB_END_TIME", "")
        end = time.monotonic() + float(said) - time.time() if said.isdigit() else self.began + seconds
        first = min((when for when in (self.save, self.end) if when), default=0.0)
        return first > end - early - _EARLY_SECONDS


@dataclass
class Here:
    """This start of the job, as SLURM describes it."""

    job_id: str
    key: str  # as scontrol takes it
    restart: int
    nodes: list[str]
    partition: str
    log_dir: Path = field(default_factory=Path)
    token: str = field(default_factory=lambda: secrets.token_hex(16))  # of this start's connections, in the environment only

    def port(self, which: int) -> int:
        """Below the ports that Linux hands out (32768). It moves with each start: the last one's may still be held."""
        return (20000, 26000)[which] + (int(self.job_id) * 16 + self.restart * 64) % 5900


def say(text: str) -> None:
    """To the job's own log, unbuffered. A disk without room for a line of it must not end the supervisor, or change its code."""
    with suppress(OSError):
        os.write(1, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n".encode())


def note(run_dir: Path, kind: str, **details: Any) -> None:
    """To the run's events, if there is room."""
    with suppress(OSError):
        note_event(run_dir, kind, **details)


def look_around() -> Here:
    """Raises ConfigError outside of a job."""
    if "SLURM_JOB_NODELIST" not in os.environ:
        rule = "this runs inside a SLURM job"
        fix = "sbatch slurm/run.sbatch VERB ..., or megalm slurm submit VERB ..."
        raise ConfigError(Problem("SLURM_JOB_NODELIST", None, rule, "", fix))
    environ = os.environ
    nodes = client.hostnames(environ["SLURM_JOB_NODELIST"])
    restart = int(environ.get("SLURM_RESTART_COUNT", "0"))
    return Here(environ["SLURM_JOB_ID"], client.job_key(), restart, nodes, environ.get("SLURM_JOB_PARTITION", ""))


def name_of(code: int) -> str:
    """An exit code in words."""
    known = {int(value): value.name for value in ExitCode}
    return f"{known.get(code, 'exit code')} ({code})"


def read_notes(log_dir: Path) -> list[dict[str, Any]]:
    """How each task ended, as it noted itself: {"task", "host", "code", "time", "step"}."""
    notes = []
    for path in sorted(log_dir.glob("exit-*.json")):
        try:
            notes.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):  # half written
            continue
    return notes


def first_error(log_dir: Path) -> str:
    """What the first rank that failed has said, in a few lines; empty where none could say anything."""
    notes = []
    for path in log_dir.glob("error-rank-*.json"):
        try:
            notes.append(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    if not notes:
        return ""
    first = min(notes, key=lambda note: note["time"])
    problems = [str(Problem(**problem)) for problem in first["problems"]]
    return "\n".join([f"{first['kind']} on rank {first['rank']}:", *problems])
