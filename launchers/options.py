"""What a verb takes: its option groups and every key with its default, for `megalm VERB --help` and the reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import yaml

from megalm.config.fields import default_of, leaves
from megalm.config.reference import option_lines
from megalm.config.run import ROOTS
from megalm.launchers.cli import SUBVERBS, VERBS

_USAGE = """usage: megalm {verb} [FILE.yaml] [group=option ...] [key=value ...]

{line}
Later values win: defaults, then groups, then the file, then keys. A sweep: -m optim.lr=1e-3,3e-4
Others: --cfg job (print the config), --config-dir DIR (groups of your own), --hydra-help.
"""


@functools.cache
def groups(verb: str) -> dict[str, list[str]]:
    """{group: its options} of the groups that the verb composes."""
    conf = files("megalm.conf")
    root = (conf / f"{verb}.yaml").read_text()
    folders = sorted(entry.name for entry in conf.iterdir() if entry.is_dir() and f"- {entry.name}:" in root)
    return {name: sorted(item.name[:-5] for item in (conf / name).iterdir() if item.name.endswith(".yaml")) for name in folders}


def defaults(verb: str) -> dict[str, Any]:
    """{dotted key: value} of what the verb runs with when nothing is typed: the fields' defaults under its yaml files.

    What Hydra would compose, read without importing it; a test holds the two together.
    """
    values = {key: default_of(field) for key, field, _ in leaves(ROOTS[verb])}
    own = _yaml(f"{verb}.yaml")
    parts: list[tuple[str, dict]] = [("", own)]
    for entry in own.pop("defaults", []):
        parts[-1:-1] = [(f"{group}.", _yaml(f"{group}/{option}.yaml")) for group, option in _pairs(entry)]
    for prefix, node in parts:
        values |= {key: value for key, value in _flat(prefix, node) if key in values}
    return values


def _pairs(entry: str | dict[str, str | None]) -> list[tuple[str, str]]:
    """The group in an entry of a defaults list, if one is chosen; a name alone is the fields' defaults, or the file itself."""
    return [(group, option) for group, option in entry.items() if option] if isinstance(entry, dict) else []


def _yaml(name: str) -> dict:
    return yaml.safe_load((files("megalm.conf") / name).read_text()) or {}


def _flat(prefix: str, node: dict) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def help_text(verb: str) -> str:
    """All options of a verb, with the values that it has when nothing is typed."""

    subverbs = SUBVERBS.get(verb, {})
    lines = [_USAGE.format(verb=f"{verb} {' | '.join(subverbs)}".strip(), line=VERBS[verb])]
    if len(subverbs) > 1:
        width = max(map(len, subverbs))
        lines += [*(f"  {name:{width}}  {line}" for name, line in subverbs.items()), ""]
    choices = groups(verb)
    if choices:
        width = max(map(len, choices)) + 1
        lines += ["groups"] + [f"  {name + '=':{width}} {' | '.join(options)}" for name, options in choices.items()] + [""]
    return "\n".join(lines + option_lines(ROOTS[verb], defaults(verb)))
