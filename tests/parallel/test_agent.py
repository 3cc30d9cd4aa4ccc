"""The agent: what it thinks of its ranks, and what it does when they die or hang.

The ranks here are small programs without torch, with real heartbeats; tests/train/test_restart.py has real ones.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import ConfigError, ExitCode, HopelessError, MegalmError, Problem, RunError
from megalm.parallel import agent as agent_module
from megalm.parallel import squad as squad_module
from megalm.parallel import verdict
from megalm.parallel.agent import Lead, Policy
from megalm.parallel.agent_link import Peers
from megalm.parallel.heartbeat_file import Collective, Pulse
from megalm.parallel.signals import StopRequest
from megalm.parallel.verdict import Patience, RankStatus
from megalm.parallel.workers import free_port, note_error
from megalm.runfolder import Progress, read_events, write_progress
from tests.parallel.dummies import alive, kinds, lead, pids, wait_for

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
        ([rank(0), rank(1, idle=2.0, state="T")], False, "running"),
        ([rank(0), rank(1, idle=4.0, state="T")], False, "stalled"),
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
    for part in ("within 3 s", "rank 1 on n1", "pid 101", "state T", "silent for 32.0 s", "all_reduce number 7 of data 0-2"):
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
    monkeypatch.setattr(squad_module, "GAP_SECONDS", 0.4)
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


def test_whoever_asks_the_agent_for_stacks_means_its_ranks(squad, tmp_path: Path) -> None:
    """With cgroups SLURM signals a task only, not what it has started."""
    before = signal.getsignal(signal.SIGUSR2)
    long = replace(squad("long"), start=squad_module.passing_on_dumps())
    ranks = squad_module.Ranks(long, "0.0", "127.0.0.1", 1)
    try:
        wait_for(lambda: len(pids(tmp_path)) == long.num_ranks)
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_for(lambda: len(list(long.log_dir.glob("stacks-rank-*.txt"))) == long.num_ranks)
    finally:
        ranks.kill()
        signal.signal(signal.SIGUSR2, before)


def test_a_hopeless_error_keeps_its_code_in_the_note(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("MEGALM_LAUNCHER", str(tmp_path))
    monkeypatch.setenv("RANK", "0")
    note_error(HopelessError(Problem("a", 1, "b")))
    assert '"exit_code": 3' in (tmp_path / "error-rank-0.json").read_text()


# --- a port that is taken ---------------------------------------------------------------------------------------------


def test_a_port_that_the_user_named_must_be_free(squad, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        policy = Policy(tmp_path, 3, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=r"cluster\.port = "):
            Lead(squad("fine"), policy, Peers(), StopRequest()).run()
    assert pids(tmp_path) == [] and kinds(tmp_path) == []


@pytest.mark.parametrize("freed", [True, False])
def test_at_a_later_start_it_is_waited_for(freed: bool, squad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was free once, so the command is good; that it stays taken is a failure like any other, not a refusal."""
    monkeypatch.setattr(agent_module, "_PORT_SECONDS", 60.0 if freed else 0.5)
    port = free_port()
    leader = Lead(squad("kill"), Policy(tmp_path, 1, Patience(1.0, 30.0, 30.0), port=port), Peers(), StopRequest())
    original, taken = leader._explain, list[socket.socket]()

    def explain(*details):
        taken.append(socket.create_server(("127.0.0.1", port)))
        if freed:
            threading.Timer(1.0, taken[0].close).start()
        return original(*details)

    leader._explain = explain  # type: ignore[method-assign]
    try:
        if freed:
            assert leader.run() == ExitCode.FINISHED and kinds(tmp_path) == ["failed", "restarted"]
        else:
            with pytest.raises(RunError, match=r"cluster\.port = ") as caught:
                leader.run()
            assert caught.value.exit_code == ExitCode.FAILED
            assert kinds(tmp_path) == ["failed", "restarted", "failed", "gave_up"]
    finally:
        taken[0].close()
    assert alive(pids(tmp_path)) == []
