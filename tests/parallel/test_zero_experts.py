"""ZeRO where experts are dealt out computes what the plain engine computes, and both compute what one rank does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.config.run import RunConfig
from megalm.parallel.collectives import gather_sequence, scatter_sum
from megalm.parallel.engine import Engine, PlainEngine
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.tensor_parallel import Shard, local_slice
from megalm.parallel.topology import Group, Topology, build_topology
from megalm.parallel.zero_experts import ZeroExpertEngine
from megalm.testing import run_distributed
from megalm.train.build import DTYPES
from tests.parallel.tiny import (
    adamw,
    alone,
    difference_from_whole,
    load_state,
    state_of,
    tiny_config,
    toy_groups,
    toy_step,
    train,
)

STEPS, CLIP, EXPERTS, SIZE = 4, 0.5, 4, 7
KINDS = {
    "zero1": ParallelConfig(zero=1),
    "zero2": ParallelConfig(zero=2),
    "zero3": ParallelConfig(zero=3),
    "zero2_microbatch": ParallelConfig(zero=2, zero_reduce="microbatch"),
    "zero3_microbatch": ParallelConfig(zero=3, zero_reduce="microbatch"),
    "zero1_cpu": ParallelConfig(zero=1, zero_offload="cpu"),
    "zero2_cpu": ParallelConfig(zero=2, zero_offload="cpu"),
    "zero3_cpu": ParallelConfig(zero=3, zero_offload="cpu"),
}
# Two ranks have no other with the same experts, four have one each: every kind is seen on either.
TWO = [("zero1", "fp32"), ("zero1", "bf16"), ("zero3", "bf16"), ("zero1_cpu", "fp32"), ("zero3_cpu", "bf16")]
FOUR = [("zero1", "bf16"), ("zero2_microbatch", "fp32"), ("zero3", "bf16")]
FOUR_MORE = [("zero1", "fp32"), ("zero2", "bf16"), ("zero3_microbatch", "fp32"), ("zero2_cpu", "bf16"), ("zero3_cpu", "fp32")]
SKIPS = [("zero1", "experts.matrix"), ("zero1", "first.weight"), ("zero3", "experts.matrix"), ("zero2_cpu", "first.weight")]


class ToyExperts(nn.Module):
    """A matrix and a factor per expert. x (T, E) -> the sum over the experts here."""

    def __init__(self, group: Group):
        super().__init__()
        generator, here = torch.Generator().manual_seed(5), EXPERTS // group.size
        wholes = torch.randn(EXPERTS, SIZE, SIZE, generator=generator), torch.randn(EXPERTS, generator=generator)
        self.matrix, self.factor = (self._part(whole, here, group) for whole in wholes)

    def _part(self, whole: Tensor, here: int, group: Group) -> nn.Parameter:
        part = nn.Parameter(whole.narrow(0, group.rank * here, here).clone())
        first = group.rank * here if group.size > 1 else None
        part.shard = Shard(tuple(whole.shape), first_expert=first)  # type: ignore[attr-defined]
        return part

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("te,nef,n->tf", x, self.matrix.tanh(), self.factor)


class ExpertToy(nn.Module):
    """Every token goes to all experts: each rank's are shown the tokens of all, and their outputs are summed."""

    def __init__(self, group: Group):
        super().__init__()
        self.group = group
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.first, self.second = nn.Linear(5, SIZE), nn.Linear(SIZE, 3)
        self.experts = ToyExperts(group)

    def forward(self, x: Tensor) -> Tensor:
        hidden = gather_sequence(self.first(x), self.group, 0)
        return self.second(scatter_sum(self.experts(hidden), self.group, 0))


def build(
    parallel: ParallelConfig, dtype: torch.dtype, topology: Topology, clip: float = CLIP, scale: LossScale | None = None
) -> tuple[nn.Module, Engine]:
    model = ExpertToy(topology.expert).to(dtype)
    for group in (groups := toy_groups(model)):
        assert topology.expert.size == 1 or group.experts == all("experts" in name for name in group.parameters)
    if parallel.zero == 0:
        return model, PlainEngine(groups, adamw, topology, clip, None, scale)
    return model, ZeroExpertEngine(nn.ModuleList([model]), groups, adamw, topology, clip, parallel, None, scale)


def largest(a: dict, b: dict) -> float:
    return max(((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1.0)).item() for key in a)


def gradients_of(engine: Engine, model: nn.Module) -> dict[str, Tensor]:
    """The reduced gradients of one more step, whose loss is the sum of the outputs."""
    with engine.accumulate():
        engine.before_backward()
        x = torch.arange(10.0).view(2, 5).to(next(iter(engine.parameters.values())).dtype) / 10
        engine.scale_loss(model(x).float().sum()).backward()
        engine.after_backward()
    return {name: engine.gradient(name).clone() for name in engine.parameters}


