"""What one field accepts: its type, its bounds, the nearest legal value; how a value is written as an override."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import shlex
import typing
from collections.abc import Iterator
from typing import Any

WRONG: Any = object()  # what `convert` returns for a value of another type
TYPE_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
}

_BOOLEAN_WORDS = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
# Hydra reads these without quotes as text; the look-ahead keeps out what it would read as a number, a boolean or null.
_PLAIN_TEXT = re.compile(
    r"(?!(?:true|false|null|[-+]?(?:nan|inf|[\d.][\d_.]*(?:e[-+]?\d+)?))$)[\w./:+%@-]+", re.IGNORECASE
)

_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """{field: its resolved type}."""
    return typing.get_type_hints(cls)


def fields_of(cls: type) -> Iterator[tuple[dataclasses.Field, Any]]:
    """(field, type) of every field."""
    return ((field, types_of(cls)[field.name]) for field in dataclasses.fields(cls))


def default_of(field: dataclasses.Field) -> Any:
    """The default as it is written in the dataclass, before `__post_init__` derives anything."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def leaves(root: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """(dotted key, field, type) of every setting below `root`."""
    for field, kind in fields_of(root):
        key = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(kind):
            yield from leaves(typing.cast(type, kind), f"{key}.")
        else:
            yield key, field, kind


def flatten(config: Any) -> dict[str, Any]:
    """{dotted key: value} of every setting."""
    return {key: functools.reduce(getattr, key.split("."), config) for key, _, _ in leaves(type(config))}


def convert(kind: Any, value: Any) -> Any:
    """The value as `kind`, or WRONG. A whole number is a fine float; so is 1e-4, which YAML 1.1 takes for text."""
    if kind is float:
        number = _number(value)
        return WRONG if number is None else number
    if kind is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else WRONG
    if kind is bool:
        return value if isinstance(value, bool) else WRONG
    if kind is str:
        return value if isinstance(value, str) and value != "???" else WRONG
    assert is_list(kind), f"no reader for fields of type {kind}"
    items = [convert(_item_of(kind), item) for item in value] if isinstance(value, (list, tuple)) else [WRONG]
    return WRONG if any(item is WRONG for item in items) else items


def is_list(kind: Any) -> bool:
    """Whether fields of this type hold a list; `allowed` is then what its items may be."""
    return kind in (list[str], list[int])


def _item_of(kind: Any) -> Any:
    return typing.get_args(kind)[0]


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def is_legal(field: dataclasses.Field, value: Any) -> bool:
    """A value of the right type lies within the field's own bounds."""
    bounds = field.metadata
    if not bounds["empty"] and value in ("", []):
        return False
    if bounds["allowed"]:
        return all(item in bounds["allowed"] for item in (value if isinstance(value, list) else [value]))
    return (
        (bounds["minimum"] is None or value >= bounds["minimum"])
        and (bounds["maximum"] is None or value <= bounds["maximum"])
        and (bounds["above"] is None or value > bounds["above"])
    )


def describe(field: dataclasses.Field, kind: Any) -> str:
    """The legal values in words."""
    bounds = field.metadata
    if bounds["allowed"]:
        return ("a list of " if is_list(kind) else "") + ", ".join(map(str, bounds["allowed"]))
    if not bounds["empty"]:
        return "text, not empty"
    limits = [f"{sign} {bounds[name]:g}" for name, sign in _SIGNS.items() if bounds[name] is not None]
    return " ".join([TYPE_NAMES[kind], " and ".join(limits)]).strip()


_SIGNS = {"minimum": ">=", "above": ">", "maximum": "<="}


def nearest(field: dataclasses.Field, kind: Any, value: Any) -> Any:
    """The legal value nearest to `value`, which may be of a wrong type; the default when nothing is near."""
    guess = convert(kind, value)
    guess = _reinterpret(kind, value) if guess is WRONG else guess
    if guess is WRONG:
        return default_of(field)
    allowed, minimum, maximum = (field.metadata[name] for name in ("allowed", "minimum", "maximum"))
    if allowed and is_list(kind):
        near = [item for wish in guess for item in difflib.get_close_matches(str(wish), map(str, allowed), 1)]
        return [item for item in allowed if str(item) in near] or default_of(field)
    if allowed and kind is str:
        matches = [guess] if guess in allowed else difflib.get_close_matches(guess.lower(), allowed, 1)
        return matches[0] if matches else default_of(field)
    if allowed:
        return min(allowed, key=lambda item: abs(item - guess))
    if minimum is not None and guess < minimum:
        guess = kind(minimum)
    if maximum is not None and guess > maximum:
        guess = kind(maximum)
    return guess if is_legal(field, guess) else default_of(field)


def _reinterpret(kind: Any, value: Any) -> Any:
    """What the user probably meant by a value of another type: 1000.0 steps, "yes", a lone text for a list."""
    number = _number(value)
    if kind is int:
        return WRONG if number is None else round(number)
    if kind is bool:
        return _BOOLEAN_WORDS.get(str(value).lower(), WRONG)
    if kind is str and isinstance(value, bool):
        return "on" if value else "off"  # YAML 1.1 reads a bare on or off as a boolean
    if kind is str and number is not None:
        return str(value)
    if kind is str and isinstance(value, (list, tuple)) and value:
        return ",".join(map(str, value))
    return [value] if is_list(kind) and convert(_item_of(kind), value) is not WRONG else WRONG


def quote(text: str) -> str:
    """The text in Hydra's grammar, as it is if it is quoted already."""
    return text if _QUOTED.fullmatch(text) else _literal(text)


def assign(key: str, value: Any) -> str:
    """`key=value` as it can be pasted into a shell."""
    return shlex.quote(override(key, value))


def override(key: str, value: Any) -> str:
    """`key=value` in Hydra's grammar."""
    return f"{key}={_literal(value)}"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_literal, value))}]"
    if not isinstance(value, str) or _PLAIN_TEXT.fullmatch(value):
        return str(value)
    escaped = re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + match[2].replace('"', '\\"'), value)
    return f'"{escaped}"'
