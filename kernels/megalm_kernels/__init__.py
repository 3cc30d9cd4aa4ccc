"""The hot operations of a transformer. Each has a plain reference beside it and is chosen once by `dispatch`."""

from megalm_kernels.activations import bias_gelu, bias_gelu_reference, geglu, geglu_reference, swiglu, swiglu_reference
from megalm_kernels.apex import Apex, find_apex
from megalm_kernels.attention import (
    attention_part,
    attention_part_backward,
    decode_attention,
    decode_attention_reference,
    flash_attention,
    flash_attention_reference,
    merge_attention,
    merge_into,
)
from megalm_kernels.cross_entropy import cross_entropy, cross_entropy_gradient, cross_entropy_reference, cross_entropy_statistics
from megalm_kernels.dispatch import Choice, Unavailable, choose, explain, use
from megalm_kernels.fused_adam import fused_adam, fused_adam_reference
from megalm_kernels.grouped_linear import grouped_linear, grouped_linear_reference
from megalm_kernels.l2_norm import l2_norm, l2_norm_reference
from megalm_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_gradient,
    linear_cross_entropy_reference,
    linear_cross_entropy_statistics,
)
from megalm_kernels.norms import LayerNorm, RMSNorm, layer_norm, layer_norm_reference, rms_norm, rms_norm_reference
from megalm_kernels.optimizer import FusedAdamW
from megalm_kernels.rotary import rotary, rotary_reference

__all__ = [
    "Apex",
    "find_apex",
    "attention_part",
    "attention_part_backward",
    "Choice",
    "Unavailable",
    "choose",
    "use",
    "bias_gelu",
    "bias_gelu_reference",
    "cross_entropy",
    "cross_entropy_gradient",
    "cross_entropy_reference",
    "cross_entropy_statistics",
    "decode_attention",
    "decode_attention_reference",
    "explain",
    "flash_attention",
    "flash_attention_reference",
    "fused_adam",
    "fused_adam_reference",
    "geglu",
    "geglu_reference",
    "grouped_linear",
    "grouped_linear_reference",
    "l2_norm",
    "l2_norm_reference",
    "linear_cross_entropy",
    "linear_cross_entropy_gradient",
    "linear_cross_entropy_reference",
    "linear_cross_entropy_statistics",
    "merge_attention",
    "merge_into",
    "FusedAdamW",
    "LayerNorm",
    "RMSNorm",
    "layer_norm",
    "layer_norm_reference",
    "rms_norm",
    "rms_norm_reference",
    "rotary",
    "rotary_reference",
    "swiglu",
    "swiglu_reference",
]