def compare(parallel: ParallelConfig, dtype: torch.dtype, topology: Topology, clip: float) -> dict:
    """Steps on the plain engine and on this one; then the state into a fresh one, and a step more."""
    (plain_model, plain), (model, engine) = (build(kind, dtype, topology, clip) for kind in (ParallelConfig(), parallel))
    wanted = [toy_step(plain, plain_model, step) for step in range(STEPS)]
    steps = [toy_step(engine, model, step) for step in range(STEPS)]
    state = state_of(engine)
    found = {
        "norm": max(abs(a[1] - b[1]) / b[1] for a, b in zip(steps, wanted, strict=True)),
        "state": largest(state, state_of(plain)),
        "smallest": min(norm for _, norm in wanted),
    }
    other_model, other = build(parallel, dtype, topology, clip)
    load_state(other, state, STEPS)
    found["loaded"] = largest(state_of(other), state)
    found["gradient"] = largest(gradients_of(other, other_model), gradients_of(plain, plain_model))
    found["after"] = abs(other.step(1e-2).item() / plain.step(1e-2).item() - 1)
    return found | {"steps": (other.steps_done, engine.steps_done)}


def plain_and_alone(topology: Topology) -> dict:
    """The plain engine itself against one rank with all experts."""
    (model, engine), (whole_model, whole) = (build(ParallelConfig(), torch.float32, t) for t in (topology, alone()))
    norms = [(toy_step(engine, model, step)[1], toy_step(whole, whole_model, step)[1]) for step in range(STEPS)]
    wanted = state_of(whole)
    pairs = {
        key: (value, local_slice(engine.parameters[key[0]], tuple(value.shape), wanted[key]))
        for key, value in state_of(engine).items()
    }
    return {
        "norm": max(abs(a - b) / b for a, b in norms),
        "state": largest({k: a for k, (a, _) in pairs.items()}, {k: b for k, (_, b) in pairs.items()}),
    }


def skipping(parallel: ParallelConfig, topology: Topology, where: str) -> dict:
    """fp16 with an infinite gradient in the second step, on the last rank alone: of an expert, or of the rest."""
    model, engine = build(parallel, torch.float16, topology, CLIP, LossScale(2.0**8, window=2))
    poison = [False]

    def infect(gradient: Tensor) -> Tensor:
        return gradient * torch.inf if poison[0] and topology.rank == topology.world_size - 1 else gradient

    engine.parameters[where].register_hook(infect)
    seen, kept = [], False
    for step in range(5):
        poison[0] = step == 1
        before = state_of(engine) if poison[0] else {}
        norm = toy_step(engine, model, step)[1]
        seen.append((norm, engine.skipped, engine.steps_done, engine.loss_scale.scale if engine.loss_scale else 0))
        kept = kept or (poison[0] and largest(state_of(engine), before) == 0.0)
    return {"seen": seen, "kept": kept, "state": state_of(engine)}


def allow_fp16() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses it on a CPU


def look_at_two(rank: int, world_size: int) -> dict:
    allow_fp16()
    topology = build_topology(ParallelConfig(expert_parallel=2), torch.device("cpu"))
    seen: dict = {run: compare(KINDS[run[0]], DTYPES[run[1]], topology, CLIP) for run in TWO}
    seen["alone"] = plain_and_alone(topology)
    seen["no clip"] = compare(KINDS["zero1"], torch.bfloat16, topology, 0.0)
    seen["plain"] = skipping(ParallelConfig(), topology, "experts.matrix")
    return seen | {("skip", *run): skipping(KINDS[run[0]], topology, run[1]) for run in SKIPS}


def look_at_four(rank: int, world_size: int, runs: list[tuple[str, str]]) -> dict:
    topology = build_topology(ParallelConfig(expert_parallel=2), torch.device("cpu"))
    seen: dict = {run: compare(KINDS[run[0]], DTYPES[run[1]], topology, CLIP) for run in runs}
    allow_fp16()
    topology = build_topology(ParallelConfig(expert_parallel=2, tensor_parallel=2), torch.device("cpu"))
    return seen | {"skip": skipping(KINDS[runs[-1][0]], topology, "first.weight")["seen"]}


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return run_distributed(look_at_two, 2)


def assert_equal(found: dict) -> None:
    assert found["smallest"] > CLIP, "the clipping must bite"
    assert found["norm"] < 3e-7 and found["state"] < 4e-6
    assert found["loaded"] == 0.0
    assert found["gradient"] < 1e-6 and found["after"] < 1e-6
    assert found["steps"] == (STEPS + 1, STEPS)


@pytest.mark.dist
def test_the_plain_engine_computes_what_one_rank_does(two: list[dict]) -> None:
    for seen in two:
        assert seen["alone"]["norm"] < 3e-7 and seen["alone"]["state"] < 4e-6


