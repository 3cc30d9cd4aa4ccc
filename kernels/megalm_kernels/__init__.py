"""The hot operations of a transformer. Each has a plain reference beside it and is chosen once by `dispatch`."""

from megalm_kernels.cross_entropy import cross_entropy, cross_entropy_reference
from megalm_kernels.dispatch import Choice, choose, explain
from megalm_kernels.flash_attention import flash_attention, flash_attention_reference
from megalm_kernels.fused_adam import fused_adam, fused_adam_reference
from megalm_kernels.layer_norm import layer_norm, layer_norm_reference
from megalm_kernels.rms_norm import rms_norm, rms_norm_reference
from megalm_kernels.rotary import rotary, rotary_reference
from megalm_kernels.swiglu import swiglu, swiglu_reference

__all__ = [
    "Choice",
    "choose",
    "cross_entropy",
    "cross_entropy_reference",
    "explain",
    "flash_attention",
    "flash_attention_reference",
    "fused_adam",
    "fused_adam_reference",
    "layer_norm",
    "layer_norm_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_reference",
    "swiglu",
    "swiglu_reference",
]
