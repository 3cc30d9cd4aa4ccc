"""Folders of runs, written by hand as the trainer writes them: three starts, the second of which was killed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalm.config.run import RunConfig
from megalm.runfolder import Progress, note_finished, write_progress

BEGAN = 1_790_000_000.0  # seconds since the epoch
PACE, EVERY = 0.5, 10  # seconds per step, steps per log line
STARTS = ((0, 400, 0.0), (400, 760, 260.0), (700, 1000, 500.0))  # first step, last step, seconds after BEGAN
MakeRun = Callable[..., Path]


def write_run(
    folder: Path, steps: int = 1000, experts: bool = False, seed: int = 0, floor: float = 2.0, lr: float = 1e-3
) -> Path:
    """A finished run of `steps` >= 1000 planned steps; asked to stop at 400, killed at 760 (saved: 700), then to 1000."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = random.Random(seed)
    config = RunConfig()
    config.train.run_dir, config.train.steps, config.cluster.num_processes = str(folder), steps, 4
    config.parallel.tensor_parallel, config.optim.lr, config.train.seed = 2, lr, seed
    (folder / "config.yaml").write_text(yaml.safe_dump(asdict(config), sort_keys=False))
    metrics, events = [], []
    for index, (first, last, after) in enumerate(STARTS):
        attempt = ("0.0", "1.0", "1.1")[index]
        began, hosts = BEGAN + after, ["node1", ("node2", "node2", "node3")[index]]
        details = {"step": first, "steps": steps, "attempt": attempt, "ranks": 4, "hosts": hosts, "job": "77", "pid": 999_999_999}
        events.append({"time": began, "kind": "started", **details})
        counted = STARTS[index + 1][0] if index + 1 < len(STARTS) else last
        for step in range(first + 1, counted + 1):
            time = began + 5 + (step - first) * PACE
            metrics.append(_line(step, time, steps, floor, noise))
            if step % 100 == 0:
                events.append({"time": time + 0.4, "kind": "saved", "step": step, "seconds": 0.4})
                metrics.append(
                    {"step": step, "valid_loss": floor + 0.1 + 6.5 * math.exp(-step / 180), "valid_bits_per_byte": 1.2}
                )
            if experts and step % EVERY == 0:
                metrics.append(_experts(step, noise))
        ended = began + 5 + (last - first) * PACE
        if index == 0:
            events.append({"time": ended, "kind": "stopping", "step": last, "signal": "SIGUSR1"})
        if index == 1:
            words = {"reason": "rank died", "message": "rank 3 ended with signal 9", "rank": 3, "host": "node2", "step": last}
            events.append({"time": ended + 1, "kind": "failed", "attempt": attempt, **words})
            events.append(
                {"time": ended + 2, "kind": "excluded", "nodes": ["node2"], "why": {"node2": "two failures in an hour"}}
            )
            events.append({"time": ended + 3, "kind": "restarted", "attempt": "1.1"})
    events.append({"time": ended + 1, "kind": "finished", "step": 1000, "attempt": "1.1"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in sorted(events, key=lambda e: e["time"])))
    for step in (900, 1000):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    write_progress(folder, Progress(1000, steps, 1000, ended, "1.1", metrics[-1].get("loss", floor), 4_096_000, 8192.0))
    ranks = [
        {"rank": i, "measured": 10**9 + i * 10**7, "predicted": 1.02e9, "parts": {"weights": 4e8, "activations": 5e8}}
        for i in range(4)
    ]
    (folder / "memory.json").write_text(json.dumps({"step": 3, "layout": "tp2_dp2", "ranks": ranks}))
    if steps == 1000:
        note_finished(folder, 1000, steps, 0)
    return folder


def _line(step: int, time: float, steps: int, floor: float, noise: random.Random) -> dict[str, Any]:
    loss = floor + 7 * math.exp(-step / 180) + noise.gauss(0, 0.08)
    lr = 1e-3 * min(step / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    norm = 1.0 + 4 * math.exp(-step / 60) + abs(noise.gauss(0, 0.15)) + (30 if step == 333 else 0)
    record = {"step": step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": step * 4096}
    if step % EVERY == 0:
        speed = PACE * (1 + 0.05 * noise.random())
        record |= {"seconds_per_step": PACE, "tokens_per_second": 4096 / speed, "tflops_per_rank": 0.02, "mfu": None}
        record |= {"memory_bytes": 1_010_000_000 + step * 1000, "time": time}
    return record


def _experts(step: int, noise: random.Random) -> dict[str, Any]:
    layers = {str(layer): {"load": [abs(noise.gauss(1, 0.4)) for _ in range(16)], "dropped": 0.01} for layer in range(6)}
    loads = [load for row in layers.values() for load in row["load"]]
    head = {"step": step, "moe_max_load": max(loads), "moe_min_load": min(loads), "moe_worst_layer": 2}
    return {**head, "moe_dropped": 0.01, "moe_entropy": 2.5, "moe_aux_loss": 1.02, "moe_z_loss": 0.1, "moe_layers": layers}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """make_run("name", steps=..., experts=..., seed=..., floor=...): the folder of such a run."""

    def make(name: str = "run", **options: Any) -> Path:
        return write_run(tmp_path / name, **options)

    return make
