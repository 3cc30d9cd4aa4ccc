"""The ranks of a run on this node: started, looked at, asked for their stacks, killed. No torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.parallel.heartbeat_file import Pulse, Slate
from megalm.parallel.verdict import RankStatus
from megalm.parallel.workers import STARTED, Starter, Worker, start_process, tail_of, this_host

GAP_SECONDS = 3.0  # if the agent itself did not run for so long, it was suspended, and its ranks with it
LOOK_SECONDS = 0.5  # between two looks at the heartbeats; exit codes are looked at each time
_DEATH_SECONDS = 10.0  # after SIGKILL; a process that waits for a device may take longer


@dataclass(frozen=True)
class Squad:
    """What to start on this node."""

    module: str  # each worker is `python -m module arguments...`
    arguments: Sequence[str]
    log_dir: Path
    environ: dict[str, str]  # of every worker, without what its rank and attempt add
    first_rank: int
    num_ranks: int  # here
    world_size: int
    quiet: bool = False  # rank 0's console goes to its log file too
    start: Starter = start_process


class Guard:
    """A shell that outlives a killed agent by a moment, to end what its ranks have started.

    The ranks die with the agent, by its death signal (be_worker); their children would not. It waits for the end of its input.
    """

    _SCRIPT = 'g=; while read -r p; do g="$g -$p"; done; [ -z "$g" ] || kill -s KILL -- $g'

    def __init__(self) -> None:
        command, nowhere = ["/bin/sh", "-c", self._SCRIPT], subprocess.DEVNULL
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": nowhere, "stderr": nowhere}
        self._shell = subprocess.Popen(command, env={}, start_new_session=True, **pipes)

    def add(self, group: int) -> None:
        """A process group to be ended."""
        assert self._shell.stdin is not None
        with suppress(OSError):  # somebody has killed it: the ranks still die with the agent
            os.write(self._shell.stdin.fileno(), f"{group}\n".encode())

    def dismiss(self) -> None:
        """All groups have been ended."""
        self._shell.kill()
        self._shell.wait()
        assert self._shell.stdin is not None
        self._shell.stdin.close()


class Ranks:
    """One start of a squad."""

    def __init__(self, squad: Squad, attempt: str, address: str, port: int):
        """Start them. Those that have been started are ended if one cannot be."""
        self.squad, self.host = squad, this_host()
        self.numbers = range(squad.first_rank, squad.first_rank + squad.num_ranks)
        self.workers: list[Worker] = []
        self.slates: dict[int, Slate] = {}
        self.guard = Guard()
        for rank in self.numbers:
            error_note(squad.log_dir, rank).unlink(missing_ok=True)
        common = {**squad.environ, "MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(squad.world_size)}
        common |= {"MEGALM_LAUNCHER": str(squad.log_dir), "MEGALM_ATTEMPT": attempt}
        try:
            for place, rank in enumerate(self.numbers):
                slate = self.slates[rank] = Slate(f"megalm-rank-{rank}")
                mine = {"RANK": str(rank), "LOCAL_RANK": str(place), "MEGALM_HEARTBEAT": str(slate.path)}
                log_file = self._log_file(rank) if rank > 0 or squad.quiet else None
                self.workers.append(squad.start(squad.module, squad.arguments, {**common, **mine}, log_file))
                self.guard.add(self.workers[-1].pid)
        except BaseException:
            self.kill()
            raise
        now = time.monotonic()
        self.seen = dict.fromkeys(self.numbers, (0, now))  # beats, and when they were new
        self.looked = self.last_look = 0.0
        self.pulses = dict.fromkeys(self.numbers, Pulse())

    def codes(self) -> list[int | None]:
        """Exit codes; None: it runs."""
        return [worker.poll() for worker in self.workers]

    def statuses(self, fresh: bool = False) -> list[RankStatus]:
        """What is to be known of every rank. Heartbeats are read twice a second, or now if they must be `fresh`."""
        now = time.monotonic()
        if self.looked and now - self.looked > GAP_SECONDS:
            gap = now - self.looked
            self.seen = {rank: (beats, when + gap) for rank, (beats, when) in self.seen.items()}
        self.looked = now
        if fresh or now - self.last_look >= LOOK_SECONDS:
            self.last_look = now
            for rank in self.numbers:
                pulse = self.pulses[rank] = self.slates[rank].read()
                if pulse.beats != self.seen[rank][0]:
                    self.seen[rank] = (pulse.beats, now)
        return [self._status(rank, worker, now) for rank, worker in zip(self.numbers, self.workers, strict=True)]

    def _status(self, rank: int, worker: Worker, now: float) -> RankStatus:
        code, idle = worker.poll(), now - self.seen[rank][1]
        if code is None:
            return RankStatus(rank, self.host, worker.pid, None, process_state(worker.pid), idle, self.pulses[rank])
        note, tail = None, ""
        with suppress(OSError, ValueError):
            note = json.loads(error_note(self.squad.log_dir, rank).read_text())
        if note is None and code:
            tail = tail_of(self.squad.log_dir / f"rank-{rank}.log")
        return RankStatus(rank, self.host, worker.pid, code, "", idle, self.pulses[rank], note, tail)

    def ask_to_stop(self) -> None:
        """Tell every rank; more than once does no harm."""
        _send(self.workers, signal.SIGUSR1)

    def dump_stacks(self) -> None:
        """Every rank that can writes its stacks to the log folder."""
        _send(self.workers, signal.SIGUSR2)

    def kill(self) -> None:
        """No process of any rank is left, nor any that it has started in its process group."""
        for worker in self.workers:
            with suppress(OSError):
                os.killpg(worker.pid, signal.SIGKILL)
            if worker.poll() is None:  # a fork that has not come to make its group
                worker.kill()
        deadline = time.monotonic() + _DEATH_SECONDS
        for worker in self.workers:
            with suppress(subprocess.TimeoutExpired):
                worker.wait(max(0.1, deadline - time.monotonic()))
        self.guard.dismiss()
        for slate in self.slates.values():
            slate.close()

    def _log_file(self, rank: int) -> Path:
        """Where a rank's console goes, with a line that separates this start from earlier ones."""
        path = self.squad.log_dir / f"rank-{rank}.log"
        with open(path, "a", encoding="utf-8") as file:
            file.write(STARTED)
        return path


def passing_on_dumps(start: Starter = start_process) -> Starter:
    """`start`; and from now on a USR2 that this process gets is for all whom it has started: they write their stacks."""
    workers: list[Worker] = []

    def start_and_remember(module: str, arguments: Sequence[str], environ: dict[str, str], log_file: Path | None) -> Worker:
        workers.append(start(module, arguments, environ, log_file))
        return workers[-1]

    signal.signal(signal.SIGUSR2, lambda *_: _send(workers, signal.SIGUSR2))
    return start_and_remember


def _send(workers: Sequence[Worker], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            with suppress(OSError):
                os.kill(worker.pid, number)


def error_note(log_dir: Path, rank: int) -> Path:
    """Where a worker says of what it died."""
    return log_dir / f"error-rank-{rank}.json"


def process_state(pid: int) -> str:
    """A letter, as in /proc/PID/stat; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
