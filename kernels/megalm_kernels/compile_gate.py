"""The compile gate: every configuration of every kernel, compiled for every architecture on a machine with no GPU.

Each file in device/ has `specimens()`: pairs (label, call), the label's first word an operation. The gate makes the calls
with tensors on the meta device, catches what they would have launched (`launch.capture`), and has Triton compile that, by the
same path as a launch would (`JITFunction.warmup`), for a GPU that only the driver pretends to have. So what is compiled is
what training launches, down to which integers are divisible by 16.

A kernel fails if it spills, has a stack, wants more shared memory than the architecture has, or lacks an instruction that the
specimen claims: a third element, such as {"LDG.128", "HGMMA"} (`cubin.FEATURES`), holds for all that the specimen launches.
A row of `tables.TABLES` that no specimen looks up fails too, and so does a kernel that none launches.

Compiled kernels are kept in Triton's cache: in a folder of the gate's own, or, with `precompile`, where a launch will look.
A launch finds them there if it has the same Triton, kernel sources, architecture and cache folder (its absolute path counts).
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver
from triton.runtime.cache import get_cache_manager

from megalm_kernels import compat, device, tables
from megalm_kernels.cubin import FEATURES, SHARED_LIMITS, Cubin, read_cubin
from megalm_kernels.launch import Launch, capture

_SHARED = {"linear_cross_entropy": "cross_entropy"}  # operations without kernels of their own: whose they use
_INSPECTED = "gate-1.json"  # beside a cubin in the cache: what read_cubin said; a new name when that changes


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
    """All rows, and what the specimens have left out."""

    rows: list[Row]
    forgotten: list[str]

    @property
    def failures(self) -> list[str]:
        """A line for everything that is wrong; empty if the gate is passed."""
        return [
            f"sm_{row.arch} {row.label}: {row.kernel} ({row.settings}): {failure}" for row in self.rows for failure in row.failures
        ] + self.forgotten


class NoSpecimen(ValueError):
    """An operation that no file in device/ has a specimen of."""


@dataclass
class _Job:
    file: str
    label: str
    arch: int
    launch: Launch
    claims: set[str] = field(default_factory=set)


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
    jobs, forgotten = _collect(archs, operations)
    folder = Path(knobs.cache.dir) if precompile else Path(knobs.cache.dir) / "gate"
    pool = ThreadPoolExecutor(workers)
    with _pretended_gpu(folder) as gpu:
        try:
            futures = [pool.submit(_compile, job, gpu) for job in jobs]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, len(futures))
        finally:
            pool.shutdown(cancel_futures=True)
            for job in jobs:  # what is in memory was made for a GPU that is not there
                job.launch.kernel.device_caches.pop(_device_of(job.arch), None)
    return Report([future.result() for future in futures], forgotten)


# Collecting


def _collect(archs: Sequence[int], operations: Sequence[str]) -> tuple[list[_Job], list[str]]:
    """Every distinct launch, and what was left out (of all operations)."""
    names = sorted(module.name for module in pkgutil.iter_modules(device.__path__))
    modules = {name: importlib.import_module(f"{device.__name__}.{name}") for name in names}
    jobs: dict[tuple, _Job] = {}
    wanted = {_SHARED.get(name, name) for name in operations}
    missing = set(wanted)
    before = set(tables.used)
    tables.used.clear()
    for arch in archs:
        for file, module in modules.items():
            for label, call, *rest in getattr(module, "specimens", list)():
                operation = label.split()[0]
                missing.discard(operation)
                if not wanted or operation in wanted:
                    _add(jobs, file, label, arch, call, rest[0] if rest else ())
    looked_up = set(tables.used)
    tables.used.update(before)
    if missing:
        raise NoSpecimen(f"no specimen is of {', '.join(sorted(missing))}; see specimens() in {', '.join(names)}")
    if operations:
        return list(jobs.values()), []
    none = [f"device/{file}.py has no specimens()" for file, module in modules.items() if not hasattr(module, "specimens")]
    return list(jobs.values()), [*none, *_rows_left_out(archs, looked_up), *_kernels_left_out(modules, jobs.values())]


def _add(jobs: dict[tuple, _Job], file: str, label: str, arch: int, call: Callable[[], object], claims: Any) -> None:
    unknown = sorted(set(claims) - FEATURES.keys())
    if unknown:
        raise ValueError(f"specimen {label} claims {unknown[0]}; known are {', '.join(FEATURES)}")
    with capture(arch) as launches:
        call()
    for launch in launches:
        args = [_kind(arg, i in launch.kernel.constexprs) for i, arg in enumerate(launch.args)]
        key = (arch, launch.kernel, *args, *sorted((name, str(value)) for name, value in launch.meta.items()))
        jobs.setdefault(key, _Job(file, label, arch, launch)).claims.update(claims)


def _kind(arg: Any, constexpr: bool) -> object:
    """What the JIT tells two arguments apart by."""
    if constexpr or not isinstance(arg, int | float | Tensor):
        return repr(arg)
    if isinstance(arg, Tensor):
        return arg.dtype, _Pointer(arg).data_ptr() % 16 == 0
    if isinstance(arg, bool | float):
        return type(arg)
    return arg == 1, arg % 16 == 0, arg.bit_length() < 32


def _rows_left_out(archs: Sequence[int], looked_up: set[tuple[str, int, int]]) -> list[str]:
    known = sorted({tables.nearest(arch) for arch in archs})
    return [
        f"table {name}, sm_{arch}, limit {row.limit}: no specimen looks this row up"
        for name, by_arch in tables.TABLES.items()
        for arch in known
        for row in by_arch[arch]
        if (name, arch, row.limit) not in looked_up
    ]


def _kernels_left_out(modules: dict[str, Any], jobs: Any) -> list[str]:
    launched = {job.launch.kernel for job in jobs}
    inner = " ".join(value.src for module in modules.values() for value in vars(module).values() if isinstance(value, JITFunction))
    return [
        f"kernel {name} in {file}: no specimen launches it"
        for file, module in modules.items()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__ and value not in launched
        if len(re.findall(rf"\b{name}\(", inner)) == 1  # its own definition; else another kernel calls it
    ]


# Compiling


class _Pointer:
    """A tensor as the JIT sees it: a dtype and how its address is aligned. What allocators give is aligned."""

    def __init__(self, x: Tensor):
        self.dtype = x.dtype
        self.offset = int(x.storage_offset()) * x.element_size()

    def data_ptr(self) -> int:
        return self.offset


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
    gpu, before = _PretendedGPU(), driver._active  # `driver.active` would look for a GPU

    def note(*, cache_hit: bool, **rest: Any) -> None:
        gpu.thread.compiled = not cache_hit

    with knobs.cache.scope(), knobs.compilation.scope():
        knobs.cache.dir = str(folder)
        knobs.compilation.listener = note
        driver.set_active(gpu)
        try:
            yield gpu
        finally:
            driver.set_active(before)


def _compile(job: _Job, gpu: _PretendedGPU) -> Row:
    launch = job.launch
    gpu.thread.arch, gpu.thread.compiled = job.arch, False
    settings = " ".join(f"{name}={value}" for name, value in launch.meta.items())
    said = {"file": job.file, "label": job.label, "kernel": launch.kernel.__name__, "settings": settings, "arch": job.arch}
    args = [_Pointer(arg) if isinstance(arg, Tensor) else arg for arg in launch.args]
    begin = time.perf_counter()
    try:
        kernel = launch.kernel.warmup(*args, grid=launch.grid, **launch.meta)
    except Exception as error:  # the front end, the passes and ptxas each have kinds of their own
        words = " ".join(str(error).split())[-300:]
        return Row(**said, compiled=True, failures=(f"does not compile: {type(error).__name__}: {words}",))
    seconds = time.perf_counter() - begin
    cubin, shared = _inspect(kernel), kernel.metadata.shared
    failures = tuple(_faults(cubin, shared, job))
    return Row(**said, shared=shared, seconds=seconds, compiled=gpu.thread.compiled, cubin=cubin, failures=failures)


def _inspect(kernel: Any) -> Cubin:
    """Once per cubin; kept beside it."""
    cache = get_cache_manager(kernel.hash)
    known = cache.get_file(_INSPECTED)
    if known:
        return Cubin(**json.loads(Path(known).read_text()))
    cubin = read_cubin(kernel.asm["cubin"])
    cache.put(json.dumps(asdict(cubin)), _INSPECTED, binary=False)
    return cubin


def _faults(cubin: Cubin, shared: int, job: _Job) -> Iterator[str]:
    if cubin.spill_loads or cubin.spill_stores:
        yield f"spills registers: {cubin.spill_loads} loads and {cubin.spill_stores} stores (LDL, STL)"
    if cubin.stack:
        yield f"has a stack of {cubin.stack} bytes per thread"
    if shared > SHARED_LIMITS[job.arch]:
        yield f"needs {shared} bytes of shared memory, and sm_{job.arch} has {SHARED_LIMITS[job.arch]}"
    for claim in sorted(job.claims):
        if job.arch in FEATURES[claim].archs and not cubin.features[claim]:
            yield f"has no {claim}, which its specimen claims ({FEATURES[claim].meaning})"


# Printing


def table(rows: Sequence[Row]) -> str:
    """One line per kernel. spills: loads and stores; 128: loads of 16 bytes or more."""
    numbers = f"{'arch':>4}{'regs':>6}{'stack':>7}{'spills':>8}{'shared':>8}{'128':>5}{'s':>7}"
    width = max((len(row.label) for row in rows), default=0)
    lines = [f"{'specimen':{width}}{numbers}  kernel and settings"]
    for row in rows:
        cells = f"{row.arch:4}"
        if row.cubin is not None:
            spills = f"{row.cubin.spill_loads}+{row.cubin.spill_stores}"
            cells += f"{row.cubin.registers:6}{row.cubin.stack:7}{spills:>8}{row.shared:8}{row.cubin.features['LDG.128']:5}"
        cells += f"{f'{row.seconds:.1f}' if row.compiled else 'cached':>7}"
        mark = "  <-- FAILS" if row.failures else ""
        lines.append(f"{row.label:{width}}{cells:45}  {row.kernel} {row.settings}{mark}")
    return "\n".join(lines)
