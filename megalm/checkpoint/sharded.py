"""A checkpoint on disk: safetensors files of pieces, and one JSON manifest that says what they are pieces of.

    checkpoints/
      latest                      the name of the newest complete checkpoint
      step-00000200/
        manifest.json             format, state of the run, config, and for every tensor its global shape and pieces
        rank-00000.safetensors    what rank 0 wrote
        ...

Layout-free: a tensor is known by name, global shape and the offsets of its pieces, never by rank. Nothing here is
unpickled. Every piece has a CRC-32 that is checked before it is used, and so has the manifest. A checkpoint is written
under a temporary name and renamed when it is complete; `latest` is replaced after that.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megalm.errors import CheckpointError, Problem

FORMAT = 1
MANIFEST, LATEST = "manifest.json", "latest"
_NEXT = LATEST + ".tmp"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: in which file, where it starts, how large it is."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: int


@dataclass
class Manifest:
    """Everything about a checkpoint but the numbers in it."""

    state: dict[str, Any]  # see state.py
    config: dict[str, Any]  # the resolved configuration of the run
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)  # key -> global shape, fp32
    pieces: dict[str, list[Piece]] = field(default_factory=dict)  # key -> its pieces


def write_pieces(folder: Path, rank: int, tensors: dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]) -> None:
    """Write one rank's pieces, {key: (tensor, global shape, offset)}, and a JSON note that `write_manifest` collects."""
    name = f"rank-{rank:05d}.safetensors"
    data = {key: tensor.detach().cpu().contiguous() for key, (tensor, _, _) in tensors.items()}
    try:
        save_file(data, folder / name)
    except SafetensorError as error:  # a full disk, for example
        raise OSError(None, str(error), str(folder / name)) from error
    notes = [
        {
            "key": key,
            "global_shape": shape,
            "piece": asdict(Piece(name, offset, tuple(data[key].shape), _crc(data[key]))),
        }
        for key, (_, shape, offset) in tensors.items()
    ]
    note = folder / f"rank-{rank:05d}.json"
    note.write_text(json.dumps(notes))
    shutil.copymode(note, folder / name)  # safetensors lets only its owner read a file
    _sync(folder / name)


def write_manifest(folder: Path, state: dict[str, Any], config: dict[str, Any], ranks: int | None = None) -> None:
    """Collect the ranks' notes into the manifest. Call once all ranks have written their pieces.

    Raises OSError if the notes of `ranks` ranks are not all to be seen here, or if a tensor is not covered: a checkpoint
    that misses a piece must not become the latest.
    """
    manifest, notes = Manifest(state, config), sorted(folder.glob("rank-*.json"))
    if ranks is not None and len(notes) != ranks:
        raise OSError(None, f"{len(notes)} of {ranks} ranks' files are here; all ranks must share one folder", str(folder))
    covered: dict[str, int] = {}
    for note_file in notes:
        for note in json.loads(note_file.read_text()):
            manifest.tensors[note["key"]] = tuple(note["global_shape"])
            manifest.pieces.setdefault(note["key"], []).append(note["piece"])
            covered[note["key"]] = covered.get(note["key"], 0) + math.prod(note["piece"]["shape"])
        note_file.unlink()
    for key, shape in manifest.tensors.items():
        if covered[key] != math.prod(shape):
            raise OSError(None, f"the pieces of {key} do not cover its shape {shape}", str(folder))
    content = {"format": FORMAT, **vars(manifest)}
    (folder / MANIFEST).write_text(json.dumps({"crc32": _text_crc(content), "manifest": content}, indent=1) + "\n")
    _sync(folder / MANIFEST)


def publish(temporary: Path, folder: Path) -> None:
    """Give a complete checkpoint its name, then point `latest` at it.

    The pointer is written first: a kill between the two steps leaves its word behind (see unnamed_checkpoint).
    """
    if folder.exists():  # of a run that went back to an earlier one; `latest` does not name it
        _remove(folder)
    _sync(temporary)
    pointer = folder.parent / _NEXT
    pointer.write_text(folder.name + "\n")
    _sync(pointer)
    os.replace(temporary, folder)
    os.replace(pointer, folder.parent / LATEST)
    _sync(folder.parent)


