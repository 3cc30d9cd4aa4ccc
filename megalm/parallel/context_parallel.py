"""Context parallelism: the ranks of a group have parts of the same samples' tokens, and attention sees them all.

Everything else in a model looks at one token at a time and needs no change. Which tokens a rank has depends on the method:

    ring      chunks r and 2n-1-r of 2n (zig-zag): balanced work under a causal mask (ring.py)
    ulysses   the r-th of n runs: heads change places with tokens, so any attention may run in between (ulysses.py)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megalm.parallel.ring import RingAttention
from megalm.parallel.ring_blocks import local_chunks
from megalm.parallel.topology import Topology
from megalm.parallel.ulysses import UlyssesAttention


def local_tokens(method: str, size: int, rank: int, seq_length: int) -> Tensor:
    """The places in a sample of the tokens that a rank has, rising, (S / size,) int64."""
    places = torch.arange(seq_length)
    if size == 1:
        return places
    if method == "ulysses":
        assert seq_length % size == 0, "checked by the configuration"
        return places.chunk(size)[rank]
    assert seq_length % (2 * size) == 0, "checked by the configuration"
    return places.view(2 * size, -1)[list(local_chunks(size, rank))].flatten()


def apply_context_parallel(model: nn.Module, topology: Topology, method: str) -> None:
    """Let the attention of `model` (every module that has an `attend`) see the tokens of the whole context group, in place."""
    group = topology.context
    if group.size == 1:
        return
    for module in model.modules():
        attend: Any = getattr(module, "attend", None)
        if attend is not None:
            ring = method == "ring"
            there = RingAttention(group, attend.window, attend.scale) if ring else UlyssesAttention(group, attend)
            module.attend = there  # type: ignore[assignment]
