"""Softmax attention: one public function, and what runs behind it."""

from megalm_kernels.attention import operators, sdpa  # noqa: F401
from megalm_kernels.attention.decode import decode_attention, decode_attention_reference
from megalm_kernels.attention.merge import merge_attention, merge_into
from megalm_kernels.attention.parts import attention_part, attention_part_backward
from megalm_kernels.attention.public import flash_attention, flash_attention_reference

__all__ = [
    "attention_part",
    "attention_part_backward",
    "decode_attention",
    "decode_attention_reference",
    "flash_attention",
    "flash_attention_reference",
    "merge_attention",
    "merge_into",
]
