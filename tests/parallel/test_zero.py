"""ZeroEngine computes what PlainEngine computes, in every stage and precision, and hands its state to any other stage.

Exact means: losses and norms within 5e-7 and 2e-7 relative, weights within a few 1e-6 (Adam amplifies the last bit of a
gradient that is nearly zero). In bf16 the same holds, since both engines sum and send gradients in fp32.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.engine import ParameterGroup
from megalm.parallel.topology import Topology, build_topology
from megalm.parallel.zero import ZeroEngine
from megalm.testing import run_distributed
from megalm.train.build import DTYPES
from tests.parallel.tiny import (
    LR,
    Toy,
    adamw,
    alone,
    difference_from_whole,
    load_state,
    state_of,
    tiny_config,
    toy_engine,
    toy_step,
    train,
)

STEPS, CLIP = 4, 0.5
STAGES = (1, 2, 3)
PRECISIONS = ("fp32", "bf16")
RUNS = list(itertools.product(STAGES, PRECISIONS))
EACH = pytest.mark.parametrize(("stage", "precision"), RUNS, ids=[f"zero{s}-{p}" for s, p in RUNS])


def build(stage: int, dtype: torch.dtype, topology: Topology, clip: float = CLIP, model: nn.Module | None = None):
    """A model and its engine; stage 0 is the plain one."""
    return toy_engine(ParallelConfig(zero=stage), dtype, topology, clip, model)


def largest(a: dict, b: dict) -> float:
    """Largest difference, of tensors beyond 1 as a share of their largest value."""
    assert a.keys() == b.keys()
    return max(((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1.0)).item() for key in a)


def compare_with_plain(stage: int, dtype: torch.dtype, topology: Topology, clip: float) -> dict:
    """Two runs on the same data, step by step."""
    (plain_model, plain), (model, engine) = (build(s, dtype, topology, clip) for s in (0, stage))
    wanted = [toy_step(plain, plain_model, step) for step in range(STEPS)]
    steps = [toy_step(engine, model, step) for step in range(STEPS)]
    errors = [[abs(a - b) / b for a, b in zip(x, y, strict=True)] for x, y in zip(steps, wanted, strict=True)]
    return {
        "loss": max(loss for loss, _ in errors),
        "norm": max(norm for _, norm in errors),
        "state": largest(state_of(engine), state_of(plain)),
        "smallest norm": min(norm for _, norm in wanted),
        "steps": engine.steps_done,
    }


def accumulated(stage: int, topology: Topology) -> tuple[float, float]:
    """The norms of 300 gradients of 1 on one rank, and of gradients 256 on one rank and 1 on the other, in bf16."""
    norms = []
    for values in ([1.0] * 300, [256.0 if topology.data.is_first else 1.0]):
        weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        module = nn.Module()
        module.w = weight
        engine = ZeroEngine(
            nn.ModuleList([module]), [ParameterGroup({"w": weight}, 0.0)], adamw, topology, 0.0, ParallelConfig(zero=stage)
        )
        with engine.accumulate():
            for value in values:
                if stage == 3:  # a parameter without a forward of its own: gather it by hand
                    weight.all_gather()
                engine.scale_loss(weight[0] * (value / 2 if len(values) > 1 else value)).backward()
                if stage == 3:
                    weight.partition()
        norms.append(engine.step(LR).item())
    return norms[0], norms[1]


def compare_all(rank: int, world_size: int) -> dict:
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    results: dict = {}
    for stage, precision in RUNS:
        for clip in (CLIP, 0.0):
            results[stage, precision, clip] = compare_with_plain(stage, DTYPES[precision], topology, clip)
    for stage in STAGES:
        results["accumulated", stage] = accumulated(stage, topology)
    return results


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    return run_distributed(compare_all, 2)


@pytest.mark.dist
@pytest.mark.parametrize("clip", [CLIP, 0.0], ids=["clip", "no-clip"])
@EACH
def test_equals_the_plain_engine(by_rank, stage, precision, clip):
    for seen in (rank[stage, precision, clip] for rank in by_rank):
        assert seen["smallest norm"] > CLIP, "the clipping must bite"
        assert seen["loss"] < 5e-7
        assert seen["norm"] < 2e-7
        assert seen["state"] < 4e-6
        assert seen["steps"] == STEPS


@pytest.mark.dist
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_gradients_are_summed_and_sent_in_fp32(by_rank, stage):
    """300 ones would stop at 256 in bf16, and 256 + 1 does not exist there."""
    assert [rank["accumulated", stage] for rank in by_rank] == [(300.0, 128.5 * 2)] * 2


# --- state ------------------------------------------------------------------------------------------------------------

MOVES = list(itertools.product((0, *STAGES), (0, *STAGES)))


def move(source: int, target: int, dtype: torch.dtype, topology: Topology) -> dict:
    """Two steps on `source`, its state into a fresh `target`, two more steps on both."""
    model, engine = build(source, dtype, topology)
    for step in range(2):
        toy_step(engine, model, step)
    other_model, other = build(target, dtype, topology, model=_Blank())
    state = state_of(engine)
    load_state(other, state, engine.steps_done)
    loaded = state_of(other)
    pairs = [(toy_step(engine, model, step), toy_step(other, other_model, step)) for step in range(2, 4)]
    return {
        "kinds": state.keys() == loaded.keys() and len(state) == 3 * len(engine.parameters),
        "same": all(torch.equal(state[key], loaded[key]) for key in state),
        "shapes": all(value.shape == engine.shapes[name] for (name, _), value in loaded.items()),
        "not zero": all(value.abs().max().item() > 0 for value in state.values()),
        "loss": max(abs(a[0] - b[0]) / b[0] for a, b in pairs),
        "norm": max(abs(a[1] - b[1]) / b[1] for a, b in pairs),
        "after": largest(state_of(engine), state_of(other)),
        "steps": other.steps_done,
    }


class _Blank(Toy):
    """Other weights: what a load forgets shows."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            for p in self.parameters():
                p.fill_(0.25)


