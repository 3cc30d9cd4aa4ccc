"""The agent: what it thinks of its ranks, what it does when they die or hang, and that it leaves nobody behind.

The ranks here are small programs without torch, with real heartbeats; tests/train/test_restart.py has real ones.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import ExitCode, HopelessError, MegalmError, Problem, RunError
from megalm.parallel import agent as agent_module
from megalm.parallel import squad as squad_module
from megalm.parallel import verdict
from megalm.parallel.agent import Lead, Policy
from megalm.parallel.agent_link import Peers, connect
from megalm.parallel.heartbeat_file import Collective, Pulse
from megalm.parallel.signals import StopRequest
from megalm.parallel.squad import Squad, process_state
from megalm.parallel.verdict import Patience, RankStatus
from megalm.parallel.workers import free_port, note_error
from megalm.runfolder import Progress, read_events, write_progress

# --- what it thinks ---------------------------------------------------------------------------------------------------

BEAT = Pulse(10, 0.0, "train", 5, 2.0, False, 0, (Collective("data 0-1", "all_reduce", 7),))


def rank(number: int, **changes) -> RankStatus:
    return replace(RankStatus(number, f"n{number}", 100 + number, pulse=BEAT), **changes)


@pytest.mark.parametrize(
    ("phase", "longest", "own", "expected"),
    [
        ("train", 2.0, 0.0, 30.0), ("train", 20.0, 0.0, 60.0), ("train", 20.0, 7.0, 7.0),
        ("start", 2.0, 7.0, 900.0), ("save", 2.0, 7.0, 600.0), ("evaluate", 300.0, 0.0, 900.0), ("end", 2.0, 0.0, 600.0),
    ],
)  # fmt: skip
def test_how_long_it_waits(phase: str, longest: float, own: float, expected: float) -> None:
    assert Patience(own).of(replace(BEAT, phase=phase, longest_step=longest)) == expected


@pytest.mark.parametrize(
    ("ranks", "asked", "expected"),
    [
        ([rank(0), rank(1, idle=29.0)], False, "running"),
        ([rank(0), rank(1, idle=31.0)], False, "stalled"),
        ([rank(0), rank(1, idle=4.0, state="T")], False, "running"),
        ([rank(0), rank(1, idle=6.0, state="T")], False, "stalled"),
        ([rank(0, code=0), rank(1, code=0, idle=99.0)], False, "ended"),
        ([rank(0, code=75), rank(1, code=75)], True, "ended"),
        ([rank(0, code=75), rank(1)], True, "running"),
        ([rank(0, code=0), rank(1, idle=31.0)], False, "stalled"),
        ([rank(0), rank(1, code=1)], False, "failed"),
        ([rank(0), rank(1, code=-9)], True, "failed"),
        ([rank(0), rank(1, code=-signal.SIGUSR1)], True, "stopped"),
        ([rank(0), rank(1, code=-signal.SIGUSR1)], False, "failed"),
    ],
)
def test_what_it_thinks_of_them(ranks: list[RankStatus], asked: bool, expected: str) -> None:
    assert verdict.judge(ranks, Patience(), asked) == expected


def at(sequence: int, inside: bool, operation: str = "all_reduce", group: str = "data 0-2") -> Pulse:
    return replace(BEAT, inside=inside, collectives=(Collective(group, operation, sequence),))


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([rank(0, pulse=at(8, True)), rank(1, state="T", pulse=at(8, True)), rank(2, pulse=at(7, False))], [1]),
        ([rank(0, pulse=at(8, True)), rank(1, pulse=at(7, False)), rank(2, pulse=at(8, True))], [1]),
        ([rank(0, pulse=at(8, True)), rank(1, pulse=at(8, False)), rank(2, pulse=at(8, True))], [1]),
        ([rank(0, pulse=at(8, True)), rank(1, pulse=at(7, True)), rank(2, pulse=at(8, True))], [1]),
        ([rank(0, pulse=at(9, False, "batch_isend_irecv")), rank(1, idle=3.0, pulse=at(7, False, "batch_isend_irecv"))], [1]),
        ([rank(0, idle=9.0, pulse=at(8, True)), rank(1, pulse=at(8, True))], [0]),
        ([rank(0, code=0), rank(1, pulse=Pulse())], [1]),
    ],
)
def test_who_the_others_wait_for(ranks: list[RankStatus], expected: list[int]) -> None:
    assert [status.rank for status in verdict.culprits(ranks)] == expected


def test_the_report_names_all(tmp_path: Path) -> None:
    ranks = [rank(0, idle=31.5, pulse=at(8, True)), rank(1, idle=32.0, state="T", pulse=at(7, False))]
    error, guilty = verdict.stall(ranks, Patience(), "report.txt", "starts anew")
    assert guilty.rank == 1 and error.exit_code == ExitCode.FAILED and error.problems[0].value == "stopped"
    for part in ("within 5 s", "rank 1 on n1", "pid 101", "state T", "silent for 32.0 s", "all_reduce number 7 of data 0-2"):
        assert part in str(error)
    text = verdict.report("title", ranks, [1])
    assert "in    all_reduce 8 of data 0-2" in text and text.count("<--") == 1
    assert "data 0-2: rank 0: all_reduce 8, rank 1: all_reduce 7" in text


def test_a_status_survives_the_wire() -> None:
    status = rank(3, code=1, note={"time": 1.0}, tail="x")
    assert RankStatus.of_plain(status.to_plain()) == status


@pytest.mark.parametrize(("codes", "expected"), [((1, 3), 3), ((2, 1), 2), ((1, 1), 1), ((3, 2), 3), ((75, 9), 1)])
def test_the_exit_code_that_forbids_a_restart_wins(codes: tuple[int, int], expected: int) -> None:
    error, _ = verdict.failure([rank(i, code=code) for i, code in enumerate(codes)], "logs", "starts anew")
    assert error.exit_code == expected


# --- what it does -----------------------------------------------------------------------------------------------------

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
with open(run_dir / f"start-{attempt}-{rank}", "w") as file:
    file.write(json.dumps({"pid": os.getpid(), "port": os.environ["MASTER_PORT"], "world": os.environ["WORLD_SIZE"]}))
row, first = beat.add_group("data 0-1"), attempt.endswith(".0")
if what == "children":
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    (run_dir / f"child-{rank}").write_text(str(child.pid))
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
    if asked:
        sys.exit(75)
    if step == 30 and what not in ("children", "long"):
        sys.exit(0)
'''


@pytest.fixture
def squad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """squad("kill", first_rank, ranks here, ranks in all): what to start."""
    (tmp_path / "path" / "dummy_ranks").mkdir(parents=True)
    (tmp_path / "path" / "dummy_ranks" / "__init__.py").touch()
    (tmp_path / "path" / "dummy_ranks" / "worker.py").write_text(WORKER)
    (tmp_path / "logs").mkdir()
    root = Path(__file__).parents[2]
    paths = [str(tmp_path / "path"), str(root), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setattr(agent_module, "_NOTE_SECONDS", 0.3)

    def build(what: str, first_rank: int = 0, here: int = 2, world_size: int = 2) -> Squad:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        words = [what, str(tmp_path)]
        return Squad("dummy_ranks.worker", words, tmp_path / "logs", environ, first_rank, here, world_size, quiet=True)

    return build


def lead(squad: Squad, run_dir: Path, restarts: int = 0, seconds: float = 1.0, stop: StopRequest | None = None) -> ExitCode:
    policy = Policy(run_dir, restarts, Patience(seconds, 30.0, 30.0), 30.0, job_attempt="4")
    return Lead(squad, policy, Peers(), stop or StopRequest()).run()


def pids(run_dir: Path) -> list[int]:
    return [json.loads(path.read_text())["pid"] for path in run_dir.glob("start-*")]


def alive(numbers: list[int]) -> list[int]:
    return [pid for pid in numbers if process_state(pid) not in ("", "Z")]


def kinds(run_dir: Path) -> list[str]:
    return [event["kind"] for event in read_events(run_dir)]


def test_all_end_well(squad, tmp_path: Path) -> None:
    assert lead(squad("fine"), tmp_path) == ExitCode.FINISHED
    assert sorted(path.name for path in tmp_path.glob("start-*")) == ["start-4.0-0", "start-4.0-1"]
    assert kinds(tmp_path) == [] and not list(tmp_path.glob("logs/report*"))


@pytest.mark.parametrize(("what", "told"), [("kill", "failed"), ("stop", "stalled"), ("hang", "stalled")])
def test_a_dead_or_hung_rank_is_named_and_all_start_again(what, told, squad, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(verdict, "STOPPED_SECONDS", 1.0)
    assert lead(squad(what), tmp_path, restarts=1) == ExitCode.FINISHED
    starts = {path.name: path.read_text() for path in tmp_path.glob("start-*")}
    assert sorted(starts) == ["start-4.0-0", "start-4.0-1", "start-4.1-0", "start-4.1-1"]
    assert kinds(tmp_path) == [told, "restarted"] and alive(pids(tmp_path)) == []
    event = next(read_events(tmp_path))
    reason = {"kill": "killed by SIGKILL", "stop": "stopped", "hang": "stalled"}[what]
    assert (event["rank"], event["reason"], event["attempt"]) == (1, reason, "4.0") and event["host"]
    report = (tmp_path / "logs" / "report-4.0.txt").read_text()
    assert "<--" in next(line for line in report.splitlines() if line.strip().startswith("1  "))
    assert "all_reduce 10 of data 0-1" in report
    assert (tmp_path / "logs" / "stacks-rank-0.txt").exists()


@pytest.mark.parametrize("what", ["always", "stop-always"])
def test_it_gives_up_after_so_many_starts_without_a_checkpoint(what, squad, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(verdict, "STOPPED_SECONDS", 0.5)
    with pytest.raises(RunError) as caught:
        lead(squad(what), tmp_path, restarts=2)
    assert caught.value.exit_code == ExitCode.FAILED and caught.value.problems[0].key == "rank 1"
    told = {"always": "failed", "stop-always": "stalled"}[what]
    assert kinds(tmp_path) == [told, "restarted", told, "restarted", told, "gave_up"]
    assert alive(pids(tmp_path)) == []


def test_a_new_checkpoint_begins_the_count_anew(squad, tmp_path: Path, monkeypatch) -> None:
    """One restart in a row is allowed; the run saves between the first three failures, and not after."""
    saved = iter([0, 5, 10, 15, 15, 15])
    monkeypatch.setattr(Lead, "_saved_step", lambda self: next(saved))
    with pytest.raises(RunError):
        lead(squad("always"), tmp_path, restarts=1)
    assert kinds(tmp_path).count("restarted") == 3


def test_the_saved_step_is_the_runs_own_word(squad, tmp_path: Path) -> None:
    leader = Lead(squad("fine"), Policy(tmp_path), Peers(), StopRequest())
    assert leader._saved_step() == 0
    write_progress(tmp_path, Progress(9, 20, 8, 0.0))
    assert leader._saved_step() == 8


@pytest.mark.parametrize(("what", "code"), [("refused", 2), ("hopeless", 3)])
def test_what_would_fail_again_is_not_started_again(what: str, code: int, squad, tmp_path: Path) -> None:
    with pytest.raises(MegalmError, match="must be 2") as caught:
        lead(squad(what), tmp_path, restarts=5)
    assert caught.value.exit_code == code and len(pids(tmp_path)) == 2
    assert kinds(tmp_path) == (["failed"] if code == 3 else [])


def test_a_refusal_after_it_has_trained_is_a_failure_like_any_other(squad, tmp_path: Path) -> None:
    """The command was good; a port that was taken meanwhile, say, is free at the next start."""
    with pytest.raises(MegalmError, match="must be 2") as caught:
        lead(squad("refused-later"), tmp_path, restarts=1)
    assert caught.value.exit_code == 2 and kinds(tmp_path) == ["failed", "restarted", "failed", "gave_up"]


def test_asked_to_stop_it_passes_it_on(squad, tmp_path: Path) -> None:
    stop = StopRequest()
    stop.signal = "SIGUSR1"
    assert lead(squad("long"), tmp_path, stop=stop) == ExitCode.SAVED


def test_nobody_is_started_again_after_a_request_to_stop(squad, tmp_path: Path) -> None:
    stop = StopRequest()
    policy = Policy(tmp_path, 3, Patience(1.0, 30.0, 30.0))
    leader = Lead(squad("always"), policy, Peers(), stop)
    original = leader._explain

    def explain(*details):
        stop.signal = "SIGTERM"
        return original(*details)

    leader._explain = explain  # type: ignore[method-assign]
    with pytest.raises(RunError):
        leader.run()
    assert kinds(tmp_path) == ["failed"]


def test_an_agent_that_was_suspended_raises_no_alarm(squad, tmp_path: Path, monkeypatch) -> None:
    """As `scontrol suspend` does: everything stands still, and nobody has hung."""
    monkeypatch.setattr(squad_module, "_GAP_SECONDS", 0.4)
    ranks = squad_module.Ranks(squad("long"), "0.0", "127.0.0.1", 1)
    try:
        time.sleep(1.0)
        ranks.statuses(fresh=True)
        for worker in ranks.workers:
            os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(1.0)
        assert all(status.idle < 0.4 for status in ranks.statuses(fresh=True))
        time.sleep(0.3)
        assert all(status.idle > 0.2 and status.state == "T" for status in ranks.statuses(fresh=True))
    finally:
        ranks.kill()
    assert alive(pids(tmp_path)) == []


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from megalm.parallel.agent import Lead, Policy
from megalm.parallel.agent_link import Peers
from megalm.parallel.signals import StopRequest
from megalm.parallel.squad import Squad
import os
run_dir = Path({run_dir!r})
squad = Squad("dummy_ranks.worker", [{what!r}, str(run_dir)], run_dir / "logs", dict(os.environ), 0, 2, 2, True)
Lead(squad, Policy(run_dir), Peers(), StopRequest()).run()
"""


