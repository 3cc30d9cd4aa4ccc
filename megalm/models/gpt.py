"""GPT (Radford et al. 2019): learned positions, LayerNorm, GELU, biases everywhere but in the head."""

from __future__ import annotations

from torch import nn

from megalm.models.attention import Attention
from megalm.models.block import Block
from megalm.models.decoder import Decoder
from megalm.models.layers import GeluMLP, PositionEmbedding
from megalm_kernels import LayerNorm


class GPT(Decoder):
    """A GPT-2 style decoder."""

    def build_norm(self) -> nn.Module:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps)

    def build_position_embedding(self) -> PositionEmbedding:
        return PositionEmbedding(self.config.max_seq_length, self.config.hidden_size)

    def build_block(self, layer: int) -> Block:
        c = self.config
        attention = Attention(c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, layer, True, c.window)
        return Block(self.build_norm(), attention, self.build_norm(), GeluMLP(c.hidden_size, c.ffn_size), c.dropout)
