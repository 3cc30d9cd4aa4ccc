"""LLaMA (Touvron et al. 2023): rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.models.attention import Attention, Rope
from megalm.models.block import Block
from megalm.models.decoder import Decoder
from megalm.models.latent_attention import LatentAttention
from megalm.models.layers import SwigluMLP
from megalm.models.moe import MoE
from megalm_kernels import RMSNorm


class Llama(Decoder):
    """A LLaMA style decoder."""

    def build_norm(self) -> nn.Module:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def build_block(self, layer: int) -> Block:
        c = self.config
        ordinary = (c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, layer, False, c.window)
        attention = LatentAttention(c, layer) if c.kv_latent_size else Attention(*ordinary)
        mlp = MoE(c) if c.has_experts(layer) else SwigluMLP(c.hidden_size, c.ffn_size)
        return Block(self.build_norm(), attention, self.build_norm(), mlp, c.dropout)

    def rope(self, positions: Tensor) -> Rope:
        """Angle of position s and pair i of D channels: s * theta^(-2i / D); fp32, computed in fp64: late positions stay exact.

        D is head_dim, with latent attention rope_head_dim.
        """
        half = (self.config.rope_head_dim if self.config.kv_latent_size else self.config.head_dim) // 2
        exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
        angles = positions.double()[:, None] * self.config.rope_theta**-exponents
        return Rope(angles.cos().float(), angles.sin().float())
