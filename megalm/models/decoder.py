"""What decoders share: embedding, blocks, final norm, head. A pipeline stage is this class with parts deleted.

Absent parts (None, or layers that are not in `layers`) are passed through, and `layers` keeps its global numbers, so a
parameter's name is the same on every layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.data.documents import Documents
from megalm.models.attention import KeyValueCache, Rope
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

    def rope(self, positions: Tensor) -> Rope | None:
        """The angles of the positions (P,), for models that turn their queries and keys."""
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
        documents: Documents | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, S) int64, or hidden (B, S, E) on a later stage -> logits (B, S, V), or hidden on an earlier one.

        positions (S,) int64: the tokens' places in their samples, 0.. if not given; samples (B,) int64 global sample numbers, for
        dropout only. With documents, attention stays inside them, and the model counts positions in them. With labels (B, S),
        a head that can (train/fused_loss.py) returns the sum of their losses instead of logits.
        """
        positions = torch.arange(x.shape[1], device=x.device) if positions is None else positions
        if self.embedding is not None:
            x = self.embedding(x)
            if self.position_embedding is not None:
                x = x + self.position_embedding(positions if documents is None else documents.positions)
            x = self.embedding_dropout(x, samples, positions)
        rope = self.rope(positions if documents is None else torch.arange(documents.seq_length, device=x.device))
        if rope is not None and documents is not None:
            rope = rope._replace(positions=documents.positions)
        for layer in self.layers.values():
            x = layer(x, rope, positions, samples, cache, documents)
        if self.head is not None and self.norm is not None:
            x = self.head(self.norm(x)) if labels is None else self.head(self.norm(x), labels)
        return x
