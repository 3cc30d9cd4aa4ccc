"""Measure a long sequence shared by ranks: `python tools/bench_context.py [--lengths 4096 8192] [--long] [--json FILE]`.

A training step (forward, loss, backward) of a tiny llama on one rank and with context parallelism on two, ring and all-to-all:

    memory   the most bytes of tensors that one rank has at once in a step, beyond weights and tokens, counted by the memory
             meter; and by how much its resident memory grew, which has what operators take inside themselves and gloo's buffers
    seconds  of one step, the slowest rank's: the median of --steps; and of its CPU alone
    sent     bytes that one rank sends for one layer's attention in a step, by the communication ledger

The ratios are to one rank at the same length. CPU, gloo, fp32, one thread per process, random tokens. --long adds 131,072 tokens,
which take minutes per layer. On a busy machine ranks wait for their turn: CPU seconds say more. Nothing fails for being slow.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from bench_report import describe_machine, describe_versions

from megalm.config.layouts import with_layout
from megalm.config.model import ModelConfig
from megalm.config.run import RunConfig
from megalm.config.validate import check
from megalm.objectives.language_modeling import causal_loss
from megalm.parallel.context_parallel import local_tokens
from megalm.parallel.ledger import Ledger
from megalm.parallel.memory_meter import MemoryMeter
from megalm.parallel.topology import build_topology
from megalm.parallel.volume import wire_bytes
from megalm.testing import run_distributed
from megalm.train.build import build_stage
from megalm_kernels.benchmarks.report import describe_commit

LAYOUTS = ("single", "cp2_ring", "cp2_ulysses")
LONG = 131072
VOCAB = 64


@dataclass(frozen=True)
class Result:
    """One layout at one length, by the rank that has most of it."""

    layout: str
    seq_length: int
    tensor_bytes: int
    resident_bytes: int
    seconds: float
    cpu_seconds: float
    sent_bytes_per_layer: float


def configure(options: argparse.Namespace, layout: str, seq_length: int) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(
            num_layers=options.layers, hidden_size=options.hidden, num_heads=options.heads, num_kv_heads=options.kv_heads,
            ffn_size=2 * options.hidden, vocab_size=VOCAB, max_seq_length=seq_length, window=options.window,
        )
    )  # fmt: skip
    config.data.seq_length, config.cluster.device = seq_length, "cpu"
    config.train.global_batch_size = config.train.micro_batch_size = 1
    config = with_layout(config, layout)
    check(config)
    return config


def measure(rank: int, size: int, config: RunConfig, steps: int) -> tuple[int, int, list[tuple[float, float]], float]:
    """On one rank: bytes of tensors, growth of resident memory, seconds of each step, also of its CPU, bytes sent per layer."""
    topology = build_topology(config.parallel, torch.device("cpu"), timedelta(hours=2))
    model = build_stage(config, topology, 0, 1, torch.float32)
    places = local_tokens(config.parallel.context_method, topology.context.size, topology.context.rank, config.data.seq_length)
    tokens = torch.randint(VOCAB, (1, config.data.seq_length + 1), generator=torch.Generator().manual_seed(0))
    inputs, labels = tokens[:, places], tokens[:, places + 1]

    def step() -> tuple[float, float]:
        start, cpu = time.perf_counter(), time.process_time()
        causal_loss(model(inputs, places), labels, topology.tensor, VOCAB).backward()
        return time.perf_counter() - start, time.process_time() - cpu

    with resident_growth() as growth, Ledger(topology) as ledger, MemoryMeter() as meter:
        seconds = [step()]  # the modes cost microseconds per operator
    sent = sum(wire_bytes(kind, count.bytes, size) for (group, kind), count in ledger.volume().items() if group == "context")
    for _ in range(steps - 1):
        seconds.append(step())
    return meter.peak - meter.before, growth(), seconds, sent / config.model.num_layers


@contextmanager
def resident_growth() -> Iterator[Callable[[], int]]:
    """How many bytes the most that was resident inside is above what was there at the start; Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, found = _status("VmRSS"), [0]
    yield lambda: found[0]
    found[0] = _status("VmHWM") - before


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run(options: argparse.Namespace, layout: str, seq_length: int) -> Result:
    config = configure(options, layout, seq_length)
    steps = 1 if seq_length >= LONG else options.steps
    ranks = run_distributed(measure, config.cluster.num_processes, config, steps, timeout_seconds=options.timeout)
    tensors, resident, seconds, sent = zip(*ranks, strict=True)
    slowest = [[max(times) for times in zip(*step, strict=True)] for step in zip(*seconds, strict=True)]
    clock, cpu = (statistics.median(times) for times in zip(*slowest, strict=True))
    return Result(layout, seq_length, max(tensors), max(resident), clock, cpu, max(sent))


def line(result: Result, one: Result | None) -> str:
    mib, ratio = 2**20, (lambda a, b: f"{a / b:5.2f}" if b else "     ")
    alone = one or result
    return (
        f"{result.seq_length:>8} {result.layout:<12} {result.tensor_bytes / mib:9.1f} MiB"
        f" {ratio(result.tensor_bytes, alone.tensor_bytes)} {result.resident_bytes / mib:9.1f} MiB"
        f" {ratio(result.resident_bytes, alone.resident_bytes)} {result.seconds:9.3f} s {ratio(result.seconds, alone.seconds)}"
        f" {result.cpu_seconds:9.3f} s {ratio(result.cpu_seconds, alone.cpu_seconds)}"
        f" {result.sent_bytes_per_layer / mib:8.2f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--long", action="store_true", help=f"{LONG} tokens too")
    parser.add_argument(
        "--layouts", nargs="+", default=list(LAYOUTS), help="short names; the first is what others are compared to"
    )
    for name, default in (("layers", 2), ("hidden", 64), ("heads", 4), ("kv-heads", 2), ("window", 0), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds for one layout at one length")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    options = parser.parse_args()
    head = (
        ("tokens", 8),
        ("layout", -12),
        ("tensors", 13),
        ("ratio", 5),
        ("resident", 13),
        ("ratio", 5),
        ("step", 11),
        ("ratio", 5),
        ("CPU", 11),
        ("ratio", 5),
    )
    print(*(f"{name:<{-width}}" if width < 0 else f"{name:>{width}}" for name, width in (*head, ("sent/layer", 12))))
    found: list[dict[str, Any]] = []
    for seq_length in [*options.lengths, *([LONG] if options.long else [])]:
        one = None
        for layout in options.layouts:
            result = run(options, layout, seq_length)
            one = one or result
            print(line(result, one), flush=True)
            found.append({**asdict(result), "load": round(os.getloadavg()[0], 2)})
    if options.json:
        about = {
            "machine": describe_machine(),
            "versions": describe_versions(None),
            "commit": describe_commit(Path(__file__).parent),
        }
        given = {name: value for name, value in vars(options).items() if name != "json"}
        options.json.write_text(json.dumps({**about, "options": given, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
