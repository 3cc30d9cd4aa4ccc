"""Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2, section 2.1): keys and values are made from one small vector.

Per token, what a cache must keep is the latent and one key that rotary positions have turned, which all heads share:
kv_latent_size + rope_head_dim numbers, however many heads there are.

    latent, rope key = kv_down(x)
    plain key, value of each head = kv_up(norm(latent));   key of the head = [turned rope key, plain key]
    query of each head = q(x), or q_up(norm(q_down(x)));   its first rope_head_dim channels are turned
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.data.documents import Documents
from megalm.models.attention import Attend, CausalAttention, KeyValueCache, Rope
from megalm.models.layers import FusesProjections, project_together
from megalm_kernels import RMSNorm


class LatentAttention(FusesProjections):
    """Causal self-attention on latents. The number of heads is read off the local weights, so a slice of them works alone."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.head_dim, self.rope_dim, self.value_dim = config.head_dim, config.rope_head_dim, config.value_head_dim
        self.plain_dim, self.layer, self.has_q_latent = config.head_dim - config.rope_head_dim, layer, config.q_latent_size > 0
        self.attend: Attend = CausalAttention(config.window)
        E, heads, q_latent, kv_latent = config.hidden_size, config.num_heads, config.q_latent_size, config.kv_latent_size
        if self.has_q_latent:
            self.q_down = nn.Linear(E, q_latent, bias=False)
            self.q_norm = RMSNorm(q_latent, config.norm_eps)
            self.q_up = nn.Linear(q_latent, heads * self.head_dim, bias=False)
        else:
            self.q = nn.Linear(E, heads * self.head_dim, bias=False)
        self.kv_down = nn.Linear(E, kv_latent + self.rope_dim, bias=False)
        self.kv_norm = RMSNorm(kv_latent, config.norm_eps)
        self.kv_up = nn.Linear(kv_latent, heads * (self.plain_dim + self.value_dim), bias=False)
        self.out = nn.Linear(heads * self.value_dim, E, bias=False)

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        cache: KeyValueCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """x (B, S, E); rope: angles of rope_head_dim channels -> (B, S, E)."""
        assert rope is not None, "latent attention turns a part of each head"
        q, down = project_together(x, (self.q_down if self.has_q_latent else self.q, self.kv_down), self.fuse)
        if self.has_q_latent:
            q = self.q_up(self.q_norm(q))
        latent, shared = down.split([down.shape[-1] - self.rope_dim, self.rope_dim], -1)
        latent, shared = self.kv_norm(latent), rope.turn(shared.unsqueeze(2))  # (B, S, L) and (B, S, 1, R)
        if cache is not None:  # the small ones: the heads' keys and values are made of them again at every step
            latent, shared = cache.extend(self.layer, latent, shared)
        k, v = self.expand(latent, shared)
        y = self.attend(rope.turn(q.unflatten(-1, (-1, self.head_dim))), k, v, documents)
        return self.out(y[..., : self.value_dim].flatten(2))

    def expand(self, latent: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, H, D) of this rank's heads. Values end in zeros: kernels want them as wide as keys."""
        heads = self.kv_up(latent).unflatten(-1, (-1, self.plain_dim + self.value_dim))
        plain, v = heads.split([self.plain_dim, self.value_dim], -1)
        k = torch.cat([shared.expand(-1, -1, plain.shape[2], -1), plain], -1)
        return k, F.pad(v, (0, self.head_dim - self.value_dim))
