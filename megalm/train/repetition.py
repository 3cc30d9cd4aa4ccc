"""Two runs of one layout that must not differ in one bit: their checkpoints and their metrics, compared (`parity.repeat`)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint.sharded import MANIFEST, Manifest, read_manifest, read_piece
from megalm.train.metrics import Speed

_OF_THE_MACHINE = {"time", "memory_bytes", *(field.name for field in dataclasses.fields(Speed))}
_SHOWN = 3  # differences that are named


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same, of two run folders: as one line that names the first differences, or nothing."""
    found = [*_of_metrics(first, second), *_of_checkpoints(first / "checkpoints", second / "checkpoints")]
    if not found:
        return []
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [f"a second run differs: {', '.join(found[:_SHOWN])}{more}"]


def _of_metrics(first: Path, second: Path) -> Iterator[str]:
    """Everything in metrics.jsonl that is not a time, a speed or a size."""
    mine, theirs = _metrics(first), _metrics(second)
    if len(mine) != len(theirs):
        yield f"{len(mine)} and {len(theirs)} lines of metrics"
    for a, b in zip(mine, theirs, strict=False):
        for key in sorted((a.keys() | b.keys()) - _OF_THE_MACHINE):
            if not _same(a.get(key), b.get(key)):
                yield f"{key} at step {a['step']} ({a.get(key)} and {b.get(key)})"


def _same(a: object, b: object) -> bool:
    return a == b or (a != a and b != b)  # NaN is not even itself


def _metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def _of_checkpoints(first: Path, second: Path) -> Iterator[str]:
    names = [{path.parent.name for path in folder.glob(f"*/{MANIFEST}")} for folder in (first, second)]
    if names[0] != names[1]:
        yield f"checkpoints {sorted(names[0])} and {sorted(names[1])}"
    for name in sorted(names[0] & names[1]):
        manifests = read_manifest(first / name), read_manifest(second / name)
        if manifests[0].state != manifests[1].state:
            yield f"the state in {name}"
        for difference in _of_pieces(first / name, second / name, *manifests):
            yield f"{difference} in {name}"


def _of_pieces(first: Path, second: Path, a: Manifest, b: Manifest) -> Iterator[str]:
    """Weights and moments, of every rank. Equal checksums are no proof, so the numbers are read."""
    if a.tensors != b.tensors:
        yield f"the names or shapes of {sorted(a.tensors.items() ^ b.tensors.items())[0][0]}"
        return
    for key in a.tensors:
        for mine, theirs in zip(a.pieces[key], b.pieces[key], strict=True):
            x, y = read_piece(first, key, mine), read_piece(second, key, theirs)
            if mine != theirs or not torch.equal(_bits(x), _bits(y)):
                at = f" at {mine.offset}" if any(mine.offset) else ""
                far = f" by {float((x - y).abs().max()):.1e}" if x.shape == y.shape else ""
                yield f"{key}{at}{far}"


def _bits(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)  # NaN is not equal to itself, and -0 is to 0
