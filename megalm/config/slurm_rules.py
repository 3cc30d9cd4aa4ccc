"""Rules about a SLURM job. Its values end up in #SBATCH lines and in options of srun: none may bring a line of its own."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from megalm.config.fixes import Rule, needs, value_of
from megalm.config.run import RunConfig

_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:=+@-]*")
WORDS = {  # key: (what a legal value looks like, in words)
    "job_name": (_WORD, "letters, digits and _.:=+@-, the first a letter or a digit"),
    "partition": (re.compile(f"({_WORD.pattern})(,{_WORD.pattern})*"), "names joined by commas"),
    "account": (_WORD, "one name"),
    "qos": (_WORD, "one name"),
    "reservation": (_WORD, "one name"),
    "constraint": (re.compile(r"[A-Za-z0-9_.:=&|*!(),\[\]-]+"), "names of features joined by & | , with [ ] ( ) *"),
    "exclude": (re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*"), "names of nodes as SLURM writes them: n[3-5],n9"),
    "container": (re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_.:/=@#+-]*"), "an image's path or address, without blanks"),
    "container_mounts": (re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_.:/=@+,-]*"), "host:container pairs joined by commas"),
    "setup": (re.compile(r"[^\x00-\x1f\x7f\"'\\$`]+"), "a path without quotes, backslashes, $ and control characters"),
}
# sbatch's options that have a key of their own, or that would take the job out of our hands
_OWN = {
    "--nodes": "slurm.nodes", "--gpus-per-node": "slurm.gpus_per_node", "--cpus-per-task": "slurm.cpus_per_task",
    "--time": "slurm.minutes", "--partition": "slurm.partition", "--account": "slurm.account", "--qos": "slurm.qos",
    "--constraint": "slurm.constraint", "--reservation": "slurm.reservation", "--exclude": "slurm.exclude",
    "--job-name": "slurm.job_name", "--requeue": "slurm.requeue", "--no-requeue": "slurm.requeue",
    "--signal": "slurm.save_seconds", "--ntasks-per-node": "slurm.processes_per_node", "--dependency": "slurm.chain",
    "--ntasks": "slurm.processes_per_node", "--output": "", "--error": "", "--open-mode": "", "--wrap": "", "--chdir": "",
    "--export": "", "--array": "", "--parsable": "", "--test-only": "", "--wait": "",
}  # fmt: skip
_OPTION = re.compile(r"(--[a-z][a-z-]*)(=[A-Za-z0-9_.,:/=@%+*&|\[\]()-]+)?")


def is_option(text: str) -> bool:
    """Whether this may be passed to sbatch as it is. It takes the first letters of an option for the whole."""
    match = _OPTION.fullmatch(text)
    return match is not None and not any(own.startswith(match[1]) for own in _OWN)


def _looks(name: str) -> Rule:
    key, (pattern, words) = f"slurm.{name}", WORDS[name]

    def holds(c: RunConfig) -> bool:
        value = value_of(c, key)
        return not value or pattern.fullmatch(value) is not None

    def cleaned(c: RunConfig) -> str:
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", value_of(c, key)).strip("-.")

    return Rule(f"slurm_{name}", (key,), f"{key} is {words}", holds, lambda c: [(key, cleaned(c)), (key, "megalm"), (key, "")])


def _saves_in_time(c: RunConfig) -> bool:
    return c.slurm.save_seconds < 60 * c.slurm.minutes


def _ranks_fit(c: RunConfig) -> bool:
    return not c.slurm.gpus_per_node or c.slurm.processes_per_node <= c.slurm.gpus_per_node


def _fields(*names: str) -> Callable[[RunConfig], list[tuple[str, Any]]]:
    """Changes that take over the other key's value."""
    return lambda c: [(f"slurm.{names[0]}", value_of(c, f"slurm.{names[1]}"))]


RULES: tuple[Rule, ...] = (
    *(_looks(name) for name in WORDS),
    Rule(
        "slurm_extra",
        ("slurm.extra",),
        "slurm.extra is a list of sbatch's long options, --name or --name=value, that have no key of their own",
        lambda c: all(map(is_option, c.slurm.extra)),
        lambda c: [("slurm.extra", [text for text in c.slurm.extra if is_option(text)])],
    ),
    Rule(
        "slurm_saves_in_time",
        ("slurm.save_seconds", "slurm.minutes"),
        "slurm.save_seconds must be shorter than the time limit, slurm.minutes",
        _saves_in_time,
        lambda c: [("slurm.minutes", c.slurm.save_seconds // 60 + 1)],
    ),
    Rule(
        "slurm_ranks_fit",
        ("slurm.processes_per_node", "slurm.gpus_per_node"),
        "slurm.processes_per_node must not exceed slurm.gpus_per_node: a rank needs a GPU of its own",
        _ranks_fit,
        _fields("processes_per_node", "gpus_per_node"),
    ),
    needs(
        "slurm_chain_used",
        "slurm.chain",
        0,
        "slurm.requeue",
        lambda c: not c.slurm.requeue,
        ("slurm.requeue", False),
        "slurm.chain has an effect with slurm.requeue=false only: a job that may go back to the queue needs no successor",
    ),
    needs(
        "slurm_mounts_used",
        "slurm.container_mounts",
        "",
        "slurm.container",
        lambda c: bool(c.slurm.container),
        ("slurm.container_mounts", ""),
        "slurm.container_mounts has an effect with slurm.container only",
    ),
    needs(
        "slurm_container_tool_used",
        "slurm.container_tool",
        "pyxis",
        "slurm.container",
        lambda c: bool(c.slurm.container),
        ("slurm.container_tool", "pyxis"),
        "slurm.container_tool has an effect with slurm.container only",
    ),
)
