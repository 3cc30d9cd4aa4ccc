"""ZeRO-3 keeps no weights gathered behind a backward; and a gradient that is not finite is told, not stumbled over."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.schedules import build_schedule
from megalm.parallel.topology import Topology, build_topology
from megalm.testing import run_distributed
from megalm.train.build import DTYPES, build_engine, build_queue, build_stage
from tests.parallel.tiny import LR, loss_of, samples, tiny_config, toy_engine, toy_losses

KINDS = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16")))


def gathered(topology: Topology) -> tuple[list[int], list[int], int]:
    """Elements of weights that are whole here: most within each of three backwards in a row, after each, and all there are."""
    config = tiny_config(layers=3, zero=3, schedule="gpipe")
    queue = build_queue(config, build_schedule("gpipe", 1, 3, 1))
    model = build_stage(config, topology, 0, 1, torch.float32, queue=queue)
    engine = build_engine(config, topology, nn.ModuleList([model]))
    counts = list[int]()

    def count(*_: object) -> None:
        counts.append(sum(p.numel() for p in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)
    within, after = [], []
    with engine.accumulate():
        losses = [engine.scale_loss(loss_of(model, samples(step, 1), topology)) for step in range(3)]
        for loss in losses:
            counts.clear()
            engine.before_backward()
            loss.backward()
            engine.after_backward()
            within.append(max(counts))
            count()
            after.append(counts[-1])
    return within, after, sum(math.prod(shape) for shape in engine.shapes.values())


def spoiled(zero: int, precision: str, topology: Topology) -> float:
    """The norm of a step in which one gradient on one rank is not a number."""
    model, engine = toy_engine(ParallelConfig(zero=zero), DTYPES[precision], topology)
    with engine.accumulate():
        for loss in toy_losses(model, 0, DTYPES[precision], topology.data.rank, 2):
            engine.before_backward()
            (engine.scale_loss(loss) * (math.nan if topology.data.rank else 1.0)).backward()
            engine.after_backward()
    return engine.step(LR).item()


def look(rank: int, world_size: int) -> dict:
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    norms: dict = {kind: spoiled(*kind, topology) for kind in KINDS}
    return norms | {"gathered": gathered(topology)}


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    return run_distributed(look, 2)


@pytest.mark.dist
def test_every_backward_gives_gathered_weights_back_as_it_goes(by_rank: list[dict]) -> None:
    for within, after, whole in (seen["gathered"] for seen in by_rank):
        assert after == [0, 0, 0]
        assert 0 < within[0] < whole / 3
        assert within == [within[0]] * 3


@pytest.mark.dist
@pytest.mark.parametrize(("zero", "precision"), KINDS)
def test_a_gradient_that_is_not_a_number_shows_in_the_norm_of_all_ranks(by_rank: list[dict], zero: int, precision: str) -> None:
    assert [math.isfinite(seen[zero, precision]) for seen in by_rank] == [False, False]
