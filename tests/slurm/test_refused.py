"""What is refused before anything is submitted, on a real SLURM: what, which rule, what to do instead; exit 2, no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megalm.launchers.slurm import client

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
CASES = {  # name: (settings, what stands in the message)
    "partition": (
        ["slurm.partition=nope"],
        ["slurm.partition = nope", "allowed: train, urgent", "fix:     slurm.partition=train"],
    ),
    "nodes": (
        ["slurm.nodes=9", "slurm.processes_per_node=1", "train.global_batch_size=36"],
        ["slurm.nodes = 9", "the partition has 3 nodes that are up", "fix:     slurm.nodes=3"],
    ),
    "GPUs": (
        ["slurm.gpus_per_node=9", "slurm.processes_per_node=1"],
        ["slurm.gpus_per_node = 9", "Requested node configuration is not available", "allowed: nodes of 8 CPUs gpu:2"],
    ),
    "CPUs": (["slurm.cpus_per_task=99"], ["slurm.cpus_per_task = 99", "allowed: nodes of 8 CPUs gpu:2"]),
    "feature": (["slurm.constraint=h100"], ["slurm.constraint = h100", "Invalid feature specification"]),
    "setup": (["slurm.setup=/nowhere"], ["slurm.setup = /nowhere", "no such file"]),
    "line of its own": (["slurm.job_name='a\n#SBATCH --uid=0'"], ["slurm.job_name is letters, digits"]),
}


def refused(run, *arguments: str, **environ: str) -> str:
    """What `megalm slurm submit` says; it exits with 2, shows no traceback and leaves neither a job nor a script."""
    before = set(client.ask("squeue", "-h", "-o", "%i").out.split())
    settings = [f"{key}={value}" for key, value in run.settings.items()]
    command = [sys.executable, "-m", "megalm.launchers.cli", "slurm", "submit", "pretrain", *settings, *arguments]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, timeout=300, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert set(client.ask("squeue", "-h", "-o", "%i").out.split()) <= before
    return said


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, make, cluster) -> None:
    cluster.wait_for_nodes()
    settings, words = CASES[case]
    said = refused(make("refused"), *settings)
    assert [word for word in words if word not in said] == [], said


def test_no_sbatch(make, tmp_path: Path) -> None:
    (tmp_path / "scontrol").symlink_to(shutil.which("scontrol") or "")
    said = refused(make("refused"), PATH=str(tmp_path))
    assert "SLURM's sbatch is not on the PATH" in said and "megalm slurm render" in said


def test_a_folder_that_cannot_be_written(make, cluster) -> None:
    """No room in it at all."""
    run = make("no-room")
    run.folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", run.folder], check=True)
    try:
        subprocess.run(["bash", "-c", "cat /dev/zero > fill"], cwd=run.folder, capture_output=True, check=False)
        assert "rule:    cannot be written: No space left on device" in refused(run)
        (run.folder / "fill").unlink()
        assert "its disk has 1 MiB left" in refused(run)
    finally:
        subprocess.run(["umount", run.folder], check=True)


@pytest.mark.slow
def test_the_folder_of_another_model(whole, make) -> None:
    run = make("whole")
    said = refused(run, "model.hidden_size=64")
    assert "model.hidden_size = 64" in said and "was begun with model.hidden_size=32" in said and "another train.run_dir" in said


def test_the_folder_of_a_job_that_is_alive(make, cluster) -> None:
    """It waits, for a time that never comes; still nobody else may write its folder, and the message says who does."""
    run = make("held")
    job = run.submit("slurm.extra=['--begin=now+1hour']")
    try:
        said = refused(run)
        assert f"another job writes this run: job {job} of root" in said and f"or scancel {job}" in said
    finally:
        subprocess.run(["scancel", job], check=True)
