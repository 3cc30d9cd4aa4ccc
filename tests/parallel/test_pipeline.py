"""The executor on several ranks leaves the gradients that one rank leaves, whatever the schedule and the cut."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from megalm.config.model import ModelConfig
from megalm.config.parallel import ParallelConfig
from megalm.models.registry import build_model
from megalm.parallel.pipeline import PipelineExecutor, Spec
from megalm.parallel.schedules import Schedule, build_schedule, forward_only
from megalm.parallel.split import even_split
from megalm.parallel.stages import apply_stage
from megalm.parallel.topology import Group, Topology, build_topology
from megalm.parallel.weight_gradients import WeightGradients
from megalm.testing import run_distributed
from megalm.train.build import build_stage
from tests.parallel.tiny import SEQ_LENGTH, alone, loss_of, samples, tiny_config, whole_model

LAYERS = 5  # divides by neither 2 nor 3
MICROBATCHES = (1, 5)
CASES = [("1f1b", 1), ("gpipe", 1), ("gpipe", 2), ("interleaved", 2), ("bfs", 2), ("zbh1", 1), ("zbv", 2), ("dualpipev", 2)]
V_SHAPED = ("zbv", "dualpipev")  # first and last stage on rank 0


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_stages_hold_every_parameter_once_under_its_own_name(architecture):
    config = tiny_config(architecture, layers=LAYERS).model
    names = []
    for stage in range(3):
        model = build_model(config)
        apply_stage(model, stage, even_split(LAYERS, 3))
        held = [name for name, _ in model.named_parameters()]
        assert any(n.startswith("embedding") for n in held) == (stage == 0)
        assert any(n.startswith(("norm", "head")) for n in held) == (stage == 2)
        names += held
    assert sorted(names) == sorted(name for name, _ in build_model(config).named_parameters())


def test_one_stage_is_the_whole_model():
    config = ModelConfig(hidden_size=8, num_heads=2, num_layers=2, vocab_size=8)
    model = build_model(config)
    apply_stage(model, 0, [2])
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in build_model(config).named_parameters()]


# --- running ----------------------------------------------------------------------------------------------------------


def run_model(topology: Topology, schedule: Schedule, tokens: Tensor) -> tuple[list, dict, list]:
    """Losses by microbatch, gradients by name, and the calls in order, of this rank's part."""
    config = tiny_config("gpt", layers=LAYERS)
    stages = schedule.num_stages
    mine = schedule.stages_of(topology.pipeline.rank)
    queue = WeightGradients()
    chunks = [build_stage(config, topology, stage, stages, torch.float32, queue=queue) for stage in mine]
    calls: list[tuple[int, int, bool]] = []

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        calls.append((stage, microbatch, torch.is_grad_enabled()))
        part = tokens[microbatch : microbatch + 1]
        if stage == stages - 1 and hidden is None:
            return loss_of(chunks[0], part, topology)
        y = chunks[mine.index(stage)](part[:, :-1] if hidden is None else hidden, torch.arange(SEQ_LENGTH))
        if stage < stages - 1:
            return y
        return nn.functional.cross_entropy(y.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")

    hidden = Spec((1, SEQ_LENGTH, config.model.hidden_size), torch.float32)
    executor = PipelineExecutor(schedule, topology.pipeline, lambda s, m: [hidden], torch.device("cpu"), queue)
    losses = executor.run(forward)
    assert not (executor._inputs or executor._roots or executor._ready or executor._received), "something was left over"
    grads = {name: p.grad for chunk in chunks for name, p in chunk.named_parameters()}
    return [loss.item() for loss in losses], grads, calls


@functools.cache
def reference(microbatches: int) -> tuple[list, dict[str, Tensor]]:
    """One plain loop over the microbatches with the whole model."""
    model, losses = whole_model(tiny_config("gpt", layers=LAYERS)), []
    for part in samples(0, microbatches).split(1):
        losses.append(loss_of(model, part, alone()))
        losses[-1].backward()
    return [loss.item() for loss in losses], {name: p.grad for name, p in model.named_parameters()}


def largest_error(grads: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    scale = max(g.abs().max().item() for g in wanted.values())
    return max((grads[name] - wanted[name]).abs().max().item() for name in grads) / scale


def compare_all(rank: int, world_size: int) -> dict:
    topology = build_topology(ParallelConfig(pipeline_parallel=world_size), torch.device("cpu"))
    results = {}
    for name, chunks in CASES:
        for m in MICROBATCHES:
            if world_size * chunks > LAYERS:
                continue
            losses, grads, _ = run_model(topology, build_schedule(name, world_size, m, chunks), samples(0, m))
            wanted_losses, wanted = reference(m)
            results[name, chunks, m] = losses, wanted_losses, largest_error(grads, wanted), sorted(grads)
    for chunks in (1, 2):
        if world_size * chunks <= LAYERS:
            with torch.no_grad():
                results["evaluation", chunks] = run_model(topology, forward_only(world_size, 4, chunks), samples(0, 4))
    return results


@pytest.fixture(scope="module", params=[2, 3], ids=["pp2", "pp3"])
def by_rank(request) -> list[dict]:
    return run_distributed(compare_all, request.param)


@pytest.mark.dist
def test_gradients_and_losses_equal_one_rank(by_rank):
    cases = [key for key in by_rank[0] if key[0] != "evaluation"]
    assert len(cases) == len(MICROBATCHES) * sum(len(by_rank) * chunks <= LAYERS for _, chunks in CASES)
    for key in cases:
        names = []
        for rank, seen in enumerate(by_rank):
            losses, wanted_losses, error, held = seen[key]
            has_loss = rank == (0 if key[0] in V_SHAPED else len(by_rank) - 1)
            assert error < 1e-6, (key, rank)
            assert losses == (pytest.approx(wanted_losses, rel=1e-6) if has_loss else []), (key, rank)
            names += held
        assert sorted(names) == sorted(reference(1)[1]), key  # all layers are somewhere, once


@pytest.mark.dist
def test_evaluation_runs_forwards_only_and_keeps_no_graph(by_rank):
    wanted, _ = reference(4)
    for key in (key for key in by_rank[0] if key[0] == "evaluation"):
        for rank, seen in enumerate(by_rank):
            losses, grads, calls = seen[key]
            assert losses == (pytest.approx(wanted, rel=1e-6) if rank == len(by_rank) - 1 else [])
            assert set(grads.values()) == {None}
            actions = forward_only(len(by_rank), 4, key[1]).actions[rank]
            assert calls == [(action.stage, action.microbatch, False) for action in actions]


@pytest.mark.parametrize(("name", "chunks"), CASES)
def test_one_rank_needs_no_process_group(name, chunks):
    losses, grads, calls = run_model(alone(), build_schedule(name, 1, 3, chunks), samples(0, 3))
    wanted_losses, wanted = reference(3)
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    assert largest_error(grads, wanted) < 1e-6
    assert len(calls) == 3 * chunks


def executor_of(schedule: Schedule) -> PipelineExecutor:
    """On one rank nothing crosses a boundary."""
    return PipelineExecutor(schedule, Group((0,), 0), lambda stage, microbatch: [], torch.device("cpu"))


def test_losses_come_in_order_of_microbatch_not_of_time():
    schedule = Schedule(1, 1, 3, (tuple(forward_only(1, 3).actions[0][i] for i in (2, 0, 1)),), trains=False)
    executor = executor_of(schedule)
    with torch.no_grad():
        assert [t.item() for t in executor.run(lambda stage, m, hidden: torch.tensor(float(m)))] == [0.0, 1.0, 2.0]


def test_an_executor_runs_many_steps():
    executor = executor_of(build_schedule("gpipe", 1, 2, 2))
    weight = nn.Parameter(torch.tensor([2.0]))

    def forward(stage: int, microbatch: int, hidden: Tensor | None) -> Tensor:
        return weight if hidden is None else (hidden * (microbatch + 1.0)).sum()

    for step in (1, 2):
        assert [t.item() for t in executor.run(forward)] == [2.0, 4.0]
        assert weight.grad is not None and weight.grad.item() == 3.0 * step
