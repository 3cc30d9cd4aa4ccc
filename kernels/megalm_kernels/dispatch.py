"""One registry: for each operation its implementations, the one that was chosen, and why.

An operation's file registers what it has; `choose` picks one per operation, once, before the first forward. Nothing is
decided inside a forward, and `explain()` says what runs and why the others do not.

    torch    torch's own operators; anywhere
    triton   the kernels in device/: on a GPU of sm_80 or newer, and on the CPU under TRITON_INTERPRET=1
    apex     NVIDIA's apex where it is installed with its CUDA extensions; only when asked for by name

Attention has more: sdpa, which is torch's there, cudnn and reference. `auto` takes triton where it can run, else torch; an
operation may have an order of its own (`prefer`), as attention has by what was measured (attention/choice.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op, infer_schema

from megalm_kernels import compat
from megalm_kernels.launch import capability
from megalm_kernels.tables import ARCHS

BACKENDS = ("triton", "torch", "apex", "sdpa", "cudnn", "reference")
PREFERENCE = ("triton", "torch")  # `auto` takes the first that is usable


@dataclass(frozen=True)
class Choice:
    """What runs for one operation."""

    operation: str
    backend: str
    reason: str


class Unavailable(ValueError):
    """An implementation that was asked for and cannot run here: operation, backend, reason."""

    def __init__(self, operation: str, backend: str, device_type: str, reason: str):
        super().__init__(f"{operation} has no implementation for backend={backend} on {device_type}: {reason}")
        self.operation, self.backend, self.reason = operation, backend, reason


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    obstacle: Callable[[str], str]  # device type -> why it cannot run there; empty: it can
    by_default: Callable[..., Any]  # what runs where `auto` picked it


@dataclass(frozen=True)
class Order:
    """What `auto` tries, the best first; why that is the best; and what was left out, in words."""

    backends: Sequence[str]
    reason: str
    left_out: Sequence[str] = ()


Facts = Mapping[str, Any]  # what is known of the calls to come: head_dim, precision
_registry: dict[str, dict[str, _Implementation]] = {}
_orders: dict[str, Callable[[str, Facts], Order]] = {}
_chosen: dict[str, tuple[Callable[..., Any], Choice]] = {}


def register(
    operation: str,
    backend: str,
    function: Callable[..., Any],
    obstacle: Callable[[str], str] = lambda device_type: "",
    by_default: Callable[..., Any] | None = None,
) -> None:
    """Make `function` known as `operation` on `backend`; `obstacle(device_type)` says why it cannot run there, or ''.

    by_default: runs in its place where nobody asked for it by name; it may hand calls that it does not have to another.
    """
    _registry.setdefault(operation, {})[backend] = _Implementation(function, obstacle, by_default or function)


def prefer(operation: str, order: Callable[[str, Facts], Order]) -> None:
    """Let `order(device type, facts)` say what `auto` tries for `operation`, instead of PREFERENCE."""
    _orders[operation] = order


def choose(
    backend: str = "auto", device_type: str = "", operations: Mapping[str, str] | None = None, facts: Facts | None = None
) -> list[Choice]:
    """Choose one implementation for every operation; later calls replace the choice. Raises Unavailable if one has none.

    backend: for all of them, of which `operations` names exceptions ({"rms_norm": "apex"}; "auto" there: as `backend`).
    A backend that some operation does not have at all leaves that one on auto. device_type: cuda where there is a GPU.
    facts: what is known of the calls to come, for operations whose order depends on it. Other names raise ValueError.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if device_type not in ("cpu", "cuda"):
        raise ValueError(f"the device type is {device_type!r}, wanted cpu or cuda")
    for wish in {backend, *(operations or {}).values()} - {"auto", *BACKENDS}:
        raise ValueError(f"no backend is called {wish}; there are auto, {', '.join(BACKENDS)}")
    named = {name: wish for name, wish in (operations or {}).items() if wish != "auto"}
    unknown = sorted(named.keys() - _registry.keys())
    if unknown:
        raise ValueError(f"no operation is called {unknown[0]}; there are {', '.join(sorted(_registry))}")
    picked = {name: _pick(name, named.get(name, backend), device_type, name in named, facts or {}) for name in _registry}
    _chosen.clear()
    _chosen.update(picked)
    return explain()


