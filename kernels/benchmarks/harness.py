"""How kernels are measured: cases, who runs them, times on the device, and the two ceilings of the machine.

Every time is taken with a cold L2: before each repetition a buffer several times its size is overwritten. That also keeps
the GPU busy while the host launches what comes next, so that the events around it time the device and not the host, whose
part is measured apart. (What a kernel leaves unwritten in the L2 when it ends, the overwriting left there for it to write
back: a kernel cannot look faster than memory.) A backward is timed alone, after a forward that is not timed: the difference
of two times would hide that the backward found its inputs in the L2.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megalm_kernels import dispatch
from megalm_kernels.benchmarks.report import OURS, Ceilings, Row, is_ours

EXACT = "fp64"  # stands for a provider where what all are compared with failed
ON_CPU = ("torch", "reference")  # what a CPU runs: everything else is about GPUs
NEEDS_GPU = "needs a GPU"
_APEX = ("rms_norm", "layer_norm", "fused_adam")  # what there is of it
_WARMUP, _FEWEST, _MOST = 3, 10, 200  # repetitions
_FLUSH_BYTES = 2**30  # 0.25 ms at 4 TB/s: longer than a host needs to launch a forward or a backward
_HOST_CALLS = 20

Function = Callable[..., Any]


class Absent(Exception):
    """A peer that is not installed; the text says what is missing."""


@dataclass(frozen=True)
class Provider:
    """Somebody's implementation. load: gives the function, raises Absent; choice: what dispatch picks while it runs."""

    name: str
    load: Callable[[], Function]
    choice: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """The least that one direction moves and computes."""

    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """One operation on one shape. Every provider's function and `exact` get the tensors that `make` returns.

    exact: the operation in plain torch, in the dtype it is given (fp64 here).
    gradients: which of the inputs get one; without any there is no backward.
    changed: of an update in place, the inputs (or what is made from them) that it is judged by.
    size, group: where the picture is to have a line over sizes, the size of this case and the panel that it is in.
    """

    operation: str
    shape: str
    dtype: torch.dtype
    make: Callable[[torch.device], list[Tensor]]
    exact: Function
    providers: Sequence[Provider]
    forward: Work
    backward: Work | None = None
    bound: str = "bytes"
    gradients: tuple[int, ...] = ()
    changed: Callable[[list[Tensor]], list[Tensor]] | None = None
    size: int = 0
    group: str = ""

    def work(self) -> dict[str, Work]:
        """By direction."""
        if self.backward is None:
            return {"forward": self.forward}
        both = Work(self.forward.bytes + self.backward.bytes, self.forward.flops + self.backward.flops)
        return {"forward": self.forward, "backward": self.backward, "full": both}

    def inputs(self, device: torch.device, exact: bool = False) -> list[Tensor]:
        """The same random numbers each time; in fp64 if `exact`."""
        torch.manual_seed(1)
        tensors = self.make(device)
        if exact:
            tensors = [x.double() if x.is_floating_point() else x for x in tensors]
        return [x.requires_grad_() if i in self.gradients else x for i, x in enumerate(tensors)]


# --- providers --------------------------------------------------------------------------------------------------------


def standard(operation: str, public: Function, reference: Function, *peers: Provider) -> list[Provider]:
    """Ours, torch's operators, torch.compile of the reference, apex where we have it, and peers."""
    backends = (OURS, "torch", "apex") if operation in _APEX else (OURS, "torch")
    chosen = [Provider(backend, lambda: public, {operation: backend}) for backend in backends]
    return [*chosen, compiled(reference), Provider("reference", lambda: reference), *peers]


def compiled(reference: Function) -> Provider:
    """torch.compile of a plain function, for exactly this shape."""

    def load() -> Function:
        torch.compiler.reset()  # else the ninth shape of a function silently runs uncompiled
        return torch.compile(reference, dynamic=False, fullgraph=True)

    return Provider("torch.compile", load)


def find(module: str, attribute: str) -> Any:
    """Something of a peer. Raises Absent if the peer is not installed; what goes wrong in it is not caught."""
    top = module.split(".")[0]
    if importlib.util.find_spec(top) is None:
        raise Absent(f"{top} is not installed")
    return getattr(importlib.import_module(module), attribute)


