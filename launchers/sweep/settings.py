"""The words of a sweep that are Hydra's: launcher, sweeper, their settings, ranges. Faults in them, named before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from hydra.core.override_parser.types import Override, RangeSweep

from megalm.config.fields import assign
from megalm.config.reader import suggest
from megalm.errors import ConfigError, Problem

LARGEST = 10_000  # points of one sweep
# Of every plugin of ours, and each of its settings: the words that it takes, or the least number
_LIMITS: dict[str, dict[str, tuple[str, ...] | int | float]] = {
    "megalm_local": {"jobs": 0, "table": ("auto", "table", "lines")},
    "megalm_slurm": {"wait": ("auto", "yes", "no"), "array_from": 0, "at_once": 0, "poll_seconds": 0.01},
    "megalm_optuna": {
        "trials": 1,
        "at_once": 1,
        "sampler": ("tpe", "random"),
        "pruner": ("none", "median", "hyperband"),
        "startup": 1,
        "warmup_steps": 0,
        "seed": 0,
    },
}
_PLUGINS = {"launcher": ("megalm_local", "megalm_slurm", "basic"), "sweeper": ("megalm_optuna", "basic")}


def faults(name: str, given: Mapping[str, Any]) -> list[Problem]:
    """Of the settings of one of our plugins."""
    limits, kind = _LIMITS[name], "sweeper" if name == "megalm_optuna" else "launcher"
    found = []
    for word, value in given.items():
        key, limit = f"hydra.{kind}.{word}", limits.get(word)
        if limit is None:
            guess = suggest(word, limits)
            hint = f"; did you mean hydra.{kind}.{guess}?" if guess else ""
            fix = assign(f"hydra.{kind}.{guess}", value) if guess else f"remove {key}"
            found.append(Problem(key, value, f"{name} has no such setting{hint}", ", ".join(limits), fix))
        elif isinstance(limit, tuple):
            if value not in limit:
                found.append(Problem(key, value, "no such one", ", ".join(limit), f"{key}={limit[0]}"))
        elif isinstance(value, bool) or not isinstance(value, (int, type(limit))) or not value >= limit:
            kinds = "a number" if isinstance(limit, float) else "a whole number"
            found.append(Problem(key, value, "cannot be", f"{kinds} >= {limit}", f"{key}={limit}"))
    return found


def check(name: str, **given: Any) -> None:
    """Raises ConfigError with the faults of a plugin's settings: a yaml file may hold them too."""
    problems = faults(name, given)
    if problems:
        raise ConfigError(*problems)


def check_words(overrides: Sequence[Override]) -> tuple[list[Override], list[Problem]]:
    """(those that Hydra can go on with, the problems of the others)."""
    chosen, found = {"launcher": "basic", "sweeper": "basic"}, list[Problem]()
    for override in overrides:
        kind = override.key_or_group.removeprefix("hydra/")
        if kind in chosen and override.key_or_group.startswith("hydra/"):
            chosen[kind] = str(override.value())
            found += _unknown_plugin(kind, chosen[kind])
    sound = [override for override in overrides if not found or not override.key_or_group.startswith(("hydra/", "hydra."))]
    kept = []
    for override in sound:
        faulty = _setting(override, chosen) or _swept(override)
        found += faulty
        kept += [] if faulty else [override]
    many = _too_many(kept, chosen["sweeper"] != "basic")
    return [override for override in kept if not (many and override.is_sweep_override())], found + many


def _unknown_plugin(kind: str, name: str) -> list[Problem]:
    known = _PLUGINS[kind]
    if name in known:
        return []
    guess = suggest(name, known)
    hint = f"; did you mean hydra/{kind}={guess}?" if guess else ""
    return [Problem(f"hydra/{kind}", name, f"no such {kind}{hint}", ", ".join(known), f"hydra/{kind}={guess or known[0]}")]


def _setting(override: Override, chosen: Mapping[str, str]) -> list[Problem]:
    """What is wrong with a hydra.launcher.NAME or hydra.sweeper.NAME."""
    words = override.key_or_group.split(".")
    if len(words) != 3 or words[0] != "hydra" or words[1] not in chosen or override.is_delete():
        return []
    kind, name = words[1], words[2]
    others = [plugin for plugin in _PLUGINS[kind] if name in _LIMITS.get(plugin, {}) and plugin != chosen[kind]]
    if name not in _LIMITS.get(chosen[kind], {}) and others:
        rule = f"a setting of {others[0]}, and this is hydra/{kind}={chosen[kind]}"
        return [Problem(override.key_or_group, override.value(), rule, "", f"hydra/{kind}={others[0]}")]
    return faults(chosen[kind], {name: override.value()}) if chosen[kind] in _LIMITS else []


def _swept(override: Override) -> list[Problem]:
    """A range that holds nothing would be a sweep of no points, which ends well and does nothing."""
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return []
    if next(iter(override.sweep_string_iterator()), None) is not None:
        return []
    typed, value = str(override.input_line).partition("=")[2], override.value()
    fix = f"'{override.key_or_group}=range(0,5)'"
    if isinstance(value, RangeSweep) and value.start is not None and value.stop is not None:
        step = f",{value.step}" if value.step != 1 else ""
        turned = value.step * (value.stop - value.start) < 0
        first, end = (value.stop, value.start) if turned else (value.start, value.stop + value.step)
        fix = f"'{override.key_or_group}=range({first},{end}{step})'"
    return [Problem(override.key_or_group, typed, "holds no value: a range leaves its end out", "", fix)]


def _too_many(overrides: Iterable[Override], search: bool) -> list[Problem]:
    """A search draws from any number of points, but of each setting it needs all values, if they are not an interval."""
    swept = [override for override in overrides if override.is_sweep_override() and override.is_discrete_sweep()]
    counts = {o.key_or_group: sum(1 for _ in islice(o.sweep_string_iterator(), LARGEST + 1)) for o in swept}
    large = [key for key, count in counts.items() if count > LARGEST]
    if search:
        rule = f"more than {LARGEST:,} values; an interval may hold any number"
        return [Problem(key, None, rule, "", f"'{key}=interval(1,1000000)'") for key in large]
    if math.prod(counts.values()) <= LARGEST:
        return []
    rule = f"more than {LARGEST:,} points: sweep fewer values, or search"
    fix = "hydra/sweeper=megalm_optuna hydra.sweeper.trials=100"
    return [Problem(", ".join(large or counts), None, rule, "", fix)]
