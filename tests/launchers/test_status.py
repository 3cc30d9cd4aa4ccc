"""`megalm status` and `megalm report` on the command line: a folder alone, exit codes, what is refused."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from megalm.config.tasks import ReportConfig, ReportRun, StatusConfig, StatusRun
from megalm.errors import ConfigError, RunError
from megalm.launchers import report
from megalm.launchers.compose import inspect, parse
from megalm.launchers.status import task
from megalm.runfolder import Progress, note_event, note_finished, write_progress

Megalm = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of a run that is at step 5 of 10, on another machine."""
    folder = tmp_path / "run"
    folder.mkdir()
    note_event(folder, "started", step=0, steps=10, attempt="0.0", ranks=1, hosts=["elsewhere"], pid=1)
    write_progress(folder, Progress(5, 10, 4, time.time(), "0.0", 2.5, 100, 50.0))
    (folder / "config.yaml").write_text("train: {steps: 10, global_batch_size: 2}\ndata: {seq_length: 10}\n")
    return folder


def test_a_folder_stands_alone(run: Path, megalm: Megalm) -> None:
    done = megalm("status", "run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "run  RUNNING" in done.stdout and "step 5 of 10, 50.0%" in done.stdout
    assert "to go         2.0 s, done" in done.stdout and "50 tokens/s" in done.stdout and "started" in done.stdout


def composed(verb: str, *arguments: str) -> Any:
    config, problems = inspect(parse(verb, list(arguments)))
    if problems:
        raise ConfigError(*problems)
    return config


def test_a_folder_whose_name_looks_like_a_setting(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    run.rename(run.with_name("lr=0.1,x=[2]"))
    assert composed("status", "lr=0.1,x=[2]").status.run_dir == "lr=0.1,x=[2]"
    assert composed("report", "run_dir=a", "parent=b").report.parent == "b"
    with pytest.raises(ConfigError, match="lr"):
        composed("status", "lr=0.2")


@pytest.mark.parametrize(
    ("kind", "code", "state"),
    [("failed", 1, "failed"), ("gave_up", 3, "gave up"), ("requeued", 75, "waiting"), ("finished", 0, "finished")],
)
def test_exit_codes(kind: str, code: int, state: str, run: Path, capsys: pytest.CaptureFixture) -> None:
    note_event(run, kind, step=5)
    with pytest.raises(SystemExit) if code else nullcontext() as end:
        task(StatusRun(StatusConfig(run_dir=str(run), output="json")))
    assert json.loads(capsys.readouterr().out)["state"] == state
    assert end is None or end.value.code == code


@pytest.mark.parametrize("verb", ["status", "report"])
@pytest.mark.parametrize(("arguments", "rule"), [(("a", "b"), "run_dir has been given already"), (("a", "wtach=true"), "wtach")])
def test_what_is_refused(verb: str, arguments: tuple[str, ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        composed(verb, *arguments)


def test_no_run_is_there(run: Path, megalm: Megalm) -> None:
    done = megalm("status", "none")
    assert done.returncode == 2 and "status.run_dir = none" in done.stderr and "no such folder" in done.stderr
    assert "Traceback" not in done.stderr
    with pytest.raises(ConfigError, match=r"report.run_dir = .*none\n.*no such folder"):
        report.task(ReportRun(ReportConfig(str(run / "none"))))


def test_a_terminal_is_drawn_over(run: Path, tmp_path: Path) -> None:
    """On a terminal of 40 columns and 8 rows no line is longer, and no picture higher."""
    command = [sys.executable, "-m", "megalm.launchers.cli", "status", "run", "watch=true", "seconds=0.2"]
    parent, child = pty.openpty()
    environ = {**os.environ, "COLUMNS": "40", "LINES": "8"}
    with subprocess.Popen(command, cwd=tmp_path, stdout=child, stderr=child, env=environ) as process:
        os.close(child)
        shown = b""
        while shown.count(b"\x1b[J") < 3:  # at the start, and at the end of every picture
            shown += os.read(parent, 4096)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 0
    os.close(parent)
    first = shown.decode().split("\x1b[H")[1].replace("\x1b[J", "").split("\r\n")
    assert "RUNNING" in first[0] and "\x1b[1;32m" in first[0]
    assert len(first) <= 8 and all(len(line.replace("\x1b[K", "")) <= 40 for line in first[1:])


def test_a_reader_who_leaves(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megalm.launchers.cli", "status", "run", "watch=true", "seconds=0.2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""


def test_a_watch_ends_with_the_run(run: Path, tmp_path: Path) -> None:
    """A line per look, into a pipe; it ends by itself when the run does."""
    command = [sys.executable, "-m", "megalm.launchers.cli", "status", "run", "watch=true", "seconds=0.2"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("running  step 5 of 10  loss 2.5")
        write_progress(run, Progress(10, 10, 10, time.time(), "0.0", 2.25, 200, 50.0))
        note_finished(run, 10, 10, 0)
        lines = process.stdout.read().splitlines()
        assert lines[-1].startswith("finished  step 10 of 10  loss 2.25")
        assert process.wait(timeout=20) == 0


def test_ctrl_c_ends_a_watch(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megalm.launchers.cli", "status", "run", "watch=true", "seconds=60", "output=json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["state"] == "running"
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(timeout=20) == 0
        assert process.stderr.read() == ""


def test_a_report_is_written(run: Path, megalm: Megalm, tmp_path: Path) -> None:
    done = megalm("report", "run")
    assert (done.returncode, done.stdout, done.stderr) == (0, "run/report.html\n", "")
    page = (run / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "running" in page
    report.task(ReportRun(ReportConfig(str(run), str(run), str(tmp_path / "pages" / "a.html"))))
    assert "Beside its parent" in (tmp_path / "pages" / "a.html").read_text()


def test_a_report_does_not_write_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (run / "report.html").symlink_to(tmp_path / "precious")
    report.task(ReportRun(ReportConfig(run_dir=str(run))))
    assert (tmp_path / "precious").read_text() == "mine"
    assert (run / "report.html").read_text().startswith("<!doctype html>") and not (run / "report.html").is_symlink()
    assert not list(run.glob(".report*"))


def test_a_report_that_cannot_be_written(run: Path) -> None:
    with pytest.raises(RunError, match=r"report.output"):
        report.task(ReportRun(ReportConfig(run_dir=str(run), output=str(run / "config.yaml" / "a.html"))))
    with pytest.raises(ConfigError, match=r"report.parent = none"):
        report.task(ReportRun(ReportConfig(run_dir=str(run), parent="none")))


def test_neither_loads_torch(run: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from megalm.launchers import cli; sys.argv = ['megalm', sys.argv[1], 'run']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    for verb in ("status", "report"):
        subprocess.run([sys.executable, "-c", code, verb], check=True, timeout=60, cwd=tmp_path, stdout=subprocess.DEVNULL)
