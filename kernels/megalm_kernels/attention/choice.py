"""What `auto` takes for attention: what was measured to be the fastest on this GPU, in the table that ships beside this file.

measured.json is a list of rows, each of one problem in bf16:

    gpu, torch, triton   the GPU's name and the versions; a row counts where the first two numbers of both are ours
    head_dim, causal, seq_length
    direction            forward, backward or full; the choice is made by full, which is what training does
    tflops               {implementation: number} of those whose result was right; other names, of variants, do not count
    commit               that was measured
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from megalm_kernels.attention.operators import suits
from megalm_kernels.dispatch import Facts, Order

Row = Mapping[str, Any]
TABLE = Path(__file__).with_name("measured.json")
_USUAL = ("triton", "sdpa")
_CANDIDATES = (*_USUAL, "cudnn")  # of equals, the first
_PROVIDERS = {"torch": "sdpa", "sdpa cudnn": "cudnn"}  # the benchmark's names that are not ours
_FIELDS = ("gpu", "torch", "triton", "head_dim", "causal", "seq_length", "direction", "tflops", "commit")


def order(device_type: str, facts: Facts) -> Order:
    """For dispatch. facts: head_dim, precision (fp32, bf16, fp16) of the calls to come, where they are known."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return Order(_USUAL, "the fastest here")
    if facts.get("precision") == "fp32":
        return Order(("sdpa", "triton"), "fp32, which triton multiplies without tensor cores")
    left_out = {name: why for name in _CANDIDATES if (why := _unfit(name, facts))}
    if not {"head_dim", "precision"} <= facts.keys():  # the calls may be of any kind, and cudnn has not all kinds
        left_out["cudnn"] = "not for every call"
    usual = [name for name in _USUAL if name not in left_out]
    gpu = torch.cuda.get_device_name(torch.cuda.current_device())
    rows = list(_rows_here(read(TABLE), gpu, facts))
    ranked = [(name, rate) for name, rate in _rank(rows) if name not in left_out]
    words = [f"{name}: {why}" for name, why in left_out.items() if name in _USUAL]
    if not ranked:
        return Order(usual, "nothing was measured on this GPU", words)
    (best, rate), *others = ranked
    second = f" {rate / others[0][1]:.2f}x {others[0][0]}" if others else ""
    return Order([best, *(name for name in usual if name != best)], f"measured{second} on {gpu}", words)


def _unfit(implementation: str, facts: Facts) -> str:
    """Why it cannot do the calls to come; '' if it can, as far as one knows."""
    head_dim = facts.get("head_dim")
    if head_dim and implementation != "sdpa" and not suits(head_dim):
        return f"not with head_dim={head_dim}"
    return ""


def _rows_here(rows: Sequence[Row], gpu: str, facts: Facts) -> Iterator[Row]:
    """Those of this machine and of the calls to come."""
    for row in rows:
        same = all(_release(row[name]) == _release(installed(name)) for name in ("torch", "triton"))
        alike = row["head_dim"] == facts.get("head_dim", row["head_dim"])
        if same and alike and row["gpu"] == gpu and row["direction"] == "full":
            yield row


def _rank(rows: Sequence[Row]) -> list[tuple[str, float]]:
    """Those that did every row, with the geometric mean of their TFLOP/s, the fastest first."""
    able = [name for name in _CANDIDATES if rows and all(row["tflops"].get(name) for row in rows)]
    rates = [(name, math.exp(sum(math.log(row["tflops"][name]) for row in rows) / len(rows))) for name in able]
    return sorted(rates, key=lambda pair: -pair[1])


@cache
def installed(package: str) -> str:
    """Its version; '' if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _release(version: str) -> list[str]:
    return version.split(".")[:2]


def read(path: Path) -> list[Row]:
    """The table. Raises ValueError if a row is not as described above."""
    rows = json.loads(path.read_text())
    for row in rows:
        if set(row) != set(_FIELDS):
            raise ValueError(f"{path}: a row has the fields {', '.join(sorted(row))}, wanted {', '.join(sorted(_FIELDS))}")
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """One row per line, in order."""
    lines = sorted(json.dumps({name: row[name] for name in _FIELDS}) for row in rows)
    path.write_text("[\n  " + ",\n  ".join(lines) + "\n]\n" if lines else "[]\n")


def rows_from(results: Mapping[str, Any], read_shape: Callable[[str], Mapping[str, Any] | None]) -> list[Row]:
    """Rows of one JSON file of `megalm kernels bench attention`; read_shape: what its shapes say, None if they do not count."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    versions, head = results["versions"], {"gpu": results["machine"]["gpu"], "commit": results["commit"]}
    for row in results["rows"]:
        shape = read_shape(row["shape"])
        if row["operation"] != "attention" or row["status"] != "ok" or row["dtype"] != "bfloat16" or shape is None:
            continue
        numbers = {name: shape[name] for name in ("head_dim", "causal", "seq_length")}
        start = {**head, "torch": versions["torch"], "triton": versions["triton"], **numbers, "tflops": {}}
        one = found.setdefault((row["shape"], row["direction"]), {**start, "direction": row["direction"]})
        one["tflops"][_PROVIDERS.get(row["provider"], row["provider"])] = round(row["tflops"], 1)
    return list(found.values())
