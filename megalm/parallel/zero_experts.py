"""ZeRO where experts are dealt out: they have another data parallel group (topology.expert_data) than all else.

DeepSpeed has one group per engine, so there are two engines side by side, each a ZeroEngine of its own parameters that reduces,
shares out, reads and writes over its own group. Four things join them:

- a loss is multiplied by the number of copies of the dense weights, over which DeepSpeed averages; experts have `expert` times
  fewer copies, so their gradients come out that much too large and are divided by it (`ZeroEngine.excess`);
- neither norm is the model's: each measures its own gradients over its own group, the sum is told to both (`ToldNorm`), and
  both clip by it, or skip, together;
- neither engine may see the other's parameters: it would send the first rank's experts to all, or gather them for each other;
- DeepSpeed keeps the group that bf16 ZeRO-1 reduces over in a global variable (`FlatGradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.collectives import all_reduce
from megalm.parallel.engine import Engine, MakeOptimizer, ParameterGroup, Tie
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.topology import Group, Topology
from megalm.parallel.zero import ZeroEngine


class ZeroExpertEngine(Engine):
    """Two ZeroEngines, of the dense parameters and of the experts. Same arguments as ZeroEngine."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[ParameterGroup],
        make_optimizer: MakeOptimizer,
        topology: Topology,
        clip: float,
        parallel: ParallelConfig,
        tie: Tie | None = None,
        loss_scale: LossScale | None = None,
        accumulate_fp32: bool = True,
    ):
        super().__init__(groups, topology, tie, loss_scale)
        dense, experts = ([group for group in groups if group.experts is kind] for kind in (False, True))
        owners = owners_of(module, experts)
        if not experts:  # a pipeline stage without: making an engine is collective over all stages
            nothing = _Nothing(next(iter(self.parameters.values())))
            owners, experts = [nothing], [ParameterGroup(dict(nothing.named_parameters()), 0.0, experts=True)]
        # Each part's norm is over its own data group alone; the other axes are summed over here, once for both.
        part = replace(topology, model=Group((topology.rank,), 0))
        elsewhere = replace(part, data=topology.expert_data)
        apart = replace(parallel, zero_offload_path=parallel.zero_offload_path and f"{parallel.zero_offload_path}/experts")
        with without(module, owners):
            self.dense = ZeroEngine(module, dense, make_optimizer, part, clip, parallel, tie, loss_scale, accumulate_fp32)
        self.experts = ZeroEngine(
            nn.ModuleList(owners),
            experts,
            make_optimizer,
            elsewhere,
            clip,
            apart,
            None,
            loss_scale,
            accumulate_fp32,
            loss_factor=topology.data.size,
        )
        self.parts = (self.dense, self.experts)
        self.norms = [ToldNorm(part.optimizer, loss_scale is not None) for part in self.parts]

    def _part(self, name: str) -> ZeroEngine:
        """The engine that has a parameter."""
        return self.dense if name in self.dense.parameters else self.experts

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        with ExitStack() as scopes:
            for part in self.parts:
                scopes.enter_context(part.accumulate())
            yield

    def before_backward(self) -> None:
        for part in self.parts:
            part.before_backward()

    def after_backward(self) -> None:
        for part in self.parts:
            part.after_backward()

    def scale_loss(self, loss: Tensor) -> Tensor:
        return self.dense.scale_loss(loss)

    def step(self, lr: float) -> Tensor:
        """Both parts are told the same norm, so both clip alike, or both skip."""
        dense, experts = (norm.measure().to(self.topology.device).double().square() for norm in self.norms)
        squares = dense + all_reduce(experts, self.topology.expert)
        whole = all_reduce(squares, self.topology.model).sqrt().float()
        for part, norm in zip(self.parts, self.norms, strict=True):
            norm.told = whole.cpu()  # DeepSpeed looks at it there in any case, and with offload multiplies there
            part.update(lr)
        self.skipped, self.steps_done = self.dense.skipped, self.dense.steps_done
        assert self.experts.skipped == self.skipped
        if self.loss_scale is not None:
            self.loss_scale.update(self.skipped)
            for part in self.parts:
                part.tell_scale()
        return whole

    def gradient(self, name: str) -> Tensor:
        return self._part(name).gradient(name)

    def read(self, name: str, kind: str) -> Tensor:
        return self._part(name).read(name, kind)

    def write(self, name: str, kind: str, value: Tensor) -> None:
        self._part(name).write(name, kind, value)

    def prepare_load(self, steps_done: int) -> None:
        self.steps_done = steps_done
        for part in self.parts:
            part.prepare_load(steps_done)

    def finish_load(self) -> None:
        for part in self.parts:
            part.finish_load()


class ToldNorm:
    """Measures the gradients of one DeepSpeed optimizer, and has it clip and skip by the norm that it is told."""

    def __init__(self, optimizer: Any, is_fp16: bool):
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self.optimizer, self.is_fp16, self.told = optimizer, is_fp16, torch.zeros(())
        self._of_kind: Callable[[], Tensor]
        if type(optimizer).__name__ == "BF16_Optimizer":
            gradients = optimizer.get_grads_for_norm
            self._of_kind = lambda: _norm_of(gradients()[0])
            optimizer.get_grads_for_norm = lambda for_clipping=False: gradients(True) if for_clipping else ([self.told], {})
        elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            self._of_kind = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda norm_type=2: self.told * optimizer.loss_scale
        else:
            groups = optimizer._get_norm_groups
            self._of_kind = lambda: combine_grad_norm_groups(groups())
            optimizer._get_norm_groups = lambda: [self.told * optimizer.loss_scale]

    def measure(self) -> Tensor:
        """L2 norm of the optimizer's own gradients, a scalar; inf where one of them is not finite.

        In fp16 also where a copy is not that another tensor rank counts: this rank would skip for it, and no other.
        """
        norm = self._of_kind() / getattr(self.optimizer, "loss_scale", 1.0)
        return torch.full_like(norm, torch.inf) if self.is_fp16 and self.optimizer.has_overflow() else norm


def _norm_of(gradients: list[Tensor]) -> Tensor:
    """L2 norm of them all; 0 of none: what a tensor rank's neighbours count is not here."""
    return torch.stack([gradient.norm() for gradient in gradients]).norm() if gradients else torch.zeros(())


class _Nothing(nn.Module):
    """A module that is never called, with a parameter that stays zero."""

    def __init__(self, like: Tensor):
        super().__init__()
        self.zero = nn.Parameter(torch.zeros(1, dtype=like.dtype, device=like.device))


def owners_of(module: nn.Module, groups: list[ParameterGroup]) -> list[nn.Module]:
    """The modules within `module` that have the groups' parameters, and must have no others."""
    wanted = {id(p) for group in groups for p in group.parameters.values()}
    owners = []
    for inner in module.modules():
        own = {id(p) for p in inner.parameters(recurse=False)}
        if own & wanted:
            assert own <= wanted, f"{type(inner).__name__} has experts and something else"
            owners.append(inner)
    return owners


@contextmanager
def without(module: nn.Module, owners: list[nn.Module]) -> Iterator[None]:
    """A time in which `module` does not know that it has the owners; they keep their places."""
    away = {id(owner) for owner in owners}
    places = [
        (parent, name, child) for parent in module.modules() for name, child in parent.named_children() if id(child) in away
    ]
    for parent, name, _ in places:
        parent._modules[name] = None
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
