"""Mistakes that parallel training code makes, one function each: it plants the mistake in the process that calls it."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.parallel import engine, tensor_parallel, zero
from megalm.parallel.collectives import scatter_sum, sum_from_region
from megalm.parallel.topology import Group, Topology
from megalm.train import build
from megalm_kernels.linear import linear


def bias_on_every_rank() -> None:
    """A row layer's bias is added before the ranks' products are summed: it counts once per rank."""

    def forward(self: tensor_parallel.RowParallelLinear, x: Tensor) -> Tensor:
        y = linear(x, self.weight, self.bias, None)
        return scatter_sum(y, self.group) if self.sequence_parallel else sum_from_region(y, self.group)

    tensor_parallel.RowParallelLinear.forward = forward  # type: ignore[method-assign]


def norm_gradient_not_summed() -> None:
    """With sequence parallelism, a norm's gradient covers a slice of the sequence, and nobody sums the slices."""
    engine.sum_partial_gradients = lambda *args: None  # type: ignore[attr-defined]


def tied_gradient_not_summed() -> None:
    """First and last stage each update their copy of the tied embedding with their own part of its gradient."""
    reduce = engine.Engine._reduce_model_parallel

    def without_tie(self: engine.Engine) -> None:
        tie, self.tie = self.tie, None
        reduce(self)
        self.tie = tie

    engine.Engine._reduce_model_parallel = without_tie  # type: ignore[method-assign]


def loss_not_scaled_for_zero() -> None:
    """DeepSpeed averages gradients over the copies, and the loss was not multiplied by their number."""
    zero.ZeroEngine.scale_loss = lambda self, loss: loss  # type: ignore[method-assign]


def chunks_in_the_wrong_order() -> None:
    """Stages are numbered rank by rank instead of chunk by chunk: of four, the second and the third change places."""
    right = build.build_stage

    def wrong(config: RunConfig, topology: Topology, stage: int, *rest: Any) -> nn.Module:
        return right(config, topology, {1: 2, 2: 1}.get(stage, stage), *rest)

    build.build_stage = wrong


def norm_of_one_stage() -> None:
    """Each stage clips by the norm of its own gradients."""
    right = engine.PlainEngine._global_norm

    def wrong(self: engine.PlainEngine) -> Tensor:
        topology = self.topology
        self.topology = dataclasses.replace(topology, model=Group((topology.rank,), 0))
        norm = right(self)
        self.topology = topology
        return norm

    engine.PlainEngine._global_norm = wrong  # type: ignore[method-assign]
