"""The compile gate: every configuration of every kernel, compiled for every architecture on a machine with no GPU.

What the specimens would launch (`specimens.py`) is compiled by the same path as a launch takes (`JITFunction.warmup`), for a
GPU that only the driver pretends to have. So what is looked at is what training launches, down to which integers are
divisible by 16. A kernel fails if it does not compile, spills, has a stack, wants more shared memory than the architecture
has, or lacks an instruction that its specimen claims. What the specimens leave out fails too.

Kernels are kept in Triton's cache: in a folder of the gate's own, or, with `precompile`, where a launch looks. A launch finds
them there if it has the same Triton, kernel sources, architecture, and cache folder (by its absolute path).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from megalm_kernels import compat, tables
from megalm_kernels.cubin import FEATURES, SHARED_LIMITS, Cubin, read_cubins
from megalm_kernels.launch import OPTIONS
from megalm_kernels.specimens import Pointer, Specimen, collect

_INSPECTED = "gate-2.json"  # beside a cubin in the cache: what read_cubins said; a new name when that changes
_AT_ONCE = 64  # kernels that are disassembled together


@dataclass(frozen=True)
class Row:
    """One kernel in one configuration, compiled for one architecture."""

    file: str
    label: str
    kernel: str
    settings: str
    arch: int
    shared: int = 0  # bytes per block
    seconds: float = 0.0
    compiled: bool = False  # now; else it was in the cache
    cubin: Cubin | None = None
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All rows, and what the specimens leave out."""

    rows: list[Row]
    left_out: list[str]

    @property
    def failures(self) -> list[str]:
        """A line for everything that is wrong; empty if the gate is passed."""
        each = ((row, failure) for row in self.rows for failure in row.failures)
        return [f"sm_{row.arch} {row.label}: {row.kernel} ({row.settings}): {failure}" for row, failure in each] + self.left_out


@dataclass(frozen=True)
class _Compiled:
    """What Triton gave for a specimen: a kernel, or what it said."""

    kernel: Any
    error: str
    seconds: float
    fresh: bool


