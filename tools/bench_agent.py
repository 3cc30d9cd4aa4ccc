"""What supervision costs and gains: `python tools/bench_agent.py [overhead] [kill] [stop] [--times 10] [--json FILE]`.

    overhead   a stamp's price, stamps of a step, the agent's own share of a core, and steps with and without heartbeats
    kill       SIGKILL to one rank of a run, again and again: seconds until the first step after it
    stop       the same with SIGSTOP: seconds until it is found, and until the first step after it

Every run is a real `megalm pretrain` of two ranks over gloo on this machine, with random tokens; the kills alternate between
the ranks. Exit 1: one of the runs did not come back, or did not end well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from bench_parallel import write_random_tokens
from bench_report import describe_machine, describe_versions

from megalm.config.cluster import ClusterConfig
from megalm.config.data import DataConfig
from megalm.config.layouts import with_layout
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.config.train import CheckpointConfig, TrainConfig
from megalm.parallel.heartbeat_file import HeartbeatFile, make_file, read_pulse
from megalm.runfolder import read_events

MODEL = dict(num_layers=4, hidden_size=256, num_heads=8, num_kv_heads=4, ffn_size=704, vocab_size=2048)
LENGTH = 256
STALL_SECONDS = 5.0


def run_config(folder: Path, steps: int, layout: str, corpus: Path) -> RunConfig:
    """A llama of 4 million weights that saves every 5 steps, and may be restarted as often as it takes."""
    config = RunConfig(
        model=ModelConfig(**MODEL, max_seq_length=LENGTH),  # type: ignore[arg-type]
        data=DataConfig(path=str(corpus), seq_length=LENGTH),
        train=TrainConfig(run_dir=str(folder), steps=steps, global_batch_size=4, micro_batch_size=1, log_every=steps),
        checkpoint=CheckpointConfig(save_every=5, keep=2),
        cluster=ClusterConfig(device="cpu", threads=1, max_restarts=3, stall_seconds=STALL_SECONDS),
    )
    return with_layout(config, layout)


@contextmanager
def running(config: RunConfig, without: bool = False) -> Iterator[subprocess.Popen]:
    """The run's agent; ended at the end. `without`: ranks started by hand, as torchrun would, and no heartbeats."""
    folder = Path(config.train.run_dir)
    folder.mkdir(parents=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    command = [sys.executable, "-m", "megalm.launchers.cli", "pretrain", str(path)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""}
    started = []
    with open(folder / "console.log", "w") as console:
        for rank in range(2 if without else 1):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} if without else {}
            mine |= {"MASTER_PORT": str(20000 + os.getpid() % 10000)} if without else {}
            started.append(subprocess.Popen(command, env={**environ, **mine}, stdout=console, stderr=console))
    try:
        yield started[0]
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
            process.wait()


def ranks_of(agent: int) -> dict[int, int]:
    """{rank: pid} of an agent's workers."""
    found: dict[int, int] = {}
    for child in Path(f"/proc/{agent}/task/{agent}/children").read_text().split():
        environ = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks = [item.removeprefix("RANK=") for item in environ if item.startswith("RANK=")]
        found |= {int(rank): int(child) for rank in ranks}
    return found


def last_step(folder: Path) -> int:
    """Of metrics.jsonl, which has a line for every step and is written at once."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def wait(what: Any, process: subprocess.Popen, seconds: float = 120.0) -> None:
    """Until what() is true. Raises SystemExit, with the run's last words, if it ends or the time is over."""
    deadline = time.monotonic() + seconds
    while not what():
        if process.poll() is not None or time.monotonic() > deadline:
            words = Path(str(process.args[-1])).with_name("console.log").read_text()[-2000:]  # type: ignore[index]
            raise SystemExit(f"{words}\nthe run did not come back (exit code {process.poll()})")
        time.sleep(0.02)


def recover(folder: Path, corpus: Path, number: int, times: int) -> dict[str, Any]:
    """Hit a rank `times` times; seconds until it was found, and until the first step of the next start was done."""
    found, again = list[float](), list[float]()
    config = run_config(folder, 100000, "tp2", corpus)

    def starts() -> int:
        return sum(event["kind"] == "started" for event in read_events(folder))

    with running(config) as process:
        chance = random.Random(0)
        for turn in range(times):
            wait(lambda turn=turn: starts() == turn + 1, process)
            begin = last_step(folder)
            wait(lambda begin=begin: last_step(folder) >= begin + 7, process)  # it has saved: a new count of restarts
            time.sleep(chance.random() * 0.3)  # anywhere in a step
            hit, moment = time.monotonic(), time.time()
            os.kill(ranks_of(process.pid)[turn % 2], number)
            wait(lambda turn=turn: starts() == turn + 2, process)
            resumed = [event["step"] for event in read_events(folder) if event["kind"] == "started"][-1]
            wait(lambda resumed=resumed: last_step(folder) > resumed, process)
            again.append(time.monotonic() - hit)
            told = [event["time"] for event in read_events(folder) if event["kind"] in ("failed", "stalled")][-1]
            found.append(told - moment)
            line = f"  {turn + 1:>3}  told after {found[-1]:5.1f} s  training after {again[-1]:5.1f} s  from step {resumed}"
            print(line, flush=True)
    return {"times": times, "told_seconds": found, "training_seconds": again}


