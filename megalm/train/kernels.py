"""From the configuration to the implementations that run: chosen once, before the model is built, and said."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch

import megalm_kernels
from megalm.config.kernels import KernelsConfig
from megalm.config.run import RunConfig
from megalm.errors import ConfigError, Problem
from megalm_kernels import Choice
from megalm_kernels.attention import hopper


def facts_of(config: RunConfig) -> dict[str, Any]:
    """What is known of a run's calls before there is one, for choices that depend on it."""
    return {"head_dim": config.model.head_dim, "precision": config.train.precision}


def choose_kernels(config: KernelsConfig, device_type: str, facts: Mapping[str, Any] | None = None) -> list[Choice]:
    """Choose for this process. Raises ConfigError, with a fix, if what is asked for cannot run on this kind of device."""
    try:
        choices = megalm_kernels.choose(config.backend, device_type, config.operations(), facts)
    except megalm_kernels.Unavailable as error:
        named = config.operations().get(error.operation, "auto") != "auto"
        key = f"kernels.{error.operation}" if named else "kernels.backend"
        problem = Problem(key, error.backend, f"{error.operation} cannot run so here: {error.reason}", "", f"{key}=auto")
        raise ConfigError(problem) from error
    by_triton = any((choice.operation, choice.backend) == ("attention", "triton") for choice in choices)
    if device_type == "cuda" and by_triton and _wants_hopper(facts or {}):
        hopper.ready(torch.device("cuda"))  # has it tried now, and not in the first forward
    return choices


def _wants_hopper(facts: Mapping[str, Any]) -> bool:
    """Whether a run's calls may be such as the warp-specialised attention takes, as far as is known before there is one."""
    return facts.get("head_dim") in hopper.HEAD_DIMS and facts.get("precision") != "fp32"


def describe(choices: list[Choice]) -> str:
    """One line: each implementation, the reason, and the operations it runs where there are several."""
    reasons = sorted((choice.backend, choice.reason, choice.operation) for choice in choices)
    groups = [(key, [name for *_, name in group]) for key, group in groupby(reasons, key=lambda choice: choice[:2])]
    if len(groups) == 1:
        ((backend, reason), _) = groups[0]
        return f"{backend} ({reason})"
    return "; ".join(f"{backend} for {', '.join(names)} ({reason})" for (backend, reason), names in groups)
