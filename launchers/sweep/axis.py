"""Axes for the settings and the loss of a sweep: where a value lies, and what is written beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from megalm.observe.chart import limits, ticks

_FEW = 6  # different values, up to which each has a mark of its own
_LOG_FROM = 4.0  # greatest over least, from which an axis may be logarithmic
_ROOM, _APART = 0.06, 0.11  # of the axis: beyond its ends, and between two marks
_MARKS = 5


@dataclass(frozen=True)
class Axis:
    """Where a value lies, from 0 to 1. `words`: of an axis that is no scale, in its order."""

    name: str
    low: float = 0  # of the scale; of a logarithmic one the exponent
    high: float = 1
    log: bool = False
    words: tuple[str, ...] = ()
    values: tuple[float, ...] = ()  # of a scale on which there are few

    def place(self, text: str) -> float:
        """Of a value as typed; at the edge if it lies beyond."""
        if self.words:
            share = self.words.index(text) / (len(self.words) - 1) if len(self.words) > 1 else 0.5
            return _ROOM + (1 - 2 * _ROOM) * share
        return min(1.0, max(0.0, self._share(float(text))))

    def is_beyond(self, text: str) -> bool:
        """Whether a value is so large that the axis does not reach it."""
        return not self.words and self._share(float(text)) > 1

    def ticks(self) -> list[tuple[float, str]]:
        """(place, what stands there)."""
        if self.words:
            return [(self.place(word), word) for word in self.words]
        found = self.values or (self._powers() if self.log else ticks(self.low, self.high, _MARKS))
        exponents = self.log and min(found, default=1.0) < 0.01
        return [(self.place(repr(value)), _power(value) if exponents else f"{value:.4g}") for value in found]

    def _share(self, value: float) -> float:
        scaled = _log(value) if self.log else value
        return (scaled - self.low) / (self.high - self.low)

    def _powers(self) -> list[float]:
        """Round numbers of a logarithmic axis: powers of ten, and steps between them where there are too few."""
        found: list[float] = []
        for steps in ((1,), (1, 3), (1, 2, 5)):
            decades = range(math.floor(self.low), math.floor(self.high) + 1)
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [value for value in found if 0 <= self._share(value) <= 1]
            if len(found) > 2:
                break
        return found[:: math.ceil(len(found) / (_MARKS + 1)) or 1]


def axis_of(name: str, texts: Sequence[str], cut: bool = False) -> Axis:
    """Numbers get a scale, anything else a place for each word. `cut`: a few that are far above the others are off the top."""
    try:
        values = [float(text) for text in texts]
    except ValueError:
        return Axis(name, words=tuple(dict.fromkeys(texts)))
    if not all(math.isfinite(value) for value in values):
        return Axis(name, words=tuple(dict.fromkeys(texts)))
    log = not cut and _is_spread_by_powers(values)
    scaled = [_log(value) for value in values] if log else values
    low, high = limits(scaled) if cut else _with_room(min(scaled), max(scaled))
    axis = Axis(name, low, high, log)
    few = tuple(sorted(set(values)))
    places = [axis.place(repr(value)) for value in few]
    if cut or len(few) > _FEW or any(b - a < _APART for a, b in pairwise(places)):
        return axis
    return Axis(name, low, high, log, values=few)


def _with_room(low: float, high: float) -> tuple[float, float]:
    room = _ROOM * (high - low) or 0.5 * abs(high) or 0.5
    return low - room, high + room


def _is_spread_by_powers(values: Sequence[float]) -> bool:
    """Whether the values fill a logarithmic axis more evenly than a plain one: by where the middle one of them lies."""
    different = set(values)
    low, high = min(different), max(different)
    if low <= 0 or high / low < _LOG_FROM:
        return False
    middle = median(different)
    plain, log = (middle - low) / (high - low), (_log(middle) - _log(low)) / (_log(high) - _log(low))
    return abs(log - 0.5) < abs(plain - 0.5)


def _log(value: float) -> float:
    return math.log10(value) if value > 0 else -math.inf


def _power(value: float) -> str:
    """0.0003 as 3e-4."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