def move_all(rank: int, world_size: int, precision: str) -> dict:
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    return {(a, b): move(a, b, DTYPES[precision], topology) for a, b in MOVES}


GROUPS = [
    pytest.param(("fp32", 2), id="fp32-dp2"),
    pytest.param(("bf16", 2), id="bf16-dp2"),
    pytest.param(("fp32", 3), id="fp32-dp3", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=GROUPS)
def moved(request) -> list[dict]:
    precision, size = request.param
    return run_distributed(move_all, size, precision)


@pytest.mark.dist
@pytest.mark.parametrize(("source", "target"), MOVES, ids=[f"{a}to{b}" for a, b in MOVES])
def test_state_moves_from_any_stage_to_any_stage(moved, source, target):
    """Exactly, though no parameter's size divides by the number of ranks."""
    for seen in (rank[source, target] for rank in moved):
        assert seen["kinds"] and seen["same"] and seen["shapes"] and seen["not zero"]
        assert seen["loss"] < 5e-7 and seen["norm"] < 2e-7 and seen["after"] < 4e-6
        assert seen["steps"] == 4


def one_rank(rank: int, world_size: int) -> list[bool]:
    """Data parallel of one: the same engines, nothing to shard."""
    return [
        compare_with_plain(stage, DTYPES[precision], alone(), CLIP)["state"] < 4e-6 for stage, precision in RUNS
    ]


@pytest.mark.dist
def test_one_rank():
    assert run_distributed(one_rank, 1) == [[True] * len(RUNS)]


# --- with tensor and pipeline parallelism -----------------------------------------------------------------------------

LAYOUTS = {
    "tp2_pp2_tied": dict(tensor_parallel=2, pipeline_parallel=2, tied=True),
    "tp2_sp_dp2": dict(tensor_parallel=2, sequence_parallel=True),
    "pp2_dp2_tied": dict(pipeline_parallel=2, tied=True),
    "pp2_dp2_gpipe_chunks2": dict(pipeline_parallel=2, schedule="gpipe", chunks=2, layers=4),
}


def compare_layout(rank: int, world_size: int, stage: int, precision: str) -> dict:
    """A run on the layout against one rank (fp32) or against the plain engine on the same layout (bf16)."""
    results = {}
    for name, settings in LAYOUTS.items():
        config = tiny_config(precision=precision, zero=stage, **settings)  # type: ignore[arg-type]
        trained = train(config)
        plain = dataclasses.replace(config.parallel, zero=0)
        if precision == "fp32":
            model = {k: v for k, v in settings.items() if k in ("tied", "layers")}
            wanted = train(tiny_config(precision=precision, **model), alone())  # type: ignore[arg-type]
            weights = difference_from_whole(trained, wanted.weights())
        else:
            wanted = train(dataclasses.replace(config, parallel=plain))
            weights = largest(trained.weights(), wanted.weights())
        norm = max(abs(a - b) / b for a, b in zip(trained.norms, wanted.norms, strict=True))
        results[name] = norm, weights, min(wanted.norms)
    return results


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_layouts_of_four_ranks(stage, precision):
    for seen in run_distributed(compare_layout, 4, stage, precision):
        for layout, (norm, weights, smallest) in seen.items():
            assert smallest > 0.5, "the clipping must bite"
            assert norm < 1e-6, layout
            assert weights < 2e-6, layout
