"""The router of a mixture of experts: which experts a token goes to, with what weights, and what keeps their loads even.

    scores   softmax (Shazeer et al. 2017) or sigmoid (DeepSeek-V3) of x W^T, in fp32
    choice   the k experts with the largest score + balance; of equals the lower number
    weights  the scores of the choice, without `balance`; divided by their sum if `normalize`; times `scale`

Three things keep the loads even. The auxiliary loss N sum_e f_e P_e (Fedus et al. 2021), where f_e is expert e's share of the
microbatch's slots (a slot is one of a token's k choices) and P_e its mean probability: 1 when both are even. The z-loss, the mean
of logsumexp(logits)^2 (Zoph et al. 2022). And the biases `balance` (Wang et al. 2024), moved after each step against the loads.

The losses have no number of their own in the forward: where the weights pass, an autograd function adds their gradient, so they
work on any pipeline stage, and the loss that a run reports is the language model's alone. What a microbatch adds to `tally` is
added there too: a forward that recomputation repeats has no backward of its own, so nothing counts twice.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.config.model import ModelConfig

DROPPED, ENTROPY, TOKENS, AUX, Z = range(5)  # what stands behind the N loads in a tally
TALLIED = 5


class Microbatch(Protocol):
    """The whole microbatch, of which other ranks may have tokens too."""

    size: int  # ranks that share it

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """What all ranks have, in the order of the sample: (B, S / size, ...) -> (B, S, ...)."""
        ...

    def local(self, whole: Tensor) -> Tensor:
        """The inverse: this rank's part."""
        ...


class WholeMicrobatch:
    """All of it is here."""

    size = 1

    def total(self, x: Tensor) -> Tensor:
        return x

    def gather(self, x: Tensor) -> Tensor:
        return x

    def local(self, whole: Tensor) -> Tensor:
        return whole


class Router(nn.Module):
    """x (B, S, E) -> experts (T, k) int64, N where the slot is dropped, and weights (T, k) fp32, with T = B S.

    `loss_scale` is what the losses of one microbatch are multiplied by in the gradient; the run sets it for every step.
    """

    balance: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.num_experts = config, config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("balance", torch.zeros(config.num_experts))
        self.microbatch: Microbatch = WholeMicrobatch()
        self.loss_scale: Tensor | float = 0.0
        self.watched = False  # whether the tally has the entropy and the losses, which cost a little
        self.tally: Tensor | None = None  # (N + TALLIED,) fp64: sums over the microbatches since it was taken

    def _apply(self, fn: Any, recurse: bool = True) -> Router:
        """Casts do not reach the biases: a step of 0.001 is lost in bf16."""
        balance = self.balance
        super()._apply(fn, recurse)
        self.balance = self.balance.float() if balance.is_meta else balance.to(self.balance.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c, wide = self.config, torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide)).flatten(0, -2)  # (T, N)
        scores = logits.softmax(-1) if c.router_score == "softmax" else logits.sigmoid()
        experts = choose(scores.detach() + self.balance, c.experts_per_token)
        weights = scores.gather(1, experts)
        if c.router_normalize:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        weights = weights * c.router_scale
        if not self.training:
            return experts, weights
        kept = self.drop(experts, x.shape[:-1]) if c.capacity_factor else experts
        loss, tally = self._judge(logits, scores, experts, kept)
        return kept, _Attach.apply(weights, loss, tally, self)

    def drop(self, experts: Tensor, shape: torch.Size) -> Tensor:
        """Mark with N the slots beyond the experts' capacity, which the first tokens of the whole microbatch fill.

        experts (T, k), of tokens in `shape` (B, S). Capacity: ceil(capacity_factor x slots / N) tokens.
        """
        whole = self.microbatch.gather(experts.view(*shape, -1))
        slots, number = whole.flatten(), self.num_experts
        capacity = math.ceil(self.config.capacity_factor * slots.numel() / number)
        order = slots.argsort(stable=True)
        loads = count(slots, number)
        place = torch.empty_like(slots)  # among its expert's
        place[order] = torch.arange(slots.numel(), device=slots.device) - (loads.cumsum(0) - loads)[slots[order]]
        fits = slots.masked_fill(place >= capacity, number)
        return self.microbatch.local(fits.view_as(whole)).reshape(experts.shape)

    def _judge(self, logits: Tensor, scores: Tensor, experts: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        """The losses times their coefficients, and what the microbatch adds to the tally: of this rank's tokens only.

        Over the ranks that share the microbatch both add up to the whole.
        """
        c, number = self.config, self.num_experts
        loads = count(experts, number)
        aux = z = entropy = scores.new_zeros(())
        if self.watched or c.router_aux_loss or c.router_z_loss:
            tokens = len(scores) * self.microbatch.size
            probabilities = scores if c.router_score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
            shares = self.microbatch.total(loads).to(scores.dtype) / (tokens * c.experts_per_token)
            aux = number * (shares * probabilities.sum(0)).sum() / tokens
            z = logits.logsumexp(-1).square().sum() / tokens
            entropy = torch.special.entr(probabilities.detach()).sum() if self.watched else entropy
        dropped = (kept == number).sum()
        sums = torch.stack([dropped.to(scores.dtype), entropy, scores.new_full((), len(scores)), aux.detach(), z.detach()])
        return c.router_aux_loss * aux + c.router_z_loss * z, torch.cat([loads.double(), sums.double()])

    def take_tally(self) -> Tensor:
        """The sums since the last time, (N + TALLIED,) fp64: loads, then DROPPED, ENTROPY, TOKENS, AUX and Z."""
        tally, self.tally = self.tally, None
        return self.balance.new_zeros(self.num_experts + TALLIED, dtype=torch.float64) if tally is None else tally

    @torch.no_grad()
    def update_balance(self, loads: Tensor) -> None:
        """Move each expert's bias by `router_balance_rate`: up where its load (N,) is below the mean, down where above."""
        self.balance += self.config.router_balance_rate * torch.sign(loads.mean() - loads).to(self.balance.dtype)


def routers_of(chunks: nn.ModuleList) -> dict[int, Router]:
    """The routers of a model's parts, by their layers' numbers."""
    named = [item for chunk in chunks for item in chunk.named_modules()]
    return {int(name.split(".")[1]): module for name, module in named if isinstance(module, Router)}


def choose(scores: Tensor, k: int) -> Tensor:
    """The columns of the k largest numbers of each row, the largest first; of equals the lower column, unlike in torch.topk.

    scores (T, N), which are overwritten -> (T, k) int64.
    """
    chosen = []
    for _ in range(k):
        best = scores.argmax(-1, keepdim=True)
        scores.scatter_(1, best, -math.inf)
        chosen.append(best)
    return torch.cat(chosen, -1)


def count(experts: Tensor, number: int) -> Tensor:
    """How often each of 0 .. number - 1 is there -> (number,) int64. Unlike torch.bincount it does not stop the host."""
    flat = experts.flatten()
    return torch.zeros(number + 1, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))[:number]


class _Attach(torch.autograd.Function):
    """The weights as they are; their backward is where the losses' gradient begins, and where a microbatch is counted."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, loss: Tensor, tally: Tensor, router: Router) -> Tensor:
        ctx.router, ctx.tally, ctx.dtype = router, tally, loss.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        router = ctx.router
        router.tally = ctx.tally if router.tally is None else router.tally + ctx.tally
        scale = torch.as_tensor(router.loss_scale, dtype=ctx.dtype, device=gradient.device)
        return gradient, scale, None, None
