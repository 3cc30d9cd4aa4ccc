"""However an agent ends, nobody is left behind: not its ranks, not what they have started, no file. By the process table."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megalm.errors import ExitCode
from megalm.parallel import squad as squad_module
from megalm.parallel.squad import Squad
from tests.parallel.dummies import alive, pids, wait_for

AGENT = """
import os, sys
from pathlib import Path
from megalm.parallel.agent import Lead, Policy
from megalm.parallel.agent_link import Peers
from megalm.parallel.signals import StopRequest
from megalm.parallel.squad import Squad
run_dir = Path(sys.argv[1])
squad = Squad("dummy_ranks.worker", [sys.argv[2], str(run_dir)], run_dir / "logs", dict(os.environ), 0, 2, 2, True)
with StopRequest() as stop:
    sys.exit(Lead(squad, Policy(run_dir), Peers(), stop).run())
"""


@pytest.fixture
def agent(squad, tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen]]:
    """agent("children"): a process that supervises two ranks, which are there; ended with the test."""
    started: list[subprocess.Popen] = []

    def start(what: str) -> subprocess.Popen:
        words = [sys.executable, "-c", AGENT, str(tmp_path), what]
        started.append(subprocess.Popen(words, env=squad(what).environ, start_new_session=True))
        wait_for(lambda: len(pids(tmp_path)) == 2 and (what != "children" or len(children(tmp_path)) == 2))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def children(run_dir: Path) -> list[int]:
    """What the ranks have started, as a loader of data starts workers."""
    return [int(path.read_text()) for path in run_dir.glob("child-*")]


def of_session(pid: int) -> list[int]:
    """Processes whose parent is `pid`: its ranks and its guard."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_nobody_outlives_an_agent_that_is_killed(number: int, agent, tmp_path: Path) -> None:
    """It can do nothing any more: the kernel ends its ranks, and its guard what they have started."""
    memory = set(os.listdir("/dev/shm"))
    process = agent("children")
    everybody = [*of_session(process.pid), *children(tmp_path)]
    assert len(everybody) == 5 and sorted(alive(everybody)) == sorted(everybody)
    environ = dict(word.split("=", 1) for word in Path(f"/proc/{pids(tmp_path)[0]}/environ").read_text().split("\0") if word)
    beat = Path(environ["MEGALM_HEARTBEAT"])
    assert beat.stat().st_nlink == 0, "it has no name, so nobody need delete it"
    os.kill(process.pid, number)
    process.wait()
    wait_for(lambda: not alive(everybody))
    assert not beat.exists() and not [name for name in set(os.listdir("/dev/shm")) - memory if name.startswith("megalm-")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_nobody_outlives_an_agent_that_is_asked_to_stop(number: int, agent, tmp_path: Path) -> None:
    process = agent("children")
    everybody = [*of_session(process.pid), *children(tmp_path)]
    process.send_signal(number)
    assert process.wait(60) == ExitCode.SAVED
    wait_for(lambda: not alive(everybody))


def test_a_second_interrupt_ends_at_once(agent, tmp_path: Path) -> None:
    """Also ranks that do not heed the first."""
    process = agent("deaf")
    everybody = of_session(process.pid)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: len(list(tmp_path.glob("asked-*"))) == 2)
    assert process.poll() is None and len(alive(everybody)) == 3
    process.send_signal(signal.SIGINT)
    assert process.wait(60) not in (ExitCode.FINISHED, ExitCode.SAVED)
    wait_for(lambda: not alive(everybody))


def test_no_child_outlives_its_rank(squad: Callable[[str], Squad], tmp_path: Path) -> None:
    ranks = squad_module.Ranks(squad("children"), "0.0", "127.0.0.1", 1)
    wait_for(lambda: len(children(tmp_path)) == 2)
    left = children(tmp_path)
    assert len(alive(left)) == 2
    ranks.kill()
    wait_for(lambda: not alive(left))


def test_a_guard_that_is_gone_harms_nobody(squad: Callable[[str], Squad], tmp_path: Path) -> None:
    guard = squad_module.Guard()
    guard._shell.kill()
    guard._shell.wait()
    guard.add(1)
    guard.dismiss()
