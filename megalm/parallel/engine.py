"""The engine: what stands between the gradients of the microbatches and the new weights.

    with engine.accumulate():      any number of forwards and backwards, in any order
        ...                        on leaving: gradients are reduced
    grad_norm = engine.step(lr)    clip by the global norm, update

and views of full parameters and moments for the checkpoint. Two implementations, which `megalm parity` compares:
`PlainEngine` here (zero: 0, all-reduce and AdamW on flat fp32 buffers, no DeepSpeed) and `ZeroEngine` in zero.py.

Contract for the loss: each rank back-propagates `engine.scale_loss(sum over its tokens / global number of tokens)`; the
engine sums over data parallel ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.parallel.collectives import all_reduce
from megalm.parallel.tensor_parallel import shard_of
from megalm.parallel.topology import Topology

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
MakeOptimizer = Callable[[list[dict]], torch.optim.Optimizer]


@dataclass
class ParameterGroup:
    """Parameters that share a weight decay, by name."""

    parameters: dict[str, nn.Parameter]
    weight_decay: float


@dataclass(frozen=True)
class Tie:
    """This rank's end of an embedding that the first and the last pipeline stage share."""

    name: str  # the parameter here
    original: str  # its name on the first stage, under which it is drawn, counted and saved


class Engine(ABC):
    """Gradients in, weights out."""

    def __init__(self, groups: list[ParameterGroup], topology: Topology, tie: Tie | None):
        self.groups, self.topology = groups, topology
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}  # local; ZeRO-3 empties p.shape
        self.tie = tie
        self.steps_done = 0

    @contextmanager
    @abstractmethod
    def accumulate(self) -> Iterator[None]:
        """Scope of one optimizer step's forwards and backwards; on leaving, gradients are reduced."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip and update with the reduced gradients; returns the global gradient norm before clipping, a scalar."""

    @abstractmethod
    def scale_loss(self, loss: Tensor) -> Tensor:
        """What to back-propagate in place of the loss."""

    @abstractmethod
    def read(self, name: str, kind: str) -> Tensor:
        """fp32 master weight (`weight`) or moment of this rank's tensor parallel slice. Collective over data parallel."""

    @abstractmethod
    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Set what `read` reads; call `finish_load` after the last one."""

    @abstractmethod
    def finish_load(self) -> None:
        """Bring the weights of the forward in line with what was written."""

    @abstractmethod
    def prepare_load(self, steps_done: int) -> None:
        """Make room for moments of an optimizer that has done `steps_done` steps; call before the first `write`."""

    def saved_name(self, name: str) -> str:
        """The name under which a checkpoint knows a parameter of this rank."""
        return self.tie.original if self.tie is not None and name == self.tie.name else name

    def counts_in_norm(self, name: str) -> bool:
        """Whether this rank's slice enters the global norm: every element of the model must, exactly once."""
        if self.saved_name(name) != name:
            return False
        return shard_of(self.parameters[name]).dim is not None or self.topology.tensor.is_first

    def _reduce_model_parallel(self) -> None:
        """Complete gradients that arise in parts within one copy of the model: sequence slices and tied embeddings."""
        partial = [p.grad for p in self.parameters.values() if shard_of(p).sequence_partial and p.grad is not None]
        if partial:
            flat = torch.cat([g.flatten() for g in partial])
            all_reduce(flat, self.topology.tensor)
            torch._foreach_copy_(
                partial, [x.view_as(g) for x, g in zip(flat.split([g.numel() for g in partial]), partial, strict=True)]
            )
        if self.tie is not None:
            gradient = self.parameters[self.tie.name].grad
            assert gradient is not None
            all_reduce(gradient, self.topology.embedding)


