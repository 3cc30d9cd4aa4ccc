"""The command line of a sweep: which launcher runs it, and what is wrong with any of its points, before one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megalm.errors import Problem
from megalm.launchers.compose import Command, inspect
from megalm.launchers.slurm.plan import examine_in_job
from megalm.launchers.sweep.settings import check_words


def with_launcher(typed: Sequence[str], slurm: bool) -> list[str]:
    """The arguments of a sweep with a launcher of ours, unless they name one. `slurm`: cluster=slurm is among them."""
    here = ("cluster=slurm", "cluster.name=slurm")
    words = [text for text in typed if not (slurm and text in here)]
    if not any(text.startswith("hydra/launcher=") for text in words):
        words.append(f"hydra/launcher={'megalm_slurm' if slurm else 'megalm_local'}")
    return words


def inspect_sweep(command: Command, typed: Sequence[str]) -> tuple[Any, list[Problem]]:
    """As compose.inspect: (config of the first point, problems of all). Points of SLURM are judged as on its nodes."""
    kept, problems = check_words(command.overrides)
    problems += _no_search(command)
    command = replace(command, overrides=kept)
    if "hydra/launcher=megalm_slurm" not in typed:
        config, found = inspect(command)
        return config, problems + found
    config, found = inspect(command, examine_in_job)
    return config, problems + found


def _no_search(command: Command) -> list[Problem]:
    """Intervals, which only a search can draw from."""
    words = [override.input_line or "" for override in command.overrides]
    if any(word.startswith("hydra/sweeper=") for word in words):
        return []
    rule = "a grid has no values to take from an interval"
    return [
        Problem(override.key_or_group, (override.input_line or "").partition("=")[2], rule, "", "hydra/sweeper=megalm_optuna")
        for override in command.overrides
        if override.is_sweep_override() and not override.is_discrete_sweep()
    ]
