"""Reads a plain nested mapping into a tree of dataclasses. Every fault is found in one pass, and each names its fix.

Hydra only composes (untyped); all checking is here, because OmegaConf's typed nodes stop at the first fault.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from megalm.config import fields
from megalm.errors import Problem

T = TypeVar("T")

# ${oc.env:HOME} calls a function that reads the environment; ${model.hidden_size} only names another key.
_RESOLVER = re.compile(r"\$\{\s*[\w.]+\s*:")
_INSTANTIATE = re.compile(r"_(target|args|partial|recursive|convert)_")


def read(root: type[T], raw: Mapping[str, Any]) -> tuple[T, list[Problem]]:
    """The typed config and all problems. The nearest legal value stands in for a faulty one, so the rules can run."""
    problems = list(forbidden(raw))
    reader = _Reader(known_keys(root), problems)
    return reader.section(root, raw, ""), problems


def defaults_of(root: type) -> dict[str, Any]:
    """The defaults as a nested plain mapping, as they are written in the fields (a 0 that means `derived` stays 0)."""
    return {
        field.name: defaults_of(kind)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind)
        else fields.default_of(field)
        for field, kind in fields.fields_of(root)
    }


def known_keys(root: type) -> list[str]:
    """Every dotted key below `root`, sections first."""
    sections = [field.name for field, kind in fields.fields_of(root) if dataclasses.is_dataclass(kind)]
    return sections + [key for key, _, _ in fields.leaves(root)]


def forbidden(raw: Any, prefix: str = "") -> Iterator[Problem]:
    """What no config may hold: keys that make Hydra build objects, and resolvers that read the environment."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            dotted = f"{prefix}{key}"
            if _INSTANTIATE.fullmatch(str(key)):
                rule = "a config never builds objects: _target_ and its kin are refused"
                yield Problem(dotted, value, rule, fix=f"remove {dotted}")
            else:
                yield from forbidden(value, f"{dotted}.")
    elif isinstance(raw, (list, tuple)):
        for item in raw:
            yield from forbidden(item, prefix)
    elif isinstance(raw, str) and _RESOLVER.search(raw):
        key = prefix.rstrip(".")
        rule = "resolvers such as ${oc.env:NAME} are refused: a run must not depend on the environment"
        yield Problem(key, raw, rule, fix=f"remove {key}")


def is_forbidden(key: str, value: Any) -> bool:
    """This entry is already reported by `forbidden`."""
    return next(forbidden({key: value}), None) is not None and not isinstance(value, Mapping)


def suggest(key: str, names: Iterable[str]) -> str:
    """The known name that was probably meant, or an empty string. The same last word in another section wins."""
    names = list(names)
    leaf = key.rpartition(".")[2]
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    close = difflib.get_close_matches(key, same_leaf, 1, 0.0) or difflib.get_close_matches(key, names, 1, 0.75)
    if close:
        return close[0]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(names)}
    close = difflib.get_close_matches(leaf, by_leaf, 1, 0.75)
    return by_leaf[close[0]] if close else ""


def unknown_key(key: str, value: Any, names: Iterable[str]) -> Problem:
    """The problem of a key that no section has."""
    is_section = isinstance(value, Mapping)
    guess = suggest(key, [name for name in names if "." not in name] if is_section else names)
    hint = f"; did you mean {guess}?" if guess else ""
    shown = None if is_section else value
    fix = fields.assign(guess, value) if "." in guess and not is_section else f"remove {key}"
    fix = f"rename it to {guess}" if is_section and guess else fix
    return Problem(key, shown, f"unknown {'section' if is_section else 'key'}{hint}", fix=fix)


class _Reader:
    """One pass over the mapping; problems are collected, never raised."""

    def __init__(self, names: list[str], problems: list[Problem]):
        self.names = names
        self.problems = problems

    def section(self, cls: type[T], raw: Any, prefix: str) -> T:
        if not isinstance(raw, Mapping):
            key = prefix.rstrip(".")
            self.problems.append(Problem(key, raw, "wrong type", "a section of keys", f"remove {key}"))
            raw = {}
        kinds = fields.types_of(typing.cast(Any, cls))
        for key, value in raw.items():
            if key not in kinds and not is_forbidden(str(key), value) and not _INSTANTIATE.fullmatch(str(key)):
                self.problems.append(unknown_key(f"{prefix}{key}", value, self.names))
        present = [(field, kind) for field, kind in fields.fields_of(cls) if field.name in raw]
        values = {
            field.name: self.entry(field, kind, raw[field.name], f"{prefix}{field.name}") for field, kind in present
        }
        return cls(**values)

    def entry(self, field: dataclasses.Field, kind: Any, value: Any, key: str) -> Any:
        if dataclasses.is_dataclass(kind):
            return self.section(typing.cast(type, kind), value, f"{key}.")
        if is_forbidden(key, value):
            return fields.default_of(field)
        converted = fields.convert(kind, value)
        if converted is not fields.WRONG and fields.is_legal(field, converted):
            return converted
        legal = fields.nearest(field, kind, value)
        bounds = "not one of the allowed values" if field.metadata["allowed"] else "out of bounds"
        rule = "wrong type" if converted is fields.WRONG else bounds
        shown = _shown(kind, value)
        self.problems.append(Problem(key, shown, rule, fields.describe(field, kind), fields.assign(key, legal)))
        return legal


def _shown(kind: Any, value: Any) -> object:
    """The value as the user knows it: null for None, and a text told from the number or the boolean it looks like."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value!r} (text)" if isinstance(value, str) and kind is not str else value