class PlainEngine(Engine):
    """Data parallel of our own: per group one flat fp32 buffer of weights and one of gradients.

    In fp32 the parameters are views of the flat weights. In bf16 the flat weights are the master copy, and `.grad` is fp32
    (torch's `grad_dtype`), so accumulation and reduction are fp32 too.
    """

    def __init__(
        self,
        groups: list[ParameterGroup],
        make_optimizer: MakeOptimizer,
        topology: Topology,
        clip: float,
        tie: Tie | None = None,
    ):
        super().__init__(groups, topology, tie)
        self.clip = clip
        self.flat_weights = [_flatten(g.parameters.values()) for g in groups]
        self.flat_gradients = [torch.zeros_like(flat) for flat in self.flat_weights]
        self.weights = self._views(self.flat_weights)
        self.gradients = self._views(self.flat_gradients)
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                parameter.data = self.weights[name]
            else:
                parameter.grad_dtype = torch.float32
        self._moment_views: dict[str, dict[str, Tensor]] = {}
        self.masters = [nn.Parameter(flat) for flat in self.flat_weights]
        self.optimizer = make_optimizer(
            [{"params": [m], "weight_decay": g.weight_decay} for m, g in zip(self.masters, groups, strict=True)]
        )

    def _views(self, flats: list[Tensor]) -> dict[str, Tensor]:
        """The flat buffers cut into the parameters' shapes, by name."""
        views = {}
        for group, flat in zip(self.groups, flats, strict=True):
            sizes = [p.numel() for p in group.parameters.values()]
            for (name, parameter), part in zip(group.parameters.items(), flat.split(sizes), strict=True):
                views[name] = part.view(parameter.shape)
        return views

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        for flat in self.flat_gradients:
            flat.zero_()
        for name, parameter in self.parameters.items():
            parameter.grad = self.gradients[name]
        yield
        self._reduce_model_parallel()
        for flat in self.flat_gradients:
            all_reduce(flat, self.topology.data)

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        norm = self._global_norm()
        if self.clip > 0:
            scale = torch.clamp(self.clip / (norm + 1e-6), max=1.0)
            for flat in self.flat_gradients:
                flat.mul_(scale)
        for master, flat, group in zip(self.masters, self.flat_gradients, self.optimizer.param_groups, strict=True):
            master.grad, group["lr"] = flat, lr
        self.optimizer.step()
        self.steps_done += 1
        self.finish_load()
        return norm

    def _global_norm(self) -> Tensor:
        """L2 norm over every element of the model, each counted once."""
        counted = [g for name, g in self.gradients.items() if self.counts_in_norm(name)]
        squares = (
            torch.stack(torch._foreach_norm(counted)).double().square().sum()
            if counted
            else torch.zeros((), dtype=torch.float64)
        )
        return all_reduce(squares.to(self.topology.device), self.topology.model).sqrt().float()

    def read(self, name: str, kind: str) -> Tensor:
        return self.weights[name].detach() if kind == WEIGHT else self._moments(kind)[name]

    def write(self, name: str, kind: str, value: Tensor) -> None:
        (self.weights[name].data if kind == WEIGHT else self._moments(kind)[name]).copy_(value)

    def prepare_load(self, steps_done: int) -> None:
        self.steps_done = steps_done
        self._moment_views.clear()
        for master in self.masters:
            self.optimizer.state[master] = initial_state(master, steps_done)

    def finish_load(self) -> None:
        """fp32 parameters are views of the master weights already; lower precision ones are rounded from them."""
        low = [(p.data, self.weights[name].data) for name, p in self.parameters.items() if p.dtype != torch.float32]
        if low:
            torch._foreach_copy_([p for p, _ in low], [w for _, w in low])

    def _moments(self, kind: str) -> dict[str, Tensor]:
        """Views of one kind of moment, made once: the optimizer updates its state in place."""
        if kind not in self._moment_views:
            self._moment_views[kind] = self._views([self.optimizer.state[master][kind] for master in self.masters])
        return self._moment_views[kind]


def initial_state(parameter: Tensor, steps_done: int) -> dict[str, Tensor]:
    """Optimizer state of a flat parameter whose moments are about to be filled in."""
    moments = {kind: torch.zeros_like(parameter.data) for kind in MOMENTS}
    return {"step": torch.tensor(float(steps_done)), **moments}


def _flatten(parameters: object) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in parameters])  # type: ignore[attr-defined]
