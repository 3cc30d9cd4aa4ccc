"""`megalm parity`: run the same training on one rank and on other layouts, and prove that they compute the same.

Every layout is an ordinary `megalm pretrain` in processes of its own. What is compared comes from what such a run leaves
behind: the checkpoint before the first step, the losses and gradient norms in metrics.jsonl, and the last checkpoint.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor

from megalm.checkpoint.reshard import read_whole
from megalm.checkpoint.sharded import Manifest, read_manifest
from megalm.config.layouts import with_layout
from megalm.config.machine import processes
from megalm.config.run import ParityRun, RunConfig
from megalm.config.validate import validate
from megalm.data.indexed import IndexedWriter
from megalm.errors import ConfigError, Problem, RunError
from megalm.log import log
from megalm.parallel.workers import make_folder, start_workers

REFERENCE = "single"
ZERO_GRADIENT = "attention.k.bias"
"""Softmax does not change when all keys of a query move together: this bias's gradient is zero but for rounding, and Adam
divides rounding by rounding unless eps is larger."""


@dataclass
class Comparison:
    """One layout against one rank: the largest differences, and what breaks a tolerance."""

    layout: str
    ranks: int
    seconds: float
    initial_equal: bool = True
    loss: float = 0.0
    norm: float = 0.0  # relative
    weight: float = 0.0
    zero_gradient: float = 0.0  # of the key biases, not judged
    faults: list[str] = field(default_factory=list)


def parity_command(config: ParityRun) -> None:
    """Run, compare, print a table. Raises RunError (exit 1) naming the first tensor that differs, if a layout does."""
    runs = {name: run_config(config, name) for name in dict.fromkeys([REFERENCE, *config.parity.layouts])}
    problems = [dataclasses.replace(p, key=f"[{name}] {p.key}") for name, run in runs.items() for p in validate(run)]
    if problems:
        raise ConfigError(*problems)
    work = Path(config.parity.work_dir)
    make_folder(work)
    clear(work, list(runs))
    if not config.data.path:
        write_random_corpus(work / "corpus", config)
    log(
        f"{'layout':<24}{'ranks':>6}{'initial':>9}{'loss':>11}{'norm':>11}{'weights':>11}{'key bias':>11}{'seconds':>9}"
    )
    results = []
    for name, run in runs.items():
        start = time.perf_counter()
        start_layout(run, work / f"{name}.yaml")
        result = Comparison(name, processes(run), time.perf_counter() - start)
        if name != REFERENCE:
            compare(result, work / REFERENCE, work / name, config)
        results.append(result)
        log(_row(result))
    if not config.parity.keep:
        clear(work, list(runs))
        if not any(work.iterdir()):
            work.rmdir()
    faults = [Problem(f"layout {r.layout}", None, "; ".join(r.faults)) for r in results if r.faults]
    if faults:
        error = RunError(*faults)
        error.kind = "parity error"
        raise error
    log(f"{len(results) - 1} layouts equal one rank over {config.parity.steps} steps")


def clear(work: Path, layouts: list[str]) -> None:
    """Delete what a parity run makes in its folder, and nothing else that may be there."""
    for name in layouts:
        shutil.rmtree(work / name, ignore_errors=True)
        (work / f"{name}.yaml").unlink(missing_ok=True)
    for suffix in (".bin", ".idx"):
        (work / "corpus").with_suffix(suffix).unlink(missing_ok=True)


def run_config(config: ParityRun, layout: str) -> RunConfig:
    """The training run of one layout. Raises ConfigError if the name cannot be read."""
    try:
        laid_out = with_layout(config, layout)
    except ValueError as error:
        rule = "must be a layout's short name"
        raise ConfigError(
            Problem("parity.layouts", layout, rule, str(error), "for example parity.layouts=[tp2,pp2,dp2_zero3]")
        ) from error
    sections = {f.name: getattr(laid_out, f.name) for f in dataclasses.fields(RunConfig)}
    work = Path(config.parity.work_dir)
    sections["train"] = dataclasses.replace(
        config.train, steps=config.parity.steps, run_dir=str(work / layout), log_every=config.parity.steps
    )
    sections["checkpoint"] = dataclasses.replace(config.checkpoint, save_first=True, keep=0, load="")
    sections["data"] = dataclasses.replace(config.data, path=config.data.path or str(work / "corpus"))
    return RunConfig(**sections)


def start_layout(run: RunConfig, path: Path) -> None:
    """Train one layout in its own processes, quietly."""
    path.write_text(yaml.safe_dump(asdict(run), sort_keys=False))
    start_workers("megalm.launchers.pretrain", [str(path)], run, quiet=True)


def write_random_corpus(prefix: Path, config: RunConfig) -> None:
    """Documents of random tokens with a skewed distribution, from the data seed: enough for every step."""
    generator = np.random.RandomState(config.data.seed)
    with IndexedWriter(prefix, config.model.vocab_size) as writer:
        for _ in range(64):
            ids = generator.randint(0, config.model.vocab_size, size=(2, 4 * config.data.seq_length)).min(0)
            writer.add_document(ids)


def compare(result: Comparison, reference: Path, other: Path, config: ParityRun) -> None:
    """Fill in `result` from what the two runs left behind."""
    tolerance = config.parity
    mine, theirs = _metrics(other), _metrics(reference)
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(mine, theirs, strict=True)]
    norms = [
        abs(a["grad_norm"] - b["grad_norm"]) / max(b["grad_norm"], 1e-12) for a, b in zip(mine, theirs, strict=True)
    ]
    result.loss, result.norm = float(np.max(losses)), float(np.max(norms))  # unlike max, it keeps a NaN
    first, last = "step-00000000", f"step-{tolerance.steps:08d}"
    for name, a, b in _tensors(reference / "checkpoints" / first, other / "checkpoints" / first):
        if _hash(a) != _hash(b) and result.initial_equal:
            result.initial_equal = False
            result.faults.append(f"initial weights differ, first in {name}")
    for name, a, b in _tensors(reference / "checkpoints" / last, other / "checkpoints" / last):
        difference = float((a - b).abs().max())
        if name.endswith(ZERO_GRADIENT):
            result.zero_gradient = max(result.zero_gradient, difference)
            continue
        if not difference <= tolerance.weight_tolerance and result.weight <= tolerance.weight_tolerance:
            result.faults.append(
                f"final weights differ by {difference:.1e} > {tolerance.weight_tolerance:.0e}, first in {name}"
            )
        result.weight = float(np.maximum(result.weight, difference))
    for what, values, limit in (
        ("loss", losses, tolerance.loss_tolerance),
        ("gradient norm", norms, tolerance.norm_tolerance),
    ):
        bad = [step for step, value in enumerate(values, 1) if not value <= limit]
        if bad:
            result.faults.append(f"{what} differs by {np.max(values):.1e} > {limit:.0e}, first at step {bad[0]}")


def _tensors(reference: Path, other: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights of two checkpoints, by name, in the reference's order of layers."""
    a, b = read_manifest(reference), read_manifest(other)
    for key in sorted(_weights(a) | _weights(b), key=_model_order):
        yield key.removeprefix("weight/"), read_whole(reference, a, key), read_whole(other, b, key)


def _weights(manifest: Manifest) -> set[str]:
    return {key for key in manifest.tensors if key.startswith("weight/")}


def _model_order(key: str) -> tuple[int, int, str]:
    """Embeddings, then layers by number, then norm and head."""
    parts = key.removeprefix("weight/").split(".")
    if parts[0] == "layers":
        return 1, int(parts[1]), key
    return (0 if "embedding" in parts[0] else 2), 0, key


def _metrics(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()


def _row(r: Comparison) -> str:
    if r.layout == REFERENCE:
        return f"{r.layout:<24}{r.ranks:>6}{'-':>9}{'-':>11}{'-':>11}{'-':>11}{'-':>11}{r.seconds:>9.1f}"
    initial = "equal" if r.initial_equal else "DIFFERS"
    verdict = "" if not r.faults else "   DIFFERS"
    return (
        f"{r.layout:<24}{r.ranks:>6}{initial:>9}{r.loss:>11.1e}{r.norm:>11.1e}{r.weight:>11.1e}"
        f"{r.zero_gradient:>11.1e}{r.seconds:>9.1f}{verdict}"
    )
