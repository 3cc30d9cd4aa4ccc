"""Experts on several ranks train as on one: every gradient, the norm, what is dropped, the biases and the loads that are told."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megalm.config.layouts import with_layout
from megalm.config.run import RunConfig
from megalm.data.loader import Batch
from megalm.models.router import routers_of
from megalm.parallel.collectives import all_reduce
from megalm.parallel.engine import shape_of
from megalm.parallel.tensor_parallel import local_slice, shard_of
from megalm.parallel.topology import Topology, build_topology
from megalm.testing import run_distributed
from megalm.train.build import build_engine, build_forward, build_places, build_stage
from megalm.train.routing import Routing
from tests.parallel.tiny import LR, SEQ_LENGTH, alone, samples, tiny_config

EXPERTS = {"num_experts": 4, "expert_ffn_size": 20, "num_dense_layers": 1}
BALANCED = {"router_score": "sigmoid", "num_shared_experts": 1, "router_balance_rate": 0.01, "capacity_factor": 0.75}
LOSSES = {"router_aux_loss": 0.3, "router_z_loss": 0.1}
# layout: the model's settings; with `starved`, no token goes to the second half of the experts
CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "dropless": ("dp2_ep2", LOSSES),
        "balanced": ("dp2_ep2", BALANCED),
        "starved": ("dp2_ep2", {**LOSSES, "num_shared_experts": 1}),
        "tensor": ("tp2", {**LOSSES, **BALANCED}),
        "sequence": ("tp2_sp", {**LOSSES, "num_shared_experts": 2}),
        "ring": ("cp2_ring_ep2", {**LOSSES, **BALANCED}),
        "ulysses": ("cp2_ulysses", {**LOSSES, "capacity_factor": 0.5}),
    },
    4: {
        "tensor": ("tp2_dp2_ep2", {**LOSSES, **BALANCED}),
        "two copies": ("dp4_ep2", {**LOSSES, **BALANCED}),
        "four, dropless": ("dp4_ep4", LOSSES),
        "context": ("cp2_ring_dp2_ep4", {**LOSSES, **BALANCED}),
    },
}
STEPS = 2


def config_of(layout: str, settings: dict[str, Any]) -> RunConfig:
    config = with_layout(tiny_config(batch=8), layout)
    model = replace(config.model, **EXPERTS, **settings)
    return replace(
        config,
        model=model,
        train=replace(config.train, micro_batch_size=2, steps=STEPS, log_every=1),
        data=replace(config.data, seq_length=SEQ_LENGTH),
    )


def train(config: RunConfig, topology: Topology, starved: bool) -> dict[str, Any]:
    """What STEPS optimizer steps leave behind on one rank; gradients are those of the first step."""
    chunks = nn.ModuleList([build_stage(config, topology, 0, 1, torch.float32)])
    engine = build_engine(config, topology, chunks)
    if starved:
        for router in routers_of(chunks).values():
            router.balance[2:] = -10.0
    schedule = SimpleNamespace(num_stages=1)
    job: Any = SimpleNamespace(
        config=config,
        topology=topology,
        stages=[0],
        chunks=chunks,
        engine=engine,
        executor=SimpleNamespace(schedule=schedule),
        positions=build_places(config, topology),
        routers=routers_of(chunks),
    )
    told: list[dict[str, Any]] = []
    hook = Routing(SimpleNamespace(write=told.append))  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(job=job, config=config, topology=topology, state=SimpleNamespace(step=0))
    hook.on_start(trainer)
    left: dict[str, Any] = {"told": told, "losses": [], "norms": []}
    for step in range(STEPS):
        hook.before_step(trainer)
        batches, losses = batches_of(config, topology, step), list[Tensor]()
        forward = build_forward(job, batches, torch.tensor(8.0 * SEQ_LENGTH), losses)
        with engine.accumulate():
            for microbatch in range(len(batches)):
                forward(0, microbatch, None).backward()
        if step == 0:
            left["gradients"] = {name: engine.gradient(name).clone() for name in engine.parameters}
        left["norms"].append(engine.step(LR).item())
        left["losses"].append(all_reduce(torch.stack(losses).sum(), topology.data).item())
        trainer.state.step += 1
        hook.after_step(trainer, SimpleNamespace(skipped=False))  # type: ignore[arg-type]
    left["weights"] = {name: engine.read(name, "weight").clone() for name in engine.parameters}
    left["balance"] = {layer: router.balance.clone() for layer, router in routers_of(chunks).items()}
    left["parameters"] = engine.parameters
    return left


def batches_of(config: RunConfig, topology: Topology, step: int) -> list[Batch]:
    whole = samples(step, 8).chunk(topology.batch.size)[topology.batch.rank]
    places = build_places(config, topology)
    numbers = torch.zeros(2, dtype=torch.int64)
    return [Batch(part[:, places], part[:, places + 1], numbers) for part in whole.split(2)]


def compare(config: RunConfig, starved: bool) -> dict[str, Any]:
    """On one rank: differences from the same steps without any parallelism."""
    topology = build_topology(config.parallel, torch.device("cpu"))
    mine, again = (train(config, topology, starved) for _ in range(2))
    single = train(with_layout(config, "single"), alone(), starved)
    gradients, weights = {}, {}
    for name, p in mine["parameters"].items():
        slices = [local_slice(p, shape_of(p), single[kind][name]) for kind in ("gradients", "weights")]
        size = single["gradients"][name].abs().max()
        gradients[name] = ((mine["gradients"][name] - slices[0]).abs().max() / size).item()
        weights[name] = (mine["weights"][name] - slices[1]).abs().max().item()
    return {
        "gradients": gradients,
        "weights": weights,
        "size": {name: single["gradients"][name].abs().max().item() for name in gradients},
        "norms": [abs(a / b - 1) for a, b in zip(mine["norms"], single["norms"], strict=True)],
        "losses": [abs(a - b) for a, b in zip(mine["losses"], single["losses"], strict=True)],
        "balance": all(torch.equal(mine["balance"][layer], b) for layer, b in single["balance"].items()),
        "moved": bool(torch.stack([*mine["balance"].values()]).any()),
        "told": (mine["told"], single["told"]),
        "same again": all(torch.equal(mine["weights"][name], again["weights"][name]) for name in weights),
        "held": {name: tuple(p.shape) for name, p in mine["parameters"].items() if "experts." in name},
        "dealt out": {
            n: g.abs().max().item() for n, g in mine["gradients"].items() if shard_of(mine["parameters"][n]).first_expert
        },
    }


def compare_all(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    return {name: compare(config_of(*case), name == "starved") for name, case in CASES[world_size].items()}


@pytest.fixture(scope="module", params=CASES, ids=[f"{size}_ranks" for size in CASES])
def by_rank(request: pytest.FixtureRequest) -> list[dict]:
    return run_distributed(compare_all, request.param)


@pytest.mark.dist
def test_many_ranks_train_as_one(by_rank: list[dict]) -> None:
    for name in by_rank[0]:
        for seen in (results[name] for results in by_rank):
            assert {n: e for n, e in seen["gradients"].items() if not e < 2e-5} == {}, name
            assert {n: e for n, e in seen["weights"].items() if not e < 2e-6} == {}, name
            assert max(seen["norms"]) < 1e-5 and max(seen["losses"]) < 1e-5, name
            assert min(seen["size"].values()) > 1e-6, f"{name}: a gradient shows nothing"
            assert seen["balance"], f"{name}: the biases differ"
            assert seen["moved"] == (name == "starved" or "router_balance_rate" in CASES[len(by_rank)][name][1]), name
            assert seen["same again"], f"{name}: two runs differ"


@pytest.mark.dist
def test_loads_are_told_of_the_whole_batch(by_rank: list[dict]) -> None:
    for name, (mine, single) in ((name, seen["told"]) for results in by_rank for name, seen in results.items()):
        assert len(mine) == len(single) == STEPS, name
        for a, b in zip(mine, single, strict=True):
            assert sorted(a["moe_layers"]) == [1] and a["moe_worst_layer"] == 1, name
            for key in ("load", "dropped"):
                assert a["moe_layers"][1][key] == b["moe_layers"][1][key], name
            for key in ("entropy", "aux_loss", "z_loss"):
                assert a[f"moe_{key}"] == pytest.approx(b[f"moe_{key}"], rel=1e-5) and b[f"moe_{key}"] > 0.1, name
            settings = CASES[len(by_rank)][name][1]
            assert (b["moe_dropped"] > 0) == ("capacity_factor" in settings), f"{name}: {b}"


@pytest.mark.dist
def test_each_rank_holds_its_share_of_the_experts(by_rank: list[dict]) -> None:
    for name, seen in ((name, seen) for results in by_rank for name, seen in results.items()):
        parallel = config_of(*CASES[len(by_rank)][name]).parallel
        number, inner = 4 // parallel.expert_parallel, 20 // parallel.tensor_parallel
        assert sorted(set(seen["held"].values())) == sorted({(number, inner, 32), (number, 32, inner)}), name


@pytest.mark.dist
def test_a_rank_without_tokens_has_gradients_of_zero(by_rank: list[dict]) -> None:
    if "starved" in by_rank[1]:
        found = by_rank[1]["starved"]["dealt out"]
        assert found == {f"layers.1.mlp.experts.{name}": 0.0 for name in ("gate", "up", "down")}
