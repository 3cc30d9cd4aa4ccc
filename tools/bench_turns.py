"""Processes that take turns: two trainings measured in alternation on one machine, in one run.

A side is one or several processes (ranks) that build what they measure and then wait, asleep, on their standard input. A
turn is one line in ({"steps": 5}) and one line out (what the rank measured). While one side has its turn the other sleeps,
so both see the same machine, and a slow minute slows neighbours in time, whose ratio is what counts.

Imports neither megalm nor, at the start, torch: a rank may run in another environment.
"""

from __future__ import annotations

import json
import os
import resource
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STORE, THREADS = "BENCH_STORE", "OMP_NUM_THREADS"
_TAIL = 15  # lines of a failed rank's output that are shown


class BenchError(Exception):
    """A side could not run; the text says why."""


# --- a rank -----------------------------------------------------------------------------------------------------------


def join_group() -> int:
    """One thread, and a gloo group of the ranks of this side; returns this process's rank."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ[THREADS]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=dist.FileStore(os.environ[STORE], world), rank=rank, world_size=world)
    return rank


def serve(build: Callable[[dict[str, Any]], Callable[[int], dict[str, Any]]]) -> int:
    """Be a rank: build from the specification in the last argument, then take turns until the input ends.

    `build` returns what runs a number of steps and says what it has measured. What libraries print goes to the error output.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    run = build(json.loads(sys.argv[-1]))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line)["steps"])), file=answers, flush=True)
    os._exit(0)  # gloo's threads may abort an interpreter that ends in the ordinary way


def clocked(step: Callable[[], Any]) -> Callable[[int], dict[str, Any]]:
    """What `serve` wants, of a training step: seconds per step, by the clock and of this process's CPU."""
    import torch.distributed as dist

    def run(steps: int) -> dict[str, Any]:
        dist.barrier()
        start, before = time.perf_counter(), _cpu_seconds()
        result = None
        for _ in range(steps):
            result = step()
        seconds, cpu = time.perf_counter() - start, _cpu_seconds() - before
        loss = None if result is None else float(result)
        return {"seconds": seconds / steps, "cpu_seconds": cpu / steps, "loss": loss}

    return run


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# --- who hands out the turns ------------------------------------------------------------------------------------------


class Side:
    """The processes of one side, started and ready."""

    def __init__(self, name: str, command: Sequence[str], spec: dict[str, Any], ranks: int, folder: Path, timeout: float):
        self.name, self.timeout = name, timeout
        self.logs = [folder / f"rank-{rank}.log" for rank in range(ranks)]
        environ = {**os.environ, "WORLD_SIZE": str(ranks), STORE: str(folder / "store"), THREADS: "1"}
        environ |= {"GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
        environ |= {"PYTHONWARNINGS": "ignore", "LOCAL_RANK": "0"}
        self.processes = []
        for rank, log in enumerate(self.logs):
            with open(log, "w", encoding="utf-8") as errors:
                process = subprocess.Popen(
                    [*command, json.dumps(spec)], env={**environ, "RANK": str(rank)}, text=True, cwd=folder,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                )  # fmt: skip
            self.processes.append(process)

    def wait_ready(self) -> None:
        """Raises BenchError where a rank could not be built."""
        self._answers()

    def turn(self, steps: int) -> list[dict[str, Any]]:
        """Run; what each rank measured. Raises BenchError when a rank dies or takes too long."""
        for process in self.processes:
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"steps": steps}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                break  # it died: the answer that is missing says so
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        """One line of every rank; a pipe is read only once there is something in it, so that a dead rank is not waited for."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self.timeout
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self.processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(answers) < len(self.processes):
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise self._failure(f"did not answer within {self.timeout:g} s", 0)
                for key, _ in ready:
                    line = self.processes[key.data].stdout.readline()
                    if not line:
                        raise self._failure("ended", key.data)
                    answers[key.data] = json.loads(line)
                    selector.unregister(key.fileobj)
        return [answers[rank] for rank in range(len(self.processes))]

    def _failure(self, what: str, rank: int) -> BenchError:
        tail = self.logs[rank].read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
        return BenchError("\n  ".join([f"{self.name}: rank {rank} {what}", *tail]))

    def end(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                try:
                    pipe.close()
                except BrokenPipeError:  # a line that a dead rank never read
                    continue


@contextmanager
def start_sides(wanted: dict[str, tuple[Sequence[str], dict[str, Any], int]], timeout: float) -> Iterator[list[Side]]:
    """Sides by name, from (command, specification, ranks); all end with the scope."""
    sides: list[Side] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for number, (name, (command, spec, ranks)) in enumerate(wanted.items()):
                place = Path(folder) / str(number)
                place.mkdir()
                sides.append(Side(name, command, spec, ranks, place, timeout))
            for side in sides:
                side.wait_ready()
            yield sides
        finally:
            for side in sides:
                side.end()


@dataclass
class Pair:
    """Two sides' turns, one behind the other; seconds per step of the slowest rank, CPU seconds of all ranks together."""

    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    cpu: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))
    losses: list[float | None] = field(default_factory=lambda: [None, None])  # the last step's: both sides learn the same

    def ratios(self) -> list[float]:
        """First over second, turn by turn."""
        return [a / b for a, b in zip(*self.seconds, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians; the ratio is the median of the turns' ratios, with its quartiles."""
        ratios = self.ratios()
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
        medians = [statistics.median(side) for side in self.seconds]
        cpu = [statistics.median(side) for side in self.cpu]
        return {
            "seconds": medians,
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
            "cpu_seconds": cpu,
            "cpu_ratio": cpu[0] / cpu[1] if cpu[1] else None,
            "turns": len(ratios),
            "losses": self.losses,
        }


def alternate(first: Side, second: Side, turns: int, steps: int, warmup: int) -> Pair:
    """`turns` turns of `steps` steps each, A B B A A B B A ..., after `warmup` steps that do not count."""
    pair, sides = Pair(), (first, second)
    for side in sides if warmup else ():
        side.turn(warmup)
    for number in range(turns):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            answers = sides[which].turn(steps)
            pair.seconds[which].append(max(answer["seconds"] for answer in answers))
            pair.cpu[which].append(sum(answer["cpu_seconds"] for answer in answers))
            pair.losses[which] = next((answer["loss"] for answer in answers if answer["loss"] is not None), None)
    return pair
