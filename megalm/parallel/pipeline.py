"""Run a schedule on one rank: compute, exchange with the neighbouring stages, compute.

The executor knows nothing of models and losses: `forward(stage, microbatch, hidden)` does the work and returns what the
next stage needs, or the loss on the last one. One executor runs every schedule, also that of a single rank.

What crosses a boundary is a tensor or several (an encoder's output that travels along with a decoder's hidden state), of
shapes that may differ from microbatch to microbatch: `boundary(stage, microbatch)` says what a stage hands on. Gradients
travel back for those of floating point.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from megalm.parallel.actions import BACKWARD, FORWARD, INPUT, WEIGHT, Action, Exchange, Schedule, Transfer
from megalm.parallel.engine import Engine
from megalm.parallel.schedule_check import check_schedule
from megalm.parallel.topology import Group
from megalm.parallel.weight_gradients import Waiting, WeightGradients, compute

Hidden = Tensor | tuple[Tensor, ...]
Forward = Callable[[int, int, Hidden | None], Hidden]


class Spec(NamedTuple):
    """Shape and dtype of one tensor at a boundary."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Boundary = Callable[[int, int], Sequence[Spec]]


class _Pending(NamedTuple):
    """Tensors in flight and the works that must finish before they may be used (received) or freed (sent)."""

    tensors: list[Tensor]
    works: list[Any]


class Timed(NamedTuple):
    """One action as it ran; seconds of a clock that all ranks of a machine share."""

    kind: str
    stage: int
    microbatch: int
    start: float
    end: float


# Older ones are waited for, which frees their tensors (gloo's works never complete by themselves). That cannot deadlock:
# the schedule has been checked to run even if every exchange waits for its own sends.
_SENDS_KEPT = 4


def _nothing() -> None:
    pass


