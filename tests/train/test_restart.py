"""Real ranks under the agent: killed, stopped, asked to stop; what they compute is what an unbroken run computes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megalm.checkpoint.sharded import find_checkpoint
from megalm.errors import ExitCode
from megalm.runfolder import is_finished, read_events, read_progress
from tools.draw_reliability import Row, append

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TWO = {
    "cluster.num_processes": 2, "parallel.tensor_parallel": 2, "checkpoint.save_every": 10,
    "train.steps": 60, "train.log_every": 1,
}  # fmt: skip


def ranks_of(agent: int) -> dict[int, int]:
    """{rank: pid} of the workers of an agent, by their environments."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{agent}\n" in (folder / "status").read_text():
                environ = dict(item.split("=", 1) for item in (folder / "environ").read_text().split("\0") if "=" in item)
                if "MEGALM_HEARTBEAT" in environ:
                    found[int(environ["RANK"])] = int(folder.name)
        except OSError:
            continue
    return found


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while (progress := read_progress(run_dir)) is None or progress.step < step:
        assert process.poll() is None and time.monotonic() < deadline, f"the run did not come to step {step}"
        time.sleep(0.02)


def losses(config, records) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in records(config)]


@pytest.fixture(scope="module")
def slow_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps of 50 ms, so that one can aim: a sitecustomize that pauses. POISON=1:13 kills rank 1 after step 13."""
    folder = tmp_path_factory.mktemp("slow")
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if os.environ.get('MEGALM_HEARTBEAT'):\n"
        "    import importlib.abc, importlib.util, time\n"
        "    class Finder(importlib.abc.MetaPathFinder):\n"
        "        def find_spec(self, name, path, target=None):\n"
        "            if name != 'megalm.train.trainer':\n"
        "                return None\n"
        "            sys.meta_path.remove(self)\n"
        "            spec = importlib.util.find_spec(name)\n"
        "            load = spec.loader.exec_module\n"
        "            def exec_module(module):\n"
        "                load(module)\n"
        "                step = module.Trainer.train_step\n"
        "                def train_step(self):\n"
        "                    time.sleep(0.05)\n"
        "                    if os.environ.get('POISON') == f\"{os.environ['RANK']}:{self.state.step}\":\n"
        "                        os.kill(os.getpid(), 9)\n"
        "                    return step(self)\n"
        "                module.Trainer.train_step = train_step\n"
        "            spec.loader.exec_module = exec_module\n"
        "            return spec\n"
        "    sys.meta_path.insert(0, Finder())\n"
    )
    return folder


@pytest.fixture
def launch(command_line, slow_path: Path):
    """launch(config): the command, in the background, with slow steps; ended with the test."""
    started: list[subprocess.Popen] = []

    def run(config, *words: str) -> subprocess.Popen:
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(slow_path), os.environ.get("PYTHONPATH", "")])}
        started.append(subprocess.Popen(words or command_line(config), env=environ))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def whole() -> dict:
    """The losses of an unbroken run, once for all tests."""
    return {}


def unbroken(whole: dict, make, command, records) -> list[tuple[int, float, float]]:
    if "losses" not in whole:
        config = make("whole", TWO)
        assert command(config).returncode == 0
        whole["losses"] = losses(config, records)
    return whole["losses"]


@pytest.mark.parametrize(
    ("name", "number", "told", "reason"),
    [
        ("killed rank", signal.SIGKILL, "failed", "killed by SIGKILL"),
        ("stopped rank", signal.SIGSTOP, "stalled", "stopped"),
    ],
)
def test_a_rank_that_is_killed_or_stopped(name, number, told, reason, make, command, launch, records, whole, fault) -> None:
    """The run starts again in place from its last checkpoint, and its numbers are those of a run that nothing befell."""
    config = make("run", {**TWO, "cluster.max_restarts": 1})
    run_dir = Path(config.train.run_dir)
    process = launch(config)
    wait_for_step(run_dir, 13, process)
    victim, hit = ranks_of(process.pid)[1], fault(name, run_dir)
    os.kill(victim, number)
    assert process.wait(240) == ExitCode.FINISHED and is_finished(run_dir)
    events = list(read_events(run_dir))
    event = next(event for event in events if event["kind"] == told)
    assert (event["rank"], event["host"], event["reason"], event["attempt"]) == (1, socket.gethostname(), reason, "0.0")
    assert [event["step"] for event in events if event["kind"] == "started"] in ([0, 10], [0, 20])
    assert f"{victim}" in (run_dir / "logs" / "report-0.0.txt").read_text()
    assert number == signal.SIGKILL or "train_step" in (run_dir / "logs" / "stacks-rank-0.txt").read_text()
    hit.note("all ranks start again in place", losses(config, records) == unbroken(whole, make, command, records))
    assert losses(config, records) == unbroken(whole, make, command, records)
    assert not Path(f"/proc/{victim}").exists()


def test_a_step_that_always_kills(make, launch, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A batch that a rank cannot survive, say: a checkpoint before it, then two restarts that bring nothing new, and the end."""
    monkeypatch.setenv("POISON", "1:13")
    config = make("run", {**TWO, "cluster.max_restarts": 2})
    run_dir = Path(config.train.run_dir)
    process = launch(config)
    wait_for_step(run_dir, 10, process)
    began = time.time()
    assert process.wait(240) == ExitCode.FAILED and not is_finished(run_dir)
    events = [event for event in read_events(run_dir) if event["kind"] != "saved"]
    assert [event["kind"] for event in events] == ["started", *["failed", "restarted", "started"] * 2, "failed", "gave_up"]
    assert [event["step"] for event in events if event["kind"] == "started"] == [0, 10, 10]
    outcome = "the agent gives up after cluster.max_restarts starts without a new checkpoint"
    append(Row("crash loop", events[-1]["time"] - began, None, None, outcome, source=request.node.nodeid))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """small_disk(folder, "800k"): a file system of that size there; again: another size."""
    if os.geteuid():
        pytest.skip("to mount a small file system one must be root")
    mounted: list[Path] = []

    def mount(folder: Path, size: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        options = f"size={size}" + (",remount" if folder in mounted else "")
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
        mounted.append(folder)

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full(make, command, launch, records, whole, small_disk, fault) -> None:
    """The second checkpoint finds no room: that is said, the first stays whole, and the run goes on as soon as there is room."""
    config = make("run", {**TWO, "cluster.max_restarts": 5})
    run_dir = Path(config.train.run_dir)
    expected = unbroken(whole, make, command, records)
    small_disk(run_dir / "checkpoints", "800k")
    process = launch(config)
    wait_for_step(run_dir, 12, process)
    full = fault("full disk", run_dir)
    deadline = time.monotonic() + 120
    while not (failed := [event for event in read_events(run_dir) if event["kind"] == "failed"]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert "No space left on device" in failed[0]["message"]
    assert find_checkpoint(run_dir).name == "step-00000010"
    small_disk(run_dir / "checkpoints", "50m")
    assert process.wait(240) == ExitCode.FINISHED
    full.note("said; tried again; goes on when there is room", losses(config, records) == expected)
    assert losses(config, records) == expected


def test_a_bit_that_has_flipped_in_a_checkpoint(make, command, records, request: pytest.FixtureRequest) -> None:
    """It is never trained on. The message names the file, and the older checkpoint that goes on to the same losses."""
    config = make("run", {"train.steps": 30, "checkpoint.save_every": 10, "checkpoint.keep": 0, "train.log_every": 1})
    run_dir = Path(config.train.run_dir)
    assert command(config).returncode == ExitCode.FINISHED
    before, pointer = losses(config, records), run_dir / "checkpoints" / "latest"
    shutil.rmtree(run_dir / "checkpoints" / "step-00000030")  # as if it had been killed before that
    (run_dir / "finished").unlink()
    pointer.write_text("step-00000020\n")
    (shard,) = (run_dir / "checkpoints" / "step-00000020").glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    began = time.time()
    refused = command(config)
    seconds = time.time() - began
    assert refused.returncode == ExitCode.REFUSED and str(shard) in refused.stderr and "CRC-32" in refused.stderr
    assert f"echo step-00000010 > {pointer}" in refused.stderr
    pointer.write_text("step-00000010\n")
    assert command(config).returncode == ExitCode.FINISHED
    assert [event["step"] for event in read_events(run_dir) if event["kind"] == "started"] == [0, 10]
    outcome, same = "the file is named, the run ends; an older checkpoint can be named", losses(config, records) == before
    append(Row("flipped bit", seconds, None, None, outcome, same, request.node.nodeid))
    assert losses(config, records) == before


def test_a_run_that_is_asked_to_stop_comes_back(make, command, launch, records, whole) -> None:
    config = make("run", TWO)
    run_dir = Path(config.train.run_dir)
    process = launch(config)
    wait_for_step(run_dir, 13, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == ExitCode.SAVED and not is_finished(run_dir)
    progress = read_progress(run_dir)
    assert progress is not None and find_checkpoint(run_dir).name == f"step-{progress.step:08d}" and progress.step % 10
    assert command(config).returncode == ExitCode.FINISHED
    assert losses(config, records) == unbroken(whole, make, command, records)


def test_asked_before_the_first_step(make, launch) -> None:
    """While its ranks import, they hear nothing; they are asked again until they do."""
    config = make("run", TWO)
    process = launch(config)
    deadline = time.monotonic() + 120
    while len(ranks_of(process.pid)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(180) == ExitCode.SAVED


def test_two_agents_train_one_run(make, command, launch, records, whole, tmp_path: Path) -> None:
    """As on two nodes: an agent each, known to the other by the link alone; a rank of the second is killed."""
    from dataclasses import asdict

    config = make("run", {**TWO, "cluster.max_restarts": 1})
    run_dir, path = Path(config.train.run_dir), tmp_path / "nodes.yaml"
    path.write_text(yaml.safe_dump(asdict(config)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = ["--nodes", "2", "--head", "127.0.0.1", "--port", str(port), "--ranks-per-node", "1"]
    logs = ["--log-dir", str(run_dir / "logs" / "7.0")]
    os.environ["MEGALM_TOKEN"] = "secret"
    try:
        agents = [
            launch(
                config,
                sys.executable,
                "-m",
                "megalm.launchers.agent",
                *common,
                "--node",
                str(node),
                *logs,
                "--",
                "pretrain",
                str(path),
            )
            for node in (0, 1)
        ]
    finally:
        del os.environ["MEGALM_TOKEN"]
    wait_for_step(run_dir, 13, agents[0])
    victim = ranks_of(agents[1].pid)[1]
    environ = Path(f"/proc/{victim}/environ").read_text()
    assert "MEGALM_TOKEN" not in environ and "LOCAL_RANK=0\0" in environ
    os.kill(victim, signal.SIGKILL)
    assert [agent.wait(240) for agent in agents] == [0, 0]
    assert losses(config, records) == unbroken(whole, make, command, records)
    assert (run_dir / "logs" / "7.0" / "report-0.0.txt").exists() and (run_dir / "logs" / "7.0" / "rank-1.log").exists()
