"""One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn

from megalm.data.documents import Documents
from megalm.models.attention import Attention, KeyValueCache, Rope
from megalm.models.latent_attention import LatentAttention
from megalm.models.layers import Dropout


class Block(nn.Module):
    """Pre-norm block made of the four parts it is given."""

    def __init__(
        self,
        attention_norm: nn.Module,
        attention: Attention | LatentAttention,
        mlp_norm: nn.Module,
        mlp: nn.Module,
        dropout: float,
    ):
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.attention_dropout = Dropout(dropout, site=2 * attention.layer + 1)
        self.mlp_dropout = Dropout(dropout, site=2 * attention.layer + 2)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        positions: Tensor,
        samples: Tensor | None,
        cache: KeyValueCache | None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        seen = self.attention(self.attention_norm(x), rope, cache, documents)
        x = x + self.attention_dropout(seen, samples, positions)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), samples, positions)
