"""A split model computes what the whole one does: logits, every gradient's slice, names, and initial weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from megalm.config.run import RunConfig
from megalm.models.plans import PLANS
from megalm.models.registry import build_model
from megalm.parallel.collectives import all_gather
from megalm.parallel.tensor_parallel import Shard, apply_tensor_parallel, local_slice, shard_of, sum_partial_gradients
from megalm.parallel.topology import Topology, build_topology
from megalm.parallel.weight_gradients import WeightGradients
from megalm.testing import run_distributed
from megalm.train.build import build_stage
from tests.parallel.tiny import alone, loss_of, samples, tiny_config, whole_model

# architecture, sequence parallel, tied, odd: a vocabulary that does not divide, two key/value heads, overlap
CASES = list(itertools.product(("llama", "gpt"), (False, True), (False, True), (False, True)))
IDS = ["-".join([a, *(["sp"] if s else []), *(["odd"] if o else []), *(["tied"] if t else [])]) for a, s, t, o in CASES]
ODD_VOCAB = 41  # 4 ranks: 11, 11, 11 and 8 of 11 rows


def config_of(architecture: str, sequence_parallel: bool, tied: bool, odd: bool, size: int) -> RunConfig:
    config = tiny_config(architecture, tied, tensor_parallel=size, sequence_parallel=sequence_parallel)
    if odd:
        config.model.vocab_size, config.model.num_kv_heads = ODD_VOCAB, 2
    return config


def compare(architecture: str, sequence_parallel: bool, tied: bool, odd: bool, size: int) -> dict:
    config = config_of(architecture, sequence_parallel, tied, odd, size)
    return compare_models(config, WeightGradients(overlap=True) if odd else None)


def compare_models(config: RunConfig, queue: WeightGradients | None) -> dict:
    """On one rank: differences of the split model from the whole one, and what its parameters say of themselves."""
    topology = build_topology(config.parallel, torch.device("cpu"))
    whole, part = randomise(whole_model(config)), build_stage(config, topology, 0, 1, torch.float32, queue=queue)
    initial = whole_model(config)
    drawn = {n: torch.equal(p, slice_like(p, dict(initial.named_parameters())[n])) for n, p in part.named_parameters()}
    with torch.no_grad():  # norm scales and biases away from 1 and 0, where a mistake in them would not show
        for name, p in part.named_parameters():
            p.copy_(slice_like(p, dict(whole.named_parameters())[name]))
    tokens = samples(0, 2)
    logits = all_gather(part(tokens[:, :-1]).detach(), topology.tensor, dim=-1)[..., : config.model.vocab_size]
    loss, whole_loss = loss_of(part, tokens, topology, config), loss_of(whole, tokens, alone(), config)
    loss.backward()
    if queue is not None:
        queue.run_behind_collective()
    whole_loss.backward()
    before = {name: p.grad.clone() for name, p in part.named_parameters()}
    wanted = {name: slice_like(p, dict(whole.named_parameters())[name].grad) for name, p in part.named_parameters()}
    errors = {}
    for name, p in part.named_parameters():
        if shard_of(p).is_partial:
            sum_partial_gradients([p], [p.grad], topology.tensor)
        errors[name] = relative(p.grad, wanted[name])
    partial = sorted(n for n, p in part.named_parameters() if shard_of(p).is_partial)
    return {
        "names": list(before) == [name for name, _ in whole.named_parameters()],
        "drawn": sorted(name for name, same in drawn.items() if not same),
        "logits": relative(logits, whole(tokens[:, :-1]).detach()),
        "loss": abs(loss.item() - whole_loss.item()) / whole_loss.item(),
        "gradients": errors,
        "partial": partial,
        "partial alone": min((relative(before[n], wanted[n]) for n in partial), default=1.0),
        "held": sum(p.numel() for p in part.parameters()),
        "real": {n: shard_of(p).real(p).numel() // shard_of(p).copies for n, p in part.named_parameters()},
        "split": sorted(n for n, p in part.named_parameters() if shard_of(p).dim is not None),
    }


def randomise(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def slice_like(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    return local_slice(parameter, tuple(parameter.shape), whole)


def relative(x: Tensor, y: Tensor) -> float:
    """Largest difference as a share of the largest value."""
    assert x.shape == y.shape, f"{x.shape} is not {y.shape}"
    return ((x - y).abs().max() / y.abs().max().clamp(min=1e-9)).item()  # a rank may hold rows that no token uses


def compare_all(rank: int, world_size: int) -> dict:
    return {name: compare(*case, world_size) for name, case in zip(IDS, CASES, strict=True)}


@pytest.fixture(scope="module", params=[2, 4], ids=["tp2", "tp4"])
def by_rank(request) -> list[dict]:
    return run_distributed(compare_all, request.param)


@pytest.mark.dist
@pytest.mark.parametrize("case", IDS)
def test_split_model_equals_whole_model(by_rank, case):
    for result in (seen[case] for seen in by_rank):
        assert result["names"], "a parameter's name or place changed"
        assert result["drawn"] == [], "these initial weights are not slices of the one-rank model's"
        assert result["logits"] < 2e-6
        assert result["loss"] < 1e-6
        assert {n: e for n, e in result["gradients"].items() if not e < 1e-5 and not n.endswith("k.bias")} == {}


@pytest.mark.dist
@pytest.mark.parametrize("case", IDS)
def test_every_matrix_is_split_and_held_once(by_rank, case):
    """No rank holds more than its share of what the plan splits: a parameter left whole would pass the test above."""
    config = config_of(*CASES[IDS.index(case)], len(by_rank))
    shapes = {name: p.shape for name, p in whole_model(config).named_parameters()}
    whole = ("norm.weight", "norm.bias", "out.bias", "down.bias", "position_embedding.weight")
    split = sorted(name for name in shapes if not name.endswith(whole))
    for name, shape in shapes.items():
        held = [seen[case]["real"][name] for seen in by_rank]
        assert sum(held) == shape.numel() * (1 if name in split else len(by_rank)), name
    rows = -(-config.model.vocab_size // len(by_rank)) * config.model.hidden_size
    for result in (seen[case] for seen in by_rank):
        assert result["split"] == split
        kv = [n for n in split if n.split(".")[-2] in ("k", "v")]
        vocabulary = [n for n in split if n in ("embedding.weight", "head.weight")]
        copies = max(1, len(by_rank) // config.model.num_kv_heads)
        rest = set(shapes) - set(vocabulary)
        shares = {n: (copies if n in kv else 1) / (len(by_rank) if n in split else 1) for n in rest}
        assert result["held"] == rows * len(vocabulary) + sum(shapes[n].numel() * share for n, share in shares.items())


@pytest.mark.dist
@pytest.mark.parametrize("case", IDS)
def test_partial_marks_exactly_what_sees_a_slice(by_rank, case):
    """With sequence parallelism every whole parameter's own gradient is a part, which the sum over ranks completes."""
    result = by_rank[0][case]
    whole = set(result["gradients"]) - set(result["split"])
    copied = {n for n in result["split"] if n.split(".")[-2] in ("k", "v")} if "odd" in case and len(by_rank) == 4 else set()
    assert result["partial"] == sorted((whole if "-sp" in case else set()) | copied)
    if "-sp" in case:
        assert result["partial alone"] > 1e-2  # without the sum they would be wrong


