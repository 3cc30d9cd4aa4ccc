"""What ptxas made of a kernel: registers, stack, spills, and the instructions that make it fast. Needs no GPU.

Read with the cuobjdump and nvdisasm that Triton brings. Counts are of instructions in the program, not of their executions.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

# Bytes of shared memory that one block may use, by compute capability (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
_ANY = range(0, 1000)
_HOPPER_ON = range(90, 1000)


@dataclass(frozen=True)
class Feature:
    """A kind of instruction, and the architectures that have it: a claim says nothing about the others."""

    pattern: str
    archs: range
    meaning: str


FEATURES = {
    "LDG.128": Feature(r"\bLDG(?:STS)?\.E\.(?:\w+\.)*(?:128|256)\b", _ANY, "loads of 16 bytes (sm_100: or 32) by a thread"),
    "STG.128": Feature(r"\bSTG\.E\.(?:\w+\.)*(?:128|256)\b", _ANY, "stores of 16 bytes or more by a thread"),
    "LDGSTS": Feature(r"\bLDGSTS\b", _ANY, "loads into shared memory that are waited for later"),
    "HMMA": Feature(r"\bHMMA\b", range(80, 90), "matrix products of a warp"),
    "HGMMA": Feature(r"\bHGMMA\b", range(90, 100), "matrix products of a warp group"),
    "UTCMMA": Feature(r"\bUTC\w*MMA\b", range(100, 120), "matrix products in tensor memory"),
    "TMA": Feature(r"\bUTMA(?:LDG|STG|REDG)\b", _HOPPER_ON, "copies of tiles by the tensor memory accelerator"),
    "USETMAXREG": Feature(r"\bUSETMAXREG\b", _HOPPER_ON, "registers moved between warps that load and that compute"),
}


@dataclass(frozen=True)
class Cubin:
    """One compiled kernel. stack: bytes per thread; spills: loads and stores of registers in local memory."""

    registers: int
    stack: int
    spill_loads: int
    spill_stores: int
    features: dict[str, int]


def read_cubin(data: bytes) -> Cubin:
    """Raises RuntimeError with the tool's own words if Triton's disassembler refuses the file."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        usage = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _output(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)  # a quarter faster without data flow
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage.strip()}")
    features = {name: len(re.findall(feature.pattern, code)) for name, feature in FEATURES.items()}
    spills = (len(re.findall(rf"\b{name}\b", code)) for name in ("LDL", "STL"))
    return Cubin(int(found[1]), int(found[2]), *spills, features)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
