"""Rules about kernels: an implementation that was asked for needs the device it is written for."""

from __future__ import annotations

import dataclasses
import os

from megalm.config.fixes import Rule, needs, value_of
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
        f"{key}: triton and apex need a GPU (TRITON_INTERPRET=1 runs triton on the CPU, interpreted, for tests)",
        holds,
        lambda c: [(key, "auto"), (key, "torch")],
    )


NAMES = tuple(f.name for f in dataclasses.fields(KernelsConfig) if "triton" in f.metadata["allowed"])
USED_BY = {"rms_norm": "llama", "layer_norm": "gpt", "rotary": "llama", "swiglu": "llama"}  # others: by every model


def _is_used(name: str) -> Rule:
    """An operation that the model does not have is nothing to choose for."""
    key, architecture = f"kernels.{name}", USED_BY[name]
    return needs(
        f"{name}_used",
        key,
        "auto",
        "model.architecture",
        lambda c: c.model.architecture == architecture,
        ("model.architecture", architecture),
        f"{key} has an effect with model.architecture={architecture} only",
    )


RULES: tuple[Rule, ...] = (*(_runs_here(name) for name in NAMES), *(_is_used(name) for name in USED_BY))
