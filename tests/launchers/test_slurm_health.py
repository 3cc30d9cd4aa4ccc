"""Looking at nodes: what one says of itself, the ring between them, and who is blamed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megalm.launchers.slurm import preflight, task
from megalm.launchers.slurm.health import find_bad, read_reports
from megalm.launchers.slurm.preflight import Report, ring

NODES = ["n1", "n2", "n3"]


def reports(**changed: Report | None) -> dict[str, Report]:
    all_of_them = {node: Report(node, total=6) for node in NODES} | changed
    return {node: report for node, report in all_of_them.items() if report is not None}


@pytest.mark.parametrize(
    ("changed", "bad"),
    [
        ({}, {}),
        ({"n2": None}, {"n2": "no answer"}),
        ({"n2": Report("n2", ["disk"])}, {"n2": "disk"}),
        ({"n2": None, "n1": Report("n1", link="refused")}, {"n2": "no answer"}),  # the echo of it
        ({"n1": Report("n1", link="refused")}, {"n2": "link n1 -> n2: refused"}),
        ({"n1": Report("n1", link="no"), "n2": Report("n2", link="no")}, {"n2": "link n1 -> n2: no"}),  # two bad links
        ({"n1": Report("n1", link="no"), "n3": Report("n3", link="no")}, {"n1": "link n1 -> n2: no"}),
        ({"n1": Report("n1", clock=100.0), "n2": Report("n2", clock=-100.0)}, {"n2": "its clock is +100 s off"}),
        ({"n1": Report("n1", clock=2.0)}, {}),
        ({"n1": Report("n1", link="refused"), "n2": Report("n2", deaf="taken")}, {}),
        ({"n1": Report("n1", link="no"), "n2": Report("n2", deaf="taken", link="no")}, {"n3": "link n2 -> n3: no"}),
    ],
)
def test_who_is_blamed(changed: dict[str, Report | None], bad: dict[str, str]) -> None:
    assert find_bad(NODES, reports(**changed)) == bad


def test_an_odd_driver_is_named() -> None:
    drivers = {node: Report(node, driver="580.1" if node != "n3" else "570.9") for node in NODES}
    assert find_bad(NODES, drivers) == {"n3": "driver 570.9, the others have 580.1"}


def test_lines_of_others_are_no_reports() -> None:
    lines = ["srun: error: {", "{broken", '{"host": "n1", "unknown": 1}', '{"host": "n2", "problems": ["x"]}']
    assert read_reports(lines) == {"n2": Report("n2", ["x"])}


def run_ring(count: int, port: int, missing: int = -1, tokens: list[str] | None = None, seconds: float = 10.0) -> list[Report]:
    """Nodes of a ring, which are threads of this process."""
    nodes = ["127.0.0.1"] * count
    found = [Report(f"n{i}") for i in range(count)]
    arguments = [(found[i], nodes, i, port, (tokens or ["t"] * count)[i], seconds) for i in range(count) if i != missing]
    threads = [threading.Thread(target=ring, args=each) for each in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def free_port(count: int = 4) -> int:
    for port in range(21000 + os.getpid() % 5000, 32000, 16):
        try:
            for i in range(count):
                with socket.create_server(("127.0.0.1", port + i)):
                    pass
            return port
        except OSError:
            continue
    raise AssertionError("no free ports")


@pytest.mark.parametrize("count", [2, 3, 4])
def test_the_ring_adds_up(count: int) -> None:
    found = run_ring(count, free_port())
    assert [(r.total, r.link, r.echo, r.problems) for r in found] == [(count * (count + 1) // 2, "", "", [])] * count
    assert all(abs(r.clock) < 1 for r in found)


def test_a_missing_node_is_seen_by_its_neighbour() -> None:
    found = run_ring(3, free_port(), missing=1, seconds=1.0)
    assert found[0].link and found[0].total == 0
    assert not found[2].link


def test_whoever_does_not_know_the_token_is_sent_away() -> None:
    found = run_ring(2, free_port(), tokens=["right", "wrong"], seconds=1.0)
    assert all(report.total == 0 and (report.link or report.echo) for report in found)


def test_a_port_in_use_is_no_fault_of_the_node() -> None:
    """Of its neighbours neither; the next link is looked at all the same."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port + 1)):
        found = run_ring(3, port, seconds=1.0)
    assert f"port {port + 1} is not free" in found[1].deaf and not found[1].link
    assert find_bad(NODES, dict(zip(NODES, found, strict=True))) == {}


