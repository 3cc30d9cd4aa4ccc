"""What two runs left behind, compared: the checkpoint before the first step, losses and gradient norms, the last checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megalm.checkpoint.reshard import read_whole
from megalm.checkpoint.sharded import Manifest, read_manifest
from megalm.checkpoint.state import BUFFER
from megalm.config.run import ParityConfig
from megalm.parallel.engine import WEIGHT

ZERO_GRADIENT = "attention.k.bias"
"""Softmax does not change when all keys of a query move together: this bias's gradient is zero but for rounding, and Adam
divides rounding by rounding unless eps is larger."""

_KINDS = (f"{WEIGHT}/", f"{BUFFER}/")  # of tensors in a checkpoint that are the model
_Found = tuple[Any, float]  # a place (a step, a tensor's name) and how far the two are apart there


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
    first_step: int = 0  # at which something differs; 0: none does
    compared: bool = False

    @property
    def verdict(self) -> str:
        if self.faults:
            return "DIFFERS" if self.compared else "FAILED"
        return "equal" if self.compared else "reference"


def compare(result: Comparison, reference: Path, other: Path, tolerance: ParityConfig) -> None:
    """Fill in `result` from the folders of two runs."""
    mine, theirs = _metrics(other), _metrics(reference)
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(mine, theirs, strict=True)]
    norms = [
        abs(a["grad_norm"] - b["grad_norm"]) / max(b["grad_norm"], 1e-12) for a, b in zip(mine, theirs, strict=True)
    ]
    first, last = "step-00000000", f"step-{tolerance.steps:08d}"
    initial, final = list[_Found](), list[_Found]()
    for name, a, b in _tensors(reference / "checkpoints" / first, other / "checkpoints" / first):
        if _hash(a) != _hash(b):
            initial.append((name, _largest(a, b)))
    for name, a, b in _tensors(reference / "checkpoints" / last, other / "checkpoints" / last):
        if name.endswith(ZERO_GRADIENT):
            result.zero_gradient = max(result.zero_gradient, _largest(a, b))
        else:
            final.append((name, _largest(a, b)))
    result.compared, result.initial_equal = True, not initial
    result.loss, result.norm = float(np.max(losses)), float(np.max(norms))  # unlike max, it keeps a NaN
    result.weight = float(np.max([difference for _, difference in final]))
    of_losses = _above(list(enumerate(losses, 1)), tolerance.loss_tolerance)
    of_norms = _above(list(enumerate(norms, 1)), tolerance.norm_tolerance)
    of_steps = [
        (of_losses, _fault("loss differs", f" > {tolerance.loss_tolerance:.0e}", "at step", of_losses)),
        (of_norms, _fault("gradient norm differs", f" > {tolerance.norm_tolerance:.0e}", "at step", of_norms)),
    ]
    of_weights = _above(final, tolerance.weight_tolerance)
    result.faults += _fault("initial weights differ", "", "in", initial)
    result.faults += [text for _, texts in sorted(of_steps, key=lambda found: _first(found[0])) for text in texts]
    result.faults += _fault("final weights differ", f" > {tolerance.weight_tolerance:.0e}", "in", of_weights)
    if result.faults:
        result.first_step = 1 if initial else min(tolerance.steps, _first(of_losses), _first(of_norms))


def _first(found: list[_Found]) -> int:
    """The first step of those found; later than all if there is none."""
    return found[0][0] if found else sys.maxsize


def _above(found: Sequence[_Found], limit: float) -> list[_Found]:
    return [(place, difference) for place, difference in found if not difference <= limit]


def _fault(what: str, limit: str, word: str, found: list[_Found]) -> list[str]:
    """One line that names the first and the largest difference; none if there is none."""
    if not found:
        return []
    place, difference = found[0]
    most, largest = max(found, key=lambda f: math.inf if math.isnan(f[1]) else f[1])
    if len(found) == 1:
        return [f"{what} by {difference:.1e}{limit} {word} {place}"]
    if most == place:
        return [f"{what} by {largest:.1e}{limit}, first and most {word} {place}"]
    return [f"{what} by {largest:.1e}{limit}: first {word} {place} (by {difference:.1e}), most {word} {most}"]


def _largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _tensors(reference: Path, other: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights and buffers of two checkpoints, by name, in the reference's order of layers."""
    a, b = read_manifest(reference), read_manifest(other)
    for name in sorted(_weights(a) | _weights(b), key=model_order):
        yield name, read_whole(reference, a, _key(a, name)), read_whole(other, b, _key(b, name))


def _weights(manifest: Manifest) -> set[str]:
    return {key.partition("/")[2] for key in manifest.tensors if key.startswith(_KINDS)}


def _key(manifest: Manifest, name: str) -> str:
    """Under which a checkpoint has it."""
    return next((key for kind in _KINDS if (key := f"{kind}{name}") in manifest.tensors), f"{_KINDS[0]}{name}")


def model_order(name: str) -> tuple[int, int, str]:
    """Sorts parameters: embeddings, then layers by number, then norm and head."""
    parts = name.split(".")
    if parts[0] == "layers":
        return 1, int(parts[1]), name
    return (0 if "embedding" in parts[0] else 2), 0, name


def _metrics(run_dir: Path) -> list[dict]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
