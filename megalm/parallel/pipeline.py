"""Run a schedule on one rank: compute, exchange with the neighbouring stages, compute.

The executor knows nothing of models and losses: `forward(stage, microbatch, hidden)` does the work and returns what the
next stage needs, or the loss on the last one. One executor runs every schedule, also that of a single rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.parallel.schedules import FORWARD, Action, Exchange, Schedule, Transfer, with_communication
from megalm.parallel.topology import Group

Forward = Callable[[int, int, Tensor | None], Tensor]


class _Pending(NamedTuple):
    """A tensor in flight and the works that must finish before it may be used (received) or freed (sent)."""

    tensor: Tensor
    works: list[Any]


class PipelineExecutor:
    """Runs this rank's part of a schedule. hidden_shape and dtype are those of the activation between two stages."""

    def __init__(
        self, schedule: Schedule, group: Group, hidden_shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ):
        self.schedule, self.group = schedule, group
        self.steps = with_communication(schedule)[group.rank]
        self.hidden_shape, self.dtype, self.device = tuple(hidden_shape), dtype, device

    def run(self, forward: Forward) -> list[Tensor]:
        """Run all actions; gradients are left on the parameters. Returns the last stage's outputs in order of microbatch."""
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._ready: dict[Transfer, Tensor] = {}  # computed here, to be sent or used by another chunk of this rank
        self._received: dict[Transfer, _Pending] = {}
        self._sent: list[_Pending] = []
        losses: dict[int, Tensor] = {}
        for step in self.steps:
            if isinstance(step, Exchange):
                self._exchange(step)
            elif step.kind == FORWARD:
                self._forward(step, forward, losses)
            else:
                self._backward(step)
        for pending in self._sent:
            _wait(pending)
        return [losses[m] for m in sorted(losses)]

    def _forward(self, action: Action, forward: Forward, losses: dict[int, Tensor]) -> None:
        hidden = self._take_input(action)
        if hidden is not None and torch.is_grad_enabled():
            hidden = hidden.detach().requires_grad_()
        output = forward(action.stage, action.microbatch, hidden)
        handed_on = self.schedule.output_of(action)
        if handed_on is None:
            losses[action.microbatch] = output.detach()
        else:
            self._ready[handed_on] = output.detach()
        if torch.is_grad_enabled():
            self._inputs[action.stage, action.microbatch] = hidden
            self._outputs[action.stage, action.microbatch] = output

    def _backward(self, action: Action) -> None:
        key = action.stage, action.microbatch
        output, hidden = self._outputs.pop(key), self._inputs.pop(key)
        torch.autograd.backward(output, self._take_input(action))
        handed_on = self.schedule.output_of(action)
        if handed_on is not None:
            assert hidden is not None and hidden.grad is not None
            self._ready[handed_on] = hidden.grad

    def _take_input(self, action: Action) -> Tensor | None:
        """What the neighbouring stage handed over; None at the ends of the model."""
        transfer = self.schedule.input_of(action)
        if transfer is None:
            return None
        if transfer in self._received:
            return _wait(self._received.pop(transfer))
        return self._ready.pop(transfer)

    def _exchange(self, exchange: Exchange) -> None:
        """Post all sends and receives of one moment together; nothing waits here."""
        operations, tensors = [], []
        for transfer in exchange.transfers:
            sends = self.schedule.rank_of(transfer.source) == self.group.rank
            other = self.group.ranks[self.schedule.rank_of(transfer.target if sends else transfer.source)]
            tensor = self._ready.pop(transfer).contiguous() if sends else self._empty()
            tensors.append(tensor)
            operations.append(dist.P2POp(dist.isend if sends else dist.irecv, tensor, other, self.group.handle))
        works = dist.batch_isend_irecv(operations)
        for i, (transfer, tensor) in enumerate(zip(exchange.transfers, tensors, strict=True)):
            pending = _Pending(tensor, [works[i]] if len(works) == len(tensors) else works)
            if self.schedule.rank_of(transfer.source) == self.group.rank:
                self._sent.append(pending)
            else:
                self._received[transfer] = pending
        self._sent = [p for p in self._sent if not all(work.is_completed() for work in p.works)]

    def _empty(self) -> Tensor:
        return torch.empty(self.hidden_shape, dtype=self.dtype, device=self.device)


def _wait(pending: _Pending) -> Tensor:
    for work in pending.works:
        work.wait()
    return pending.tensor
