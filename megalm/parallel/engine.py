"""The engine: what stands between the gradients of the microbatches and the new weights.

    with engine.accumulate():      any number of forwards and backwards, in any order
        engine.after_backward()    behind each backward: what can be reduced at once is
    ...                            on leaving: the others are
    grad_norm = engine.step(lr)    clip by the global norm, update; or, in fp16, skip after an overflow

and views of full parameters and moments for the checkpoint. Two implementations, which `megalm parity` compares:
`PlainEngine` here (zero: 0, all-reduce and AdamW on flat fp32 buffers, no DeepSpeed) and `ZeroEngine` in zero.py.

Contract for the loss: each rank back-propagates `engine.scale_loss(sum over its tokens / global number of tokens)`; the
engine sums over all ranks that have a parameter: those of topology.data, or of an expert that is dealt out, topology.expert_data.

In fp16 the loss is multiplied by a LossScale, gradients are divided by it again, and a step whose gradients are not finite on
any rank is skipped on all of them: `skipped` tells of the last step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.parallel.collectives import all_reduce
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.tensor_parallel import shard_of, sum_partial_gradients
from megalm.parallel.topology import Group, Topology

WEIGHT, MOMENTS = "weight", ("exp_avg", "exp_avg_sq")
MakeOptimizer = Callable[[list[dict]], torch.optim.Optimizer]


@dataclass
class ParameterGroup:
    """Parameters that share a weight decay, by name."""

    parameters: dict[str, nn.Parameter]
    weight_decay: float
    experts: bool = False  # that are dealt out: their gradients are summed over topology.expert_data, not .data


@dataclass(frozen=True)
class Tie:
    """This rank's end of an embedding that the first and the last pipeline stage share."""

    name: str  # the parameter here
    original: str  # its name on the first stage, under which it is drawn, counted and saved


