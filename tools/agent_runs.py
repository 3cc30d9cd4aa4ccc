"""Real runs of two ranks for bench_agent.py: `megalm pretrain` over gloo on this machine, with random tokens."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.layouts import with_layout
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.config.train import CheckpointConfig, TrainConfig
from megalm.parallel.workers import ends_with_parent, free_port
from megalm.runfolder import read_events

MODEL = dict(num_layers=4, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=704, vocab_size=2048)
LENGTH = 256
PATIENCE_SECONDS = 120.0  # for anything that a run is waited for; it may share its cores


def run_config(folder: Path, steps: int, corpus: Path, stall_seconds: float = 0.0, **checkpoint: Any) -> RunConfig:
    """A llama of 4 million weights in two parts, a step of some 200 ms on a core each; each step's time is in metrics.jsonl."""
    config = RunConfig(
        model=ModelConfig(**MODEL, max_seq_length=LENGTH),  # type: ignore[arg-type]
        data=DataConfig(path=str(corpus), seq_length=LENGTH),
        train=TrainConfig(run_dir=str(folder), steps=steps, global_batch_size=4, micro_batch_size=1, log_every=1),
        checkpoint=CheckpointConfig(**checkpoint),
        cluster=ClusterConfig(device="cpu", threads=1, max_restarts=3, stall_seconds=stall_seconds),
    )
    return with_layout(config, "tp2")


@dataclasses.dataclass
class Run:
    """A run that is going on."""

    folder: Path
    processes: list[subprocess.Popen]  # the agent, or where there is none, the ranks

    def wait(self, what: Callable[[], object], seconds: float = PATIENCE_SECONDS) -> None:
        """Until what() is true. Raises SystemExit, with the run's last words, if it ends or the time is over."""
        deadline = time.monotonic() + seconds
        while not what():
            codes = [process.poll() for process in self.processes]
            if any(code is not None for code in codes) or time.monotonic() > deadline:
                words = (self.folder / "console.log").read_text()[-4000:]
                raise SystemExit(f"{words}\nthe run did not come to what it was waited for (exit codes {codes})")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Until it is done."""
        self.wait(lambda: last_step(self.folder) >= step)

    def wait_for_start(self, number: int) -> int:
        """Until the run has begun for the `number`th time; the step that it goes on from."""
        self.wait(lambda: len(self._starts()) >= number)
        return self._starts()[number - 1]

    def _starts(self) -> list[int]:
        return [event["step"] for event in read_events(self.folder) if event["kind"] == "started"]

    def pids(self) -> list[int]:
        """All processes, ranks first."""
        own = [process.pid for process in self.processes]
        return [*(pid for agent in own for pid in children(agent)), *own]


@contextmanager
def running(config: RunConfig, supervised: bool = True) -> Iterator[Run]:
    """A run under its agent; or, not supervised, two ranks started by hand, as torchrun would, without heartbeats."""
    folder = Path(config.train.run_dir)
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, "-m", "megalm.launchers.cli", "pretrain", str(path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    environ |= {"PYTHONWARNINGS": "ignore::FutureWarning"}  # what the agent gives its ranks
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    more = [{}] if supervised else [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    run = Run(folder, [])
    try:
        with open(folder / "console.log", "w") as console:
            for mine in more:
                options: dict[str, Any] = {"start_new_session": True, "preexec_fn": ends_with_parent}
                process = subprocess.Popen(command, env={**environ, **mine}, stdout=console, stderr=console, **options)
                run.processes.append(process)
        yield run
    finally:
        send(run.pids(), signal.SIGCONT)
        for process in run.processes:
            process.terminate()
        for process in run.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()  # its ranks end with it
            process.wait()


def send(pids: Sequence[int], number: int) -> None:
    """A signal to each that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def children(pid: int) -> list[int]:
    """Of a process; none if it is gone."""
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def environ_of(pid: int) -> dict[str, str]:
    """A process's environment; empty if it is gone."""
    try:
        words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return {}
    return dict(word.split("=", 1) for word in words if "=" in word)


def ranks_of(agent: int) -> dict[int, int]:
    """{rank: pid} of an agent's workers."""
    found = {child: environ_of(child) for child in children(agent)}
    return {int(environ["RANK"]): child for child, environ in found.items() if "RANK" in environ}


def cpu_seconds(pid: int) -> float:
    """What a process and its threads have computed, in the kernel too."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, which has one for every step, written at once; a line that is half written is left out."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if "loss" in line]


def last_step(folder: Path) -> int:
    """The newest step that is done; 0: none."""
    lines = lines_of(folder)
    return lines[-1]["step"] if lines else 0
