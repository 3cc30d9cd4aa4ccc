"""LLaMA (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.models.attention import Attention
from megalm.models.block import Block
from megalm.models.decoder import Decoder
from megalm.models.layers import SwigluMLP
from megalm_kernels import RMSNorm


class Llama(Decoder):
    """A LLaMA style decoder."""

    def build_norm(self) -> nn.Module:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def build_block(self, layer: int) -> Block:
        c = self.config
        attention = Attention(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, layer, bias=False)
        return Block(self.build_norm(), attention, self.build_norm(), SwigluMLP(c.hidden_size, c.ffn_size), c.dropout)

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Angle of position s and pair i: s * theta^(-2i / D); fp32, computed in fp64 so that late positions stay exact."""
        half = self.config.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
        angles = positions.double()[:, None] * self.config.rope_theta**-exponents
        return angles.cos().float(), angles.sin().float()
