"""How numbers, times and texts of a run are written. Texts come from files that anybody may have written."""

from __future__ import annotations

import math
import reprlib
from datetime import datetime, timezone
from html import escape
from typing import Any

_BRIEF = reprlib.Repr()  # looks at a part of what is large or deep: a small yaml file can unfold to gigabytes
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxdict = _BRIEF.maxset = 40
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother, _BRIEF.maxlong = 3, 300, 300, 60
_MOST = 1e100
_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))


def number(value: object) -> float | None:
    """A number up to 1e100 as it is, anything else (text, NaN, true, infinity) as None: sums and products stay finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if abs(result) <= _MOST else None


def clean(value: object, limit: int = 300) -> str:
    """One line of printable text: no terminal codes, no marks that turn the writing direction, no end of line."""
    text = value if isinstance(value, str) else _BRIEF.repr(value)
    cut = text[:limit] + ("..." if len(text) > limit else "")
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in cut)


def safe(value: object, limit: int = 300) -> str:
    """`clean`, for HTML and for attributes in double quotes."""
    return escape(clean(value, limit), quote=True)


def duration(seconds: float) -> str:
    """12.3 s, 4 min 10 s, 2 h 31 min, 3 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(min(seconds, 1e12))
    for size, name, below, part in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size:,} {name}" + (f" {rest} {part}" if rest else "")
    return f"{whole} s"


def moment(seconds: float | None, utc: bool = False) -> str:
    """Date and time of seconds since the epoch; a dash where there is none."""
    try:
        time = datetime.fromtimestamp(seconds if seconds is not None else math.nan, timezone.utc)
    except (ValueError, OverflowError, OSError):
        return "-"
    return f"{time:%Y-%m-%d %H:%M:%S}" if utc else f"{time.astimezone():%Y-%m-%d %H:%M:%S}"


def count(value: float) -> str:
    """1,234 as it is, 1.23 M from a million on."""
    for size, name in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {name}" if abs(value) < 1000 * size else f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def short(value: float) -> str:
    """A number on an axis or in a table: four digits."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6 or abs(value) < 1e-3:
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(value: float) -> str:
    """Bytes, as GiB, MiB or KiB."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} B"


def told(event: dict[str, Any]) -> str:
    """What an event says besides its time and kind, as one line: the sentence first, then names and values."""
    first = [clean(event[key]) for key in ("reason", "message") if event.get(key)]
    skipped = {"time", "kind", "reason", "message", "pid", "reached", "cancelled"}
    others = {key: value for key, value in event.items() if key not in skipped and value not in (None, "")}
    rest = [f"{clean(key, 40)} {_joined(value)}" for key, value in others.items()]
    return "; ".join([*first, ", ".join(rest)] if rest else first)


def _joined(value: object) -> str:
    if isinstance(value, dict):
        return _joined([f"{clean(key, 80)}: {clean(text, 120)}" for key, text in list(value.items())[:21]])
    if isinstance(value, list):
        return " ".join(clean(item) for item in value[:20]) + (" ..." if len(value) > 20 else "")
    return clean(value)
