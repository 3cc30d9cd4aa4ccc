"""From a nested mapping to a config that can run: read, validate, derive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from megalm.config.machine import processes
from megalm.config.reader import read
from megalm.config.run import ParityRun, RunConfig
from megalm.config.tasks import PipelineRun
from megalm.config.validate import validate
from megalm.errors import ConfigError, Problem

T = TypeVar("T")


def examine(root: type[T], raw: Mapping[str, Any]) -> tuple[T, list[Problem]]:
    """The config with everything derived, and the problems of its fields and of the rules that join them."""
    config, problems = read(root, raw)
    if isinstance(config, PipelineRun):
        problems += validate(config)
    if isinstance(config, RunConfig):
        problems += validate(config)
        if not isinstance(config, ParityRun):  # parity takes the world size from each layout
            config.cluster.num_processes = processes(config)
    return config, problems


def load(root: type[T], raw: Mapping[str, Any]) -> T:
    """The typed config, with everything derived. Raises ConfigError with all problems."""
    config, problems = examine(root, raw)
    if problems:
        raise ConfigError(*problems)
    return config
