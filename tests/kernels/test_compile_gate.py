"""The compile gate: finds spills, overruns, missing instructions and forgotten rows; leaves what a launch will find."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver

from megalm_kernels import compat, compile_gate, device, tables
from megalm_kernels.compile_gate import Report, run_gate
from megalm_kernels.cubin import SHARED_LIMITS
from megalm_kernels.specimens import NoSpecimen

TOYS = Path(__file__).parent / "toys"
GOOD = {
    "centre": [tables.Row(4096, dict(BLOCK=1024, num_warps=4)), tables.Row(0, dict(BLOCK=4096, num_warps=8))],
    "product": [tables.Row(0, dict(SIZE=64, num_warps=4, num_stages=3))],
}


def plant(monkeypatch: pytest.MonkeyPatch, **rows: list[tables.Row]) -> None:
    """These tables, and no others, for every architecture."""
    monkeypatch.setattr(tables, "TABLES", {name: dict.fromkeys(tables.ARCHS, of) for name, of in {**GOOD, **rows}.items()})
    tables._find.cache_clear()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    """The toy is the only file in device/, and the cache is empty."""
    monkeypatch.setattr(device, "__path__", [str(TOYS)])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plant(monkeypatch)

    yield importlib.import_module(f"{device.__name__}.toy")
    tables._find.cache_clear()


def the_failure(report: Report) -> str:
    assert len(report.failures) == 1, report.failures
    return report.failures[0]


def test_every_kernel_that_is_shipped_passes_on_hopper() -> None:
    report = run_gate([90])
    assert report.failures == []
    assert {row.file for row in report.rows} >= {"norms", "fused_adam", "l2_norm", "rotary", "activations", "cross_entropy"}


@pytest.mark.slow
def test_every_kernel_that_is_shipped_passes() -> None:
    assert run_gate(tables.ARCHS).failures == []


def test_two_threads_may_parse_while_garbage_is_collected() -> None:
    """On Python 3.11 the two confuse each other about the depth of what they build (SystemError), unless they take turns."""

    class Garbage:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            sum(range(100))  # bytecode, after which Python may hand over to another thread

    def parse_often(kernel: Any) -> None:
        for _ in range(100):
            [Garbage() for _ in range(5)]
            kernel.parse()

    compat.mend_parsing()
    kernel = importlib.import_module("megalm_kernels.device.norms")._norm_forward
    threshold, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(10)
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(parse_often, [kernel] * 2))
    finally:
        gc.set_threshold(*threshold)
        sys.setswitchinterval(interval)


def test_good_kernels_pass_and_are_compiled_once(toy: ModuleType) -> None:
    seen: list[tuple[int, int]] = []
    first = run_gate(progress=lambda done, total: seen.append((done, total)))
    assert first.failures == []
    assert seen == [(done, 9) for done in range(1, 10)]
    assert all(row.compiled and row.cubin and row.cubin.registers > 0 for row in first.rows)
    again = run_gate()
    assert not any(row.compiled for row in again.rows)
    assert [row.cubin for row in again.rows] == [row.cubin for row in first.rows]


def test_the_table_has_a_line_for_each_kernel(toy: ModuleType) -> None:
    rows = run_gate([90]).rows
    text = compile_gate.table(rows)
    assert len(text.splitlines()) == 1 + len(rows)
    assert "_centre BLOCK=1024 num_warps=4" in text and "FAILS" not in text
    assert rows[0].cubin and rows[0].cubin.features["LDG.128"] > 0
    product = next(row for row in rows if row.kernel == "_product")
    assert product.shared >= 2 * 2 * 64 * 64 * 2  # two tiles of bf16 in at least two stages
    assert f"{product.shared:8}" in text


def test_a_spilling_row_fails(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, centre=[GOOD["centre"][0], tables.Row(0, dict(BLOCK=16384, num_warps=1))])
    report = run_gate([90])
    row = next(row for row in report.rows if row.failures)
    assert row.cubin and row.cubin.spill_loads > 0
    assert (
        f"sm_90 centre bf16 65536: _centre (BLOCK=16384 num_warps=1): spills registers: {row.cubin.spill_loads} loads"
        in (report.failures[0])
    )
    assert f"has a stack of {row.cubin.stack} bytes per thread" in report.failures[1]
    assert "FAILS" in compile_gate.table(report.rows)


def test_a_row_that_wants_too_much_shared_memory_fails(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, product=[tables.Row(0, dict(SIZE=64, num_warps=4, num_stages=16))])
    assert f"bytes of shared memory, and sm_90 has {SHARED_LIMITS[90]}" in the_failure(run_gate([90]))


def test_a_row_that_nothing_looks_up_fails(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, centre=[tables.Row(16, dict(BLOCK=16, num_warps=1)), *GOOD["centre"]])
    assert the_failure(run_gate([90])) == "table centre, sm_90, limit 16: no specimen looks this row up"
    assert run_gate([90], ["product"]).failures == []  # of one operation, nobody asks for all rows


def test_a_kernel_that_nothing_launches_fails(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def fewer() -> Iterator[Any]:
        return (specimen for specimen in kept if specimen[0].startswith("centre"))

    kept = list(toy.specimens())
    monkeypatch.setattr(toy, "specimens", fewer)
    monkeypatch.delitem(tables.TABLES, "product")
    assert the_failure(run_gate([90])) == "kernel _product in toy: no specimen launches it"


def test_a_claim_that_is_not_met_fails(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(toy.CLAIMS, "product", {"TMA", "HGMMA"})
    assert "_product" in the_failure(run_gate([90]))
    assert "has no TMA, which its specimen claims" in the_failure(run_gate([90]))
    assert run_gate([80]).failures == []  # which has no such thing
    monkeypatch.setitem(toy.CLAIMS, "product", {"LDG.256"})
    with pytest.raises(ValueError, match=r"claims LDG\.256; known are LDG\.128"):
        run_gate([90])


def test_a_kernel_that_does_not_compile_fails(toy: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, product=[tables.Row(0, dict(SIZE=48, num_warps=4))])
    assert "does not compile: CompilationError" in the_failure(run_gate([90]))


def test_unknown_operations_and_architectures(toy: ModuleType) -> None:
    with pytest.raises(NoSpecimen, match="no specimen is of rms_norm"):
        run_gate([90], ["rms_norm", "product"])
    with pytest.raises(ValueError, match="sm_70 is not known"):
        run_gate([70])


# What a launch finds


class RealGPU:
    """What Triton's own driver says on an H200 (or the capability given), without one."""

    def __init__(self, *capability: int):
        self.capability = capability

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        asked = SimpleNamespace(get_current_device=lambda: 0, get_device_capability=lambda device: self.capability)
        return CudaDriver.get_current_target(asked)


