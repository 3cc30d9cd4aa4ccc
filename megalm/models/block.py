"""One transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

from __future__ import annotations

from torch import Tensor, nn

from megalm.models.attention import Attention, KeyValueCache
from megalm.models.layers import Dropout


class Block(nn.Module):
    """Pre-norm block made of the four parts it is given."""

    def __init__(
        self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: nn.Module, dropout: float
    ):
        super().__init__()
        self.attention_norm, self.attention = attention_norm, attention
        self.mlp_norm, self.mlp = mlp_norm, mlp
        self.attention_dropout = Dropout(dropout, site=2 * attention.layer + 1)
        self.mlp_dropout = Dropout(dropout, site=2 * attention.layer + 2)

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        positions: Tensor,
        samples: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        x = x + self.attention_dropout(self.attention(self.attention_norm(x), rope, cache), samples, positions)
        return x + self.mlp_dropout(self.mlp(self.mlp_norm(x)), samples, positions)
