"""What a verb takes: its option groups and every key with its default, for `megalm VERB --help` and the reference."""

from __future__ import annotations

import functools
from importlib.resources import files

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


def help_text(verb: str) -> str:
    """All options of a verb."""
    lines = [_USAGE.format(verb=f"{verb} {SUBVERBS.get(verb, '')}".strip(), line=VERBS[verb])]
    choices = groups(verb)
    if choices:
        width = max(map(len, choices)) + 1
        lines += ["groups"] + [f"  {name + '=':{width}} {' | '.join(options)}" for name, options in choices.items()] + [""]
    return "\n".join(lines + option_lines(ROOTS[verb]))
