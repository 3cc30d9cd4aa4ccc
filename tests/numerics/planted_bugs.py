"""Mistakes that parallel training code makes, one function each: it plants the mistake in the process that calls it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.data import loader
from megalm.data.documents import Documents
from megalm.parallel import engine, ring, tensor_parallel, zero
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


# --- long samples and experts ------------------------------------------------------------------------------------------


def merge_without_lse() -> None:
    """What the ring finds in each step is added up as it is, without its share of the softmax."""

    def wrong(total: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
        total += part.to(total.dtype)
        torch.logaddexp(lse, part_lse.to(lse.dtype), out=lse)

    ring.merge_into = wrong  # type: ignore[attr-defined]


def tokens_not_in_zigzag_order() -> None:
    """The loader deals out runs of tokens, and the ring takes them for an early and a late chunk each."""
    build.local_tokens = lambda method, size, rank, length: torch.arange(length).chunk(size)[rank]


def positions_of_the_rank() -> None:
    """A packed document that a cut goes through begins anew on the next rank."""
    right = loader.build_documents

    def wrong(starts: Any, seq_length: int, places: np.ndarray | None) -> Documents:
        documents = right(starts, seq_length, places)
        positions = documents.positions.clone()
        for sample in positions:
            end = next((i for i, place in enumerate(sample) if i and place == 0), len(sample))
            sample[:end] -= int(sample[0])
        return dataclasses.replace(documents, positions=positions)

    loader.build_documents = wrong  # type: ignore[attr-defined]


def router_gradient_not_summed() -> None:
    """Each tensor rank has some of every expert's features, so a part of the router's gradient, and nobody sums the parts."""
    right = build.apply_tensor_parallel

    def wrong(model: nn.Module, *rest: Any) -> None:
        right(model, *rest)
        for name, parameter in model.named_parameters():
            if name.endswith("router.weight"):
                parameter.shard = dataclasses.replace(parameter.shard, partial=False)  # type: ignore[attr-defined]

    build.apply_tensor_parallel = wrong


def expert_gradient_over_all_copies() -> None:
    """Experts that are dealt out are summed over all ranks that share the other weights: over ranks with other experts."""
    right = build.build_groups

    def wrong(*arguments: Any) -> list[engine.ParameterGroup]:
        return [dataclasses.replace(group, experts=False) for group in right(*arguments)]

    build.build_groups = wrong
