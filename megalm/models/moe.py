"""Mixture of experts: a block's MLP made of many, of which each token uses k (Shazeer et al. 2017; Fedus et al. 2021).

    y_t = sum over the k experts e of token t: w_te down_e(silu(gate_e x_t) * up_e x_t)   [+ the shared experts' MLP of x_t]

The way of a token's k slots: sorted by expert (`dispatch`), so that an expert's rows lie together and one grouped product serves
all experts; through the experts, which other ranks may have (`exchange`); back to their token and summed with the weights
(`combine`). Both ends are permutations, and their backwards are written as what they are, gathers in a fixed order: torch's own
would add up rows with atomics, in another order each time.

The module knows nothing of other ranks. Expert parallelism sets `exchange`, tensor parallelism `leave`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.models.layers import SwigluMLP
from megalm.models.router import Router, count
from megalm_kernels import grouped_linear, swiglu


class Experts(nn.Module):
    """SwiGLU experts. x (R, E) are the rows of the first, then those of the second ...; counts (N,) int64 of them -> (R, E)."""

    def __init__(self, number: int, size: int, inner: int):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(number, inner, size))
        self.up = nn.Parameter(torch.empty(number, inner, size))
        self.down = nn.Parameter(torch.empty(number, size, inner))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        starts = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        inner = swiglu(grouped_linear(x, self.gate, starts), grouped_linear(x, self.up, starts))
        return grouped_linear(inner, self.down, starts)


class Exchange(Protocol):
    """Brings rows to their experts and back. rows (R, E) sorted by expert, counts (N,) int64 of them -> (R, E)."""

    def __call__(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor: ...


class MoE(nn.Module):
    """A router, its experts, and the shared ones that every token goes to besides. x (B, S, E) -> (B, S, E)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config.num_experts, config.hidden_size, config.expert_ffn_size)
        shared = config.num_shared_experts * config.expert_ffn_size
        self.shared = SwigluMLP(config.hidden_size, shared) if shared else None
        self.exchange: Exchange = all_here
        self.leave: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.router(x)
        drops = self.training and self.router.config.capacity_factor > 0
        way = Way(chosen, self.router.num_experts, drops)
        y = self.exchange(self.experts, dispatch(x.flatten(0, -2), way), way.counts)
        y = combine(y, weights, way).view_as(x)
        return self.leave(y if self.shared is None else y + self.shared(x))


class Way:
    """Which slot goes where. A slot is token t's choice j, number t k + j; its row is its place in the order of the experts."""

    def __init__(self, chosen: Tensor, num_experts: int, drops: bool):
        """chosen (T, k) int64: experts, or num_experts for a dropped slot, which has no row; only where `drops`."""
        flat, k = chosen.flatten(), chosen.shape[1]
        order = flat.argsort(stable=True)
        self.counts = count(flat, num_experts)  # (N,) rows of each expert
        self.rows = torch.empty_like(flat)  # (T k,) of each slot
        self.rows[order] = torch.arange(flat.numel(), device=flat.device)
        self.drops = drops
        if drops:
            kept = int(self.counts.sum())  # sync
            order = order[:kept]  # dropped slots are sorted behind all experts
            self.rows.clamp_(max=kept)
        self.rows = self.rows.view_as(chosen)
        self.slots, self.tokens = order, order // k  # (R,) of each row

    def sum_of(self, rows: Tensor, weights: Tensor | None = None) -> Tensor:
        """For each token the sum of its rows, times weights (T, k). rows (R, E) -> (T, E)."""
        if self.drops:
            rows = F.pad(rows, (0, 0, 0, 1))  # a row of zeros for the slots that have none
        weights = None if weights is None else weights.to(rows.dtype)
        return F.embedding_bag(self.rows, rows, mode="sum", per_sample_weights=weights)


def dispatch(x: Tensor, way: Way) -> Tensor:
    """Every row's token. x (T, E) -> (R, E)."""
    return _Dispatch.apply(x, way)


def combine(rows: Tensor, weights: Tensor, way: Way) -> Tensor:
    """Each token's rows, weighted and summed. rows (R, E), weights (T, k) -> (T, E)."""
    return _Combine.apply(rows, weights, way)


def all_here(experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
    """The exchange of a rank that has all experts."""
    return experts(rows, counts)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, way: Way) -> Tensor:
        ctx.way = way
        return x.index_select(0, way.tokens)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.way.sum_of(gradient), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, way: Way) -> Tensor:
        ctx.save_for_backward(rows, weights)
        ctx.way = way
        return way.sum_of(rows, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        rows, weights = ctx.saved_tensors
        way, arrived = ctx.way, gradient.index_select(0, ctx.way.tokens)  # (R, E)
        of_rows = (rows * arrived).sum(-1, dtype=weights.dtype)
        of_weights = (F.pad(of_rows, (0, 1)) if way.drops else of_rows)[way.rows]
        return arrived * weights.flatten()[way.slots].unsqueeze(-1).to(rows.dtype), of_weights, None