def overhead(folder: Path, corpus: Path, steps: int, turns: int) -> dict[str, Any]:
    """The price of one stamp, and what a run pays."""
    make_file(folder / "beat")
    file, rounds = HeartbeatFile(folder / "beat"), []
    row = file.add_group("data 0-1")
    for _ in range(50):
        begin = time.perf_counter()
        for _ in range(2000):
            file.enter(row, b"all_reduce")
            file.leave()
        rounds.append((time.perf_counter() - begin) / 2000)
    result: dict[str, Any] = {"stamp_microseconds": min(rounds) * 1e6}
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns):
        for without in (bool(turn % 2), not turn % 2):
            config = run_config(folder / f"{turn}-{without}", steps, "tp2", corpus)
            config.checkpoint.save_every = 0
            with running(config, without) as process:
                if not without:
                    result |= _share(process, Path(config.train.run_dir), steps)
                if process.wait(600):
                    raise SystemExit((Path(config.train.run_dir) / "console.log").read_text())
            times = [e["time"] for e in read_events(Path(config.train.run_dir)) if e["kind"] in ("started", "finished")]
            seconds[without].append((times[1] - times[0]) / steps)
            print(f"  {'without' if without else 'with   '}  {seconds[without][-1] * 1e3:7.2f} ms per step", flush=True)
    result["with_seconds"], result["without_seconds"] = seconds[False], seconds[True]
    step = statistics.median(seconds[True])
    result["stamps_share"] = result["collectives_per_step"] * result["stamp_microseconds"] * 1e-6 / step
    result["measured_share"] = statistics.median(seconds[False]) / step - 1
    return result


def _share(agent: subprocess.Popen, folder: Path, steps: int) -> dict[str, float]:
    """Of a run: collectives of a step, and the agent's share of a core while it trains."""
    wait(lambda: last_step(folder) >= steps // 4, agent)
    pid = next(iter(ranks_of(agent.pid).values()))
    environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
    beat = Path(next(item.split("=", 1)[1] for item in environ if item.startswith("MEGALM_HEARTBEAT=")))

    def now() -> tuple[float, float, int, int]:
        fields = Path(f"/proc/{agent.pid}/stat").read_text().rpartition(")")[2].split()
        ticks, pulse = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), read_pulse(beat)
        return time.monotonic(), ticks, pulse.step, sum(c.sequence for c in pulse.collectives)

    first = now()
    wait(lambda: last_step(folder) >= steps * 3 // 4, agent)
    last = now()
    return {
        "agent_core_share": (last[1] - first[1]) / (last[0] - first[0]),
        "collectives_per_step": (last[3] - first[3]) / max(1, last[2] - first[2]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("what", nargs="*", default=["overhead", "kill", "stop"], help="overhead, kill, stop")
    parser.add_argument("--times", type=int, default=10, help="faults of each kind")
    parser.add_argument("--steps", type=int, default=200, help="steps of a run that measures the overhead")
    parser.add_argument("--turns", type=int, default=3, help="such runs, with and without")
    parser.add_argument("--json", help="write the numbers to this file")
    options = parser.parse_args()
    print(describe_machine())
    results: dict[str, Any] = {"machine": describe_machine(), "versions": describe_versions(None)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_tokens(folder / "corpus")
        for what in options.what:
            print(what)
            if what == "overhead":
                found = results[what] = overhead(folder, folder / "corpus", options.steps, options.turns)
                print(
                    f"  a stamp {found['stamp_microseconds']:.2f} us, {found['collectives_per_step']:.0f} collectives per step: "
                    f"{found['stamps_share']:.3%} of a step; the agent {found['agent_core_share']:.2%} of a core; "
                    f"measured {found['measured_share']:+.1%}"
                )
                continue
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[what]
            found = results[what] = recover(folder / what, folder / "corpus", number, options.times)
            for key in ("told_seconds", "training_seconds"):
                values = sorted(found[key])
                median, count = statistics.median(values), f"{len(values)} of {options.times}"
                print(f"  {key}: median {median:.1f}, worst {values[-1]:.1f}, {count}")
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