def finds(kernel: Any, gpu: RealGPU, *args: Any, **meta: Any) -> bool:
    """Whether a launch by these arguments is in the cache; the way of a launch up to the point where it would run."""
    hits: list[bool] = []
    before = driver._active
    with knobs.compilation.scope():
        knobs.compilation.listener = lambda *, cache_hit, **rest: hits.append(cache_hit)
        driver.set_active(gpu)  # type: ignore[arg-type]
        try:
            kernel.warmup(*args, grid=(1,), **meta)
        finally:
            driver.set_active(before)  # type: ignore[arg-type]
            kernel.device_caches.clear()
    return hits == [True]


def test_a_launch_finds_what_precompile_leaves(toy: ModuleType) -> None:
    x = torch.empty(8192, dtype=torch.bfloat16)
    kernel, meta = toy._centre, GOOD["centre"][1].settings
    run_gate([90])
    assert not finds(kernel, RealGPU(8, 0), x, x, x.numel(), **meta), "the gate's own folder is not where a launch looks"
    first = run_gate([90], precompile=True)
    assert all(row.compiled for row in first.rows)
    assert not any(row.compiled for row in run_gate([90], precompile=True).rows)
    assert finds(kernel, RealGPU(9, 0), x, x, x.numel(), **meta)
    assert finds(kernel, RealGPU(9, 0), x, x, 1 << 20, **meta), "another size that is divisible by 16"
    others = [(RealGPU(10, 0), (x, x, 8192)), (RealGPU(9, 0), (x, x, 8191)), (RealGPU(9, 0), (x.float(), x, 8192))]
    others.append((RealGPU(9, 0), (x[1:], x, 8192)))  # its address is not divisible by 16
    for gpu, args in others:
        assert not finds(kernel, gpu, *args, **meta)
    assert not finds(kernel, RealGPU(9, 0), x, x, 8192, **{**meta, "num_warps": 2})


def test_everything_is_put_back(toy: ModuleType) -> None:
    before = driver._active, knobs.compilation.listener, knobs.cache.dir

    def stop(done: int, total: int) -> None:
        assert driver._active is not before[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_gate([90], progress=stop)
    run_gate([90])
    assert (driver._active, knobs.compilation.listener, knobs.cache.dir) == before
    assert not toy._centre.device_caches
    doubled = torch.compile(lambda x: 2 * x, backend="aot_eager", fullgraph=True)(torch.ones(3))
    assert doubled.tolist() == [2, 2, 2]
