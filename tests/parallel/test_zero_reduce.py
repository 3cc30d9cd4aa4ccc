"""Reduction in the backward, offload and node groups compute what the plain engine computes; only where things lie differs."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megalm.config.parallel import ParallelConfig
from megalm.doctor import missing_for_nvme
from megalm.errors import RunError
from megalm.parallel import zero_config
from megalm.parallel.engine import Engine, PlainEngine
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
    toy_groups,
    toy_step,
    train,
)

STEPS = 4
PRECISIONS = ("fp32", "bf16")
KINDS = {
    "zero2_microbatch": ParallelConfig(zero=2, zero_reduce="microbatch"),
    "zero3_microbatch": ParallelConfig(zero=3, zero_reduce="microbatch"),
    "zero1_cpu": ParallelConfig(zero=1, zero_offload="cpu"),
    "zero2_cpu": ParallelConfig(zero=2, zero_offload="cpu"),
    "zero3_cpu": ParallelConfig(zero=3, zero_offload="cpu"),
    "zero2_cpu_microbatch": ParallelConfig(zero=2, zero_offload="cpu", zero_reduce="microbatch"),
    "zero3_cpu_microbatch": ParallelConfig(zero=3, zero_offload="cpu", zero_reduce="microbatch"),
}
RUNS = list(itertools.product(KINDS, PRECISIONS))


def largest(a: dict, b: dict) -> float:
    return max(((a[key] - b[key]).abs().max() / b[key].abs().max().clamp(min=1.0)).item() for key in a)


def compare(parallel: ParallelConfig, dtype: torch.dtype, topology: Topology) -> dict:
    """Steps, then the state into a fresh engine, and one step more."""
    (plain_model, plain), (model, engine) = (toy_engine(kind, dtype, topology) for kind in (ParallelConfig(), parallel))
    wanted = [toy_step(plain, plain_model, step) for step in range(STEPS)]
    steps = [toy_step(engine, model, step) for step in range(STEPS)]
    norm = max(abs(a[1] - b[1]) / b[1] for a, b in zip(steps, wanted, strict=True))
    state = state_of(engine)
    result = {"norm": norm, "state": largest(state, state_of(plain))}
    other_model, other = toy_engine(parallel, dtype, topology)
    load_state(other, state, STEPS)
    result["loaded"] = largest(state_of(other), state)
    a, b = toy_step(other, other_model, STEPS)[1], toy_step(plain, plain_model, STEPS)[1]
    return result | {"after": abs(a - b) / b}


def held_behind_a_backward(parallel: ParallelConfig, topology: Topology) -> int:
    """Elements of gradients left on the parameters after the first microbatch."""
    model, engine = toy_engine(parallel, torch.float32, topology)
    with engine.accumulate():
        engine.scale_loss(model(torch.ones(1, 5)).sum()).backward()
        engine.after_backward()
        held = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    return held


def look(rank: int, world_size: int) -> dict:
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    seen: dict = {(name, p): compare(KINDS[name], DTYPES[p], topology) for name, p in RUNS}
    for zero, reduce in itertools.product((2, 3), ("step", "microbatch")):
        seen["held", zero, reduce] = held_behind_a_backward(ParallelConfig(zero=zero, zero_reduce=reduce), topology)
    return seen


@pytest.fixture(scope="module")
def by_rank() -> list[dict]:
    return run_distributed(look, 2)


@pytest.mark.dist
@pytest.mark.parametrize(("name", "precision"), RUNS)
def test_equals_the_plain_engine(by_rank, name, precision) -> None:
    for seen in (rank[name, precision] for rank in by_rank):
        assert seen["norm"] < 2e-7 and seen["state"] < 4e-6
        assert seen["loaded"] == 0.0
        assert seen["after"] < 5e-7


@pytest.mark.dist
@pytest.mark.parametrize("zero", [2, 3])
def test_gradients_leave_the_parameters_behind_each_backward(by_rank, zero) -> None:
    whole = sum(p.numel() for p in Toy().parameters())
    assert [rank["held", zero, "step"] for rank in by_rank] == [whole] * 2
    assert [rank["held", zero, "microbatch"] for rank in by_rank] == [0] * 2


TWO = {
    "tp2_sp_zero3": dict(tensor_parallel=2, sequence_parallel=True, zero=3, zero_reduce="microbatch"),
    "tp2_sp_zero2": dict(tensor_parallel=2, sequence_parallel=True, zero=2, zero_reduce="microbatch", tied=True),
    "pp2_gpipe_chunks2_zero3": dict(
        pipeline_parallel=2, schedule="gpipe", chunks=2, layers=4, zero=3, zero_reduce="microbatch"
    ),
    "pp2_tied_zero3_cpu": dict(pipeline_parallel=2, tied=True, zero=3, zero_offload="cpu"),
}
FOUR = {
    "pp2_interleaved": dict(pipeline_parallel=2, schedule="interleaved", chunks=2, layers=4),
    "pp2_bfs": dict(pipeline_parallel=2, schedule="bfs", chunks=2, layers=4),
    "pp2_1f1b": dict(pipeline_parallel=2),
    "tp2_sp": dict(tensor_parallel=2, sequence_parallel=True, tied=True),
}


def layouts(rank: int, world_size: int, settings: dict) -> dict:
    """Every layout against one rank (fp32), or against the plain engine on the same layout."""
    results = {}
    for name, values in settings.items():
        config = tiny_config(**values)
        config.kernels.fuse_projections = False  # ZeRO-3 cannot: in bf16 its rounding would differ
        trained = train(config)
        if config.train.precision == "fp32":
            wanted = train(tiny_config(**{k: v for k, v in values.items() if k in ("tied", "layers")}), alone())
            weights = difference_from_whole(trained, wanted.weights())
        else:
            plain = dict(zero=0, zero_reduce="step", zero_offload="none", zero_node_size=0)
            wanted = train(dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **plain)))
            weights = largest(trained.weights(), wanted.weights())
        norm = max(abs(a - b) / b for a, b in zip(trained.norms, wanted.norms, strict=True))
        results[name] = norm, weights, min(wanted.norms), second_copy(trained.engine)
    return results


def second_copy(engine: Engine) -> float | None:
    """The share of a parameter that this rank's second copy has after a forward; DeepSpeed drops it at each step."""
    parameter = next(iter(engine.parameters.values()))
    if getattr(parameter, "ds_zero_param_process_group", None) is None:
        return None
    parameter.all_gather()
    parameter.partition()
    return parameter.ds_secondary_tensor.numel() / parameter.ds_numel


