"""What DeepSpeed does with gradients of several groups of ranks: whose norm it takes, and over whom it reduces.

As test_zero_traps.py: each test states DeepSpeed's behaviour, and names the line that relies on it or works around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from megalm.config.parallel import ParallelConfig
from megalm.parallel.engine import Tie
from megalm.parallel.topology import Group, Topology, build_topology
from megalm.parallel.zero import ZeroEngine
from tests.parallel.deepspeed_probes import BF16, FP32, build, initialize, look, norm_of, probe
from tests.parallel.tiny import Toy, toy_losses

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def seen() -> Callable[[str], list]:
    return look(__name__)


class Uncorrected(ZeroEngine):
    """Without our overrides of the stage 3 norm."""

    def _correct_stage3_norm(self) -> None:
        pass


def true_norm(without: str = "") -> float:
    """Of one Toy, in one process."""
    model = Toy()
    for loss in toy_losses(model, 0, FP32):
        loss.backward()
    return torch.stack([p.grad.norm() for n, p in model.named_parameters() if n != without]).norm().item()  # type: ignore[union-attr]


@probe
def norms(topology: Topology) -> dict:
    """Two pipeline stages of the same Toy each; `first.weight` of the last one is a tied copy, its gradient not summed."""
    stages = build_topology(ParallelConfig(pipeline_parallel=2), torch.device("cpu"))
    stages = dataclasses.replace(stages, embedding=Group((topology.rank,), 0))
    tie = Tie("first.weight", "the first stage's") if stages.pipeline.is_last else None
    found: dict = {"model rank": build(stages, 3, kind=Uncorrected).optimizer.model_parallel_rank}
    found["corrected rank"] = build(stages, 3).optimizer.model_parallel_rank
    found["uncorrected"] = norm_of(build(stages, 3, kind=Uncorrected))

    class RankOnly(Uncorrected):
        def _correct_stage3_norm(self) -> None:
            self.optimizer.model_parallel_rank = self.topology.tensor.rank

    found["rank only"] = norm_of(build(stages, 3, kind=RankOnly, tie=tie))
    for stage in (1, 2, 3):
        found[stage] = norm_of(build(stages, stage, tie=tie))
    return found


def test_zero3_takes_the_rank_in_the_model_for_the_tensor_rank(seen):
    """ZeroEngine._correct_stage3_norm: the later stages' replicated parameters would be missing from the norm."""
    first, last = seen("norms")
    assert (first["model rank"], last["model rank"]) == (0, 1)
    assert (first["corrected rank"], last["corrected rank"]) == (0, 0)
    assert first["uncorrected"] == last["uncorrected"] == pytest.approx(true_norm(), rel=1e-6)  # the first stage's alone


def test_zero3_counts_a_tied_copy_and_the_other_stages_do_not(seen):
    """ZeroEngine._correct_stage3_norm: ds_pipe_replicated."""
    both = 2**0.5 * true_norm()
    once = (true_norm() ** 2 + true_norm("first.weight") ** 2) ** 0.5
    for found in seen("norms"):
        assert found["rank only"] == pytest.approx(both, rel=1e-6)
        assert [found[stage] for stage in (1, 2, 3)] == pytest.approx([once] * 3, rel=1e-6)


@probe
def counted(topology: Topology) -> list[float]:
    """Two tensor ranks with copies of the whole Toy, and DeepSpeed told of no model parallel group."""
    ranks = build_topology(ParallelConfig(tensor_parallel=2), torch.device("cpu"))
    alone = dataclasses.replace(ranks, model=Group((topology.rank,), 0))

    class RankOnly(Uncorrected):
        def _correct_stage3_norm(self) -> None:
            self.optimizer.model_parallel_rank = self.topology.tensor.rank

    return [norm_of(build(alone, 3, kind=kind)) for kind in (RankOnly, ZeroEngine)]


def test_zero3_counts_on_every_rank_where_it_knows_of_no_model_parallel_group(seen):
    """ZeroEngine._correct_stage3_norm: tensor ranks would count what all of them have."""
    (_, first), last = seen("counted")
    assert first == pytest.approx(true_norm(), rel=1e-6)
    assert last == pytest.approx([true_norm(), 0.0], rel=1e-6)


@probe
def reduced_over(topology: Topology) -> list[float]:
    """One rank's gradient of 1 and the other's of 2, averaged by an engine of both, when one of a single rank was made since."""
    from deepspeed.utils import groups

    engine = initialize(topology, 1, BF16)
    apart = dataclasses.replace(topology, data=Group((topology.rank,), 0))
    initialize(apart, 1, BF16)
    found = []
    for mpu in (groups.mpu, engine.mpu):
        groups.mpu = mpu
        gradient = engine.optimizer.fp32_groups_gradients_flat[0].fill_(topology.data.rank + 1)
        engine.allreduce_gradients()
        found.append(gradient[0].item())
    return found


def test_the_bf16_optimizer_reduces_over_the_ranks_of_the_engine_that_was_made_last(seen):
    """FlatGradients: groups.mpu."""
    assert seen("reduced_over") == [[1.0, 1.5], [2.0, 1.5]]
