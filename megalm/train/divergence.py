"""Where two runs part: the first module, in the order of the computation, whose records differ (see record.py)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalm.train.comparison import model_order
from megalm.train.record import GRADIENT, OUTPUT, OUTPUT_GRADIENT, Piece, read_pieces

TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2, "fp16": 5e-2}
"""Largest difference that counts as rounding, as a part of the module's largest value. Measured in fp32: 2e-7 in the first step,
and 7e-5 in the second, where Adam has made steps out of the rounding of the smallest gradients."""

_MEANS = {OUTPUT: "forward", OUTPUT_GRADIENT: "backward: the gradient of its output", GRADIENT: "gradient of the parameter"}
_TINY = 1e-6  # of the largest value of its kind: what is all rounding is not judged by its own size


@dataclass(frozen=True)
class Divergence:
    """How far one module's records lie apart."""

    name: str
    kind: str
    difference: float  # largest, as a part of the largest value in the reference
    sample: int | None  # where it is largest; None for parameters

    def __str__(self) -> str:
        where = "" if self.sample is None else f"; sample {self.sample}"
        return f"{self.name} ({_MEANS[self.kind]}), by {self.difference:.1e} of its largest value{where}"


def name_first(reference: Path, other: Path, step: int, precision: str, not_judged: str) -> str:
    """One line that names the first module that differs at this step. Parameters ending in `not_judged` are left out."""
    found = [d for d in compare_records(reference, other) if not (d.kind == GRADIENT and d.name.endswith(not_judged))]
    first = next((d for d in found if not d.difference <= TOLERANCE[precision]), None)
    if first is not None:
        return f"first differing module at step {step}: {first}"
    largest = max(found, key=lambda d: d.difference, default=None)
    if largest is None:
        return f"no module of step {step} was recorded by both runs"
    same = f"at step {step} every output, its gradient and every parameter's gradient agree (largest difference {largest}): "
    if precision != "fp32" and largest.difference > TOLERANCE["fp32"]:
        return f"{same}that is what {precision} can resolve; prove the layout with train.precision=fp32, or widen the tolerances"
    return f"{same}what differs comes after the backward: the norm of the gradients, clipping, or the update"


def compare_records(reference: Path, other: Path) -> list[Divergence]:
    """Of all that both runs recorded: outputs in the order of the forward, their gradients and the parameters' in that of the
    backward."""
    wholes = read_pieces(reference)
    rows = {(p.kind, p.name, sample): p.value[i] for p in wholes for i, sample in enumerate(p.samples)}
    rows |= {(p.kind, p.name, -1): p.value for p in wholes if not p.samples}
    sizes = _largest(rows)
    worst: dict[tuple[str, str], tuple[float, int]] = {}
    for kind, name, sample, part, start in _parts(read_pieces(other)):
        whole = rows.get((kind, name, sample))
        if whole is None:
            continue
        for dim, (begin, length) in enumerate(zip(start, part.shape, strict=True)):
            whole = whole.narrow(dim, begin, length)
        difference = float((part - whole).abs().max()) / sizes[kind, name] if part.numel() else 0.0
        difference = float("inf") if difference != difference else difference  # NaN
        if difference >= worst.get((kind, name), (-1.0, 0))[0]:
            worst[kind, name] = difference, sample
    order = {kind: list(dict.fromkeys(p.name for p in wholes if p.kind == kind)) for kind in _MEANS}
    order[GRADIENT].sort(key=model_order, reverse=True)  # as the backward reaches them
    keys = [(kind, name) for kind, names in order.items() for name in names if (kind, name) in worst]
    return [Divergence(name, kind, *_shown(worst[kind, name])) for kind, name in keys]


def _parts(pieces: Iterable[Piece]) -> Iterable[tuple[str, str, int, Tensor, tuple[int, ...]]]:
    """(kind, name, sample, its part, where that begins); parameters have the sample -1."""
    for p in pieces:
        if not p.samples:
            yield p.kind, p.name, -1, p.value, p.start
        for i, sample in enumerate(p.samples):
            yield p.kind, p.name, sample, p.value[i], p.start


def _largest(rows: dict[tuple[str, str, int], Tensor]) -> dict[tuple[str, str], float]:
    """The largest magnitude of each (kind, name) over all samples, and never next to nothing."""
    found: dict[tuple[str, str], float] = {}
    for (kind, name, _), x in rows.items():
        found[kind, name] = max(found.get((kind, name), 0.0), float(x.abs().max()) if x.numel() else 0.0)
    floors = {kind: max(size for (k, _), size in found.items() if k == kind) * _TINY for kind, _ in found}
    return {key: max(size, floors[key[0]], torch.finfo(torch.float32).tiny) for key, size in found.items()}


def _shown(worst: tuple[float, int]) -> tuple[float, int | None]:
    return worst[0], worst[1] if worst[1] >= 0 else None
