"""Which implementation of each hot operation runs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from megalm.config.knobs import knob

_ATTENTION = ("auto", "triton", "sdpa", "cudnn", "reference")
_TRITON = ("auto", "triton", "torch")
_APEX = ("auto", "triton", "torch", "apex")


def _operation(allowed: tuple[str, ...]) -> Any:
    return knob("auto", "auto: as kernels.backend", allowed=allowed)


@dataclass
class KernelsConfig:
    """Which implementation runs of each hot operation that training uses; `megalm kernels explain` shows it for a machine."""

    backend: str = knob(
        "auto", "of all operations; auto: triton on a GPU of sm_80 or newer, else torch; chosen once and reported", allowed=_APEX
    )
    rms_norm: str = _operation(_APEX)
    layer_norm: str = _operation(_APEX)
    fused_adam: str = _operation(_APEX)
    rotary: str = _operation(_TRITON)
    swiglu: str = _operation(_TRITON)
    cross_entropy: str = _operation(_TRITON)
    grouped_linear: str = _operation(_TRITON)
    attention: str = knob(
        "auto",
        "auto: as kernels.backend, whose torch is sdpa; on a GPU what was measured to be faster, and sdpa in fp32",
        allowed=_ATTENTION,
    )
    fuse_projections: bool = knob(False, "q, k and v in one matrix product, and gate and up; the parameters stay apart")
    fused_loss: bool = knob(False, "the head and its loss go over the tokens in chunks: the logits never exist all at once")

    def operations(self) -> dict[str, str]:
        """{operation: what is asked for}, without `backend`."""
        others = ("backend", "fuse_projections", "fused_loss")
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in others}


# The operations that run Triton kernels. What training does not call follows `backend`; the last runs those of cross_entropy.
_CHOSEN = tuple(f.name for f in fields(KernelsConfig) if f.name != "backend" and "triton" in f.metadata["allowed"])
KERNELS = (*_CHOSEN, "l2_norm", "geglu", "bias_gelu", "decode_attention", "linear_cross_entropy")
