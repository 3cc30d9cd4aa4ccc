"""The local launcher: whatever a worker does, the cause is named once and no process is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalm.config.cluster import ClusterConfig
from megalm.config.run import RunConfig
from megalm.config.train import TrainConfig
from megalm.errors import ConfigError, RunError
from megalm.parallel.agent import start_workers
from megalm.parallel.forked import Fork
from megalm.parallel.workers import Starter, in_worker, make_folder, note_error, start_process

WORKER = '''
import os, signal, sys, time
from megalm.errors import DataError, Problem
from megalm.parallel.workers import note_error

rank, what, folder = int(os.environ["RANK"]), sys.argv[1], sys.argv[2]
if what == "listen":
    signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
if what == "deaf" and rank != 1:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with open(os.path.join(folder, f"new-{rank}"), "w") as file:
    file.write(str(os.getpid()))
os.rename(file.name, os.path.join(folder, f"pid-{rank}"))
while what not in ("fine", "hang", "listen") and sum(name.startswith("pid-") for name in os.listdir(folder)) < 3:
    time.sleep(0.01)  # all are up before one fails
print(f"hello from {rank} of {os.environ['WORLD_SIZE']}", flush=True)

try:
    if what == "fine":
        pass
    elif rank != 1:
        if what == "echo":  # the others fail because rank 1 has: later, and with less to say
            while not os.path.exists(os.path.join(os.environ["MEGALM_LAUNCHER"], "error-rank-1.json")):
                time.sleep(0.01)
            raise RuntimeError("connection closed by peer")
        time.sleep(60)
    elif what in ("megalm", "echo", "deaf"):
        raise DataError(Problem("data.corpus", "x.bin", "must be whole", "1 byte", "megalm prepare"))
    elif what == "other":
        raise ZeroDivisionError("seven\\nlines")
    elif what == "empty":
        raise AssertionError
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "abort":
        try:
            raise DataError(Problem("data.corpus", "x.bin", "must be whole"))
        except DataError as error:
            note_error(error)
        os.abort()  # as gloo's threads may, at exit
    elif what == "exit":
        print("last words", flush=True)
        os._exit(9)
except BaseException as error:
    note_error(error)
    sys.exit(getattr(error, "exit_code", 1))
'''


@pytest.fixture(autouse=True)
def dummy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `dummy_run` whose module `worker` does what its argument says."""
    (tmp_path / "path" / "dummy_run").mkdir(parents=True)
    (tmp_path / "path" / "dummy_run" / "__init__.py").touch()
    (tmp_path / "path" / "dummy_run" / "worker.py").write_text(WORKER)
    inherited = os.environ.get("PYTHONPATH", "")
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(tmp_path / "path")  # a fork has its parent's path
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "path"), str(root), str(root / "kernels"), inherited]))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MEGALM_LAUNCHER", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(params=[start_process, Fork(["torch"])], ids=["started", "forked"])
def start(request: pytest.FixtureRequest) -> Starter:
    """What the launcher promises does not depend on how it starts its workers."""
    return request.param


def launch(tmp_path: Path, what: str, processes: int = 3, quiet: bool = True, start: Starter = start_process, **cluster) -> None:
    config = RunConfig(
        train=TrainConfig(run_dir=str(tmp_path / "run")), cluster=ClusterConfig(num_processes=processes, device="cpu", **cluster)
    )
    start_workers("dummy_run.worker", [what, str(tmp_path)], config, quiet, start)


def alive(tmp_path: Path) -> list[int]:
    left = []
    for file in tmp_path.glob("pid-*"):
        try:
            os.kill(int(file.read_text()), 0)
            left.append(int(file.read_text()))
        except ProcessLookupError:
            pass
    return left


def log_of(tmp_path: Path, rank: int) -> str:
    """What a worker wrote in its last start."""
    return (tmp_path / "run" / "logs" / f"rank-{rank}.log").read_text().rpartition("--- started\n")[2]


def test_all_ranks_run_and_write_their_logs(tmp_path, capfd):
    launch(tmp_path, "fine", quiet=False)
    assert capfd.readouterr().out == "hello from 0 of 3\n"  # rank 0 keeps the console
    assert [log_of(tmp_path, rank) for rank in (1, 2)] == ["hello from 1 of 3\n", "hello from 2 of 3\n"]
    assert not (tmp_path / "run" / "logs" / "rank-0.log").exists()


def test_quiet_sends_rank_0_to_its_log_too(tmp_path, start, capfd):
    launch(tmp_path, "fine", start=start, processes=1)
    assert capfd.readouterr().out == "" and log_of(tmp_path, 0) == "hello from 0 of 1\n"


def test_a_users_error_is_shown_as_it_is_with_its_exit_code(tmp_path, start):
    with pytest.raises(RunError) as caught:
        launch(tmp_path, "megalm", start=start)
    assert str(caught.value) == (
        "data error on rank 1: 1 problem\n1. data.corpus = x.bin\n"
        "  rule:    must be whole\n  allowed: 1 byte\n  fix:     megalm prepare"
    )
    assert caught.value.exit_code == 2
    assert alive(tmp_path) == []