# --- time -------------------------------------------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Times what runs on a device. seconds: about how long one measurement may take."""

    device: torch.device
    seconds: float

    def __post_init__(self) -> None:
        self.flush: Tensor | None = None
        if self.device.type == "cuda":
            room = torch.cuda.get_device_properties(self.device).total_memory // 16
            self.flush = torch.empty(min(_FLUSH_BYTES, room), dtype=torch.int8, device=self.device)

    def time(self, region: Callable[[Any], Any], prepare: Callable[[], Any] = lambda: None) -> list[float]:
        """Milliseconds of `region`, repeated; each repetition gets what `prepare` has just returned, which is not timed."""
        begin = 0.0
        for i in range(_WARMUP):
            begin = time.perf_counter() if i == _WARMUP - 1 else begin
            self._once(region, prepare)
            self.wait()
        estimate = time.perf_counter() - begin
        fewest = _FEWEST if self.device.type == "cuda" else 3
        count = max(fewest, min(_MOST, int(self.seconds / estimate)))
        pending = [self._once(region, prepare) for _ in range(count)]
        self.wait()
        return [read() for read in pending]

    def _once(self, region: Callable[[Any], Any], prepare: Callable[[], Any]) -> Callable[[], float]:
        state = prepare()
        if self.flush is None:
            begin = time.perf_counter()
            region(state)
            milliseconds = 1e3 * (time.perf_counter() - begin)
            return lambda: milliseconds
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()
        start.record()
        region(state)
        end.record()
        return lambda: start.elapsed_time(end)

    def host(self, call: Callable[[], Any]) -> float | None:
        """Microseconds until a call returns to the host, the device working behind it; None where there is no device."""
        if self.device.type == "cpu":
            return None
        self.wait()
        begin = time.perf_counter()
        for _ in range(_HOST_CALLS):
            call()
        seconds = time.perf_counter() - begin
        self.wait()
        return 1e6 * seconds / _HOST_CALLS

    def peak_memory(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call allocates at the most; None on the CPU, where nobody counts."""
        if self.device.type == "cpu":
            return None
        self.wait()
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def quantiles(milliseconds: Sequence[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(milliseconds) == 1:
        return (milliseconds[0],) * 3
    fifths = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return fifths[0], statistics.median(milliseconds), fifths[3]


def measure_ceilings(stopwatch: Stopwatch) -> Ceilings:
    """A large copy, counting bytes read and written, and a large matrix product on random data (zeros run faster)."""
    device, on_gpu = stopwatch.device, stopwatch.device.type == "cuda"
    size = min(2**32, torch.cuda.get_device_properties(device).total_memory // 16) if on_gpu else 2**24
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = quantiles(stopwatch.time(lambda _: target.copy_(source)))[1]
    n, dtype = (8192, torch.bfloat16) if on_gpu else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = quantiles(stopwatch.time(lambda _: a @ b))[1]
    return Ceilings(2 * size / copy / 1e6, 2 * n**3 / product / 1e9, size, n)


# --- a case -----------------------------------------------------------------------------------------------------------


def measure(case: Case, stopwatch: Stopwatch, peers: Sequence[str] = ()) -> Iterator[Row]:
    """Rows of one case, provider by provider; what fails is a row too. peers: names of those to measure; empty: all."""
    on_gpu = stopwatch.device.type == "cuda"
    exact = None
    try:
        exact = _Exact(case, stopwatch.device)
    except torch.OutOfMemoryError as error:  # times without errors are better than nothing, if said
        work = case.forward
        row = Row(case.operation, case.shape, _name(case.dtype), EXACT, "forward", case.bound, work.bytes, work.flops)
        yield replace(row, status="failed", reason=str(error))
    for provider in case.providers:
        if (on_gpu and provider.name == "reference") or (peers and provider.name not in (OURS, *peers)):
            continue
        if not on_gpu and provider.name not in ON_CPU:
            yield from (replace(row, status="absent", reason=NEEDS_GPU) for row in _blank(case, provider).values())
            continue
        yield from _measure_provider(case, provider, stopwatch, exact)
        if on_gpu:
            gc.collect()  # a graph may hold its tensors in a cycle
            torch.cuda.empty_cache()


def _blank(case: Case, provider: Provider) -> dict[str, Row]:
    """A row per direction, without numbers."""
    start = (case.operation, case.shape, _name(case.dtype), provider.name)
    place = {"size": case.size, "group": case.group}
    return {way: Row(*start, way, case.bound, work.bytes, work.flops, **place) for way, work in case.work().items()}


def _measure_provider(case: Case, provider: Provider, stopwatch: Stopwatch, exact: _Exact | None) -> Iterator[Row]:
    rows = _blank(case, provider)
    try:
        with dispatch.use("auto", stopwatch.device.type, **provider.choice):
            function = provider.load()
            errors = exact.errors(function) if exact else {}
            for direction in list(rows):
                row = replace(rows[direction], **errors.get(direction, {}))
                yield _timed(row, case, function, stopwatch)
                del rows[direction]  # done
    except (Absent, dispatch.Unavailable) as gap:
        status = "failed" if is_ours(provider.name) else "absent"
        yield from (replace(row, status=status, reason=str(gap)) for row in rows.values())
    except Exception as error:  # whatever a peer raises is a result, and must not end the others'
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        yield from (replace(row, status="failed", reason=reason[:300]) for row in rows.values())


def _timed(row: Row, case: Case, function: Function, stopwatch: Stopwatch) -> Row:
    inputs = case.inputs(stopwatch.device)
    leaves = [inputs[i] for i in case.gradients]
    grads = _output_gradients(_outputs(function(*inputs))) if leaves else []

    def forward(_: Any = None) -> list[Tensor]:
        return _outputs(function(*inputs))

    def backward(outputs: list[Tensor]) -> Any:
        return torch.autograd.grad(outputs, leaves, grads, allow_unused=True)

    def full(_: Any = None) -> Any:
        return backward(forward())

    if row.direction == "backward":
        times = stopwatch.time(backward, forward)
    else:
        times = stopwatch.time(full if row.direction == "full" else forward)
    whole = full if leaves else forward
    host = None if row.direction == "backward" else stopwatch.host(full if row.direction == "full" else forward)
    p20, p50, p80 = quantiles(times)
    return replace(row, ms_p20=p20, ms_p50=p50, ms_p80=p80, host_us=host, peak_memory_bytes=stopwatch.peak_memory(whole))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_ours(case: Case, device: torch.device) -> None:
    """Forward and backward once, with our kernels."""
    ours = next(provider for provider in case.providers if provider.name == OURS)
    with dispatch.use("auto", device.type, **ours.choice):
        inputs = case.inputs(device)
        outputs = _outputs(ours.load()(*inputs))
        if case.gradients:
            torch.autograd.grad(outputs, [inputs[i] for i in case.gradients], _output_gradients(outputs))


def _outputs(result: Any) -> list[Tensor]:
    found = [result] if isinstance(result, Tensor) else [] if result is None else list(result)
    return [x for x in found if isinstance(x, Tensor)]


def _output_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Random numbers; 1 for a scalar, which is a loss."""
    torch.manual_seed(2)
    return [torch.ones_like(y) if y.dim() == 0 else torch.randn(y.shape, device=y.device).to(y.dtype) for y in outputs]


@dataclass
class _Exact:
    """The results of a case in fp64, computed once, for as long as its providers run."""

    case: Case
    device: torch.device

    def __post_init__(self) -> None:
        inputs = self.case.inputs(self.device, exact=True)
        self.found = self._run(self.case.exact, inputs, updates=False)

    def _run(self, function: Function, inputs: list[Tensor], updates: bool) -> dict[str, list[Tensor]]:
        """By direction: the outputs, or what an update has changed, and the gradients."""
        outputs = _outputs(function(*inputs))
        if self.case.changed is not None:
            return {"forward": self.case.changed(inputs) if updates else outputs}
        if not self.case.gradients:
            return {"forward": outputs}
        leaves = [inputs[i] for i in self.case.gradients]
        grads = [g.to(y.dtype) for g, y in zip(self.gradients_of(outputs), outputs, strict=True)]
        found = torch.autograd.grad(outputs, leaves, grads)
        return {"forward": [y.detach() for y in outputs], "backward": list(found), "full": list(found)}

    def gradients_of(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Those of the timing, rounded to the dtype of the case, so that fp64 gets the very same numbers."""
        return [g.to(self.case.dtype) for g in _output_gradients([y.detach().float() for y in outputs])]

    def errors(self, function: Function) -> dict[str, dict[str, Any]]:
        """By direction: how far a provider is off, and whether it has overwritten its inputs."""
        inputs = self.case.inputs(self.device)
        before = [x.detach().clone() for x in inputs] if self.case.changed is None else []
        found = self._run(function, inputs, updates=True)
        changes = not all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True)) if before else None
        return {
            direction: {"error": _distance(found[direction], exact), "changes_inputs": changes}
            for direction, exact in self.found.items()
        }


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """|x - exact| / |exact|, the worst of several tensors. Raises ValueError for other shapes and for NaN."""
    worst = 0.0
    for x, y in zip(found, exact, strict=True):
        if x.shape != y.shape:
            raise ValueError(f"gives shape {tuple(x.shape)}, wanted {tuple(y.shape)}")
        error = torch.linalg.vector_norm(x.double() - y) / torch.linalg.vector_norm(y).clamp(min=1e-300)
        if not torch.isfinite(error):
            raise ValueError("gives values that are not finite")
        worst = max(worst, float(error))
    return worst
