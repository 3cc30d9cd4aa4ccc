"""What crosses from stage to stage: several tensors, of shapes that differ from microbatch to microbatch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.pipeline import PipelineExecutor, Spec
from megalm.parallel.schedules import build_schedule
from megalm.parallel.topology import build_topology
from megalm.parallel.weight_gradients import WeightGradients
from megalm.testing import run_distributed
from megalm_kernels.linear import linear

WIDTH, MICROBATCHES, STAGES = 6, 4, 4
SCHEDULES = [("1f1b", 4, 1), ("gpipe", 2, 2), ("interleaved", 2, 2), ("zbv", 2, 2), ("zbh1", 4, 1)]


class EncoderDecoder:
    """Stage 0 encodes; the others decode, and each looks at the encoder's result, which travels along with a mask."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def matrix() -> nn.Parameter:
            return nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 3)

        self.own, self.across = [matrix() for _ in range(STAGES)], [matrix() for _ in range(STAGES)]

    def stage(self, stage: int, x: tuple[Tensor, ...], queue: WeightGradients | None) -> tuple[Tensor, ...]:
        """(hidden (S, E), memory (2 S, E), mask (S,) int64) of one stage to those of the next."""
        hidden, memory, mask = x
        if stage == 0:
            return hidden, linear(memory, self.own[0], None, queue).tanh(), mask
        seen = linear(memory, self.across[stage], None, queue).mean(0)
        hidden = (linear(hidden, self.own[stage], None, queue) + seen).tanh() * mask.unsqueeze(-1)
        if stage == 2:  # not every stage adds to the memory's gradient in the same way
            memory = memory * 0.5
        return hidden, memory, mask

    def gradients(self) -> list[Tensor | None]:
        return [p.grad for p in (*self.own, *self.across)]


def inputs(microbatch: int) -> tuple[Tensor, ...]:
    """Of another length for each microbatch."""
    generator, length = torch.Generator().manual_seed(microbatch), 3 + microbatch
    hidden, memory = (torch.randn(n, WIDTH, generator=generator) for n in (length, 2 * length))
    return hidden, memory, (torch.arange(length) % 3 > 0).long()


def loss_of(x: tuple[Tensor, ...]) -> Tensor:
    return x[0].square().sum()


def boundary(stage: int, microbatch: int) -> list[Spec]:
    length = 3 + microbatch
    return [
        Spec((length, WIDTH), torch.float32),
        Spec((2 * length, WIDTH), torch.float32),
        Spec((length,), torch.int64),
    ]


def run(rank: int, world_size: int) -> dict[str, tuple[list, list]]:
    topology = build_topology(ParallelConfig(pipeline_parallel=world_size), torch.device("cpu"))
    results = {}
    for name, ranks, chunks in SCHEDULES:
        if ranks != world_size:
            continue
        model, queue = EncoderDecoder(), WeightGradients()

        def forward(stage: int, microbatch: int, hidden, model=model, queue=queue) -> Tensor | tuple[Tensor, ...]:
            y = model.stage(stage, inputs(microbatch) if hidden is None else hidden, queue)
            return loss_of(y) if stage == STAGES - 1 else y

        schedule = build_schedule(name, ranks, MICROBATCHES, chunks)
        losses = PipelineExecutor(schedule, topology.pipeline, boundary, torch.device("cpu"), queue).run(forward)
        results[name] = [loss.item() for loss in losses], model.gradients()
    return results


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [2, 4])
def test_an_encoders_result_travels_along_and_its_gradient_comes_back(ranks: int) -> None:
    whole, wanted_losses = EncoderDecoder(), []
    for microbatch in range(MICROBATCHES):
        x = inputs(microbatch)
        for stage in range(STAGES):
            x = whole.stage(stage, x, None)
        wanted_losses.append(loss_of(x))
        wanted_losses[-1].backward()
    by_rank = run_distributed(run, ranks)
    names = [name for name, size, _ in SCHEDULES if size == ranks]
    assert all(set(results) == set(names) for results in by_rank)
    for name in names:
        losses = [loss for results in by_rank for loss in results[name][0]]
        assert losses == pytest.approx([loss.item() for loss in wanted_losses], rel=1e-6)
        for i, want in enumerate(whole.gradients()):
            held = [results[name][1][i] for results in by_rank if results[name][1][i] is not None]
            if want is None:  # the encoder's stage looks at nothing
                assert held == []
            else:
                assert len(held) == 1, "each matrix lives on one rank"
                torch.testing.assert_close(held[0], want)
