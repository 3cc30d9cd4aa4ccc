"""Workers that are forked from a warm process instead of started as a new Python: for many short runs on CPUs.

A new Python imports torch and DeepSpeed for seconds before it runs its first line; a fork has them. What then runs is the
same: `python -m module arguments...`, with the environment, the log file and the exit code of a process of its own.

The parent of all forks is a server (multiprocessing's fork server) that imports and never computes, so it has no threads
that a fork would lose. CUDA does not survive a fork: runs on GPUs start their ranks in the ordinary way.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megalm.parallel.workers import be_worker


class ForkedWorker:
    """One rank's process, with the methods of `subprocess.Popen` that the launcher uses."""

    def __init__(self, run: Callable[[], None], preload: Sequence[str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))  # heeded at the first fork that this process asks for
        self.process = context.Process(target=run)
        with _without_main():
            self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None, "it has been started"
        return self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked worker", timeout or 0.0)
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()


@contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing would import the launcher's main module again in every fork, which here has one of its own."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class Fork:
    """Starts workers by fork (see `workers.Starter`).

    `preload`: modules that the server imports once. `first`: what every fork calls before it runs.
    """

    def __init__(self, preload: Sequence[str], first: Sequence[Callable[[], None]] = ()):
        self.preload, self.first = preload, tuple(first)

    def __call__(self, module: str, arguments: Sequence[str], environ: dict[str, str], log_file: Path | None) -> ForkedWorker:
        return ForkedWorker(_Run(module, list(arguments), environ, log_file, self.first), self.preload)


class _Run:
    """In the fork: what `python -m module arguments...` does. A class, because the fork server gets it pickled."""

    def __init__(
        self,
        module: str,
        arguments: list[str],
        environ: dict[str, str],
        log_file: Path | None,
        first: tuple[Callable[[], None], ...],
    ):
        self.module, self.arguments, self.environ, self.log_file, self.first = module, arguments, environ, log_file, first

    def __call__(self) -> None:
        os.setsid()
        be_worker()
        if self.log_file is not None:
            file = os.open(self.log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.close(file)
        os.environ.clear()
        os.environ.update(self.environ)
        sys.argv = [self.module, *self.arguments]
        if "torch" in sys.modules:  # it has read OMP_NUM_THREADS already, when the server imported it
            sys.modules["torch"].set_num_threads(int(self.environ["OMP_NUM_THREADS"]))
        for prepare in self.first:
            prepare()
        runpy.run_module(self.module, run_name="__main__", alter_sys=True)
