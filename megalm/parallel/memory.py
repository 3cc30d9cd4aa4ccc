"""Bytes of model states on one rank: weights, gradients, master weights, moments, buckets. Pure arithmetic, no torch.

Meant is the end of a step's last backward, when gradients are fullest. With N parameters on the rank (its stage, its tensor
slice), P copies (data parallel), w bytes per weight and g per accumulated gradient (4, or w without `accumulate_fp32`):

    zero            weights   gradients      masters   moments      buckets
    0   fp32        4N        4N             -         8N           -
    0   bf16 fp16   wN        gN             4N        8N           -
    1   2           wN        gN             4N/P      8N/P         -        (one bucket while it reduces)
    3               wN/P      gN + gN/P      4N/P      8N/P         4 bytes x bucket
    microbatch  2   wN        gN/P           4N/P      8N/P         -        (one bucket in the backward)
    microbatch  3   wN/P      gN/P           4N/P      8N/P         4 bytes x bucket

The step itself needs more for a moment (`step_bytes`), when no activation is left.

(Rajbhandari et al. 2020, with DeepSpeed's ways: in fp32 it keeps a second copy of a rank's part of the weights.) ZeRO-3 also
gathers the weights of the module that runs, whole. Activations are another matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.train import ITEM_BYTES

BUCKET_ELEMENTS = 50_000_000  # ZeRO sends gradients in buckets; more than this gains no bandwidth
_MASTER, _MOMENTS, _REDUCED = 4, 8, 4  # bytes per parameter; reduction is in fp32


@dataclass(frozen=True)
class ModelStates:
    """Bytes on one rank."""

    weights: int
    gradients: int
    masters: int
    moments: int
    buckets: int
    offloaded: int = 0  # of these, what lies in host memory or on disk

    @property
    def total(self) -> int:
        """All of it, wherever it lies."""
        return self.weights + self.gradients + self.masters + self.moments + self.buckets

    @property
    def on_device(self) -> int:
        """What the device holds."""
        return self.total - self.offloaded


def model_states(
    parameters: int,
    copies: int,
    zero: int,
    precision: str,
    in_backward: bool = False,
    accumulate_fp32: bool = True,
    offload: bool = False,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> ModelStates:
    """Of a rank with `parameters` elements, under ZeRO over `copies`. in_backward: parallel.zero_reduce=microbatch."""
    weight = ITEM_BYTES[precision]
    gradient = 4 if accumulate_fp32 else weight
    part = -(-parameters // copies)
    if zero == 0:
        masters = _MASTER * parameters if precision != "fp32" else 0
        return ModelStates(weight * parameters, gradient * parameters, masters, _MOMENTS * parameters, 0)
    held = parameters if zero < 3 else part
    gradients = gradient * (part if in_backward else parameters + (part if zero == 3 else 0))
    bucket = _REDUCED * min(bucket_elements, parameters) if zero == 3 else 0
    masters, moments = _MASTER * part, _MOMENTS * part
    return ModelStates(weight * held, gradients, masters, moments, bucket, masters + moments if offload else 0)


def step_bytes(
    parameters: int,
    copies: int,
    zero: int,
    precision: str,
    in_backward: bool = False,
    accumulate_fp32: bool = True,
    bucket_elements: int = BUCKET_ELEMENTS,
) -> int:
    """The most that reducing gradients and updating weights take beside the states.

    Without ZeRO nothing, but fp32 copies of gradients that were added up in less. With it one bucket, two where gradients are
    gone from the weights already; ZeRO-2 also makes fp32 of a rank's part of gradients of lower precision.
    """
    if zero == 0:
        return _REDUCED * parameters if precision != "fp32" and not accumulate_fp32 else 0
    bucket = _REDUCED * min(bucket_elements, parameters)
    part = _REDUCED * -(-parameters // copies) if zero == 2 and precision != "fp32" and not in_backward else 0
    return bucket * (2 if in_backward else 1) + part
