"""What a benchmark reports: rows with ratios and how far to trust them, and on what they were measured."""

from __future__ import annotations

import os
import platform
import statistics
from dataclasses import dataclass
from typing import Any

from megalm_kernels.benchmarks.report import describe_processor, versions_of

NOISY = 0.1  # quartiles farther apart than this share of the ratio
_PACKAGES = ("megalm", "torch", "deepspeed", "numpy")
_UNITS = ((1.0, "s"), (1e-3, "ms"), (0.0, "us"))


@dataclass
class Row:
    """One thing measured: two sides and their ratio, or a time and its bound (then the second side is the bound)."""

    section: str
    what: str
    sides: tuple[str, str]
    seconds: tuple[float, float]
    ratio: float
    quartiles: tuple[float, float]
    target: float | None = None  # of the ratio
    cpu_ratio: float | None = None
    details: dict[str, Any] | None = None

    @property
    def verdict(self) -> str:
        """Whether the target is met, if there is one, and whether the quartiles are far apart."""
        met = "" if self.target is None else "met" if self.ratio <= self.target else "missed"
        noisy = self.quartiles[1] - self.quartiles[0] > NOISY * self.ratio
        return " ".join(word for word in (met, "noisy" if noisy else "") if word)


def bounded(section: str, what: str, name: str, seconds: list[float], bound: float, details: dict[str, Any] | None = None) -> Row:
    """A row of a time that has a bound in seconds."""
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (seconds[0],) * 3
    median = statistics.median(seconds)
    return Row(section, what, (name, "bound"), (median, bound), median / bound, (low / bound, high / bound), 1.0, None, details)


def headline() -> str:
    """What stands above the lines."""
    return f"{'section':<10} {'what':<42} {'first':>28} {'second':>24} {'ratio':>7} {'quartiles':>13} {'cpu':>6} {'target':>7}"


def line(row: Row) -> str:
    """One row for the terminal."""
    first, second = (f"{name} {_duration(seconds)}" for name, seconds in zip(row.sides, row.seconds, strict=True))
    quartiles = "{:.2f}-{:.2f}".format(*row.quartiles)
    cpu = "" if row.cpu_ratio is None else f"{row.cpu_ratio:.2f}"
    target = "" if row.target is None else f"{row.target:.2f}"
    return (
        f"{row.section:<10} {row.what:<42} {first:>28} {second:>24} {row.ratio:>7.3f} {quartiles:>13} {cpu:>6} {target:>7}"
        f"  {row.verdict}"
    ).rstrip()


def _duration(seconds: float) -> str:
    scale, unit = next((scale, unit) for scale, unit in _UNITS if seconds >= scale)
    return f"{seconds / (scale or 1e-6):.3g} {unit}"


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory and the load at this moment."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        **describe_processor(),
        "memory_gib": round(memory, 1),
        "load": [round(x, 2) for x in os.getloadavg()],
    }


def describe_versions(megatron: str | None) -> dict[str, str]:
    """Of Python and the packages; None: megatron-core is not there."""
    versions = {"python": platform.python_version(), **versions_of(_PACKAGES)}
    return versions | ({"megatron-core": megatron} if megatron else {})