def test_an_error_of_ours_names_its_type_and_line_and_shows_the_traceback_once(tmp_path, capfd):
    with pytest.raises(RunError) as caught:
        launch(tmp_path, "other")
    problem = caught.value.problems[0]
    assert (problem.key, problem.value) == ("ZeroDivisionError", "seven")
    assert "worker.py:" in problem.allowed and str(tmp_path / "run" / "logs") in problem.fix
    assert "on rank 1" in str(caught.value) and caught.value.exit_code == 1
    assert capfd.readouterr().err.count("Traceback") == 1
    assert alive(tmp_path) == []


def test_an_error_without_a_message(tmp_path):
    with pytest.raises(RunError, match="AssertionError"):
        launch(tmp_path, "empty")


def test_the_cause_is_shown_not_its_echo(tmp_path):
    with pytest.raises(RunError, match="data error on rank 1") as caught:
        launch(tmp_path, "echo")
    assert "connection closed" not in str(caught.value)


def test_a_killed_worker_ends_all_within_seconds(tmp_path, start):
    begin = time.monotonic()
    with pytest.raises(RunError) as caught:
        launch(tmp_path, "killed", start=start)
    assert time.monotonic() - begin < 15  # the others would sleep for 60
    assert caught.value.problems[0].key == "rank 1" and caught.value.problems[0].value == "killed by SIGKILL"
    assert alive(tmp_path) == []


def test_an_abort_after_a_noted_error_does_not_hide_it(tmp_path):
    with pytest.raises(RunError, match="data error on rank 1"):
        launch(tmp_path, "abort")


def test_a_worker_that_cannot_be_started_leaves_none_behind(tmp_path):
    def fails_at_rank_2(module, arguments, environ, log_file):
        if environ["RANK"] == "2":
            while len(list(tmp_path.glob("pid-*"))) < 2:
                time.sleep(0.05)
            raise OSError("no more processes")
        return start_process(module, arguments, environ, log_file)

    with pytest.raises(OSError, match="no more processes"):
        launch(tmp_path, "hang", start=fails_at_rank_2)
    assert alive(tmp_path) == []


def test_a_worker_that_hangs_and_ignores_sigterm_is_killed(tmp_path, start):
    begin = time.monotonic()
    with pytest.raises(RunError, match="data error on rank 1"):
        launch(tmp_path, "deaf", start=start)
    assert time.monotonic() - begin < 20
    assert len(list(tmp_path.glob("pid-*"))) == 3 and alive(tmp_path) == []


def test_a_worker_that_leaves_no_note_shows_its_last_lines(tmp_path, start):
    with pytest.raises(RunError) as caught:
        launch(tmp_path, "exit", start=start)
    problem = caught.value.problems[0]
    assert problem.value == "ended with exit code 9" and problem.rule.endswith("log: hello from 1 of 3 | last words")


def test_notes_of_an_earlier_run_are_not_shown_again(tmp_path):
    with pytest.raises(RunError, match="data error"):
        launch(tmp_path, "megalm")
    with pytest.raises(RunError, match="exit code 9"):
        launch(tmp_path, "exit")


@pytest.mark.parametrize(("what", "number", "times", "code"), [
    ("listen", signal.SIGTERM, 1, 75), ("listen", signal.SIGUSR1, 1, 75), ("hang", signal.SIGINT, 2, 130),
])  # fmt: skip
def test_signals_to_the_launcher_end_its_workers(what, number, times, code, tmp_path):
    """It passes them on; a second Ctrl-C ends those that do not listen."""
    program = f"""
from megalm.config.run import RunConfig
from megalm.config.cluster import ClusterConfig
from megalm.config.train import TrainConfig
from megalm.parallel.agent import start_workers
config = RunConfig(train=TrainConfig(run_dir={str(tmp_path / "run")!r}), cluster=ClusterConfig(num_processes=2, device="cpu"))
try:
    code = start_workers("dummy_run.worker", [{what!r}, {str(tmp_path)!r}], config, True)
except KeyboardInterrupt:
    code = 130
import sys
sys.exit(code)
"""
    launcher = subprocess.Popen([sys.executable, "-c", program])
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(times):
        launcher.send_signal(number)
        time.sleep(0.2)
    assert launcher.wait(20) == code
    assert alive(tmp_path) == []


def test_a_port_in_use_is_a_config_error(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="must be free") as caught:
            launch(tmp_path, "fine", port=taken.getsockname()[1])
    assert caught.value.problems[0].key == "cluster.port" and "cluster.port=0" in caught.value.problems[0].fix
    assert not list(tmp_path.glob("pid-*"))


def test_a_run_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"train\.run_dir"):
        make_folder(tmp_path / "file" / "run")


def test_a_run_dir_without_write_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ConfigError, match="no write permission"):
        launch(tmp_path, "fine")
    assert not list(tmp_path.glob("pid-*"))


def test_note_error_outside_our_launcher_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    note_error(ValueError("x"))
    assert not list(tmp_path.rglob("error-rank-*"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, True),
        ({"SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
    ],
)
def test_in_worker(environ, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert in_worker() is expected


def test_the_launcher_imports_no_torch():
    program = "import sys, megalm.parallel.agent; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
