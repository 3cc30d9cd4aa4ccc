"""What decoders share: embedding, blocks, final norm, head. A pipeline stage is this class with parts deleted.

Absent parts (None, or layers that are not in `layers`) are passed through, and `layers` keeps its global numbers, so a
parameter's name is the same on every layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.attention import KeyValueCache
from megalm.models.block import Block
from megalm.models.layers import Dropout, PositionEmbedding


class Decoder(nn.Module):
    """A causal language model. Subclasses fill in the parts."""

    layers: nn.ModuleDict
    embedding: nn.Module | None
    position_embedding: PositionEmbedding | None
    norm: nn.Module | None
    head: nn.Module | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = self.build_position_embedding()
        self.embedding_dropout = Dropout(config.dropout, site=0)
        self.layers = nn.ModuleDict({str(i): self.build_block(i) for i in range(config.num_layers)})
        self.norm = self.build_norm()
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def build_norm(self) -> nn.Module:
        raise AssertionError("a subclass builds its norm")

    def build_block(self, layer: int) -> Block:
        raise AssertionError("a subclass builds its blocks")

    def build_position_embedding(self) -> PositionEmbedding | None:
        return None

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos and sin (S, D/2) of the positions, for models that turn their queries and keys."""
        return None

    def tie(self) -> None:
        """Make the head's weight the embedding's, if the model wants that and has both parts here."""
        if self.config.tie_embeddings and self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        samples: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """tokens (B, S) int64, or hidden (B, S, E) on a later stage -> logits (B, S, V), or hidden on an earlier one.

        positions (S,) int64, 0.. if not given; samples (B,) int64 global sample numbers, for dropout only.
        """
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        if self.embedding is not None:
            x = self.embedding(x)
            if self.position_embedding is not None:
                x = x + self.position_embedding(positions)
            x = self.embedding_dropout(x, samples, positions)
        rope = self.rope(positions)
        for layer in self.layers.values():
            x = layer(x, rope, positions, samples, cache)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x))
        return x
