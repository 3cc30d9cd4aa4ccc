"""PlainEngine against torch's own AdamW and clipping, and the global norm on layouts where elements live more than once."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.parallel.engine import MOMENTS, WEIGHT, ParameterGroup, PlainEngine
from megalm.parallel.topology import build_topology
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
    toy_groups,
    toy_losses,
    toy_step,
    train,
)

STEPS, CLIP = 4, 0.5
PRECISIONS = {name: DTYPES[name] for name in ("fp32", "bf16")}
DTYPE = pytest.mark.parametrize("dtype", list(PRECISIONS.values()), ids=list(PRECISIONS))


def reference(dtype: torch.dtype, clip: float = CLIP) -> tuple[list[float], list[float], dict[tuple[str, str], Tensor]]:
    """Losses, norms and state of torch's AdamW: fp32 masters, gradients summed in fp32, weights rounded to dtype."""
    model, losses, norms = Toy().to(dtype), [], []
    masters = {name: nn.Parameter(p.detach().float()) for name, p in model.named_parameters()}
    decay = {True: 0.1, False: 0.0}
    optimizer = torch.optim.AdamW(
        [{"params": [m], "weight_decay": decay[m.dim() > 1]} for m in masters.values()], lr=LR, betas=(0.9, 0.95), eps=1e-8
    )
    for step in range(STEPS):
        optimizer.zero_grad()
        losses.append(0.0)
        for loss in toy_losses(model, step, dtype):
            losses[-1] += loss.item()
            for (_, master), grad in zip(masters.items(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
                master.grad = grad.float() if master.grad is None else master.grad + grad.float()
        norms.append(nn.utils.clip_grad_norm_(masters.values(), clip or 1e9).item())
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    state = {(name, WEIGHT): m.detach() for name, m in masters.items()}
    return losses, norms, state | {(name, kind): optimizer.state[m][kind] for name, m in masters.items() for kind in MOMENTS}


def build(dtype: torch.dtype, topology=None, clip: float = CLIP) -> tuple[Toy, PlainEngine]:
    model = Toy().to(dtype)
    return model, PlainEngine(toy_groups(model), adamw, topology or alone(), clip)


@DTYPE
@pytest.mark.parametrize("clip", [CLIP, 0.0, 1e3], ids=["clip", "off", "loose"])
def test_equals_torch_adamw_with_clipping(dtype, clip):
    model, engine = build(dtype, clip=clip)
    steps = [toy_step(engine, model, step) for step in range(STEPS)]
    losses, norms, state = reference(dtype, clip)
    assert min(norms) > CLIP, "the clipping must bite"
    assert [loss for loss, _ in steps] == pytest.approx(losses, rel=1e-6)
    assert [norm for _, norm in steps] == pytest.approx(norms, rel=1e-6)
    for (name, kind), wanted in state.items():  # the moments too: Adam's step hides a wrong scale of all gradients
        assert engine.read(name, kind).dtype == torch.float32
        torch.testing.assert_close(engine.read(name, kind), wanted, rtol=1e-5, atol=2e-6)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, engine.read(name, WEIGHT).to(dtype))
    assert engine.steps_done == STEPS


def test_fp32_weights_are_held_once():
    _, engine = build(torch.float32)
    flats = {flat.untyped_storage().data_ptr() for flat in engine.flat_weights}
    assert {p.untyped_storage().data_ptr() for p in engine.parameters.values()} == flats


def test_each_step_starts_from_zero_gradients():
    model, engine = build(torch.float32)
    first = toy_step(engine, model, 0)[1]
    load_state(engine, {(name, WEIGHT): p.detach() for name, p in Toy().named_parameters()}, 0)
    assert toy_step(engine, model, 0)[1] == first  # the same weights and data again


def single(dtype: torch.dtype, topology=None) -> tuple[nn.Parameter, PlainEngine]:
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    return weight, PlainEngine([ParameterGroup({"w": weight}, 0.0)], adamw, topology or alone(), 0.0)


def test_bf16_gradients_accumulate_in_fp32():
    """300 gradients of 1: bf16, whose neighbours at 256 are 2 apart, would stay at 256."""
    weight, engine = single(torch.bfloat16)
    with engine.accumulate():
        for _ in range(300):
            (weight[0] * 1.0).backward()
    assert engine.gradients["w"].tolist() == [300.0, 0.0, 0.0]
    assert engine.step(LR).item() == 300.0


def test_bf16_master_keeps_what_rounding_would_lose():
    weight, engine = single(torch.bfloat16)
    for _ in range(3):
        with engine.accumulate():
            weight.sum().backward()
        engine.step(1e-4)  # 1 - 1e-4 rounds to 1 in bf16
    assert weight.tolist() == [1.0] * 3
    assert engine.read("w", WEIGHT).tolist() == pytest.approx([1 - 3e-4] * 3, abs=1e-6)


@DTYPE
def test_read_and_write_carry_a_run_on_exactly(dtype):
    model, engine = build(dtype)
    for step in range(2):
        toy_step(engine, model, step)
    other_model, other = build(dtype)
    with torch.no_grad():
        for p in other_model.parameters():
            p.zero_()  # nothing may be left of what was there
    load_state(other, state_of(engine), engine.steps_done)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other_model.parameters(), strict=True))
    for step in range(2, 4):
        assert toy_step(engine, model, step) == toy_step(other, other_model, step)
    before, after = state_of(engine), state_of(other)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert other.steps_done == 4