@contextmanager
def use(backend: str = "", device_type: str = "", **operations: str) -> Iterator[list[Choice]]:
    """Another choice for the calls inside, and the one before for those after: `with use(rms_norm="torch"):`.

    Without `backend` what is not named stays as it was chosen. Not for a forward: choose before it.
    """
    before = dict(_chosen)
    try:
        choose(backend or "auto", device_type, operations)
        if not backend:
            _chosen.update({name: chosen for name, chosen in before.items() if name not in operations})
        yield explain()
    finally:
        _chosen.clear()
        _chosen.update(before)


def _usual_order(device_type: str, facts: Facts) -> Order:
    return Order(PREFERENCE, "the fastest here")


def _pick(
    operation: str, backend: str, device_type: str, by_name: bool, facts: Facts
) -> tuple[Callable[..., Any], Choice]:
    has = _registry[operation]
    asked = backend != "auto" and (by_name or backend in has)
    order = Order((backend,), "asked for") if asked else _orders.get(operation, _usual_order)(device_type, facts)
    passed_over = [] if asked or backend in ("auto", *PREFERENCE) else [f"{backend}: has none"]
    passed_over += order.left_out
    for name in order.backends:
        obstacle = has[name].obstacle(device_type) if name in has else "has none"
        if not obstacle:
            interpreted = not asked and name == "triton" and compat.interpreting()
            why = "; ".join(passed_over) or ("TRITON_INTERPRET=1, slowly" if interpreted else order.reason)
            return has[name].function if asked else has[name].by_default, Choice(operation, name, why)
        passed_over.append(f"{name}: {obstacle}")
    raise Unavailable(operation, backend, device_type, f"{'; '.join(passed_over)} (it has {', '.join(sorted(has))})")


def implementation(operation: str) -> Callable[..., Any]:
    """The function that runs for `operation`; `auto` for this machine if nobody has chosen yet."""
    _see_to_a_choice()
    return _chosen[operation][0]


@compat.assume_constant  # inside, caches would make a compiler warn
def _see_to_a_choice() -> bool:
    if len(_chosen) < len(_registry):
        choose()
    return True


def explain() -> list[Choice]:
    """What was chosen, by operation."""
    return [choice for _, choice in sorted(_chosen.values(), key=lambda pair: pair[1].operation)]


def triton_obstacle(device_type: str) -> str:
    """Why Triton kernels cannot run on this kind of device; '' if they can."""
    if not compat.installed():
        return "triton is not installed"
    if compat.interpreting():
        return "" if device_type == "cpu" else "TRITON_INTERPRET=1 runs kernels on the CPU only"
    if device_type != "cuda" or not torch.cuda.is_available():
        return "no GPU"
    if torch.version.hip:
        return "an AMD GPU, which the kernels were never tried on"
    arch, oldest = capability(torch.cuda.current_device()), min(ARCHS)
    if arch < oldest:
        return f"the GPU is sm_{arch}, the oldest that has block sizes is sm_{oldest}"
    return ""


def kernel_op(name: str, launcher: str, mutates: Sequence[str] = ()) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Register an operator `megalm::name` of torch.library: opaque to torch.compile, so it compiles with no GPU.

    launcher: "file:function" in megalm_kernels.device, with the same arguments; runs on CUDA, and on the CPU in the
    interpreter. The decorated function is what a CPU does otherwise, in plain torch. The caller adds `register_fake` and,
    if it has a gradient, `register_autograd`. mutates: names of the arguments it writes into.
    """

    def decorate(plain: Callable[..., Any]) -> CustomOpDef:
        file, function = launcher.split(":")

        @cache
        def find() -> Callable[..., Any]:
            return getattr(importlib.import_module(f"megalm_kernels.device.{file}"), function)

        def on_device(*args: Any, **kwargs: Any) -> Any:
            return find()(*args, **kwargs)

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            return (on_device if compat.interpreting() else plain)(*args, **kwargs)

        schema = infer_schema(plain, mutates_args=mutates)
        op = custom_op(f"megalm::{name}", on_device, mutates_args=mutates, device_types="cuda", schema=schema)
        op.register_kernel("cpu", on_cpu)
        return op

    return decorate


def rows_of(x: Tensor) -> Tensor:
    """x (..., N) as (T, N) with a row's columns next to each other in memory; copied only where no view is so."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
