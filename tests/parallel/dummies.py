"""Ranks that are small programs without torch, with real heartbeats, for tests of what watches them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from megalm.errors import ExitCode
from megalm.parallel.agent import Lead, Policy
from megalm.parallel.agent_link import Peers
from megalm.parallel.signals import StopRequest
from megalm.parallel.squad import Squad, process_state
from megalm.parallel.verdict import Patience
from megalm.runfolder import read_events

WORKER = '''
import json, os, signal, sys, time
from pathlib import Path
from megalm.parallel.heartbeat_file import HeartbeatFile
from megalm.parallel.workers import free_port, note_error

rank, what, run_dir = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])
attempt = os.environ["MEGALM_ATTEMPT"]
beat = HeartbeatFile(Path(os.environ["MEGALM_HEARTBEAT"]))
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
signal.signal(signal.SIGUSR2, lambda *_: Path(os.environ["MEGALM_LAUNCHER"], f"stacks-rank-{rank}.txt").touch())


def tell(name, text):
    (run_dir / f"new-{name}").write_text(text)
    (run_dir / f"new-{name}").rename(run_dir / name)  # whoever sees it can read it whole


me = {"pid": os.getpid(), "port": os.environ["MASTER_PORT"], "world": os.environ["WORLD_SIZE"]}
tell(f"start-{attempt}-{rank}", json.dumps(me))
row, first = beat.add_group("data 0-1"), attempt.endswith(".0")
if what == "children":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    tell(f"child-{rank}", str(child.pid))
for step in range(1, 3000):  # a minute
    beat.enter(row, b"all_reduce")
    time.sleep(0.02)
    beat.leave()
    beat.say("start" if what == "refused" else "train", step, 0.02)
    if rank == 1 and step == (1 if what == "refused" else 20 if what == "refused-later" else 10):
        if what == "kill" and first or what == "always":
            os.kill(os.getpid(), signal.SIGKILL)
        if what in ("stop", "stop-always") and (first or what == "stop-always"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "hang" and first:
            time.sleep(300)
        if what in ("refused", "hopeless", "refused-later"):
            from megalm.errors import ConfigError, HopelessError, Problem
            error = {"refused": ConfigError, "hopeless": HopelessError}.get(what, ConfigError)(Problem("a.b", 1, "must be 2"))
            note_error(error)
            sys.exit(error.exit_code)
    if rank != 1 and step == 11 and (what in ("kill", "stop", "hang") and first or what in ("always", "stop-always")):
        beat.enter(row, b"all_reduce")
        time.sleep(300)  # for rank 1
    if asked and what == "deaf":
        tell(f"asked-{rank}", "")
    elif asked:
        sys.exit(75)
    if step == 30 and what not in ("children", "long", "deaf"):
        sys.exit(0)
'''


def lead(squad: Squad, run_dir: Path, restarts: int = 0, seconds: float = 1.0, stop: StopRequest | None = None) -> ExitCode:
    policy = Policy(run_dir, restarts, Patience(seconds, 30.0, 30.0), 30.0, job_attempt="4")
    return Lead(squad, policy, Peers(), stop or StopRequest()).run()


def pids(run_dir: Path) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in run_dir.glob("start-*")]


def alive(numbers: list[int]) -> list[int]:
    return [pid for pid in numbers if process_state(pid) not in ("", "Z")]


def kinds(run_dir: Path) -> list[str]:
    return [event["kind"] for event in read_events(run_dir)]


def wait_for(what: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
