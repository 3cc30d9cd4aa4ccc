"""tests/slurm/cluster.sh: a checkout's own cluster beside others, gone without a trace whoever is killed, and when it cannot."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]
TOOL = Path(__file__).parent / "cluster.sh"
SMALL = {"MEGALM_CLUSTER_NODES": "1", "MEGALM_CLUSTER_GPUS": "0"}


class Second:
    """A cluster of one node beside the one of this checkout."""

    def __init__(self, folder: Path):
        self.folder, self.environ = folder, {**os.environ, **SMALL, "MEGALM_CLUSTER_DIR": str(folder)}
        self.environ.pop("SLURM_CONF", None)

    def call(self, *words: str, **more: str) -> subprocess.CompletedProcess:
        environ = {**self.environ, **more}
        return subprocess.run([TOOL, *words], env=environ, capture_output=True, text=True, timeout=200, check=False)

    def traces(self) -> list[str]:
        """What is left of it on this machine: processes, links, namespaces, control groups, mounts, files."""
        number = int(subprocess.run(["cksum"], input=f"{self.folder}\n", capture_output=True, text=True).stdout.split()[0])
        name = f"mg{number % 16777216:06x}"
        found = [str(path) for path in (self.folder, Path("/run/netns", name + "n1")) if path.exists()]
        links = subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout
        found += [line[:60] for line in [*links.splitlines(), *Path("/proc/mounts").read_text().splitlines()] if name in line]
        found += [line for line in Path("/proc/mounts").read_text().splitlines() if str(self.folder) in line]
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if name in (folder / "cgroup").read_text() or str(self.folder) in words:
                    found.append(f"process {folder.name}: {words[:100]}")
            except OSError:
                continue
        return found


@pytest.fixture
def second() -> Iterator[Second]:
    with tempfile.TemporaryDirectory(prefix="mgc-", dir="/run") as name:  # short: a socket's path has 108 characters
        cluster = Second(Path(name, "c"))
        try:
            yield cluster
        finally:
            cluster.call("down")


def until(what: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def test_two_clusters_live_side_by_side(cluster, second: Second) -> None:
    """Each answers for its own nodes, by a number of its own, and the end of one is not the end of the other."""
    done = second.call("up")
    assert done.returncode == 0, done.stderr
    conf = second.call("env").stdout.strip().partition("=")[2]
    numbers = []
    for environ, nodes in ((dict(os.environ), 3), ({**os.environ, "SLURM_CONF": conf}, 1)):
        command = ["srun", f"-N{nodes}", "--immediate=60", "bash", "-c", "hostname; echo $SLURM_JOB_ID; cat /proc/self/cgroup"]
        said = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=True).stdout.split()
        numbers.append({word for word in said if word.isdigit()})
        assert {"n1", "n2", "n3"} & set(said) == {f"n{i + 1}" for i in range(nodes)}
    assert not numbers[0] & numbers[1]
    assert second.call("down").returncode == 0 and second.traces() == []
    assert subprocess.run(["scontrol", "ping"], capture_output=True, timeout=60).returncode == 0


def test_a_killed_owner_leaves_nothing(cluster, second: Second) -> None:
    """`up --for PID`, then kill -9 PID: as when CI is killed. While it lives, nobody else gets the cluster."""
    owner = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        assert second.call("up", "--for", str(owner.pid)).returncode == 0
        other = second.call("up", "--for", str(os.getpid()))
        assert other.returncode == 3 and f"serves process {owner.pid}" in other.stderr
        assert second.traces()
    finally:
        owner.kill()  # and a zombie until it is waited for
    until(lambda: not second.traces())
    owner.wait()


@pytest.mark.parametrize("seconds", [pytest.param(0.1, marks=pytest.mark.slow), 0.3, pytest.param(0.6, marks=pytest.mark.slow)])
def test_down_takes_away_what_was_half_made(cluster, second: Second, seconds: float) -> None:
    """kill -9 in the middle of `up`, with all that it has started still there and some of it in no file yet."""
    start = subprocess.Popen(
        [TOOL, "up"], env=second.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(seconds)
    os.killpg(start.pid, signal.SIGKILL)
    start.wait()
    assert second.call("down").returncode == 0
    until(lambda: not second.traces(), 10)
    assert second.call("up").returncode == 0, "and it starts again"


@pytest.mark.slow
def test_this_cluster_can_track_processes_by_their_parents(cluster, second: Second, tmp_path: Path) -> None:
    """_TRACKING=linuxproc: signals reach descendants there that cgroups keep them from, so it is another mode to test in.

    It proves the tool, with bash for ranks. The other tests run in the mode that their cluster was started in.
    """
    done = second.call("up", MEGALM_CLUSTER_TRACKING="linuxproc")
    assert done.returncode == 0, done.stderr
    environ = {**os.environ, "SLURM_CONF": second.call("env").stdout.strip().partition("=")[2]}

    def ask(*command: str) -> str:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()

    assert "proctrack/linuxproc" in ask("scontrol", "show", "config")
    script = tmp_path / "job.sh"
    inner = f"trap 'echo heard >> {tmp_path}/heard' USR1; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done"
    script.write_text(f'#!/bin/bash\nsrun bash -c "trap : USR1; setsid bash {tmp_path}/inner.sh & while :; do wait; done"\n')
    (tmp_path / "inner.sh").write_text(inner)
    job = ask("sbatch", "--parsable", "--output=/dev/null", str(script))
    until(lambda: (tmp_path / "pid").exists())
    ask("scancel", "--signal=USR1", job)
    until(lambda: (tmp_path / "heard").exists())
    ask("scancel", job)
    until(lambda: str(tmp_path / "inner.sh") not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout)


def test_where_it_cannot_start_it_says_so(second: Second) -> None:
    """Neither a failure nor a cluster: exit 3 and the reason, and nothing is left."""
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", "bash", TOOL, "up"],
        env=second.environ, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (3, "cluster.sh: needs root")
    no_namespaces = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", "bash", TOOL, "up"]
    done = subprocess.run(no_namespaces, env=second.environ, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.strip()) == (3, "cluster.sh: this machine makes no namespaces")
    assert second.traces() == []


def test_without_packages_or_network_it_says_so(second: Second, tmp_path: Path) -> None:
    """SLURM is not installed and apt-get fails."""
    for name in ("bash", "id", "mkdir", "chmod", "cat", "grep", "unshare", "mount", "cksum", "cut", "dirname", "tail", "rm",
                 "ip", "timeout", "seq"):  # fmt: skip
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    (tmp_path / "apt-get").write_text("#!/bin/bash\necho 'E: Unable to fetch some archives' >&2\nexit 100\n")
    (tmp_path / "apt-get").chmod(0o755)
    done = second.call("up", PATH=str(tmp_path))
    assert done.returncode == 3, done.stderr
    assert "Unable to fetch" in done.stderr and "cannot install munge slurmctld slurmd slurm-client" in done.stderr
    assert second.traces() == []