def run_gate(
    archs: Sequence[int] = tables.ARCHS,
    operations: Sequence[str] = (),
    precompile: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Compile and look. Raises NoSpecimen for an operation that has none, ValueError for an architecture without limits.

    operations: their names; empty: all, and only then is what the specimens leave out a failure.
    workers: threads; Triton's passes and ptxas run outside Python's lock. progress(done, total) is called after each kernel.
    """
    unknown = sorted(set(archs) - SHARED_LIMITS.keys())
    if unknown:
        raise ValueError(f"sm_{unknown[0]} is not known to the compile gate, which knows {', '.join(map(str, SHARED_LIMITS))}")
    specimens, left_out = collect(archs, operations)
    folder = Path(knobs.cache.dir) if precompile else Path(knobs.cache.dir) / "gate"
    pool = ThreadPoolExecutor(workers)
    with _pretended_gpu(folder) as gpu:
        try:
            futures = [pool.submit(_compile, specimen, gpu) for specimen in specimens]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, len(futures))
            compiled = [future.result() for future in futures]
            cubins = _inspect(compiled, pool)
        finally:
            pool.shutdown(cancel_futures=True)
            for specimen in specimens:  # what is in memory was made for a GPU that is not there
                specimen.launch.kernel.device_caches.pop(_device_of(specimen.arch), None)
    return Report([_row(*each, cubins) for each in zip(specimens, compiled, strict=True)], left_out)


class _PretendedGPU:
    """What the JIT asks a driver for when it compiles without launching. Each thread may pretend another architecture."""

    def __init__(self) -> None:
        self.thread = threading.local()

    def get_current_device(self) -> int:
        return _device_of(self.thread.arch)

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.thread.arch, 32)


def _device_of(arch: int) -> int:
    """No GPU's number, lest a launch take from memory what was compiled for another architecture."""
    return -arch


@contextmanager
def _pretended_gpu(folder: Path) -> Iterator[_PretendedGPU]:
    """For the calls inside, and for every other thread: nothing may be launched meanwhile. `folder`: Triton's cache."""
    if compat.interpreting():
        raise RuntimeError("the compile gate cannot run under TRITON_INTERPRET=1, where nothing is compiled")
    compat.mend_parsing()
    gpu, before = _PretendedGPU(), driver._active  # `driver.active` would look for a GPU

    def note(*, cache_hit: bool, **rest: Any) -> None:
        gpu.thread.fresh = not cache_hit

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        knobs.compilation.listener = note
        driver.set_active(gpu)
        try:
            yield gpu
        finally:
            driver.set_active(before)


def _compile(specimen: Specimen, gpu: _PretendedGPU) -> _Compiled:
    launch = specimen.launch
    gpu.thread.arch, gpu.thread.fresh = specimen.arch, False
    args = [Pointer(arg) if isinstance(arg, Tensor) else arg for arg in launch.args]
    kernel, said = None, ""
    begin = time.perf_counter()
    try:
        kernel = launch.kernel.warmup(*args, grid=launch.grid, **launch.meta, **OPTIONS)
    except Exception as error:  # the front end, the passes and ptxas each have kinds of their own
        said = f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"
        said += f" (from {error.__cause__!r})"[:300] if error.__cause__ else ""
    return _Compiled(kernel, said, time.perf_counter() - begin, gpu.thread.fresh or kernel is None)


def _inspect(compiled: Sequence[_Compiled], pool: ThreadPoolExecutor) -> dict[str, Cubin]:
    """{hash of a kernel: what is in it}; once per cubin, and kept beside it."""
    kernels = {each.kernel.hash: each.kernel for each in compiled if each.kernel is not None}
    caches = {key: get_cache_manager(key) for key in kernels}
    paths = {key: cache.get_file(_INSPECTED) for key, cache in caches.items()}
    known = {key: Cubin(**json.loads(Path(path).read_text())) for key, path in paths.items() if path}
    new = [kernel for key, kernel in kernels.items() if key not in known]
    by_arch = [[kernel for kernel in new if kernel.metadata.target.arch == arch] for arch in SHARED_LIMITS]
    parts = [some[i : i + _AT_ONCE] for some in by_arch for i in range(0, len(some), _AT_ONCE)]

    def read(part: list[Any]) -> list[Cubin]:
        return read_cubins([kernel.asm["cubin"] for kernel in part], part[0].metadata.target.arch)

    for part, cubins in zip(parts, pool.map(read, parts), strict=True):
        for kernel, cubin in zip(part, cubins, strict=True):
            caches[kernel.hash].put(json.dumps(asdict(cubin)), _INSPECTED, binary=False)
            known[kernel.hash] = cubin
    return known


def _row(specimen: Specimen, compiled: _Compiled, cubins: dict[str, Cubin]) -> Row:
    launch, kernel = specimen.launch, compiled.kernel
    settings = " ".join(f"{name}={value}" for name, value in launch.meta.items())
    row = Row(specimen.file, specimen.label, launch.kernel.__name__, settings, specimen.arch)
    said = asdict(row) | {"seconds": compiled.seconds, "compiled": compiled.fresh}
    if kernel is None:
        return Row(**said | {"failures": (f"does not compile: {compiled.error}",)})
    cubin, shared = cubins[kernel.hash], kernel.metadata.shared
    return Row(**said | {"shared": shared, "cubin": cubin, "failures": tuple(_faults(cubin, shared, specimen))})


def _faults(cubin: Cubin, shared: int, specimen: Specimen) -> Iterator[str]:
    arch = specimen.arch
    if cubin.spill_loads or cubin.spill_stores:
        yield f"spills registers: {cubin.spill_loads} loads and {cubin.spill_stores} stores (LDL, STL)"
    if cubin.stack:
        yield f"has a stack of {cubin.stack} bytes per thread"
    if shared > SHARED_LIMITS[arch]:
        yield f"needs {shared} bytes of shared memory, and sm_{arch} has {SHARED_LIMITS[arch]}"
    for claim in sorted(specimen.claims):
        if arch in FEATURES[claim].archs and not cubin.features[claim]:
            yield f"has no {claim}, which its specimen claims ({FEATURES[claim].meaning})"


def table(rows: Sequence[Row]) -> str:
    """One line per kernel. spills: loads and stores; 128: loads of 16 bytes or more; s: seconds to compile."""
    width = max((len(row.label) for row in rows), default=0)
    head = f"{'arch':>4}{'regs':>6}{'stack':>7}{'spills':>12}{'shared':>8}{'128':>5}{'s':>7}"
    lines = [f"{'specimen':{width}} {head}  kernel and settings"]
    for row in rows:
        cells = " " * 38
        if row.cubin is not None:
            spills = f"{row.cubin.spill_loads}+{row.cubin.spill_stores}"
            cells = f"{row.cubin.registers:6}{row.cubin.stack:7}{spills:>12}{row.shared:8}{row.cubin.features['LDG.128']:5}"
        seconds = f"{row.seconds:.1f}" if row.compiled else "cached"
        mark = "  <-- FAILS" if row.failures else ""
        lines.append(f"{row.label:{width}} {row.arch:4}{cells}{seconds:>7}  {row.kernel} {row.settings}{mark}")
    return "\n".join(lines)