class PipelineExecutor:
    """Runs this rank's part of a schedule."""

    def __init__(
        self,
        schedule: Schedule,
        group: Group,
        boundary: Boundary,
        device: torch.device,
        weight_gradients: WeightGradients | None = None,
    ):
        self.schedule, self.group, self.boundary, self.device = schedule, group, boundary, device
        self.steps = check_schedule(schedule)[group.rank]
        self.weight_gradients = weight_gradients or WeightGradients()
        self.before_backward = self.after_backward = _nothing
        self.record: list[Timed] | None = None  # a list: every action's times are added
        self._run = {FORWARD: self._forward, BACKWARD: self._backward, INPUT: self._input_backward, WEIGHT: self._weights}

    def serve(self, engine: Engine) -> None:
        """Tell the engine of every backward."""
        self.before_backward, self.after_backward = engine.before_backward, engine.after_backward

    def run(self, forward: Forward) -> list[Tensor]:
        """Run all actions; gradients are left on the parameters. Returns the last stage's outputs in order of microbatch."""
        self._compute = forward
        self._inputs: dict[tuple[int, int], list[Tensor]] = {}
        self._roots: dict[tuple[int, int], list[GradientEdge | None]] = {}
        self._waiting: dict[tuple[int, int], Waiting] = {}
        self._ready: dict[Transfer, list[Tensor]] = {}  # computed here, to be sent or used by another chunk of this rank
        self._received: dict[Transfer, _Pending] = {}
        self._sent: deque[_Pending] = deque()
        self._losses: dict[int, Tensor] = {}
        for step in self.steps:
            if isinstance(step, Exchange):
                self._exchange(step)
            elif self.record is None:
                self._run[step.kind](step)
            else:
                self._timed(step)
        for pending in self._sent:
            _wait(pending)
        assert not (self._roots or self._waiting or self._ready or self._received), "every result of a schedule is used"
        return [self._losses[m] for m in sorted(self._losses)]

    def _forward(self, action: Action) -> None:
        hidden, keeps = self._take_input(action), torch.is_grad_enabled()
        if keeps:
            hidden = [x.detach().requires_grad_() if x.is_floating_point() else x for x in hidden]
        given = (hidden[0] if len(hidden) == 1 else tuple(hidden)) if hidden else None
        output = self._compute(action.stage, action.microbatch, given)
        outputs = [output] if isinstance(output, Tensor) else list(output)
        handed_on = self.schedule.output_of(action)
        if handed_on is None:
            self._losses[action.microbatch] = outputs[0].detach()
        else:
            self._ready[handed_on] = [x.detach() for x in outputs]
        if keeps:  # the graph's ends, not the outputs: those are the next stage's, and free once they are sent
            self._inputs[action.stage, action.microbatch] = hidden
            floating = [x for x in outputs if x.is_floating_point()]
            self._roots[action.stage, action.microbatch] = [get_gradient_edge(x) if x.requires_grad else None for x in floating]

    def _backward(self, action: Action) -> None:
        key = action.stage, action.microbatch
        roots, hidden = self._roots.pop(key), self._inputs.pop(key)
        incoming: list[Tensor | None] = [None]  # of the loss
        if self.schedule.input_of(action) is not None:
            incoming = [*self._take_input(action)]
        pairs = [(root, gradient) for root, gradient in zip(roots, incoming, strict=True) if root is not None]
        self.before_backward()
        if pairs:
            torch.autograd.backward([root for root, _ in pairs], [gradient for _, gradient in pairs])
        self.weight_gradients.run_behind_collective()
        self.after_backward()
        handed_on = self.schedule.output_of(action)
        if handed_on is not None:
            floating = [x for x in hidden if x.is_floating_point()]
            self._ready[handed_on] = [torch.zeros_like(x) if x.grad is None else x.grad for x in floating]

    def _input_backward(self, action: Action) -> None:
        """The backward without the gradients of the matrices, which wait for their own action."""
        self.weight_gradients.hold()
        self._backward(action)
        self._waiting[action.stage, action.microbatch] = self.weight_gradients.take()

    def _weights(self, action: Action) -> None:
        compute(self._waiting.pop((action.stage, action.microbatch)))

    def _timed(self, action: Action) -> None:
        assert self.record is not None
        needed = self.schedule.input_of(action)
        if needed in self._received:  # waiting for it is not computing
            self._received[needed] = _Pending(_wait(self._received[needed]), [])
        start = self._now()
        self._run[action.kind](action)
        self.record.append(Timed(*action, start, self._now()))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # sync
        return time.monotonic()

    def _take_input(self, action: Action) -> list[Tensor]:
        """What the neighbouring stage handed over; nothing at the ends of the model."""
        transfer = self.schedule.input_of(action)
        if transfer is None:
            return []
        if transfer in self._received:
            return _wait(self._received.pop(transfer))
        return self._ready.pop(transfer)

    def _exchange(self, exchange: Exchange) -> None:
        """Post all sends and receives of one moment together; only sends that are long on their way are waited for."""
        operations, moved = [], []
        for transfer in exchange.transfers:
            sends = self.schedule.rank_of(transfer.source) == self.group.rank
            other = self.group.ranks[self.schedule.rank_of(transfer.target if sends else transfer.source)]
            tensors = [x.contiguous() for x in self._ready.pop(transfer)] if sends else self._empty(transfer)
            moved.append((transfer, sends, tensors))
            operations += [dist.P2POp(dist.isend if sends else dist.irecv, x, other, self.group.handle) for x in tensors]
        works = dist.batch_isend_irecv(operations)
        one_each, at = len(works) == len(operations), 0  # gloo returns a work per operation, NCCL one for all
        for transfer, sends, tensors in moved:
            pending = _Pending(tensors, works[at : at + len(tensors)] if one_each else works)
            at += len(tensors)
            if sends:
                self._sent.append(pending)
            else:
                self._received[transfer] = pending
        while len(self._sent) > _SENDS_KEPT:
            _wait(self._sent.popleft())

    def _empty(self, transfer: Transfer) -> list[Tensor]:
        """Where to receive a transfer: what its activation's source hands on, or gradients of that."""
        stage = transfer.source if transfer.kind == FORWARD else transfer.target
        specs = self.boundary(stage, transfer.microbatch)
        wanted = [s for s in specs if transfer.kind == FORWARD or s.dtype.is_floating_point]
        return [torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for spec in wanted]


def _wait(pending: _Pending) -> list[Tensor]:
    for work in pending.works:
        work.wait()
    return pending.tensors
