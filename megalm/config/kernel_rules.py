"""Rules about kernels: an implementation that was asked for needs the device it is written for."""

from __future__ import annotations

import dataclasses
import os

from megalm.config.fixes import Rule, value_of
from megalm.config.kernels import KernelsConfig
from megalm.config.machine import uses_cuda
from megalm.config.run import RunConfig


def _runs_here(name: str) -> Rule:
    """kernels.NAME=triton needs a GPU or Triton's interpreter, apex a GPU."""
    key = f"kernels.{name}"

    def holds(c: RunConfig) -> bool:
        wanted = value_of(c, key)
        if wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return not uses_cuda(c)
        return wanted not in ("triton", "apex") or uses_cuda(c)

    return Rule(
        f"{name}_device",
        (key, "cluster.device"),
        f"{key}=triton needs a GPU (TRITON_INTERPRET=1 interprets kernels on the CPU, for tests), apex always",
        holds,
        lambda c: [(key, "auto"), (key, "torch")],
    )


NAMES = tuple(f.name for f in dataclasses.fields(KernelsConfig) if "triton" in f.metadata["allowed"])
RULES: tuple[Rule, ...] = tuple(_runs_here(name) for name in NAMES)