def test_plan_does_nothing_in_a_group_of_one():
    config = tiny_config()
    model = build_model(config.model)
    before = [type(module) for module in model.modules()]
    apply_tensor_parallel(model, PLANS["llama"], alone())
    assert [type(module) for module in model.modules()] == before
    assert all(not hasattr(p, "shard") for p in model.parameters())


def two_ranks(rank: int, **other: bool) -> Topology:
    """A tensor group of two as one of them sees it; good for everything but communication."""
    from dataclasses import replace

    from megalm.parallel.topology import Group

    return replace(alone(), tensor=Group((0, 1), rank), **other)


def test_a_shape_that_does_not_divide_is_refused():
    model = nn.ModuleDict({"up": nn.Linear(4, 3)})
    with pytest.raises(AssertionError, match=r"\[3, 4\] does not divide by 2 along 0"):
        apply_tensor_parallel(model, {"up": "column"}, two_ranks(0))


def test_plan_names_match_whole_path_parts_only():
    """`norm` must not catch `attention_norm`, and a name matches only at a dot."""
    model = nn.ModuleDict({"a": nn.ModuleDict({"up": nn.Linear(4, 4), "wind_up": nn.Linear(4, 4)}), "up": nn.Linear(4, 4)})
    apply_tensor_parallel(model, {"up": "column"}, two_ranks(0))
    assert [n for n, p in model.named_parameters() if p.shape[0] == 2] == ["a.up.weight", "a.up.bias", "up.weight", "up.bias"]


def test_shards_say_which_rows_and_columns_they_are():
    model = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "embedding": nn.Embedding(10, 4)})
    apply_tensor_parallel(model, {"up": "column", "down": "row", "embedding": "vocab"}, two_ranks(1))
    shards = {name: shard_of(p) for name, p in model.named_parameters()}
    assert shards == {
        "up.weight": Shard((6, 4), 0, 3),
        "up.bias": Shard((6,), 0, 3),
        "down.weight": Shard((4, 6), 1, 3),
        "down.bias": Shard((4,)),
        "embedding.weight": Shard((10, 4), 0, 5),
    }
    whole = torch.arange(24).view(4, 6)
    assert torch.equal(local_slice(model["down"].weight, (4, 3), whole), whole[:, 3:])
    bias = torch.arange(4)
    assert local_slice(model["down"].bias, (4,), bias) is bias


def test_a_parameter_without_a_plan_is_whole():
    parameter = nn.Parameter(torch.zeros(2, 3))
    assert shard_of(parameter) == Shard((2, 3))


def test_sequence_slices_are_told_which_they_are():
    config = tiny_config("gpt")
    model = build_model(config.model)
    apply_tensor_parallel(model, PLANS["gpt"], two_ranks(1, sequence_parallel=True))
    told = {name: m.sequence_slice for name, m in model.named_modules() if hasattr(m, "sequence_slice")}
    assert len(told) == 2 + 2 * config.model.num_layers  # position embedding, dropout after it and on each branch
    assert set(told.values()) == {(1, 2)}