def test_no_rank_outlives_an_agent_that_is_killed(squad, tmp_path: Path) -> None:
    environ = squad("long").environ
    program = PROGRAM.format(tests="", run_dir=str(tmp_path), what="long")
    process = subprocess.Popen([sys.executable, "-c", program], env=environ)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("start-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    left = pids(tmp_path)
    assert len(alive(left)) == 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while alive(left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(left) == []


def test_no_child_outlives_its_rank(squad, tmp_path: Path) -> None:
    ranks = squad_module.Ranks(squad("children"), "0.0", "127.0.0.1", 1)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("child-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    left = [int(path.read_text()) for path in tmp_path.glob("child-*")]
    assert len(alive(left)) == 2
    ranks.kill()
    time.sleep(0.2)
    assert alive(left) == []


def test_a_hopeless_error_keeps_its_code_in_the_note(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MEGALM_LAUNCHER", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    note_error(HopelessError(Problem("a", 1, "b")))
    assert '"exit_code": 3' in (tmp_path / "error-rank-0.json").read_text()


# --- several nodes: agents on one machine that know of each other by the link alone ------------------------------------

NODE = """
import os, sys
from pathlib import Path
from megalm.errors import MegalmError
from megalm.parallel.agent import Lead, Policy, follow
from megalm.parallel.agent_link import Peers, connect
from megalm.parallel.signals import StopRequest
from megalm.parallel.squad import Squad
from megalm.parallel.verdict import Patience
run_dir, what, node, port, restarts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
squad = Squad("dummy_ranks.worker", [what, str(run_dir)], run_dir / "logs", dict(os.environ), node, 1, 2, True)
with StopRequest() as stop:
    try:
        if node:
            code = follow(squad, connect("127.0.0.1", port, node, f"n{node}", os.environ["MEGALM_TOKEN"], 20.0), stop)
        else:
            policy = Policy(run_dir, restarts, Patience(1.0, 30.0, 30.0), 20.0)
            code = Lead(squad, policy, Peers(2, "127.0.0.1", port, os.environ["MEGALM_TOKEN"]), stop).run()
    except MegalmError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
sys.exit(code)
"""


@pytest.fixture
def nodes(squad, tmp_path: Path):
    """nodes("kill", restarts): two agents with a rank each; whatever is left of them is ended."""
    started: list[subprocess.Popen] = []

    def start(what: str, restarts: int = 0, token: str = "secret") -> list[subprocess.Popen]:
        port = str(free_port())
        for node in (0, 1):
            environ = {**squad(what).environ, "MEGALM_TOKEN": token if node else "secret", "SLURMD_NODENAME": f"n{node}"}
            words = [sys.executable, "-c", NODE, str(tmp_path), what, str(node), port, str(restarts)]
            started.append(subprocess.Popen(words, env=environ))
        return started

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(what, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def test_two_nodes_end_well(nodes, tmp_path: Path) -> None:
    assert [process.wait(60) for process in nodes("fine")] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("start-*")) == ["start-0.0-0", "start-0.0-1"]
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("start-*")]
    assert starts[0]["port"] == starts[1]["port"] and starts[0]["world"] == "2"


@pytest.mark.parametrize(("what", "told"), [("kill", "failed"), ("hang", "stalled")])
def test_a_rank_of_another_node_is_named_and_both_nodes_start_again(what: str, told: str, nodes, tmp_path: Path) -> None:
    assert [process.wait(60) for process in nodes(what, 1)] == [0, 0]
    assert len(list(tmp_path.glob("start-0.1-*"))) == 2 and alive(pids(tmp_path)) == []
    assert kinds(tmp_path) == [told, "restarted"]
    event = next(read_events(tmp_path))
    assert (event["rank"], event["host"]) == (1, "n1")
    report = (tmp_path / "logs" / "report-0.0.txt").read_text()
    assert "n0" in report and "n1" in report and "all_reduce 10 of data 0-1" in report
    assert (tmp_path / "logs" / "stacks-rank-0.txt").exists()


def test_both_nodes_end_with_the_code_that_is_due(nodes, tmp_path: Path) -> None:
    assert [process.wait(60) for process in nodes("hopeless", 3)] == [3, 3]
    assert len(pids(tmp_path)) == 2


def test_a_signal_to_one_agent_reaches_its_own_ranks_and_both_end_saved(nodes, tmp_path: Path) -> None:
    """Real ranks agree among themselves; these do not, so both agents are told."""
    agents = nodes("long")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    for process in agents:
        process.send_signal(signal.SIGUSR1)
    assert [process.wait(60) for process in agents] == [75, 75]


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_is_lost_ends_the_others(node: int, nodes, tmp_path: Path) -> None:
    agents = nodes("long", 3)
    wait_for(lambda: len(list(tmp_path.glob("start-*"))) == 2)
    time.sleep(0.5)
    agents[node].kill()
    assert agents[1 - node].wait(30) == 1
    wait_for(lambda: not alive(pids(tmp_path)), 10)
    if node == 1:
        event = next(event for event in read_events(tmp_path) if event["kind"] == "failed")
        assert (event["reason"], event["host"]) == ("lost", "n1")


def test_a_node_with_another_token_is_not_let_in(nodes, tmp_path: Path) -> None:
    agents = nodes("fine", token="guess")
    assert agents[1].wait(60) == 1
    assert pids(tmp_path) == [] and agents[0].poll() is None


STRANGE = [b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"x" * 10000, b'{"hello": "secret", "node": "1"}\n', b"{}\n"]


@pytest.mark.parametrize("what", STRANGE)
def test_strangers_are_not_listened_to(what: bytes) -> None:
    peers = Peers(2, "127.0.0.1", 0, "secret")
    try:
        stranger = socket.create_connection(("127.0.0.1", peers.port))
        stranger.sendall(what)
        for _ in range(5):
            peers.look(0.05)
        assert peers.wires == {} and peers.strangers == [] and stranger.recv(1) == b""
        stranger.close()
        wire = connect("127.0.0.1", peers.port, 1, "n1", "secret", 5.0)
        wire.send({"ranks": [rank(1).to_plain()], "attempt": ""})
        for _ in range(5):
            peers.look(0.05)
        assert peers.hosts == {1: "n1"} and peers.statuses() == [rank(1)]
        wire.close()
    finally:
        peers.close()


def test_agents_that_do_not_arrive_are_named() -> None:
    peers = Peers(3, "127.0.0.1", 0, "secret")
    with pytest.raises(RunError, match="nodes 1, 2 of 3"):
        peers.gather(0.2, StopRequest())
    peers.close()
    with pytest.raises(RunError, match="must reach node 0's within"):
        connect("127.0.0.1", free_port(), 1, "n1", "secret", 0.3)
