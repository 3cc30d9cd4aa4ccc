"""Multi-head self-attention with grouped key/value heads, with or without rotary positions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from megalm.models.layers import FusesProjections, project_together
from megalm_kernels import flash_attention, rotary


class KeyValueCache(Protocol):
    """What attention needs of a cache when it decodes token by token."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, S_new, Hkv, D) of one layer; return all keys and values so far."""
        ...


class Attention(FusesProjections):
    """Causal self-attention. The number of heads is read off the local weights, so a slice of them works alone."""

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, layer: int, bias: bool):
        super().__init__()
        self.head_dim, self.layer = head_dim, layer
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KeyValueCache | None = None) -> Tensor:
        """x (B, S, E); rope: cos and sin (S, D/2) -> (B, S, E)."""
        projected = project_together(x, (self.q, self.k, self.v), self.fuse)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)  # (B, S, H, D)
        if rope is not None:
            q, k = rotary(q, *rope), rotary(k, *rope)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.out(flash_attention(q, k, v).flatten(2))
