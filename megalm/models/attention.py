"""Multi-head self-attention with grouped key/value heads, with or without rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from megalm.data.documents import Documents
from megalm.models.layers import FusesProjections, project_together
from megalm_kernels import flash_attention, rotary


class KeyValueCache(Protocol):
    """What attention needs of a cache when it decodes token by token."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, S_new, Hkv, D) of one layer; return all keys and values so far."""
        ...


class Rope(NamedTuple):
    """Rotary positions: the angles of every position, and each token's position; None: 0, 1, 2 ..."""

    cos: Tensor  # (P, D / 2)
    sin: Tensor
    positions: Tensor | None = None  # (B, S) int64, rows of the angles

    def turn(self, x: Tensor) -> Tensor:
        """x (B, S, H, D), turned."""
        return rotary(x, self.cos, self.sin, positions=self.positions)


class Attend(Protocol):
    """What becomes of queries, keys and values. The run may put one in its place that knows of other ranks' tokens."""

    @property
    def window(self) -> int: ...

    @property
    def scale(self) -> float | None: ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        """q (B, S, H, D), k and v (B, S or more, Hkv, D) -> (B, S, H, D)."""
        ...


@dataclass(frozen=True)
class CausalAttention:
    """Each token sees itself and what comes before it, in its document, where documents are told apart."""

    window: int = 0  # so many tokens before its own; 0: all
    scale: float | None = None  # of the scores; None: 1 / sqrt(D)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None) -> Tensor:
        options: dict[str, Any] = {"window": (self.window or -1, -1), "scale": self.scale}
        if documents is None:
            return flash_attention(q, k, v, **options)
        options |= {"cu_seqlens_q": documents.cu_seqlens, "cu_seqlens_k": documents.cu_seqlens}
        return flash_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **options).view_as(q)


class Attention(FusesProjections):
    """Causal self-attention. The number of heads is read off the local weights, so a slice of them works alone."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, layer: int, bias: bool, window: int = 0
    ):
        super().__init__()
        self.head_dim, self.layer = head_dim, layer
        self.attend: Attend = CausalAttention(window)
        self.q = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.out = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        cache: KeyValueCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x (B, S, E) -> (B, S, E)."""
        projected = project_together(x, (self.q, self.k, self.v), self.fuse)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projected)  # (B, S, H, D)
        if rope is not None:
            q, k = rope.turn(q), rope.turn(k)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        return self.out(self.attend(q, k, v, documents).flatten(2))