class Engine(ABC):
    """Gradients in, weights out."""

    def __init__(
        self, groups: list[ParameterGroup], topology: Topology, tie: Tie | None, loss_scale: LossScale | None = None
    ):
        self.groups, self.topology = groups, topology
        self.parameters = {name: p for group in groups for name, p in group.parameters.items()}
        self.shapes = {name: shape_of(p) for name, p in self.parameters.items()}  # local
        self.tie, self.loss_scale = tie, loss_scale
        self.buffers: dict[str, Tensor] = {}  # what modules keep besides: whole, and the same wherever the module is
        self.steps_done = 0  # without the skipped ones
        self.skipped = False  # whether the last step changed nothing

    def before_backward(self) -> None:  # noqa: B027  most engines have nothing to do
        """Call before each backward within `accumulate`."""

    def after_backward(self) -> None:  # noqa: B027
        """Call behind each backward within `accumulate`: what can be reduced at once is."""

    @contextmanager
    @abstractmethod
    def accumulate(self) -> Iterator[None]:
        """Scope of one optimizer step's forwards and backwards; on leaving, gradients are reduced."""

    @abstractmethod
    def step(self, lr: float) -> Tensor:
        """Clip and update with the reduced gradients; returns the global gradient norm before clipping, a scalar.

        The norm of a skipped step is inf.
        """

    @abstractmethod
    def scale_loss(self, loss: Tensor) -> Tensor:
        """What to back-propagate in place of the loss."""

    @abstractmethod
    def gradient(self, name: str) -> Tensor:
        """Reduced gradient of this rank's slice, fp32, without the loss scale. Between `accumulate` and `step`; collective
        over `replicas`."""

    @abstractmethod
    def read(self, name: str, kind: str) -> Tensor:
        """fp32 master weight (`weight`) or moment of this rank's slice. Collective over `replicas`."""

    @abstractmethod
    def write(self, name: str, kind: str, value: Tensor) -> None:
        """Set what `read` reads; call `finish_load` after the last one."""

    @abstractmethod
    def finish_load(self) -> None:
        """Bring the weights of the forward in line with what was written."""

    @abstractmethod
    def prepare_load(self, steps_done: int) -> None:
        """Make room for moments of an optimizer that has done `steps_done` steps; call before the first `write`."""

    @property
    def scale(self) -> float:
        """What gradients are multiplied by until the step; 1 without a loss scale."""
        return 1.0 if self.loss_scale is None else self.loss_scale.scale

    def saved_name(self, name: str) -> str:
        """The name under which a checkpoint knows a parameter of this rank."""
        return self.tie.original if self.tie is not None and name == self.tie.name else name

    def replicas(self, name: str) -> Group:
        """The ranks that have this slice of a parameter, as far as data and context go."""
        return self.topology.expert_data if shard_of(self.parameters[name]).is_dealt_out else self.topology.data

    def counts_in_norm(self, name: str) -> bool:
        """Whether this rank's slice enters the global norm, summed over model and expert groups: every element of the model must,
        exactly once."""
        dealt_out = shard_of(self.parameters[name]).is_dealt_out
        return self.stands_for_copies(name) and (dealt_out or self.topology.expert.is_first)

    def stands_for_copies(self, name: str) -> bool:
        """Whether this rank is the first within one copy of the model that has its slice."""
        is_split = shard_of(self.parameters[name]).dim is not None
        return not self.is_extra_copy(name) and (is_split or self.topology.tensor.is_first)

    def is_extra_copy(self, name: str) -> bool:
        """Whether the slice is another rank's too, which counts and saves it: a tied copy, a replicated key/value head."""
        return self.saved_name(name) != name or shard_of(self.parameters[name]).copy > 0

    def _reduce_model_parallel(self) -> None:
        """Complete gradients that arise in parts within one copy of the model: sequence slices, copies, tied embeddings."""
        partial = [p for p in self.parameters.values() if shard_of(p).is_partial and p.grad is not None]
        sum_partial_gradients(partial, [p.grad for p in partial if p.grad is not None], self.topology.tensor)
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
        loss_scale: LossScale | None = None,
        accumulate_fp32: bool = True,
    ):
        super().__init__(groups, topology, tie, loss_scale)
        self.clip = clip
        precision = next(iter(self.parameters.values())).dtype
        accumulated = torch.float32 if accumulate_fp32 else precision
        self.flat_weights = [_flatten(g.parameters.values()) for g in groups]
        self.flat_gradients = [torch.zeros_like(flat, dtype=accumulated) for flat in self.flat_weights]
        self.reduced = self.flat_gradients  # what the step uses; without accumulate_fp32 a copy in fp32, for the step only
        self.weights = self._views(self.flat_weights)
        self.gradients = self._views(self.flat_gradients)
        # What the forward uses: one flat buffer per group too, the master weights themselves in fp32.
        self.flat_forward = [flat.to(precision) for flat in self.flat_weights]
        for name, part in self._views(self.flat_forward).items():
            self.parameters[name].data = part
            if precision != torch.float32:
                self.parameters[name].grad_dtype = accumulated
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
        if self.flat_gradients[0].dtype != torch.float32:
            self.reduced = [flat.float() for flat in self.flat_gradients]
        for flat, group in zip(self.reduced, self.groups, strict=True):
            all_reduce(flat, self.topology.expert_data if group.experts else self.topology.data)

    def scale_loss(self, loss: Tensor) -> Tensor:
        return loss if self.loss_scale is None else loss * self.loss_scale.scale

    @torch.no_grad()
    def step(self, lr: float) -> Tensor:
        scale = self.scale  # what the gradients have; it may change for the next step
        norm = self._global_norm() / scale
        if self.loss_scale is not None:
            self.skipped = not bool(norm.isfinite())  # sync
            self.loss_scale.update(self.skipped)
        if not self.skipped:
            self._update(lr, norm, scale)
        self.reduced = self.flat_gradients
        return norm

    def _update(self, lr: float, norm: Tensor, scale: float) -> None:
        """Gradients are divided by the loss scale and clipped in one pass."""
        if self.clip > 0 or scale != 1.0:
            factor = torch.clamp(self.clip / (norm + 1e-6), max=1.0) if self.clip > 0 else torch.ones_like(norm)
            for flat in self.reduced:
                flat.mul_(factor / scale)
        for master, flat, group in zip(self.masters, self.reduced, self.optimizer.param_groups, strict=True):
            master.grad, group["lr"] = flat, lr
        self.optimizer.step()
        for master in self.masters:
            master.grad = None
        self.steps_done += 1
        self.finish_load()

    def _global_norm(self) -> Tensor:
        """L2 norm over every element of the model, each counted once; with a loss scale inf if any of them is not finite."""
        views = self._reduced_views()
        norms = dict(zip(views, torch._foreach_norm(list(views.values())), strict=True))
        counted = [norm for name, norm in norms.items() if self.counts_in_norm(name)]
        squares = torch.stack(counted).double().square().sum() if counted else torch.zeros((), dtype=torch.float64)
        if self.loss_scale is not None:  # copies that are not counted decide too: they would differ from then on
            finite = torch.stack(list(norms.values())).isfinite().all()
            squares = torch.where(finite, squares, torch.inf)
        total = all_reduce(squares.to(self.topology.device), self.topology.model)
        return all_reduce(total, self.topology.expert).sqrt().float()

    def gradient(self, name: str) -> Tensor:
        return self._reduced_views()[name] / self.scale

    def _reduced_views(self) -> dict[str, Tensor]:
        """What the step uses, in the parameters' shapes."""
        return self.gradients if self.reduced is self.flat_gradients else self._views(self.reduced)

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
        for low, master in zip(self.flat_forward, self.flat_weights, strict=True):
            if low is not master:
                low.copy_(master)

    def _moments(self, kind: str) -> dict[str, Tensor]:
        """Views of one kind of moment, made once: the optimizer updates its state in place."""
        if kind not in self._moment_views:
            self._moment_views[kind] = self._views([self.optimizer.state[master][kind] for master in self.masters])
        return self._moment_views[kind]


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of this rank's slice, also where ZeRO-3 has shared the parameter out and left it empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def initial_state(parameter: Tensor, steps_done: int) -> dict[str, Tensor]:
    """Optimizer state of a flat parameter whose moments are about to be filled in."""
    moments = {kind: torch.zeros_like(parameter.data) for kind in MOMENTS}
    return {"step": torch.tensor(float(steps_done)), **moments}


def _flatten(parameters: object) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in parameters])  # type: ignore[attr-defined]
