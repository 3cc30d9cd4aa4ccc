"""One rank's process: how it is started, and what it leaves behind for the agent that watches it. Imports no torch.

Each worker is the same command again with torchrun's environment variables set. Rank 0 keeps the console; the others
write to `logs/rank-N.log`. A worker that fails leaves a small JSON note; the agent shows the earliest one, once.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Protocol

from megalm.config.machine import launched_processes
from megalm.errors import ConfigError, MegalmError, Problem, RunError

STARTED = "--- started\n"  # separates the starts of a run in its log files
_LOWEST_PORT = 10000  # services of the machine lie below
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in linux/prctl.h
_libc = ctypes.CDLL(None)  # found before a fork, where little may be done


class Worker(Protocol):
    """One rank's process, as `subprocess.Popen` knows it, in a process group of its own."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None:
        """None while it runs, then its exit code; -9 if SIGKILL ended it."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        ...

    def kill(self) -> None: ...


Starter = Callable[[str, Sequence[str], dict[str, str], Path | None], Worker]
"""(module, arguments, environment, log file or None for the console) -> the process that runs them."""


def in_worker() -> bool:
    """Whether a launcher (torchrun, srun, or our agent) has started this process as one rank."""
    return launched_processes() > 0


def this_attempt() -> str:
    """Which start of a job this process belongs to: SLURM's restarts, and after a point the agent's restarts in place."""
    return os.environ.get("MEGALM_ATTEMPT") or os.environ.get("SLURM_RESTART_COUNT") or "0"


def this_host() -> str:
    """The node's name as the scheduler knows it, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def start_process(module: str, arguments: Sequence[str], environ: dict[str, str], log_file: Path | None) -> subprocess.Popen:
    """A new Python: `python -m module arguments...`."""
    command = [sys.executable, "-m", module, *arguments]
    with open(log_file, "a", encoding="utf-8") if log_file else nullcontext() as file:
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT if file else None,
            start_new_session=True,  # Ctrl-C reaches the agent alone, and one signal to the group ends all that it starts
            preexec_fn=be_worker,
        )


def be_worker() -> None:
    """In the new process, before its program: end with the agent, whatever ends it, and take no signal before it listens.

    The default action of USR1 and USR2 would kill a rank that is still importing; the agent asks again until it is heard.
    """
    _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def ends_with_parent() -> None:
    """In a new process, before its program: be asked to save and end when whoever started it is gone."""
    _libc.prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def make_folder(path: Path) -> None:
    """Make a folder of the run. Raises ConfigError if this user may not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no write permission")
    except OSError as error:
        rule = f"must be a folder that can be made and written ({error.strerror or error})"
        raise ConfigError(Problem("train.run_dir", path, rule, "", "train.run_dir=<a folder of yours>")) from error


def next_start(run_dir: Path) -> str:
    """What the next start of a run would do."""
    latest = run_dir / "checkpoints" / "latest"
    return f"resumes from {latest.read_text().strip()}" if latest.is_file() else "starts anew: nothing was saved yet"


def note_error(error: BaseException) -> None:
    """In a worker: leave the note that the agent shows; does nothing under torchrun or srun."""
    folder = os.environ.get("MEGALM_LAUNCHER")
    if folder is None:
        return
    trace = ""
    if not isinstance(error, MegalmError):
        trace = "".join(traceback.format_exception(error))
        error = _unexpected(error, folder)
    note = {
        "traceback": trace,
        "rank": int(os.environ["RANK"]),
        "time": time.time(),
        "kind": error.kind,
        "exit_code": error.exit_code,
        "problems": [{**vars(p), "value": p.value if p.value is None else str(p.value)} for p in error.problems],
    }
    path = Path(folder) / f"error-rank-{os.environ['RANK']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(note))
    path.with_suffix(".tmp").rename(path)


def _unexpected(error: BaseException, folder: str) -> RunError:
    """What the launcher shows of an exception that is not a user's mistake: its first line and where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"raised at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    first_line = (str(error).splitlines() or [""])[0]
    fix = f"read the traceback above; {folder} holds each rank's log"
    return RunError(Problem(type(error).__name__, first_line, "a worker must not fail", where, fix))


def free_port(port: int = 0, address: str = "127.0.0.1") -> int:
    """`port` if it is free; for 0 one that stays free until rank 0 has imported torch, and listens. ConfigError if it is taken.

    That is seconds: a port of the range that the kernel gives to outgoing connections may be gone by then.
    """
    candidates = [port] if port else [*random.SystemRandom().sample(range(_LOWEST_PORT, _lowest_outgoing_port()), 20), 0]
    for candidate in candidates:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a run that has just ended is free
            try:
                probe.bind((address, candidate))
                return probe.getsockname()[1]
            except OSError as error:
                reason = error.strerror
    rule = f"the rendezvous port must be free on this machine ({reason})"
    raise ConfigError(Problem("cluster.port", port, rule, "a free port; 0: any", "cluster.port=0"))


def _lowest_outgoing_port() -> int:
    """Where the kernel's own range begins; Linux's default if it does not say, or leaves no room below."""
    try:
        lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        lowest = 0
    return lowest if lowest > _LOWEST_PORT + 1000 else 32768


def tail_of(path: Path, lines: int = 5) -> str:
    """The last lines of a log file, in one line."""
    if not path.exists():
        return ""
    of_this_start = path.read_text(encoding="utf-8", errors="replace").rpartition(STARTED)[2]
    return " | ".join(of_this_start.splitlines()[-lines:])
