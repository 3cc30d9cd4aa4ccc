"""Rules about kernels: an implementation that was asked for needs the device it is written for, and attention its shapes."""

from __future__ import annotations

import dataclasses
import os

from megalm.config.fixes import Rule, needs, value_of
from megalm.config.kernels import KernelsConfig
from megalm.config.machine import uses_cuda
from megalm.config.run import RunConfig


def _runs_here(name: str) -> Rule:
    """kernels.NAME=triton needs a GPU or Triton's interpreter, apex and cudnn a GPU."""
    key = f"kernels.{name}"

    def holds(c: RunConfig) -> bool:
        wanted = value_of(c, key)
        if wanted == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return not uses_cuda(c)
        return wanted not in ("triton", "apex", "cudnn") or uses_cuda(c)

    needy, plain = ("triton and cudnn", "sdpa") if name == "attention" else ("triton and apex", "torch")
    return Rule(
        f"{name}_device",
        (key, "cluster.device"),
        f"{key}: {needy} need a GPU (TRITON_INTERPRET=1 runs triton on the CPU, interpreted, for tests)",
        holds,
        lambda c: [(key, "auto"), (key, plain)],
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


def attention_of(c: RunConfig) -> str:
    """What is asked for; backend=apex, which has none, leaves it on auto."""
    wanted, backend = c.kernels.attention, c.kernels.backend
    if wanted != "auto" or backend in ("auto", "apex"):
        return wanted
    return "sdpa" if backend == "torch" else backend


def suits(head_dim: int) -> bool:
    """Whether triton and cudnn have attention with so many channels per head."""
    return head_dim % 8 == 0 and 0 < head_dim <= 256


_ATTENTION = "kernels.attention"
_SHAPES = (
    Rule(
        "attention_head_dim",
        (_ATTENTION, "kernels.backend", "model.head_dim"),
        f"{_ATTENTION}: triton and cudnn need a model.head_dim that 8 divides, 256 at the most",
        lambda c: attention_of(c) not in ("triton", "cudnn") or suits(c.model.head_dim),
        lambda c: [(_ATTENTION, "sdpa")],
    ),
    Rule(
        "attention_precision",
        (_ATTENTION, "train.precision"),
        f"{_ATTENTION}=cudnn needs train.precision=bf16 or fp16",
        lambda c: attention_of(c) != "cudnn" or c.train.precision != "fp32",
        lambda c: [("train.precision", "bf16"), (_ATTENTION, "auto"), (_ATTENTION, "sdpa")],
    ),
)
RULES: tuple[Rule, ...] = (*(_runs_here(name) for name in NAMES), *(_is_used(name) for name in USED_BY), *_SHAPES)
