"""Any layout loads any checkpoint: cut the box that a rank needs out of the pieces that were written."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megalm.checkpoint.sharded import Manifest, read_piece
from megalm.errors import CheckpointError, Problem


def read_box(folder: Path, manifest: Manifest, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The box at `offset` of the global tensor `key`, fp32. Raises CheckpointError if the checkpoint does not cover it."""
    if key not in manifest.tensors:
        raise CheckpointError(
            Problem(key, None, f"must be in the checkpoint {folder}", "", "use a checkpoint of the same model")
        )
    box = torch.empty(shape)
    covered = 0
    for piece in manifest.pieces[key]:
        low = [max(a, b) for a, b in zip(offset, piece.offset, strict=True)]
        high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, piece.offset, piece.shape, strict=True)]
        if any(end <= begin for begin, end in zip(low, high, strict=True)):
            continue
        source = tuple(slice(begin - at, end - at) for begin, end, at in zip(low, high, piece.offset, strict=True))
        target = tuple(slice(begin - at, end - at) for begin, end, at in zip(low, high, offset, strict=True))
        box[target] = read_piece(folder, key, piece)[source]
        covered += box[target].numel()
    if covered != box.numel():
        rule = f"its pieces must cover {shape} at {offset}"
        raise CheckpointError(Problem(key, f"{covered} of {box.numel()} elements", rule, "", "use another checkpoint"))
    return box


def read_whole(folder: Path, manifest: Manifest, key: str) -> Tensor:
    """A whole tensor, fp32."""
    shape = manifest.tensors.get(key, ())
    return read_box(folder, manifest, key, (0,) * len(shape), shape)
