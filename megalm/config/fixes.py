"""The nearest legal fix: a rule proposes changes of one key; the one that leaves the fewest rules broken is shown."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megalm.config import fields
from megalm.config.run import RunConfig

C = TypeVar("C", bound=RunConfig)
Change = tuple[str, Any]  # (dotted key, new value)


@dataclass(frozen=True)
class Rule:
    """A row of the table: `holds` judges a config, `changes` proposes one-key changes, the nearest first.

    `keys` are printed with their values.
    """

    name: str
    keys: tuple[str, ...]
    text: str
    holds: Callable[[RunConfig], bool]
    changes: Callable[[RunConfig], Iterable[Change]]


def value_of(config: RunConfig, key: str) -> Any:
    """The value at `section.field`."""
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def with_value(config: C, key: str, value: Any) -> C:
    """A copy with one value changed. What the section had derived is derived anew."""
    name, field = key.split(".")
    section = getattr(config, name)
    values = {f.name: getattr(section, f.name) for f in dataclasses.fields(section)}
    values |= dict.fromkeys(getattr(section, "derived", ()), 0)
    return dataclasses.replace(config, **{name: type(section)(**{**values, field: value})})


def within_bounds(config: RunConfig, change: Change) -> bool:
    """The new value is legal for its field."""
    name, field_name = change[0].split(".")
    field = next(f for f in dataclasses.fields(getattr(config, name)) if f.name == field_name)
    return fields.is_legal(field, change[1])


def broken(rules: Sequence[Rule], config: RunConfig) -> list[Rule]:
    """The rules that the config does not obey."""
    return [rule for rule in rules if not rule.holds(config)]


def cures(rule: Rule, config: RunConfig) -> Iterator[Change]:
    """The proposed changes that are legal and make the rule hold."""
    legal = (change for change in rule.changes(config) if within_bounds(config, change))
    return (change for change in legal if rule.holds(with_value(config, *change)))


def best_cure(rule: Rule, rules: Sequence[Rule], config: RunConfig) -> Change | None:
    """The cure that leaves the fewest rules broken; the first of equals."""
    return min(cures(rule, config), key=lambda change: len(broken(rules, with_value(config, *change))), default=None)


def plan(rules: Sequence[Rule], config: RunConfig) -> dict[str, Change]:
    """{name of a broken rule: its cure}. Each is chosen with the earlier ones applied: none undoes another."""
    cure_of: dict[str, Change] = {}
    ill = broken(rules, config)
    for rule in ill:
        change = None if rule.holds(config) else best_cure(rule, rules, config)
        if change is None:
            continue
        config = with_value(config, *change)
        cure_of |= {other.name: change for other in ill if other.name not in cure_of and other.holds(config)}
    return cure_of


def multiples(config: RunConfig, key: str, of: int, count: int = 6) -> list[Change]:
    """Multiples of `of` as new values, the nearest to the present value first, the larger of two equals first."""
    value = value_of(config, key)
    values = [factor * of for factor in range(max(1, value // of - count // 2), value // of + count)]
    return [(key, v) for v in sorted(values, key=lambda v: (abs(v - value), -v))]


def divisors(config: RunConfig, key: str, number: int) -> list[Change]:
    """Divisors of `number` as new values, the nearest to the present value first."""
    value = value_of(config, key)
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    values = {*small, *(number // d for d in small)}
    return [(key, v) for v in sorted(values, key=lambda v: (abs(v - value), v))]


def needs(
    name: str, key: str, neutral: Any, other: str, given: Callable[[RunConfig], bool], change: Change, why: str
) -> Rule:
    """`key` has an effect only when `given` holds: a setting without effect is a mistake, not a detail."""
    return Rule(
        name, (key, other), why, lambda c: value_of(c, key) == neutral or given(c), lambda c: [(key, neutral), change]
    )
