"""The loss scale's policy, and fp16 in every engine: all ranks skip together, and skipped steps leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.engine import PlainEngine
from megalm.parallel.loss_scale import LossScale
from megalm.parallel.topology import Topology, build_topology
from megalm.parallel.zero import ZeroEngine
from megalm.testing import run_distributed
from tests.parallel.tiny import Toy, adamw, alone, load_state, state_of, tiny_config, toy_groups, toy_step, train

STEPS, POISONED = 6, 2
ENGINES = {
    "zero0": ParallelConfig(),
    "zero1": ParallelConfig(zero=1),
    "zero2": ParallelConfig(zero=2),
    "zero3": ParallelConfig(zero=3),
    "zero2_microbatch": ParallelConfig(zero=2, zero_reduce="microbatch"),
    "zero3_microbatch": ParallelConfig(zero=3, zero_reduce="microbatch"),
    "zero2_cpu": ParallelConfig(zero=2, zero_offload="cpu"),
    "zero3_cpu": ParallelConfig(zero=3, zero_offload="cpu"),
}


def test_policy() -> None:
    scale, seen = LossScale(8.0, window=2), []
    for overflow in (False, False, True, True, False, True, False, False):
        scale.update(overflow)
        seen.append((scale.scale, scale.clean_steps))
    assert seen == [(8, 1), (16, 0), (8, 0), (4, 0), (4, 1), (2, 0), (2, 1), (4, 0)]


def build(parallel: ParallelConfig, topology: Topology, accumulate_fp32: bool = True, first: float = 2.0**10):
    model, scale = Toy().half(), LossScale(first, window=2)
    groups, clip = toy_groups(model), 0.5
    if parallel.zero == 0:
        return model, PlainEngine(groups, adamw, topology, clip, None, scale, accumulate_fp32)
    engine = ZeroEngine(nn.ModuleList([model]), groups, adamw, topology, clip, parallel, None, scale, accumulate_fp32)
    return model, engine


def poisoned_run(parallel: ParallelConfig, topology: Topology, accumulate_fp32: bool = True) -> dict:
    """+inf in one element of one gradient on the last rank, in one step."""
    model, engine = build(parallel, topology, accumulate_fp32)
    poison = [False]

    def infect(gradient: Tensor) -> Tensor | None:
        if not (poison[0] and topology.data.is_last):
            return None
        gradient = gradient.clone()
        gradient[2, 3] = torch.inf
        return gradient

    model.first.weight.register_hook(infect)
    norms, scales, told = [], [], []
    for step in range(STEPS):
        poison[0] = step == POISONED
        before = state_of(engine) if poison[0] else {}
        scales.append(engine.loss_scale.scale)
        norms.append(toy_step(engine, model, step)[1])
        told.append((engine.skipped, engine.steps_done))
        if poison[0]:
            after = state_of(engine)
            kept = all(torch.equal(before[key], after[key]) for key in before)
    return {"norms": norms, "scales": scales, "told": told, "kept": kept, "state": state_of(engine)}


def look(rank: int, world_size: int) -> dict:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True  # DeepSpeed refuses fp16 on a CPU, which can do it, only slowly
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    seen = {name: poisoned_run(parallel, topology) for name, parallel in ENGINES.items()}
    low = {name: poisoned_run(ENGINES[name], topology, False) for name in ("zero0", "zero1", "zero3", "zero2_microbatch")}
    moved = {}
    for name in ("zero0", "zero3"):
        model, engine = build(ENGINES[name], topology, first=2.0**4)
        load_state(engine, seen["zero1"]["state"], 5)
        engine.loss_scale.scale = 2.0**7  # what a checkpoint restores
        engine.finish_load()
        moved[name] = toy_step(engine, model, STEPS)
    return {"fp16": seen, "low": low, "moved": moved}


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    return run_distributed(look, 2)


def largest(a: dict, b: dict) -> float:
    return max((a[key] - b[key]).abs().max().item() for key in a)


@pytest.mark.dist
@pytest.mark.parametrize("name", ENGINES)
def test_all_ranks_skip_and_go_on_alike(by_rank, name) -> None:
    for seen in (rank["fp16"][name] for rank in by_rank):
        assert seen["scales"] == [1024, 1024, 2048, 1024, 1024, 2048]
        assert seen["told"] == [(False, 1), (False, 2), (True, 2), (False, 3), (False, 4), (False, 5)]
        assert seen["kept"], "weights and moments are as before the skipped step"
        assert [norm == torch.inf for norm in seen["norms"]] == [step == POISONED for step in range(STEPS)]
        plain = by_rank[0]["fp16"]["zero0"]
        assert seen["norms"] == pytest.approx(plain["norms"], rel=5e-7)
        assert largest(seen["state"], plain["state"]) < 4e-6


@pytest.mark.dist
@pytest.mark.parametrize("name", ["zero1", "zero3", "zero2_microbatch"])
def test_accumulation_in_fp16(by_rank, name) -> None:
    """Close to fp32, not equal: what is added up is rounded."""
    for rank in by_rank:
        exact, plain, seen = rank["fp16"]["zero0"], rank["low"]["zero0"], rank["low"][name]
        assert seen["told"] == plain["told"] == exact["told"]
        assert seen["norms"] == pytest.approx(plain["norms"], rel=1e-3)
        assert largest(seen["state"], plain["state"]) < 1e-3
        assert plain["norms"] != exact["norms"] and plain["norms"] == pytest.approx(exact["norms"], rel=1e-2)


@pytest.mark.dist
def test_a_restored_scale_is_used(by_rank) -> None:
    for rank in by_rank:
        assert rank["moved"]["zero3"] == pytest.approx(rank["moved"]["zero0"], rel=1e-6)


def test_a_scale_too_large_is_found_by_halving() -> None:
    model, engine = build(ParallelConfig(), alone(), first=2.0**40)
    skipped = 0
    while (toy_step(engine, model, 0), engine.skipped)[1]:
        skipped += 1
    assert 10 < skipped < 40
    assert engine.loss_scale.scale == 2.0 ** (40 - skipped)
    assert engine.steps_done == 1


LAYOUTS = {"tp2": dict(tensor_parallel=2), "pp2": dict(pipeline_parallel=2), "dp2": {}}


def overflow_in(rank: int, world_size: int) -> dict:
    """A loss scale that overflows at first: who skips, on each layout."""
    seen = {}
    for name, settings in LAYOUTS.items():
        config = tiny_config(precision="fp16", **settings)  # type: ignore[arg-type]
        config.train.loss_scale, config.train.loss_scale_window = 2.0**24, 2
        trained = train(config, steps=10)
        engine = trained.engine
        seen[name] = trained.norms, engine.steps_done, engine.loss_scale.scale
    return seen


@pytest.mark.dist
def test_ranks_of_a_model_skip_together() -> None:
    first, second = run_distributed(overflow_in, 2)
    assert first == second
    for norms, steps_done, scale in first.values():
        assert 0 < steps_done < 10
        assert norms.count(torch.inf) == 10 - steps_done
        assert scale < 2.0**24
