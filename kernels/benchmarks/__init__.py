"""Benchmarks of every operation beside its peers: `megalm kernels bench`, or `python -m megalm_kernels.benchmarks`.

One file per kernel file lists its cases; harness.py measures them and report.py says what the results are.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megalm_kernels.benchmarks import report
from megalm_kernels.benchmarks.harness import EXACT, OURS, Case, Stopwatch, measure, measure_ceilings

FILES = {
    "rms_norm": "norms",
    "layer_norm": "norms",
    "fused_adam": "fused_adam",
    "l2_norm": "l2_norm",
    "rotary": "rotary",
    "swiglu": "activations",
    "geglu": "activations",
    "bias_gelu": "activations",
    "cross_entropy": "cross_entropy",
    "linear_cross_entropy": "linear_cross_entropy",
}


def find_cases(ops: Sequence[str] = (), sizes: str = "full") -> Iterator[Case]:
    """The cases of these operations (empty: all). sizes: full, quick or tiny. Raises ValueError for an unknown operation."""
    unknown = sorted(set(ops) - FILES.keys())
    if unknown:
        raise ValueError(f"no benchmark is called {unknown[0]}; there are {', '.join(FILES)}")
    wanted = list(ops) or list(FILES)
    for file in dict.fromkeys(FILES[name] for name in wanted):
        for case in importlib.import_module(f"megalm_kernels.benchmarks.{file}").cases(sizes):
            if case.operation in wanted:
                yield case


def run(
    ops: Sequence[str] = (),
    device: str = "auto",
    quick: bool = False,
    results: Path = Path("runs/kernels"),
    peers: Sequence[str] = (),
) -> int:
    """Measure, print a table, write the JSON file and the pictures. 1: ours failed, or anything on a CPU; 0: else.

    device: auto, cuda or cpu (tiny sizes and no GPU kernels: shows that the benchmark works, says nothing about speed).
    peers: names of providers beside ours, empty: all that are installed. Raises ValueError for an unknown operation.
    """
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = kind == "cuda"
    where = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    cases = list(find_cases(ops, "tiny" if not on_gpu else "quick" if quick else "full"))
    if not on_gpu:
        print(f"({report.CPU_LABEL})")
    stopwatch = Stopwatch(where, 0.002 if not on_gpu else 0.08 if quick else 0.25)
    ceilings = measure_ceilings(stopwatch)
    print(report.headline())
    rows: list[report.Row] = []
    try:
        for case in cases:
            fresh = report.complete(list(measure(case, stopwatch, peers)), ceilings)
            print("\n".join(report.line(row) for row in fresh if row.status != "absent"), flush=True)
            rows += fresh
    finally:  # a fault on a GPU ends the process's use of it; what was measured before stands
        found = report.document(rows, ceilings, where, quick)
        path = report.write(found, results)
    pictures = report.draw(found, results)
    print("\n".join(report.summary(found)))
    print(f"{path}, and {len(pictures)} pictures" if pictures else f"{path}; no pictures: matplotlib is not installed")
    failed = {row.provider for row in rows if row.status == "failed"}
    return 1 if failed & {OURS, EXACT} or (failed and not on_gpu) else 0  # a peer's failure is a result, and in the table
