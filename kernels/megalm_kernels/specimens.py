"""Every launch that training makes, on every architecture, caught without making it.

Each file in device/ has `specimens()`: tuples (label, call) or (label, call, claims). The label's first word is an operation.
The call is made with tensors on the meta device, and what it would launch is what the compile gate compiles. claims: names in
`cubin.FEATURES`, such as {"LDG.128"}, of instructions that every kernel it launches must have.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

from megalm_kernels import device, tables
from megalm_kernels.cubin import FEATURES
from megalm_kernels.launch import Launch, capture

_SHARED = {"linear_cross_entropy": "cross_entropy"}  # operations without kernels of their own: whose they use


class NoSpecimen(ValueError):
    """An operation that no file in device/ has a specimen of."""


@dataclass
class Specimen:
    """One launch, by the first label that makes it; the claims are those of all."""

    file: str
    label: str
    arch: int
    launch: Launch
    claims: set[str] = field(default_factory=set)


def collect(archs: Sequence[int], operations: Collection[str] = ()) -> tuple[list[Specimen], list[str]]:
    """Every distinct launch, and what the specimens leave out (of all operations: empty if some are named)."""
    names = sorted(module.name for module in pkgutil.iter_modules(device.__path__))
    modules = {name: importlib.import_module(f"{device.__name__}.{name}") for name in names}
    found: dict[tuple, Specimen] = {}
    wanted = {_SHARED.get(name, name) for name in operations}
    missing = set(wanted)
    before = set(tables.used)
    tables.used.clear()
    for arch in archs:
        for file, module in modules.items():
            for label, call, *claims in getattr(module, "specimens", list)():
                operation = label.split()[0]
                missing.discard(operation)
                if not wanted or operation in wanted:
                    _add(found, file, label, arch, call, *claims)
    looked_up = set(tables.used)
    tables.used.update(before)
    if missing:
        raise NoSpecimen(f"no specimen is of {', '.join(sorted(missing))}; see specimens() in {', '.join(names)}")
    specimens = list(found.values())
    return specimens, [] if operations else list(_left_out(modules, specimens, archs, looked_up))


def _add(
    found: dict[tuple, Specimen], file: str, label: str, arch: int, call: Callable[[], object], claims: Collection[str] = ()
) -> None:
    unknown = sorted(set(claims) - FEATURES.keys())
    if unknown:
        raise ValueError(f"specimen {label} claims {unknown[0]}; known are {', '.join(FEATURES)}")
    with capture(arch) as launches:
        call()
    for launch in launches:
        found.setdefault((arch, *identity(launch)), Specimen(file, label, arch, launch)).claims.update(claims)


def identity(launch: Launch) -> tuple:
    """What the JIT tells two launches apart by: where it is the same, the second compiles nothing."""
    args = [_kind(arg, param) for arg, param in zip(launch.args, launch.kernel.params, strict=False)]
    return (launch.kernel, *args, *sorted((name, str(value)) for name, value in launch.meta.items()))


def _kind(arg: Any, param: Any) -> object:
    if isinstance(arg, int) and not isinstance(arg, bool) and param.do_not_specialize:
        return arg.bit_length() < 32
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, tuple(arg.block_shape), repr(arg.layout)
    if param.is_constexpr or not isinstance(arg, int | float | Tensor):
        return repr(arg)
    if isinstance(arg, Tensor):
        return arg.dtype, Pointer(arg).data_ptr() % 16 == 0
    if isinstance(arg, bool | float):
        return type(arg)
    return arg == 1, arg % 16 == 0, arg.bit_length() < 32


class Pointer:
    """A tensor as the JIT sees it: a dtype and how its address is aligned. What allocators give is aligned."""

    def __init__(self, x: Tensor):
        self.dtype = x.dtype
        self.offset = int(x.storage_offset()) * x.element_size()

    def data_ptr(self) -> int:
        return self.offset


def _left_out(
    modules: dict[str, Any], specimens: Sequence[Specimen], archs: Sequence[int], looked_up: set[tuple[str, int, int]]
) -> Iterator[str]:
    """Files without specimens, rows of tables that none looks up, kernels that none launches."""
    yield from (f"device/{file}.py has no specimens()" for file, module in modules.items() if not hasattr(module, "specimens"))
    for name, by_arch in tables.TABLES.items():
        for arch in sorted({tables.nearest(arch) for arch in archs}):
            for row in by_arch[arch]:
                if (name, arch, row.limit) not in looked_up:
                    yield f"table {name}, sm_{arch}, limit {row.limit}: no specimen looks this row up"
    launched = {id(specimen.launch.kernel) for specimen in specimens}
    jitted = {
        (file, name): value
        for file, module in modules.items()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.__module__ == module.__name__
    }
    sources = " ".join(value.src for value in jitted.values())
    for (file, name), value in jitted.items():
        called = len(re.findall(rf"\b{name}[(,]", sources)) > 1  # by another kernel; its own definition is one
        if id(value) not in launched and not called:
            yield f"kernel {name} in {file}: no specimen launches it"
