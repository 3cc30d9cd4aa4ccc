"""`kernels.fused_loss`: the head computes its own loss, so that the logits (B, S, V) never exist all at once.

The loss is computed where the head is called, by its own name: ZeRO-3 gathers the head's weight there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.objectives.cross_entropy import head_loss
from megalm.parallel.actions import Schedule
from megalm.parallel.timeline import losses_in_flight
from megalm.parallel.topology import Group, Topology


def apply_fused_loss(chunks: nn.ModuleList, config: RunConfig, topology: Topology, schedule: Schedule) -> None:
    """Let the head, if it is here, take labels: head(x, labels) is the sum of the losses of the tokens that count."""
    if not config.kernels.fused_loss:
        return
    # Gradients that are made in the forward are as large as the head: not for many microbatches at once. See `head_loss`.
    keep = config.train.precision != "fp16" and losses_in_flight(schedule) == 1
    for chunk in chunks:
        head = chunk.head
        if isinstance(head, nn.Module):
            head.forward = partial(_forward, head, head.forward, topology.tensor, config.model.vocab_size, keep)


def _forward(
    head: nn.Module,
    plain: Callable[[Tensor], Tensor],
    group: Group,
    vocab_size: int,
    keep_gradients: bool,
    x: Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    """x (B, S, E), labels (B, S) int64 -> a scalar; without labels the logits."""
    if labels is None:
        return plain(x)
    weight = head.weight
    assert isinstance(weight, Tensor)
    return head_loss(x.flatten(0, 1), weight, labels.flatten(), group, vocab_size, keep_gradients)