def test_moments_are_those_of_their_parameter():
    model, engine = build(torch.float32, clip=0.0)
    toy_step(engine, model, 0)
    for name, gradient in engine.gradients.items():
        torch.testing.assert_close(engine.read(name, MOMENTS[0]), 0.1 * gradient)
        torch.testing.assert_close(engine.read(name, MOMENTS[1]), 0.05 * gradient.square())


# --- several ranks ----------------------------------------------------------------------------------------------------


def data_parallel(rank: int, world_size: int) -> dict:
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    results: dict = {}
    for name, dtype in PRECISIONS.items():
        model, engine = build(dtype, topology)
        steps = [toy_step(engine, model, step) for step in range(STEPS)]
        results[name] = steps, {n: engine.read(n, WEIGHT).tolist() for n in engine.parameters}
    weight, engine = single(torch.bfloat16, topology)
    with engine.accumulate():
        (weight[0] * (256.0 if rank == 0 else 1.0)).backward()
    results["reduced"] = engine.gradients["w"][0].item()
    return results


@pytest.fixture(scope="module")
def two_copies() -> list[dict]:
    return run_distributed(data_parallel, 2)


@pytest.mark.dist
@pytest.mark.parametrize("precision", PRECISIONS)
def test_two_copies_equal_one_process(two_copies, precision):
    losses, norms, state = reference(DTYPES[precision])
    steps = [seen[precision][0] for seen in two_copies]
    assert [a[0] + b[0] for a, b in zip(*steps, strict=True)] == pytest.approx(losses, rel=1e-5)
    for seen in two_copies:
        assert [norm for _, norm in seen[precision][0]] == pytest.approx(norms, rel=1e-5 if precision == "fp32" else 1e-2)
        assert seen[precision][1] == two_copies[0][precision][1]  # the copies stay equal bit by bit
    if precision == "fp32":  # in bf16 the microbatches are cut elsewhere and round elsewhere
        for name, value in two_copies[0]["fp32"][1].items():
            torch.testing.assert_close(torch.tensor(value), state[name, WEIGHT], rtol=0, atol=4e-5)


@pytest.mark.dist
def test_bf16_gradients_are_reduced_in_fp32(two_copies):
    assert [seen["reduced"] for seen in two_copies] == [257.0, 257.0]  # 257 does not exist in bf16


LAYOUTS_2 = {
    "tp2": dict(tensor_parallel=2),
    "tp2_sp_tied": dict(tensor_parallel=2, sequence_parallel=True, tied=True),
    "pp2": dict(pipeline_parallel=2),
    "pp2_tied": dict(pipeline_parallel=2, tied=True),
}
LAYOUTS_4 = {
    "tp2_pp2_tied": dict(tensor_parallel=2, pipeline_parallel=2, tied=True),
    "tp2_sp_dp2": dict(tensor_parallel=2, sequence_parallel=True),
    "pp2_dp2_tied_gpipe_chunks2": dict(pipeline_parallel=2, tied=True, schedule="gpipe", chunks=2, layers=4),
}


def compare_layouts(rank: int, world_size: int) -> dict:
    results = {}
    for name, settings in (LAYOUTS_2 if world_size == 2 else LAYOUTS_4).items():
        model = {k: v for k, v in settings.items() if k in ("tied", "layers")}
        one = train(tiny_config(**model), alone())
        trained = train(tiny_config(**settings))  # type: ignore[arg-type]
        pairs = zip(trained.norms, one.norms, strict=True)
        results[name] = max(abs(a - b) / b for a, b in pairs), difference_from_whole(trained, one.weights()), min(one.norms)
    return results


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, 4])
def test_norm_counts_every_element_once_and_weights_follow(size):
    for seen in run_distributed(compare_layouts, size):
        for layout, (norm_error, weight_error, smallest) in seen.items():
            assert smallest > 0.5, "the clipping must bite, or a wrong norm would not change the weights"
            assert norm_error < 1e-6, layout
            assert weight_error < 2e-6, layout


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_a_group_lie_one_behind_the_other(precision: str) -> None:
    """So that projections of one input can be one matrix product without a copy."""
    model = Toy().to(PRECISIONS[precision])
    engine = PlainEngine(toy_groups(model), adamw, alone(), 0.5)
    for group in engine.groups:
        parameters = list(group.parameters.values())
        for a, b in itertools.pairwise(parameters):
            assert b.data_ptr() == a.data_ptr() + a.numel() * a.element_size()
    toy_step(engine, model, 0)
    for name, parameter in engine.parameters.items():
        assert torch.equal(parameter, engine.read(name, "weight").to(parameter.dtype)), name
