"""A knob: one configuration field with its default, its help text and its own bounds, all on one line."""

from __future__ import annotations

import copy
from dataclasses import field
from typing import Any


def knob(
    default: Any,
    help: str,
    *,
    allowed: tuple = (),
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    empty: bool = True,
) -> Any:
    """A dataclass field. `allowed`: the only legal values; `minimum`, `maximum`: ends included; `above`: not.

    `empty`: text may be empty.
    """
    bounds = {"allowed": allowed, "minimum": minimum, "maximum": maximum, "above": above, "empty": empty}
    metadata = {"help": help, **bounds}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type) -> Any:
    """A field that holds a whole section, made of its own defaults."""
    return field(default_factory=cls, metadata={"help": (cls.__doc__ or "").strip().splitlines()[0]})
