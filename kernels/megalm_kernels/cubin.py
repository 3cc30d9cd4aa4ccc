"""What ptxas made of kernels: registers, stack, spills, and the instructions that make them fast. Needs no GPU.

Read with the cuobjdump and nvdisasm that Triton brings. nvdisasm takes 0.25 s to start and 10 ms for a kernel, so it gets the
code of many kernels at once, one behind the other, and the addresses say whose an instruction is.
Counts are of instructions in the program, not of their executions.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

# Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, technical specifications).
# sm_86 and sm_89 use the block sizes of sm_80, and sm_120 those of sm_100, so these two must fit the smaller ones as well.
SHARED_LIMITS = {80: 101376, 86: 101376, 89: 101376, 90: 232448, 100: 101376, 120: 101376}
_ANY = range(0, 1000)
_HOPPER_ON = range(90, 1000)


@dataclass(frozen=True)
class Feature:
    """A kind of instruction, and the architectures that have it: a claim says nothing about the others."""

    pattern: str
    archs: range
    meaning: str


FEATURES = {
    "LDG.128": Feature(r"LDG(?:STS)?\.E\.(?:\w+\.)*(?:128|256)\b", _ANY, "loads of 16 bytes (sm_100: or 32) by a thread"),
    "STG.128": Feature(r"STG\.E\.(?:\w+\.)*(?:128|256)\b", _ANY, "stores of 16 bytes or more by a thread"),
    "LDGSTS": Feature(r"LDGSTS\b", _ANY, "loads into shared memory that are waited for later"),
    "HMMA": Feature(r"HMMA\b", range(80, 90), "matrix products of a warp"),
    "HGMMA": Feature(r"HGMMA\b", range(90, 100), "matrix products of a warp group"),
    "UTCMMA": Feature(r"UTC\w*MMA\b", range(100, 120), "matrix products in tensor memory"),
    "TMA": Feature(r"UTMA(?:LDG|STG|REDG)\b", _HOPPER_ON, "copies of tiles by the tensor memory accelerator"),
    "USETMAXREG": Feature(r"USETMAXREG\b", _HOPPER_ON, "registers moved between warps that load and that compute"),
}
_COUNTED = {name: re.compile(feature.pattern) for name, feature in FEATURES.items()} | {
    name: re.compile(rf"{name}\b") for name in ("LDL", "STL")
}
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)  # address, operation


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel. stack: bytes per thread; spills: loads and stores of registers in local memory."""

    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    features: dict[str, int]


def read_cubins(cubins: Sequence[bytes], arch: int) -> list[Cubin]:
    """All of one architecture. Raises RuntimeError with the tool's own words if one of them refuses a file."""
    codes = [_code(cubin) for cubin in cubins]
    counts = _count(codes, arch)
    read = []
    for cubin, found in zip(cubins, counts, strict=True):
        registers, stack = _usage(cubin)
        read.append(Cubin(registers, stack, found.pop("LDL"), found.pop("STL"), found))
    return read


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread."""
    from triton import knobs

    usage = _output(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage.strip()}")
    return int(found[1]), int(found[2])


def _count(codes: Sequence[bytes], arch: int) -> list[dict[str, int]]:
    """How often each code has what is counted."""
    from triton import knobs

    target = f"SM{arch}" + ("a" if arch >= 90 else "")
    text = _output(b"".join(codes), knobs.nvidia.nvdisasm.path, "--binary", target)
    ends = list(accumulate(map(len, codes)))
    counts = [dict.fromkeys(_COUNTED, 0) for _ in codes]
    seen = 0
    for address, operation in _INSTRUCTION.findall(text):
        seen += 1
        for name, pattern in _COUNTED.items():
            if pattern.match(operation):
                counts[bisect(ends, int(address, 16))][name] += 1
    if 16 * seen != sum(map(len, codes)):
        raise RuntimeError(f"nvdisasm shows {seen} instructions in {sum(map(len, codes))} bytes, at 16 bytes each")
    return counts


def _code(cubin: bytes) -> bytes:
    """The instructions in an ELF file: its sections .text.*."""
    table, size, count, names = *struct.unpack_from("<Q", cubin, 0x28), *struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]  # name, .., offset, length
    first = sections[names][4]
    parts = [
        cubin[offset : offset + length] for name, _, _, _, offset, length in sections if cubin[first + name :][:6] == b".text."
    ]
    return b"".join(parts)


def _output(data: bytes, *command: str) -> str:
    """What a tool says of a file."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