def prune(folder: Path, keep: int, newest: Path | None = None) -> None:
    """Delete all but the `keep` newest checkpoints (0: none), and what interrupted saves have left.

    `newest` is the one just published. Later steps belong to a future that the run has left by going back: they go too.
    """
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    complete = sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))
    left = [path for path in complete if newest is not None and path.name > newest.name]
    past = [path for path in complete if path not in left]
    for old in left + (past[:-keep] if keep else []):
        _remove(old)


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It loses its name first: a half deleted one must not look complete."""
    nameless = folder.with_name(f".{folder.name}.old")
    os.replace(folder, nameless)
    shutil.rmtree(nameless)


def find_checkpoint(path: Path, key: str = "train.run_dir") -> Path:
    """The checkpoint at `path`: itself, or the latest of a run folder. Raises CheckpointError, naming `key`, if there is none."""
    if (path / MANIFEST).is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            return _named_by(folder / LATEST)
    rule = f"a checkpoint folder (with {MANIFEST}) or a run folder with checkpoints/{LATEST}"
    runs = [pointer.parent.parent.name for pointer in path.parent.glob(f"*/checkpoints/{LATEST}")]
    near = difflib.get_close_matches(path.name, runs, 1)
    fix = f"{key}={path.parent / near[0]}" if near else f"train first: megalm pretrain train.run_dir={path}"
    raise CheckpointError(Problem(key, path, rule, "", fix))


def unnamed_checkpoint(folder: Path) -> Path | None:
    """Where there is no `latest`: the first checkpoint of a run that was killed just before it became that; else None."""
    try:
        return _named_by(folder / _NEXT)
    except (OSError, CheckpointError):
        return None


def _named_by(pointer: Path) -> Path:
    """The checkpoint that a `latest` file names. Raises CheckpointError if that is none."""
    name = pointer.read_text(errors="replace").strip()
    if not re.fullmatch(r"step-\d+", name) or not (pointer.parent / name / MANIFEST).is_file():
        fix = f"write the name of one of the folders beside it into {pointer}"
        raise CheckpointError(Problem(str(pointer), repr(name), "must name a complete checkpoint", "step-NNNNNNNN", fix))
    return pointer.parent / name


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest. Raises CheckpointError if it is missing, damaged or of another format."""
    path = folder / MANIFEST
    try:
        envelope = json.loads(path.read_text())
        content = envelope["manifest"]
        intact = envelope["crc32"] == _text_crc(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"must be readable: {error}") from error
    if not intact:
        raise _damaged(path, "its CRC-32 must match its text")
    if content.pop("format") != FORMAT:
        raise CheckpointError(
            Problem(
                str(path), None, f"this version reads format {FORMAT}", "", "use the version of megalm that wrote it"
            )
        )
    pieces = {
        key: [Piece(p["file"], tuple(p["offset"]), tuple(p["shape"]), p["crc32"]) for p in found]
        for key, found in content["pieces"].items()
    }
    shapes = {key: tuple(shape) for key, shape in content["tensors"].items()}
    return Manifest(content["state"], content["config"], shapes, pieces)


def read_piece(folder: Path, key: str, piece: Piece) -> Tensor:
    """One piece, checked. Raises CheckpointError if its file is missing or truncated, or one bit of it has changed."""
    path = folder / piece.file
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, f"must hold {key}: {error}") from error
    if tuple(tensor.shape) != piece.shape or _crc(tensor) != piece.crc32:
        raise _damaged(path, f"the CRC-32 of {key} must be what was written")
    return tensor


def _damaged(path: Path, rule: str) -> CheckpointError:
    others = sorted(p.parent.name for p in path.parent.parent.glob(f"step-*/{MANIFEST}") if p.parent != path.parent)
    older = f"echo {others[-1]} > {path.parent.parent / LATEST}, which goes on from there; or " if others else ""
    fix = f"{older}restore {path.parent} from a copy; or start anew in another train.run_dir"
    return CheckpointError(Problem(str(path), None, rule, "", fix))


def _text_crc(content: dict[str, Any]) -> int:
    """CRC-32 of the content as JSON in its shortest form with sorted keys: white space in the file does not count."""
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.numpy().reshape(-1).view(np.uint8).data)


def _sync(path: Path) -> None:
    """Make sure that it is on the disk before something points at it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