@pytest.mark.dist
@pytest.mark.parametrize("run", [*TWO, "no clip"], ids=str)
def test_two_ranks_with_half_of_the_experts_each(two: list[dict], run: Any) -> None:
    for seen in two:
        assert_equal(seen[run])


@pytest.mark.dist
@pytest.mark.parametrize("runs", [FOUR, pytest.param(FOUR_MORE, marks=pytest.mark.slow)], ids=["few", "more"])
def test_four_ranks_of_which_two_have_the_same_experts(runs: list[tuple[str, str]]) -> None:
    for seen in run_distributed(look_at_four, 4, runs, timeout_seconds=300):
        for run in runs:
            assert_equal(seen[run])
        skipped = [skipped for _, skipped, *_ in seen["skip"]]
        assert skipped == [False, True, False, False, False], "for what the second tensor rank alone has, too"


@pytest.mark.dist
@pytest.mark.parametrize("run", SKIPS, ids=str)
def test_both_parts_skip_together(two: list[dict], run: tuple[str, str]) -> None:
    """Whichever has the gradient that is not finite."""
    for rank in two:
        seen, plain = rank[("skip", *run)], rank["plain"]
        assert [told[1:] for told in seen["seen"]] == [told[1:] for told in plain["seen"]]
        assert [told[1] for told in seen["seen"]] == [False, True, False, False, False]
        assert [told[0] for told in seen["seen"]] == pytest.approx([told[0] for told in plain["seen"]], rel=5e-7)
        assert seen["kept"] and largest(seen["state"], plain["state"]) < 4e-6


# --- the model ----------------------------------------------------------------------------------------------------------

# Of two layers the first is dense: with two pipeline stages it is a stage without experts.
LAYOUTS: dict[str, tuple[int, dict[str, dict[str, Any]]]] = {
    "two ranks": (2, {
        "dp2_zero3_microbatch": dict(zero=3, zero_reduce="microbatch"),
        "dp2_ep2_zero3": dict(zero=3, expert_parallel=2),
    }),
    "two ranks, more": (2, {
        "dp2_zero3": dict(zero=3),
        "dp2_ep2_zero2": dict(zero=2, expert_parallel=2, zero_reduce="microbatch"),
    }),
    "four ranks": (4, {
        "pp2_dp2_ep2_zero1": dict(zero=1, expert_parallel=2, pipeline_parallel=2, tied=True),
        "pp2_dp2_ep2_zero1_bf16": dict(zero=1, expert_parallel=2, pipeline_parallel=2, precision="bf16"),
        "pp2_dp2_ep2_zero3": dict(zero=3, expert_parallel=2, pipeline_parallel=2),
        "pp2_dp2_ep2_zero2_cpu": dict(zero=2, expert_parallel=2, pipeline_parallel=2, zero_offload="cpu"),
        "tp2_sp_dp2_ep2_zero1_bf16": dict(zero=1, expert_parallel=2, tensor_parallel=2, sequence_parallel=True, precision="bf16"),
        "tp2_dp2_ep2_zero3": dict(zero=3, expert_parallel=2, tensor_parallel=2),
        "tp2_dp2_ep2_zero3_cpu": dict(zero=3, expert_parallel=2, tensor_parallel=2, zero_offload="cpu"),
        "dp4_ep2_zero3": dict(zero=3, expert_parallel=2),
    }),
}  # fmt: skip


def with_experts(**settings: Any) -> RunConfig:
    config = tiny_config(**settings)
    experts = dict(num_experts=4, expert_ffn_size=20, num_dense_layers=1, num_shared_experts=1)
    return replace(config, model=replace(config.model, **experts))


def run_layouts(rank: int, world_size: int, which: str) -> dict[str, tuple[float, float, float]]:
    """Norm and weights against one rank (fp32), or against the plain engine on the same layout, and the smallest norm."""
    found = {}
    for name, settings in LAYOUTS[which][1].items():
        config = with_experts(**settings)
        trained = train(config)
        if config.train.precision == "fp32":
            wanted = train(with_experts(tied=config.model.tie_embeddings), alone())
            weights = difference_from_whole(trained, wanted.weights())
        else:
            wanted = train(replace(config, parallel=replace(config.parallel, zero=0)))
            weights = largest(trained.weights(), wanted.weights())
        norm = max(abs(a - b) / b for a, b in zip(trained.norms, wanted.norms, strict=True))
        found[name] = norm, weights, min(wanted.norms)
    return found


@pytest.mark.dist
@pytest.mark.parametrize(
    "which", [which if which == "two ranks" else pytest.param(which, marks=pytest.mark.slow) for which in LAYOUTS]
)
def test_the_model(which: str) -> None:
    for seen in run_distributed(run_layouts, LAYOUTS[which][0], which, timeout_seconds=300):
        for layout, (norm, weights, smallest) in seen.items():
            assert smallest > CLIP, "the clipping must bite"
            assert norm < 1e-6 and weights < 2e-6, layout
