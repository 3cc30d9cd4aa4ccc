"""Agents of several nodes, on one machine, that know of each other by the link alone."""

from __future__ import annotations

import errno
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megalm.errors import ConfigError, RunError
from megalm.parallel import agent_link
from megalm.parallel.agent import follow
from megalm.parallel.agent_link import Peers, connect
from megalm.parallel.signals import StopRequest
from megalm.parallel.verdict import RankStatus
from megalm.parallel.workers import free_port
from megalm.runfolder import read_events
from tests.parallel.dummies import alive, kinds, pids, wait_for

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


def test_two_nodes_end_well(nodes, tmp_path: Path) -> None:
    assert [process.wait(120) for process in nodes("fine")] == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("start-*")) == ["start-0.0-0", "start-0.0-1"]
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("start-*")]
    assert starts[0]["port"] == starts[1]["port"] and starts[0]["world"] == "2"


@pytest.mark.parametrize(("what", "told"), [("kill", "failed"), ("hang", "stalled")])
def test_a_rank_of_another_node_is_named_and_both_nodes_start_again(what: str, told: str, nodes, tmp_path: Path) -> None:
    assert [process.wait(120) for process in nodes(what, 1)] == [0, 0]
    assert len(list(tmp_path.glob("start-0.1-*"))) == 2 and alive(pids(tmp_path)) == []
    assert kinds(tmp_path) == [told, "restarted"]
    event = next(read_events(tmp_path))
    assert (event["rank"], event["host"]) == (1, "n1")
    report = (tmp_path / "logs" / "report-0.0.txt").read_text()
    assert "n0" in report and "n1" in report and "all_reduce 10 of data 0-1" in report
    assert (tmp_path / "logs" / "stacks-rank-0.txt").exists()


def test_both_nodes_end_with_the_code_that_is_due(nodes, tmp_path: Path) -> None:
    assert [process.wait(120) for process in nodes("hopeless", 3)] == [3, 3]
    assert len(pids(tmp_path)) == 2


def test_a_signal_to_one_agent_reaches_its_own_ranks_and_both_end_saved(nodes, tmp_path: Path) -> None:
    """Real ranks agree among themselves; these do not, so both agents are told."""
    agents = nodes("long")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    for process in agents:
        process.send_signal(signal.SIGUSR1)
    assert [process.wait(120) for process in agents] == [75, 75]


@pytest.mark.parametrize("node", [0, 1])
def test_a_node_that_is_lost_ends_the_others(node: int, nodes, tmp_path: Path) -> None:
    agents = nodes("long", 3)
    wait_for(lambda: len(list(tmp_path.glob("start-*"))) == 2)
    time.sleep(0.5)
    agents[node].kill()
    assert agents[1 - node].wait(90) == 1
    wait_for(lambda: not alive(pids(tmp_path)))
    if node == 1:
        event = next(event for event in read_events(tmp_path) if event["kind"] == "failed")
        assert (event["reason"], event["host"]) == ("lost", "n1")


def test_a_node_with_another_token_is_not_let_in(nodes, tmp_path: Path) -> None:
    agents = nodes("fine", token="guess")
    assert agents[1].wait(120) == 1
    assert pids(tmp_path) == [] and agents[0].poll() is None


STRANGE = [
    b"GET / HTTP/1.0\r\n\r\n", b"[]\n", b"x" * 10000, b'{"hello": "secret", "node": "1"}\n', b"{}\n", b"[" * 4000 + b"\n",
    b'{"hello": "\\ud800", "node": 1}\n', b'{"node": 1, "hello": ' + 900 * b"[" + 900 * b"]" + b"}\n",
]  # fmt: skip


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
        wire.send({"ranks": [RankStatus(1, "n1", 101).to_plain()], "attempt": ""})
        for _ in range(5):
            peers.look(0.05)
        assert peers.hosts == {1: "n1"} and peers.statuses() == [RankStatus(1, "n1", 101)]
        wire.close()
    finally:
        peers.close()


def test_many_strangers_do_not_use_up_the_open_files() -> None:
    peers = Peers(2, "127.0.0.1", 0, "secret")
    strangers = [socket.create_connection(("127.0.0.1", peers.port)) for _ in range(80)]
    peers.look(0.05)
    assert len(peers.strangers) == 66
    for stranger in strangers:
        stranger.close()
    wire = connect("127.0.0.1", peers.port, 1, "n1", "secret", 5.0)
    for _ in range(5):
        peers.look(0.05)
    assert peers.hosts == {1: "n1"} and peers.strangers == []
    wire.close()
    peers.close()


def test_a_word_to_the_lead_that_fails_is_the_end_of_the_lead(squad) -> None:
    peers = Peers(2, "127.0.0.1", 0, "secret")
    wire = connect("127.0.0.1", peers.port, 1, "n1", "secret", 5.0)
    wire.close()  # as Wire.send does
    with pytest.raises(RunError, match="node 0's agent must give a sign of life"):
        follow(squad("fine"), wire, StopRequest())
    peers.close()


def test_agents_that_do_not_arrive_are_named() -> None:
    peers = Peers(3, "127.0.0.1", 0, "secret")
    with pytest.raises(RunError, match="nodes 1, 2 of 3"):
        peers.gather(0.2, StopRequest())
    peers.close()
    with pytest.raises(RunError, match="must reach node 0's within"):
        connect("127.0.0.1", free_port(), 1, "n1", "secret", 0.3)


def test_a_port_of_the_agents_that_is_in_use_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier start of the job may still have it; it is no mistake in the command."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    monkeypatch.setattr(agent_link, "_PORT_SECONDS", 0.3)
    with pytest.raises(RunError, match="must be able to listen there"):
        Peers(2, "127.0.0.1", port, "secret")
    monkeypatch.setattr(agent_link, "_PORT_SECONDS", 60.0)
    threading.Timer(0.5, taken.close).start()
    peers = Peers(2, "127.0.0.1", port, "secret")
    assert peers.port == port
    peers.close()


def test_an_address_that_is_not_this_nodes_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="another --port, or node 0's own address") as caught:
        Peers(2, "192.0.2.1", 0, "secret")
    assert caught.value.__cause__.errno == errno.EADDRNOTAVAIL  # type: ignore[union-attr]
