"""Recomputed activations: the same numbers to the last bit, less memory, and nothing expensive done twice."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalm.config.layouts import with_layout
from megalm.config.model import ModelConfig
from megalm.models.activations import Setting, block_tape
from megalm.models.count import EVERYTHING, count_block_activations
from megalm.models.init import initial_value
from megalm.models.layers import FusesProjections
from megalm.models.plans import PLANS
from megalm.models.registry import build_model
from megalm.parallel.collectives import all_reduce
from megalm.parallel.recompute import PRODUCTS, apply_recompute
from megalm.parallel.tensor_parallel import apply_tensor_parallel
from megalm.parallel.topology import Group, Topology, build_topology
from megalm.testing import run_distributed
from megalm_kernels import use
from tests.parallel.tiny import alone, tiny_config, train

PARTS = ["attention", "mlp", "norms"]
MODES = [("full", 1), ("selective", 1), ("full", 2), ("modules", 1), ("selective", 3)]
BATCH, LENGTH = 2, 64


class Count(TorchDispatchMode):
    """Counts matrix products, attentions and collectives that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.collectives = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += operation in PRODUCTS
        self.collectives += operation.namespace == "c10d"
        return operation(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Counts megalm's own operators that really run."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "megalm":
            self.count[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


class Made(TorchDispatchMode):
    """Sees the storage of every tensor that is made, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[StorageWeakRef, int]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in known:
                self.storages.append((StorageWeakRef(x.untyped_storage()), x.untyped_storage().nbytes()))
        return result


def model_of(
    architecture: str, mode: str = "none", every: int = 1, topology: Topology | None = None, **changes: Any
) -> nn.Module:
    """Four blocks; in a topology, this rank's slices of them."""
    dtype, topology, parts = changes.pop("dtype", torch.float32), topology or alone(), changes.pop("parts", PARTS)
    shape = {"vocab_size": 50, "hidden_size": 64, "num_layers": 4, "num_heads": 4, "ffn_size": 192, "max_seq_length": LENGTH}
    config = ModelConfig(architecture, init_std=0.1, **(shape | changes))
    with torch.device("meta"):
        model = build_model(config)
    apply_tensor_parallel(model, PLANS[architecture], topology)
    model.to_empty(device="cpu").to(dtype)
    for name, p in model.named_parameters():
        p.data.copy_(initial_value(name, tuple(p.shape), config, 3))
    for buffer in model.buffers():
        buffer.zero_()
    apply_recompute(model, mode, every, topology.tensor, parts)
    return model


def run(model: nn.Module, steps: int = 2) -> list[Tensor]:
    """Loss and all gradients of the last of some steps: the second uses what the first has learned."""
    tokens = torch.randint(50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        model.zero_grad()
        loss = model(tokens, None, torch.arange(BATCH)).float().square().mean()
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits(architecture: str, dtype: torch.dtype) -> None:
    changes = {"dropout": 0.1, "dtype": dtype, "num_kv_heads": 2 if architecture == "llama" else 4}
    plain = model_of(architecture, **changes)
    expected = run(plain)
    for mode, every in MODES:
        model = model_of(architecture, mode, every, **changes)
        assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
        for step, (a, b) in enumerate(zip(run(model), expected, strict=True)):
            assert torch.equal(a, b), (mode, every, step)


def kept_bytes(model: nn.Module, group: Group, layer: int = 1) -> int:
    """What one block's forward leaves in memory, its result included: the next block's input."""
    x = torch.randn(model.sequence_shape, dtype=next(model.parameters()).dtype).requires_grad_()
    positions, samples = torch.arange(LENGTH), torch.arange(BATCH)
    arguments = (x, model.rope(positions), positions, samples, None)
    model.layers[str(layer)](*arguments).float().sum().backward()  # selective learns what it need not keep
    with Made() as made:
        y = model.layers[str(layer)](*arguments)
        for _ in range(8 if group.size > 1 else 0):  # each of gloo's threads holds its last tensors until the next come
            all_reduce(torch.zeros(1), group)
    assert y.requires_grad
    return sum(nbytes for storage, nbytes in made.storages if not storage.expired())


def check_memory(
    architecture: str, dtype: torch.dtype, dropout: float, topology: Topology, triton: bool = False
) -> dict[str, float]:
    """Bytes per token and mode, each equal to the formula within 2%."""
    measured = {}
    for mode in ("none", "selective", "full"):
        model = model_of(architecture, mode, topology=topology, dtype=dtype, dropout=dropout)
        size, split = topology.tensor.size, topology.sequence_parallel
        model.sequence_shape = (BATCH, LENGTH // (size if split else 1), 64)  # type: ignore[assignment]
        measured[mode] = kept_bytes(model, topology.tensor) / (BATCH * LENGTH)
        counted = count_block_activations(model.config, mode, dtype.itemsize, size, split, triton=triton)
        if architecture == "llama" and mode == "none" and not triton:  # torch's RMSNorm on the CPU keeps more: it is several
            counted += 2 * 64 * 4 / (size if split else 1)
        assert measured[mode] == pytest.approx(counted, rel=0.02), (mode, measured, counted)
    return measured


@pytest.mark.parametrize(
    ("architecture", "dtype", "dropout"),
    [("llama", torch.float32, 0.0), ("gpt", torch.float32, 0.1), ("gpt", torch.bfloat16, 0.1)],
)
def test_memory_shrinks_as_counted(architecture: str, dtype: torch.dtype, dropout: float) -> None:
    measured = check_memory(architecture, dtype, dropout, alone())
    print(architecture, dtype, {mode: f"{measured[mode] / measured['none']:.2f}" for mode in measured})
    assert measured["selective"] < 0.65 * measured["none"]
    assert measured["full"] < 0.07 * measured["none"]


@pytest.mark.parametrize("architecture", ["llama", "gpt"])
def test_kernels_keep_what_is_counted(architecture: str, pretend_kernels: Callable[[], None]) -> None:
    pretend_kernels()
    check_memory(architecture, torch.float32, 0.0, alone(), triton=True)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_fused_projections_keep_what_is_counted(mode: str) -> None:
    model = model_of("llama", mode, num_kv_heads=2)
    model.sequence_shape = (BATCH, LENGTH, 64)  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, FusesProjections):
            module.fuse = True
    norms = 2 * 64 * 4 if mode == "none" else 0  # see check_memory
    counted = count_block_activations(model.config, mode, 4, fused=True) + norms
    assert kept_bytes(model, alone().tensor) / (BATCH * LENGTH) == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_attention_keeps_what_is_counted(
    implementation: str, dtype: torch.dtype, mode: str, pretend_kernels: Callable[[], None]
) -> None:
    """triton: the operator's plain body. Keys and values have fewer heads, so the reference makes copies of them."""
    pretend_kernels()
    changes = {"num_heads": 2, "num_kv_heads": 1, "dtype": dtype}
    model = model_of("llama", mode, **changes)
    model.sequence_shape = (BATCH, LENGTH, 64)  # type: ignore[assignment]
    with use(attention="reference") if implementation == "reference" else nullcontext():
        kept = kept_bytes(model, alone().tensor) / (BATCH * LENGTH)
    scores = LENGTH if implementation == "reference" else 0
    counted = count_block_activations(model.config, mode, dtype.itemsize, triton=True, scores=scores)
    assert kept == pytest.approx(counted, rel=0.02)


@pytest.mark.parametrize(("mode", "triton"), [("none", True), ("selective", True), ("selective", False)])
def test_experts_keep_what_is_counted(mode: str, triton: bool, pretend_kernels: Callable[[], None]) -> None:
    """Selective keeps the products that the kernel makes; torch's loop runs again. Not counted: 65 bytes per token of the way."""
    if triton:
        pretend_kernels()
    model = model_of("llama", mode, num_experts=4, expert_ffn_size=96)
    model.sequence_shape = (BATCH, LENGTH, 64)  # type: ignore[assignment]
    setting = Setting(4, BATCH * LENGTH, BATCH, triton=EVERYTHING | {"grouped_linear"} if triton else frozenset())
    counted = block_tape(model.config, setting, experts=True).profile(mode).kept  # type: ignore[arg-type]
    assert kept_bytes(model, alone().tensor) == pytest.approx(counted, rel=0.02, abs=65 * BATCH * LENGTH)


def test_selective_runs_no_attention_kernel_twice(pretend_kernels: Callable[[], None]) -> None:
    pretend_kernels()
    for mode, wanted in (("none", 1), ("selective", 1), ("full", 2)):
        model = model_of("llama", mode, num_heads=2)
        with Kernels() as seen:
            run(model, 1)
        assert seen.count["attention_forward"] == wanted * 4, mode  # blocks
        assert seen.count["attention_backward"] == 4


def test_only_every_nth_block() -> None:
    plain, some = model_of("gpt"), model_of("gpt", "full", 2)
    plain.sequence_shape = some.sequence_shape = (BATCH, LENGTH, 64)  # type: ignore[assignment]
    one = alone().tensor
    assert kept_bytes(some, one, 1) == kept_bytes(plain, one, 1) > 10 * kept_bytes(some, one, 2)


def test_selective_multiplies_no_matrix_twice() -> None:
    counts = {}
    for mode in ("none", "selective", "full"):
        with Count() as count:
            run(model_of("llama", mode))
        counts[mode] = count.products
    assert counts["selective"] == counts["none"]
    assert counts["full"] == counts["none"] + 2 * 4 * 7  # steps x blocks x (q k v, attention, out, gate, up; not down)


def test_a_part_alone_runs_again_and_what_it_keeps_is_not_kept() -> None:
    counts, kept = {}, {}
    for parts in ([], ["mlp"], ["attention"], ["norms"]):
        model = model_of("llama", "modules", parts=parts)
        model.sequence_shape = (BATCH, LENGTH, 64)  # type: ignore[assignment]
        with Count() as count:
            run(model, 1)
        name = "".join(parts)
        counts[name], kept[name] = count.products, kept_bytes(model, alone().tensor) / (BATCH * LENGTH * 4)
    blocks = 4
    assert counts == {"": counts[""], "mlp": counts[""] + 2 * blocks, "attention": counts[""] + 4 * blocks, "norms": counts[""]}
    assert kept["mlp"] == pytest.approx(kept[""] - 4 * 192, rel=0.02)  # gate, up, silu of gate, their product: torch's swiglu
    assert kept["norms"] < kept[""] - 2 * 64 and kept["attention"] < kept[""] - 4 * 64


class InPlace(nn.Module):
    """A block that changes a matrix product after it is made."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x).add_(1.0).relu()


def test_a_kept_result_must_not_change() -> None:
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": InPlace()})
    apply_recompute(model, "selective", 1, alone().tensor)
    with pytest.raises(AssertionError, match="changes a result that is kept"):
        model.layers["0"](torch.ones(2, 8, requires_grad=True))


class NoRows(nn.Module):
    """A block with a product that has no rows, as experts without tokens have, and an operator that writes into nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        none = self.up(x[:0])
        torch.zeros(0).add_(1.0)
        return x * 2 + none.sum()


def test_results_without_rows_have_no_memory_that_could_change() -> None:
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": NoRows()})
    apply_recompute(model, "selective", 1, alone().tensor)
    model.layers["0"](torch.ones(2, 8, requires_grad=True)).sum().backward()
    assert (model.layers["0"].up.weight.grad == 0).all()


# --- several ranks ----------------------------------------------------------------------------------------------------


def _layouts(rank: int, size: int, cases: list[tuple[str, str, str]]) -> list[str]:
    """Short runs with and without recomputation; what differs."""
    faults = []
    for layout, architecture, precision in cases:
        values = dataclasses.asdict(with_layout(tiny_config(), layout).parallel)
        results = []
        for mode, every in [("none", 1), *MODES[:4]]:
            config = tiny_config(architecture, layers=4, batch=4, precision=precision, **values)
            config.train.recompute, config.train.recompute_every, config.train.recompute_modules = mode, every, PARTS
            trained = train(config, steps=2)
            results.append((trained.losses, trained.norms, trained.weights()))
            same = all(torch.equal(value, results[0][2][name]) for name, value in results[-1][2].items())
            if results[-1][:2] != results[0][:2] or not same:
                faults.append(f"{layout} {architecture} {mode} {every}: {results[-1][:2]} != {results[0][:2]}")
    return faults


@pytest.mark.dist
def test_the_same_bits_with_queues_and_split_backwards() -> None:
    faults = run_distributed(_layouts, 2, [("tp2_sp", "llama", "fp32"), ("tp2", "gpt", "bf16"), ("pp2_zbv", "gpt", "fp32")])
    assert faults == [[], []]


@pytest.mark.dist
def test_the_same_bits_under_zero() -> None:
    faults = run_distributed(_layouts, 2, [("dp2_zero3", "llama", "fp32"), ("dp2_zero3_microbatch", "gpt", "bf16")])
    assert faults == [[], []]


def _tensor_parallel(rank: int, size: int) -> list[dict[str, tuple[int, int]]]:
    """Memory against the formula, and how many products and collectives a step runs, with and without sequence parallel."""
    counts = []
    for layout in ("tp2", "tp2_sp"):
        topology = build_topology(with_layout(tiny_config(), layout).parallel, torch.device("cpu"))
        check_memory("llama", torch.float32, 0.0, topology)
        check_memory("gpt", torch.bfloat16, 0.1, topology)
        counts.append({})
        for mode in ("none", "selective", "full"):
            with Count() as count:
                run(model_of("llama", mode, topology=topology), steps=1)
            counts[-1][mode] = count.products, count.collectives
    return counts


@pytest.mark.dist
def test_selective_repeats_no_collective_and_keeps_no_part_of_a_sum() -> None:
    for counts in run_distributed(_tensor_parallel, 2)[0]:
        assert counts["selective"] == counts["none"] < counts["full"]
