"""Files of JSON lines from an untrusted folder: of any size, cut, mixed with noise. Time and memory stay bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

WHOLE = 32 << 20  # bytes of a file that is read from end to end, about 250,000 steps in 3 s
STRETCHES, STRETCH = 32, 1 << 20  # of a larger one: so many parts of so many bytes, evenly spread, the last one included
LONGEST = 1 << 20  # bytes of a line: loads of 100 layers with 1,000 experts each fit


def read_lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The records of a file, in order. What was left out, and why, is added to `notes`. Raises nothing."""
    try:
        if not path.is_file():
            return
        length, noise = path.stat().st_size, 0
        with open(path, "rb") as file:
            for line in _whole(file) if length <= WHOLE else _stretches(file, length):
                record = _parse(line)
                if record is not None:
                    yield record
                elif line.strip():
                    noise += 1
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return
    if length > WHOLE:
        notes.append(f"{path.name} has {length / 2**30:.1f} GiB: {STRETCHES} parts of 1 MiB were read, evenly spread")
    if noise:
        lines = f"{noise:,} line{'s were' if noise > 1 else ' was'}"
        notes.append(f"{path.name}: {lines} left out, being cut short or no record")


def read_tail(path: Path, reach: int = 1 << 17) -> list[dict[str, Any]]:
    """The records in the last `reach` bytes of a file. Raises nothing."""
    try:
        if not path.is_file():
            return []
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - reach))
            lines = file.read(reach).split(b"\n")
    except OSError:
        return []
    return [record for record in map(_parse, lines) if record is not None]


def read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    """A file that is one JSON object of at most 16 MiB; None if it is not there, not that, or larger."""
    try:
        if not path.is_file():
            return None
        with open(path, "rb") as file:
            found = _parse(file.read(16 << 20))
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}")
        return None
    if found is None:
        notes.append(f"{path.name} is not one JSON object, and was left out")
    return found


def _whole(file: BinaryIO) -> Iterator[bytes]:
    """A longer line than LONGEST comes in pieces, none of which is a record."""
    while line := file.readline(LONGEST):
        yield line


def _stretches(file: BinaryIO, length: int) -> Iterator[bytes]:
    for index in range(STRETCHES):
        start = index * (length - STRETCH) // (STRETCHES - 1)
        file.seek(start)
        if start:
            file.readline(LONGEST)  # the rest of a line
        while file.tell() < start + STRETCH and (line := file.readline(LONGEST)):
            yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
