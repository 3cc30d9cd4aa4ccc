"""All-to-all attention: a rank gives its tokens of other ranks' heads away, and gets all tokens of its own (Jacobs et al. 2023).

Between the two exchanges attention is that of one rank with fewer heads, whatever it does.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megalm.parallel.collectives import all_to_all
from megalm.parallel.topology import Group


class Attend(Protocol):
    """Attention of one rank."""

    window: int
    scale: float | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Any) -> Tensor: ...


class UlyssesAttention:
    """`attend` on whole samples with some of the heads. A rank has the r-th of n runs of a sample's tokens."""

    def __init__(self, group: Group, attend: Attend):
        self.group, self.attend = group, attend
        self.window, self.scale = attend.window, attend.scale

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, documents: Any = None) -> Tensor:
        """q (B, S / n, H, D), k and v (B, S / n, Hkv, D) -> (B, S / n, H, D). H divides by n; Hkv does, or divides n."""
        size = self.group.size
        copies = max(1, size // k.shape[2])  # ranks that share a head of keys and values
        k, v = (x.repeat_interleave(copies, 2) if copies > 1 else x for x in (k, v))
        heads = [x.shape[2] // size for x in (q, k, v)]
        assert all(x.shape[2] % size == 0 for x in (q, k, v)), "checked by the configuration"
        packed = torch.cat([x.unflatten(2, (size, -1)).movedim(2, 0) for x in (q, k, v)], 3)  # (n, B, S', heads of all, D)
        whole = self._turn(packed).movedim(0, 1).flatten(1, 2)  # (B, S, heads, D)
        q, k, v = whole.split(heads, 2)
        y = self.attend(q, k, v, documents)
        return self._turn(y.unflatten(1, (size, -1)).movedim(1, 0)).movedim(0, 2).flatten(2, 3)

    def _turn(self, x: Tensor) -> Tensor:
        """x (n, ...): x[i] goes to rank i, what comes from rank i becomes [i]."""
        return all_to_all(x, self.group)