def test_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert preflight.check_disk(tmp_path) == []
    (problem,) = preflight.check_disk(tmp_path / "missing")
    assert "train.run_dir" in problem and "cannot be written" in problem
    monkeypatch.setattr(preflight, "FREE_BYTES", 1 << 60)
    assert len(preflight.check_disk(tmp_path)) == 2


def test_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert preflight.check_gpus(0) == []
    assert "nvidia-smi does not work" in preflight.check_gpus(2)[0]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '0, GPU-a, 80000, 300, 0'\necho '1, GPU-b, 80000, 60000, 2'\n")
    tool.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert preflight.check_gpus(3) == [
        "2 GPUs instead of 3",
        "GPU 1: 60000 of 80000 MiB are in use already",
        "GPU 1: 2 memory errors that could not be corrected",
    ]
    for given, found in (("0", []), ("GPU-a", []), ("1", 2), ("0,2", ["1 GPUs instead of 2"]), ("MIG-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        problems = preflight.check_gpus(given.count(",") + 1)
        assert problems == found or len(problems) == found, "only the job's own GPUs count"
    tool.write_text("#!/bin/sh\necho '0, GPU-a, [N/A], [N/A], [N/A]'\n")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert preflight.check_gpus(1) == []


def test_the_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"SLURM_CPUS_ON_NODE": "9", "NCCL_DEBUG": "INFO"}
    task.prepare_environment(environ, ["n1"], 0, 2)
    assert (environ["OMP_NUM_THREADS"], environ["NCCL_DEBUG"], environ["GLOO_SOCKET_IFNAME"]) == ("4", "INFO", "lo")
    assert environ["PYTHONSAFEPATH"] == "1"
    assert task.interface_to("127.0.0.1") == "lo"
    assert task.interface_to("no.such.host.invalid") == ""


def test_nobody_else_can_write_where_kernels_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task.tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / f"megalm-{os.getuid()}"
    assert task.own_folder("triton") == f"{mine}/triton"
    assert mine.stat().st_mode & 0o777 == 0o700
    mine.chmod(0o777)
    assert not task.own_folder("triton").startswith(f"{mine}/")
    mine.rmdir()
    (tmp_path / "theirs").mkdir()
    mine.symlink_to(tmp_path / "theirs")
    assert not task.own_folder("triton").startswith(f"{mine}/")


@pytest.mark.parametrize(("ending", "code", "srun_code"), [("75", 75, 0), ("3", 3, 3), ("0", 0, 0)])
@pytest.mark.parametrize("full", [False, True])
def test_a_task_passes_signals_on_and_notes_the_end(full: bool, ending: str, code: int, srun_code: int, tmp_path: Path) -> None:
    """The program gets USR1 although only its parent was signalled; 75 becomes 0 for srun, on a full disk too."""
    (tmp_path / "logs").mkdir()
    if full:
        (tmp_path / "logs/exit-0.tmp").symlink_to("/dev/full")
    package = tmp_path / "fake.py"
    package.write_text(
        "import signal, sys, os\n"
        "assert 'MEGALM_HEARTBEAT' not in os.environ, 'no agent is there, which would note why it failed'\n"
        f"signal.signal(signal.SIGUSR1, lambda *_: os._exit({ending}))\n"
        "open('ready', 'w').close()\nsignal.pause()\n"
    )
    code_text = (
        "import sys\nfrom megalm.launchers.slurm import task\n"
        f"task.command = lambda *_: [sys.executable, {str(package)!r}]\n"
        "task.main()\n"
    )
    environ = {**os.environ, "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "1"}
    words = ["rank", "--head=h", "--port=1", "--nodes=h", "--ranks=1", f"--log-dir={tmp_path}/logs", "--", "pretrain"]
    environ |= {"SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    process = subprocess.Popen([sys.executable, "-c", code_text, *words], env=environ, cwd=tmp_path)
    end = time.monotonic() + 20
    while not (tmp_path / "ready").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == srun_code
    assert full or f'"code": {code}' in (tmp_path / "logs/exit-0.json").read_text()
