"""One registry: for each operation its implementations, the one that was chosen, and why.

A kernel file registers what it has; `choose(backend, device_type)` picks one per operation, once, before the first
forward. Nothing is decided inside a forward, and `explain()` says what runs and why the others do not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

PREFERENCE = ("triton", "apex", "torch")  # `auto` takes the first that is usable


@dataclass(frozen=True)
class Choice:
    """What runs for one operation."""

    operation: str
    backend: str
    reason: str


@dataclass(frozen=True)
class _Implementation:
    function: Callable[..., Any]
    obstacle: Callable[[str], str]  # device type -> why it cannot run there; empty: it can


_registry: dict[str, dict[str, _Implementation]] = {}
_chosen: dict[str, tuple[Callable[..., Any], Choice]] = {}


def register(
    operation: str, backend: str, function: Callable[..., Any], obstacle: Callable[[str], str] = lambda device_type: ""
) -> None:
    """Make `function` known as `operation` on `backend`; `obstacle(device_type)` says why it cannot run there, or ''."""
    _registry.setdefault(operation, {})[backend] = _Implementation(function, obstacle)


def choose(backend: str = "auto", device_type: str = "cpu") -> list[Choice]:
    """Choose one implementation for every operation; later calls replace the choice. Raises ValueError if one has none."""
    _chosen.clear()
    for operation in _registry:
        _chosen[operation] = _pick(operation, backend, device_type)
    return explain()


def _pick(operation: str, backend: str, device_type: str) -> tuple[Callable[..., Any], Choice]:
    passed_over: list[str] = []
    for name in PREFERENCE if backend == "auto" else (backend,):
        implementation = _registry[operation].get(name)
        obstacle = "not written" if implementation is None else implementation.obstacle(device_type)
        if implementation is not None and not obstacle:
            why = "asked for" if backend != "auto" else "; ".join(passed_over) or "first choice"
            return implementation.function, Choice(operation, name, why)
        passed_over.append(f"{name}: {obstacle}")
    raise ValueError(
        f"no implementation of {operation} for kernels.backend={backend} on {device_type}: {'; '.join(passed_over)}"
    )


def implementation(operation: str) -> Callable[..., Any]:
    """The function that runs for `operation`; `auto` on the CPU if nobody has chosen yet."""
    if operation not in _chosen:
        _chosen[operation] = _pick(operation, "auto", "cpu")
    return _chosen[operation][0]


def explain() -> list[Choice]:
    """What was chosen, by operation."""
    return [choice for _, choice in sorted(_chosen.values(), key=lambda pair: pair[1].operation)]
