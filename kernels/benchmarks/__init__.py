"""Benchmarks of every operation beside its peers: `megalm kernels bench`, or `python -m megalm_kernels.benchmarks`.

One file per kernel file lists its cases; harness.py measures them and report.py says what the results are.
"""

from __future__ import annotations

import importlib
import re
import sys
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
    "grouped_linear": "grouped_linear",
    "attention": "attention",
    "attention_packed": "attention",
    "decode_attention": "decode_attention",
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
    commit: str = "",
    shapes: str = "",
) -> int:
    """Measure, print a table, write the JSON file and the pictures.

    Returns 1 if ours failed, or anything on a CPU, or nothing was measured; 2 without the GPU that was asked for; else 0.
    device: auto, cuda or cpu (tiny sizes and no GPU kernels: shows that the benchmark works, says nothing about speed).
    peers: names of providers beside ours, empty: all that are installed. commit: what the file says; empty: the checkout's.
    shapes: a regular expression that the cases' shapes must contain.
    Raises ValueError for an unknown operation.
    """
    on_gpu = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print(f"error: device {device}: torch sees no GPU here", file=sys.stderr)
        return 2
    where = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    sizes = "tiny" if not on_gpu else "quick" if quick else "full"
    cases = [case for case in find_cases(ops, sizes) if re.search(shapes, case.shape)]
    if not on_gpu:
        print(f"({report.CPU_LABEL})")
    stopwatch = Stopwatch(where, 0.002 if not on_gpu else 0.08 if quick else 0.25)
    ceilings = measure_ceilings(stopwatch)
    print(report.headline())
    about = report.circumstances(ceilings, where, quick, commit)  # now: the GPU may be lost later
    rows = _unknown(peers, cases)
    try:
        for case in cases:
            begin = len(rows)
            for row in measure(case, stopwatch, peers):
                rows.append(row)  # one by one: the case may end in the middle
            for row in report.complete(rows[begin:], ceilings):
                if row.status != "absent":
                    print(report.line(row), flush=True)
    finally:  # a fault on a GPU ends the process's use of it; what was measured before stands
        found = {**about, **report.results(rows, ceilings)}
        print("\n".join(report.summary(found)))
        if found["rows"]:
            print(report.write(found, results), flush=True)
    if not found["rows"]:
        return 1
    print(report.describe_pictures(report.draw(found, results), results))
    failed = {row.provider for row in rows if row.status == "failed"}
    wrong = any(report.is_ours(name) or name == EXACT for name in failed)
    return 1 if wrong or (failed and not on_gpu) else 0  # a peer's failure is a result, and in the table


def _unknown(peers: Sequence[str], cases: Sequence[Case]) -> list[report.Row]:
    """Rows for the names that are no provider of any of these cases."""
    known = {OURS, *(provider.name for case in cases for provider in case.providers)}
    why = "no provider of these operations"
    operations = dict.fromkeys(case.operation for case in cases)
    missing = [(operation, name) for name in peers if name not in known for operation in operations]
    return [report.Row(operation, "", "", name, "", "", 0, 0, "absent", why) for operation, name in missing]
