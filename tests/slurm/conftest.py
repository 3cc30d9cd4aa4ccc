"""A cluster to test on: the one that SLURM_CONF names, or one of namespaces that is started here, as root."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megalm.config.data import PrepareConfig
from megalm.data.tokenize import prepare
from megalm.launchers.slurm import client
from megalm.runfolder import read_events, read_progress
from tests.slurm.layouts import BY_RANK, TWO_BY_TWO

TOOL = Path(__file__).parent / "cluster.sh"
REQUIRED = "MEGALM_REQUIRE_SLURM"  # set: a cluster that cannot be started is a failure, not a reason to skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """Nodes n1, n2, n3; power and cables only where the cluster is ours."""

    def __init__(self, ours: bool):
        self.ours = ours

    def tool(self, *words: str) -> None:
        if not self.ours:
            pytest.skip("needs the cluster of namespaces: power and cables of this one are not ours")
        subprocess.run([TOOL, *words], check=True, timeout=60)

    def wait_for_nodes(self, seconds: float = 180.0) -> None:
        """Until all are idle again."""
        end = time.monotonic() + seconds
        while len(client.usable_nodes("train")) < 3:
            assert time.monotonic() < end, client.ask("sinfo", "-N").out
            time.sleep(0.5)

    def submit(self, *arguments: str) -> str:
        """megalm slurm submit pretrain ...; the job's number."""
        words = [sys.executable, "-m", "megalm.launchers.cli", "slurm", "submit", "pretrain", *arguments]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[1].rstrip(":")

    def wait(self, job: str, seconds: float = 600.0) -> dict[str, str]:
        """Until it has ended; what scontrol says of it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = client.find_job(job)
            if found["JobState"] in ENDED:
                return found
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {found['JobState']} after {seconds:.0f} s")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if "SLURM_CONF" in os.environ:
        ping = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=60, check=False)
        assert ping.returncode == 0, f"SLURM_CONF names a cluster that does not answer: {ping.stdout}{ping.stderr}"
        yield Cluster(ours=os.environ["SLURM_CONF"] == _our_conf())
        return
    missing = [name for name in ("slurmctld", "slurmd", "munged", "ip", "unshare") if shutil.which(name) is None]
    if os.geteuid() or missing:
        reason = f"no SLURM: SLURM_CONF is not set, and to start one needs root{' and ' * bool(missing)}{', '.join(missing)}"
        (pytest.fail if REQUIRED in os.environ else pytest.skip)(reason)
    started = subprocess.run([TOOL, "up", "--for", str(os.getpid())], capture_output=True, text=True, timeout=600, check=False)
    if started.returncode == 3 and REQUIRED not in os.environ:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stderr
    os.environ["SLURM_CONF"] = _our_conf()
    yield Cluster(ours=True)
    del os.environ["SLURM_CONF"]
    subprocess.run([TOOL, "down"], check=True, timeout=60)


def _our_conf() -> str:
    """SLURM_CONF of this checkout's own cluster, up or not."""
    settings = subprocess.run([TOOL, "env"], check=True, capture_output=True, text=True).stdout
    return settings.strip().partition("=")[2]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all nodes see, with a corpus of a few thousand tokens."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "text").mkdir()
    for i in range(60):
        lines = [f"def f{i}_{j}(x, y):\n    return x * {i} + y * {j}\n" for j in range(4)]
        (folder / "text" / f"{i}.py").write_text("\n".join(lines))
    prepare(PrepareConfig(source=str(folder / "text"), output=str(folder / "data"), vocab_size=300))
    return folder


class Run:
    """A run's folder, and how its job is submitted."""

    def __init__(self, cluster: Cluster, shared: Path, name: str):
        self.cluster, self.folder = cluster, shared / name
        settings = {
            "model.vocab_size": 300, "model.hidden_size": 32, "model.num_layers": 2, "model.num_heads": 4,
            "model.num_kv_heads": 2, "model.max_seq_length": 32, "data.path": shared / "data" / "corpus",
            "data.seq_length": 16, "train.steps": 150, "train.global_batch_size": 4, "train.micro_batch_size": 1,
            "train.run_dir": self.folder, "train.log_every": 1, "checkpoint.save_every": 50, "cluster.device": "cpu",
            "cluster.threads": 1,
        }  # fmt: skip
        self.settings: dict[str, Any] = settings

    def submit(self, *arguments: str) -> str:
        return self.cluster.submit(*(f"{key}={value}" for key, value in self.settings.items()), *arguments)

    def records(self) -> list[dict[str, Any]]:
        """Of the steps that counted."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record for record in map(json.loads, lines) if "loss" in record]

    def losses(self) -> list[tuple[int, float]]:
        return [(record["step"], record["loss"]) for record in self.records()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder) if event["kind"] == kind]

    def wait_for(self, what: Callable[[], Any], seconds: float = 300.0) -> None:
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, f"waited {seconds:.0f} s in vain; the job's log:\n{self.log()}"
            time.sleep(0.2)

    def wait_for_step(self, step: int, seconds: float = 300.0) -> None:
        self.wait_for(lambda: (progress := read_progress(self.folder)) and progress.step >= step, seconds)

    def log(self) -> str:
        """What the job's supervisor has said."""
        return "".join(path.read_text() for path in sorted((self.folder / "logs").glob("slurm-*.out")))


@pytest.fixture
def make(cluster: Cluster, shared: Path) -> Callable[[str], Run]:
    return lambda name: Run(cluster, shared, name)


@pytest.fixture(scope="session")
def whole(cluster: Cluster, shared: Path) -> Run:
    """An unbroken run over two nodes, that the broken ones are compared with."""
    run = Run(cluster, shared, "whole")
    job = run.submit(*TWO_BY_TWO, BY_RANK)
    found = cluster.wait(job)
    assert found["JobState"] == "COMPLETED", run.log()
    return run
