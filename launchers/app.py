"""Runs one verb: help, all faults at once, then Hydra, then the task with its typed config."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from megalm.errors import ConfigError, MegalmError

Task = Callable[[Any], Any]


def run_verb(verb: str, task: Task | Mapping[str, Task]) -> None:
    """The command line of `verb`: exits with 2 for a user's mistake, 130 for Ctrl-C, and no traceback for either.

    task: gets the config; a verb with several subverbs has a task for each.
    """
    try:
        _run(verb, task)
    except MegalmError as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(error: MegalmError) -> NoReturn:
    """Prints the error, exits with its code."""
    _report(error)
    sys.exit(error.exit_code)


def _report(error: MegalmError) -> None:
    """A faulty config is the same on all ranks: one prints it."""
    from megalm.log import this_rank

    if this_rank() == 0 or not isinstance(error, ConfigError):
        print(error, file=sys.stderr, flush=True)


def job_arguments(typed: list[str], config: Any) -> list[str]:
    """The arguments that start a worker of the present job: files and options as `typed`, the rest as in this job."""
    from hydra.core.hydra_config import HydraConfig

    from megalm.config.fields import override
    from megalm.launchers.sweep.point import files_and_flags

    keep = [text for text in files_and_flags(typed) if text not in ("-m", "--multirun")]
    return [*keep, *HydraConfig.get().overrides.task, override("train.run_dir", config.train.run_dir)]


def _run(verb: str, tasks: Task | Mapping[str, Task]) -> None:
    if {"--help", "-h"} & set(sys.argv[1:]):
        from megalm.launchers.options import help_text

        print(help_text(verb))
        return
    import hydra

    from megalm.launchers.compose import HYDRA_SETTINGS, SEARCH_PATH, inspect, parse
    from megalm.launchers.slurm.plan import is_for_slurm
    from megalm.launchers.sweep.command_line import inspect_sweep, with_launcher
    from megalm.launchers.sweep.point import SweepCommand, files_and_flags

    typed = sys.argv[1:]
    many = verb == "pretrain" and bool({"-m", "--multirun"} & set(typed))
    if many:
        typed = with_launcher(typed, is_for_slurm(typed))
    elif is_for_slurm(typed):
        return _submit(verb, typed)
    command = parse(verb, typed)
    if not (command.options.hydra_help or command.options.shell_completion):
        config, problems = inspect_sweep(command, typed) if many else inspect(command)
        if config is not None and not many and _named_slurm(config):  # a yaml file says so
            return _submit(verb, typed)
        if problems:
            raise ConfigError(*problems)

    task = tasks[command.subverb] if isinstance(tasks, Mapping) else tasks
    sweep = SweepCommand(verb, [text for text in files_and_flags(typed) if text not in ("-m", "--multirun")])
    sweep.inspected = command.inspected
    failures = sweep.failures

    def job(composed: Any) -> Any:
        try:
            return task(_typed(verb, composed))
        except MegalmError as error:  # Hydra would add a line of its own; the other jobs of a sweep go on
            _report(error)
            failures.append(error)
            return None

    job.__dict__["sweep"] = sweep  # Hydra hands the task to our launchers, and nothing else of ours
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # what is left to fail is a mistake of ours: show all of it
    sys.argv[1:] = [*command.argv, *HYDRA_SETTINGS, f"hydra.job.name={verb}"]
    hydra.main(version_base="1.3", config_path=SEARCH_PATH, config_name=verb)(job)()
    if failures:
        sys.exit(failures[0].exit_code)


def _named_slurm(config: Any) -> bool:
    cluster = getattr(config, "cluster", None)
    return cluster is not None and cluster.name == "slurm"


def _submit(verb: str, typed: list[str]) -> None:
    from megalm.launchers.slurm.submit import submit_verb

    submit_verb(verb, typed)


def _typed(verb: str, composed: Any) -> Any:
    """The checked config of one job. In a sweep each run gets a folder of its own, lest jobs resume one another."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from megalm.config.load import examine
    from megalm.config.run import ROOTS, RunConfig
    from megalm.launchers.compose import plain

    raw, unresolved = plain(composed)
    config: Any
    config, problems = examine(ROOTS[verb], raw)
    if unresolved + problems:
        raise ConfigError(*unresolved, *problems)
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and isinstance(config, RunConfig) and config.train.run_dir == RunConfig().train.run_dir:
        config.train.run_dir = job.runtime.output_dir
    return config