def assert_equal(by_rank: list[dict]) -> None:
    for seen in by_rank:
        for layout, (norm, weights, smallest, _) in seen.items():
            assert smallest > 0.5, "the clipping must bite"
            assert norm < 1e-6 and weights < 2e-6, layout


@pytest.mark.dist
def test_partial_gradients_chunks_and_tied_copies() -> None:
    assert_equal(run_distributed(layouts, 2, TWO))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("zero", [2, 3])
def test_reduction_in_the_backward_on_four_ranks(zero, precision) -> None:
    more = dict(zero=zero, zero_reduce="microbatch", precision=precision)
    assert_equal(run_distributed(layouts, 4, {name: {**values, **more} for name, values in FOUR.items()}))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_split_backwards_on_four_ranks(zero, precision) -> None:
    """ZeRO-3 has released a weight when its gradient is computed."""
    two = dict(pipeline_parallel=2, chunks=2, layers=4)
    runs = {
        "zbh1": dict(pipeline_parallel=2, schedule="zbh1"),
        "zbv": dict(schedule="zbv", **two),
        "zbv_tied": dict(schedule="zbv", tied=True, **two),
        "dualpipev": dict(schedule="dualpipev", **two),
    }
    more = dict(zero=zero, precision=precision)
    assert_equal(run_distributed(layouts, 4, {name: {**values, **more} for name, values in runs.items()}))


@pytest.mark.dist
@pytest.mark.slow
def test_node_groups() -> None:
    """A second copy of the weights in each node: half of them where the node has two ranks."""
    runs = {
        "step": dict(zero=3, zero_node_size=2),
        "microbatch": dict(zero=3, zero_node_size=2, zero_reduce="microbatch"),
        "bf16": dict(zero=3, zero_node_size=2, precision="bf16"),
        "tp2": dict(zero=3, zero_node_size=2, tensor_parallel=2),
        "pp2": dict(zero=3, zero_node_size=2, pipeline_parallel=2),
    }
    by_rank = run_distributed(layouts, 4, runs)
    assert_equal(by_rank)
    assert all(share == 0.5 for rank in by_rank for *_, share in rank.values())


# --- disk -------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Large enough for DeepSpeed to use the disk: it leaves less than 1 MiB in memory."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.ModuleList([nn.Linear(256, 256) for _ in range(10)])
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def on_disk(rank: int, world_size: int, folder: str) -> dict:
    topology = build_topology(ParallelConfig(), torch.device("cpu"))
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(4, 256, generator=generator)

    def make(zero: int, name: str = ""):
        model = Wide()
        if zero == 0:
            return model, PlainEngine(toy_groups(model), adamw, topology, 0.5)
        parallel = ParallelConfig(zero=3, zero_offload="nvme", zero_offload_path=f"{folder}/{name}")
        return model, ZeroEngine(nn.ModuleList([model]), toy_groups(model), adamw, topology, 0.5, parallel)

    def step(model: nn.Module, engine) -> float:
        with engine.accumulate():
            engine.scale_loss(model(x).square().mean()).backward()
            engine.after_backward()
        return engine.step(LR).item()

    (plain_model, plain), (model, engine) = make(0), make(3, "first")
    norms = [(step(model, engine), step(plain_model, plain)) for _ in range(3)]
    used = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    state = state_of(engine)
    found = {"norm": max(abs(a - b) / b for a, b in norms), "state": largest(state, state_of(plain)), "bytes": used}
    other_model, other = make(3, "second")
    load_state(other, state, 3)
    a, b = step(other_model, other), step(plain_model, plain)
    return found | {"after": abs(a - b) / b}


@pytest.mark.dist
@pytest.mark.matrix  # its first start compiles for minutes
@pytest.mark.skipif(bool(missing_for_nvme()), reason="DeepSpeed's access to a disk cannot be built here")
def test_nvme(tmp_path: Path) -> None:
    for seen in run_distributed(on_disk, 2, str(tmp_path), timeout_seconds=900):
        assert seen["norm"] < 1e-6 and seen["state"] < 4e-6 and seen["after"] < 1e-6
        assert seen["bytes"] > 3 * 4 * 10 * 256 * 256 / 2, "master weights and moments lie on the disk"


def test_nvme_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(zero_config, "missing_for_nvme", lambda: ["libaio-dev", "g++"])
    with pytest.raises(RunError, match=r"libaio-dev and g\+\+ on every machine"):
        zero_config.prepare_nvme(str(tmp_path))
    monkeypatch.setattr(zero_config, "missing_for_nvme", list)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError):
        zero_config.prepare_nvme(str(tmp_path / "file" / "below"))
    zero_config.prepare_nvme(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()
