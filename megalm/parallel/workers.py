"""Start a run's processes on this machine, watch them, and end all when one dies. Imports no torch.

Each worker is the same command again with torchrun's environment variables set. Rank 0 keeps the console; the others
write to `logs/rank-N.log`. A worker that fails leaves a small JSON note; the launcher shows the earliest one, once.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from megalm.config.machine import launched_processes, processes
from megalm.config.run import RunConfig
from megalm.errors import ConfigError, MegalmError, Problem, RunError

_POLL_SECONDS = 0.05
_NOTE_SECONDS = 1.0  # how long to wait for other workers' notes, so that the cause is shown and not its echo
_STARTED = "--- started\n"  # separates the starts of a run in its log files
_GRACE_SECONDS = 3.0  # between SIGTERM and SIGKILL


class Worker(Protocol):
    """One rank's process, as `subprocess.Popen` knows it."""

    def poll(self) -> int | None:
        """None while it runs, then its exit code; -9 if SIGKILL ended it."""
        ...

    def wait(self, timeout: float | None = None) -> int:
        """The exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


Starter = Callable[[str, Sequence[str], dict[str, str], Path | None], Worker]
"""(module, arguments, environment, log file or None for the console) -> the process that runs them."""


def in_worker() -> bool:
    """Whether a launcher (torchrun, srun, or `start_workers`) has started this process as one rank."""
    return launched_processes() > 0


def start_process(module: str, arguments: Sequence[str], environ: dict[str, str], log_file: Path | None) -> subprocess.Popen:
    """A new Python: `python -m module arguments...`."""
    command = [sys.executable, "-m", module, *arguments]
    if log_file is None:
        return subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL)
    with open(log_file, "a", encoding="utf-8") as file:
        return subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


def start_workers(
    module: str, arguments: Sequence[str], config: RunConfig, quiet: bool = False, start: Starter = start_process
) -> None:
    """Run `python -m module arguments...` as the ranks of `config` and wait for them. Raises RunError when one fails.

    `quiet` sends rank 0's console to its log file too.
    """
    num_processes, log_dir = processes(config), Path(config.train.run_dir) / "logs"
    make_folder(log_dir)
    for note in log_dir.glob("error-rank-*.json"):
        note.unlink()
    environ = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port(config.cluster.port)),
        "WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": str(config.cluster.threads or max(1, len(os.sched_getaffinity(0)) // num_processes)),
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "MEGALM_LAUNCHER": str(log_dir),
    }
    workers: list[Worker] = []
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        for rank in range(num_processes):
            log_file = _log_file(log_dir, rank) if rank > 0 or quiet else None
            workers.append(start(module, arguments, {**environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log_file))
        _watch(workers, log_dir)
    finally:
        _end(workers)
        signal.signal(signal.SIGTERM, previous)


def make_folder(path: Path) -> None:
    """Make a folder of the run. Raises ConfigError if this user may not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no write permission")
    except OSError as error:
        rule = f"must be a folder that can be made and written ({error.strerror or error})"
        raise ConfigError(Problem("train.run_dir", path, rule, "", "train.run_dir=<a folder of yours>")) from error


def _log_file(log_dir: Path, rank: int) -> Path:
    """Where a rank's console goes, with a line that separates this start from earlier ones."""
    path = log_dir / f"rank-{rank}.log"
    with open(path, "a", encoding="utf-8") as file:
        file.write(_STARTED)
    return path


def _watch(workers: list[Worker], log_dir: Path) -> None:
    """Wait until all end well, or one does not."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code not in (None, 0)]
        if failed:
            time.sleep(_NOTE_SECONDS)
            raise _first_error(workers, failed, log_dir)
        if all(code == 0 for code in codes):
            return
        time.sleep(_POLL_SECONDS)


def _first_error(workers: list[Worker], failed: list[int], log_dir: Path) -> MegalmError:
    """The cause: a worker killed by a signal leaves no note and was first; else the earliest note."""
    for rank in failed:
        code = workers[rank].poll() or 0
        if code < 0 and not (log_dir / f"error-rank-{rank}.json").exists():  # gloo may abort after an error was noted
            name = signal.Signals(-code).name
            rule = "every worker must run to the end; all the others were ended"
            fix = f"look at {log_dir}/rank-{rank}.log; the same command again {_next_start(log_dir.parent)}"
            return RunError(Problem(f"rank {rank}", f"killed by {name}", rule, "", fix))
    notes = [json.loads(path.read_text()) for path in log_dir.glob("error-rank-*.json")]
    if not notes:
        tail = _tail(log_dir / f"rank-{failed[0]}.log")
        rule = f"every worker must run to the end; last lines of its log: {tail}"
        ended = workers[failed[0]].poll()
        return RunError(Problem(f"rank {failed[0]}", f"ended with exit code {ended}", rule, "", "megalm doctor"))
    first = min(notes, key=lambda note: note["time"])
    sys.stderr.write(first["traceback"])  # empty for a user's mistake
    error = RunError(*(Problem(**problem) for problem in first["problems"]))
    error.kind, error.exit_code = f"{first['kind']} on rank {first['rank']}", first["exit_code"]
    return error


def _next_start(run_dir: Path) -> str:
    """What the next start of a run would do."""
    latest = run_dir / "checkpoints" / "latest"
    return f"resumes from {latest.read_text().strip()}" if latest.is_file() else "starts anew: nothing was saved yet"


def note_error(error: BaseException) -> None:
    """In a worker: leave the note that the launcher shows; does nothing under torchrun or srun."""
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


def _end(workers: list[Worker]) -> None:
    """Make sure that no worker is left: ask, wait a little, kill."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def _free_port(port: int) -> int:
    """`port` if it is free, any free one if it is 0. Raises ConfigError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port of a run that has just ended is free
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            rule = f"the rendezvous port must be free on this machine ({error.strerror})"
            raise ConfigError(Problem("cluster.port", port, rule, "a free port; 0: any", "cluster.port=0")) from error
        return probe.getsockname()[1]


def _tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log file, in one line."""
    if not path.exists():
        return ""
    of_this_start = path.read_text(encoding="utf-8", errors="replace").rpartition(_STARTED)[2]
    return " | ".join(of_this_start.splitlines()[-lines:])
