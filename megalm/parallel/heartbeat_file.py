"""A rank's signs of life: one small file, mapped into the memory of the rank, which writes, and of the agent, which reads.

    header   magic, phase, step, longest step | beats, time of the last, row of the last collective, inside it or not
    rows     one per process group that was used: its name, the last operation, how many there have been

A write to mapped memory costs less than a microsecond and asks nobody: no lock, no system call, no thread that would go on
beating while the rank hangs. The file lies in memory, never on a shared disk; the agent's has no name, so that nothing is left
of it when the processes are gone, however they went. Torn reads are possible, and harmless: what is read is compared over
seconds. No torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path

MAGIC = b"megalm-1"
BUSY = "busy"  # a file in the log folder, where no agent is: rank 0 evaluates or saves
ROWS = 24  # groups of one rank: more than a topology makes
_HEADER = struct.Struct("<8s16sqd")  # magic, phase, step, seconds of the longest step
_BEAT = struct.Struct("<Qdii")  # beats, time.monotonic(), row, inside
_ROW = struct.Struct("<48s24sQ")  # group, operation, sequence number
_LAST = struct.Struct("<24sQ")  # of a row
_BEAT_AT = _HEADER.size
_ROWS_AT = _BEAT_AT + _BEAT.size
SIZE = _ROWS_AT + ROWS * _ROW.size


@dataclass(frozen=True)
class Collective:
    """The last collective of a rank in one group."""

    group: str  # "tensor 0-3"
    operation: str
    sequence: int  # how many this rank has begun in this group


@dataclass(frozen=True)
class Pulse:
    """What a rank last said."""

    beats: int = 0  # 0: nothing yet
    time: float = 0.0  # time.monotonic() of this machine
    phase: str = "start"
    step: int = 0
    longest_step: float = 0.0  # seconds; 0: none is known
    inside: bool = False  # the call of the last collective has not returned
    last: int = -1  # its place in `collectives`; -1: there was none
    collectives: tuple[Collective, ...] = ()

    @property
    def last_collective(self) -> Collective | None:
        return self.collectives[self.last] if 0 <= self.last < len(self.collectives) else None


class HeartbeatFile:
    """The writing side. Its methods are called for every collective: they do as little as they can."""

    def __init__(self, path: Path):
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), SIZE)
        self.beats, self.row, self.inside = 0, -1, 0
        self.sequence: list[int] = []
        self.say("start", 0, 0.0)

    def say(self, phase: str, step: int, longest_step: float) -> None:
        """Where the rank is."""
        _HEADER.pack_into(self.memory, 0, MAGIC, phase.encode(), step, longest_step)
        self.beat()

    def beat(self) -> None:
        """A sign of life."""
        self.beats += 1
        _BEAT.pack_into(self.memory, _BEAT_AT, self.beats, time.monotonic(), self.row, self.inside)

    def add_group(self, name: str) -> int:
        """A row for a group; the last row, if all are taken, serves every further one."""
        if len(self.sequence) < ROWS:
            self.sequence.append(0)
            _ROW.pack_into(self.memory, _ROWS_AT + (len(self.sequence) - 1) * _ROW.size, name.encode()[:48], b"", 0)
        return len(self.sequence) - 1

    def enter(self, row: int, operation: bytes) -> None:
        """A collective begins."""
        self.sequence[row] += 1
        _LAST.pack_into(self.memory, _ROWS_AT + row * _ROW.size + 48, operation, self.sequence[row])
        self.beats += 1
        self.row, self.inside = row, 1
        _BEAT.pack_into(self.memory, _BEAT_AT, self.beats, time.monotonic(), row, 1)

    def leave(self) -> None:
        """Its call has returned."""
        self.beats += 1
        self.inside = 0
        _BEAT.pack_into(self.memory, _BEAT_AT, self.beats, time.monotonic(), self.row, 0)


class Slate:
    """The agent's side: memory for a rank to write to, which finds it as `path` for as long as this process has it open."""

    def __init__(self, name: str):
        self._handle, self._last = os.memfd_create(name), Pulse()
        os.ftruncate(self._handle, SIZE)
        self.path = Path(f"/proc/{os.getpid()}/fd/{self._handle}")

    def read(self) -> Pulse:
        """What the rank last said, before this was closed; Pulse() if it has said nothing yet."""
        return _pulse(os.pread(self._handle, SIZE, 0)) if self._handle >= 0 else self._last

    def close(self) -> None:
        """Give it up; a rank that still has it writes on, unread."""
        if self._handle >= 0:
            self._last = self.read()
            os.close(self._handle)
            self._handle = -1


def make_file(path: Path) -> None:
    """An empty file for a rank to write to. Raises OSError."""
    path.write_bytes(bytes(SIZE))


def read_pulse(path: Path) -> Pulse:
    """What a rank last said in a file; Pulse() if it has said nothing yet, or there is no such file."""
    try:
        return _pulse(path.read_bytes())
    except OSError:
        return Pulse()


def _pulse(data: bytes) -> Pulse:
    if len(data) != SIZE or not data.startswith(MAGIC):
        return Pulse()
    _, phase, step, longest = _HEADER.unpack_from(data)
    beats, when, row, inside = _BEAT.unpack_from(data, _BEAT_AT)
    rows = [_ROW.unpack_from(data, _ROWS_AT + i * _ROW.size) for i in range(ROWS)]
    collectives = tuple(Collective(_text(name), _text(operation), count) for name, operation, count in rows if name.strip(b"\0"))
    return Pulse(beats, when, _text(phase), step, longest, bool(inside), row, collectives)


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
