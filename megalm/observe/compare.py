"""A run beside its parent: which settings differ, and what the curves say at the same step."""

from __future__ import annotations

from statistics import fmean, median
from typing import Any

from megalm.observe.folder import Points, Run
from megalm.observe.words import count, short

_OWN = ("train.run_dir",)  # differs between any two runs
_REACH = 20  # steps before the common one whose losses are averaged
ABSENT = "(not there)"


def differing(run: Run, parent: Run) -> list[tuple[str, Any, Any]]:
    """(key, the parent's value, the run's), in the order of the run's config."""
    keys = dict.fromkeys([*run.config, *parent.config])
    rows = [(key, parent.config.get(key, ABSENT), run.config.get(key, ABSENT)) for key in keys if key not in _OWN]
    return [row for row in rows if row[1] != row[2]]


def numbers(run: Run, parent: Run) -> list[tuple[str, str, str, str]]:
    """(what, the parent's, the run's, difference); what one of the two lacks is left out."""
    rows = []
    for name, key in (("training loss", "loss"), ("validation loss", "valid_loss")):
        mine, theirs = run.column(key), parent.column(key)
        step = min(mine[-1][0], theirs[-1][0]) if mine and theirs else None
        a, b = (_around(points, step, key) for points in (theirs, mine)) if step is not None else (None, None)
        if a is not None and b is not None:
            rows.append((f"{name} at step {step:,.0f}", short(a), short(b), f"{b - a:+.4g}"))
    for name, key, say in (("tokens/s, median", "tokens_per_second", count), ("gradient norm, median", "grad_norm", short)):
        mine, theirs = run.column(key), parent.column(key)
        if mine and theirs:
            a, b = median(y for _, y in theirs), median(y for _, y in mine)
            rows.append((name, say(a), say(b), f"{b / a - 1:+.1%}" if a else "-"))
    rows.append(("last step", f"{parent.step:,}", f"{run.step:,}", f"{run.step - parent.step:+,}"))
    return rows


def _around(points: Points, step: float, key: str) -> float | None:
    """The value at `step`: of the training loss the mean of the steps up to it, of the rest the last one."""
    before = [(x, y) for x, y in points if x <= step]
    near = [y for x, y in before if x > step - _REACH] if key == "loss" else []
    return fmean(near) if near else before[-1][1] if before else None
