"""From logits to a token: greedy, temperature, top-k, top-p (nucleus, Holtzman et al. 2020)."""

from __future__ import annotations

import torch
from torch import Tensor


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits of the tokens that may be drawn; -inf for the others. logits (B, V); the likeliest token always stays."""
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        kept = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, True)
        logits = logits.masked_fill(~kept, -torch.inf)  # exactly k, also where logits are equal
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # probability of all likelier tokens
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def draw_token(
    logits: Tensor, greedy: bool, temperature: float, top_k: int, top_p: float, generator: torch.Generator
) -> Tensor:
    """One token per row. logits (B, V) -> (B,) int64."""
    if greedy:
        return logits.argmax(-1)
    probabilities = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
