"""What DeepSpeed does that ZeroEngine relies on or works around, one test per fact.

Each test states DeepSpeed's behaviour, not ours. When one goes red after a new release, read the line of zero.py that
the test's docstring names: the work-around may be wrong now, or no longer needed. All facts are looked at in one start of
two processes; each probe leaves what it saw, and the tests judge.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalm.parallel.topology import Topology
from megalm.parallel.zero import ZeroEngine
from megalm.parallel.zero_config import ModelParallelUnit, import_deepspeed
from tests.parallel.deepspeed_probes import BF16, FP32, build, initialize, look, norm_of, probe, raised
from tests.parallel.tiny import LR, Toy, toy_losses

pytestmark = pytest.mark.dist

@pytest.fixture(scope="module")
def seen() -> Callable[[str], list]:
    return look(__name__)


@probe
def typo(topology: Topology) -> list:
    engine = initialize(topology, 1, gradient_cliping=0.5, zero_optimisation={"stage": 3}, gradient_clipping=None)
    return [engine.gradient_clipping(), int(engine.zero_optimization_stage())]


def test_a_typo_in_the_config_is_swallowed(seen):
    """deepspeed_config: made from typed settings only, and complete: without the right key the clipping is 1."""
    assert seen("typo") == [[1.0, 1]] * 2


@probe
def linear(topology: Topology) -> list[bool]:
    original, replaced = F.linear, []
    for changes in ({}, {"memory_efficient_linear": True}):
        initialize(topology, 3, zero=changes)
        replaced.append(F.linear is not original)
        F.linear = original
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return [*replaced, DeepSpeedZeroConfig(stage=3).memory_efficient_linear]


def test_memory_efficient_linear_replaces_torchs_in_the_whole_process_by_default(seen):
    """deepspeed_config: memory_efficient_linear."""
    assert seen("linear") == [[False, True, True]] * 2


@probe
def communication(topology: Topology) -> list[str]:
    engines = initialize(topology, 2, BF16), initialize(topology, 2, BF16, communication_data_type=None)
    return [str(engine.communication_data_type) for engine in engines]


def test_bf16_gradients_are_sent_in_bf16_by_default(seen):
    """deepspeed_config: communication_data_type."""
    assert seen("communication") == [["torch.float32", "torch.bfloat16"]] * 2


@probe
def wrappers(topology: Topology) -> list[str]:
    with_default_accumulation = initialize(topology, 1, BF16, data_types=None)
    engines = [initialize(topology, stage, dtype) for stage in (1, 2, 3) for dtype in (FP32, BF16)]
    return [type(engine.optimizer).__name__ for engine in (*engines, with_default_accumulation)]


def test_bf16_zero1_with_fp32_accumulation_selects_another_optimizer(seen):
    """ZeroEngine.aliased."""
    plain, third = "DeepSpeedZeroOptimizer", "DeepSpeedZeroOptimizer_Stage3"
    assert seen("wrappers") == [[plain, "BF16_Optimizer", plain, plain, third, third, plain]] * 2


@probe
def untested(topology: Topology) -> str:
    return raised(lambda: initialize(topology, 1, zero_allow_untested_optimizer=None))


def test_an_optimizer_of_our_own_needs_permission(seen):
    """deepspeed_config: zero_allow_untested_optimizer."""
    assert seen("untested") == ["AssertionError"] * 2


@probe
def stage_zero(topology: Topology) -> list:
    steps = []
    original = torch.optim.AdamW.step

    def counted(self: Any, closure: Any = None) -> Any:
        steps.append(1)
        return original(self, closure)

    torch.optim.AdamW.step = counted  # type: ignore[method-assign, assignment]
    try:
        deepspeed, model = import_deepspeed(), Toy().to(BF16)
        config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
        deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=ModelParallelUnit(topology))
    finally:
        torch.optim.AdamW.step = original  # type: ignore[method-assign]
    return [len(steps), raised(lambda: initialize(topology, 0, BF16))]


def test_stage_0_steps_at_construction_and_cannot_accumulate_in_fp32(seen):
    """engine.PlainEngine: why zero=0 is not DeepSpeed's: a step with zero gradients decays the weights once too often."""
    assert seen("stage_zero") == [[1, "NotImplementedError"]] * 2


@probe
def shared_memory(topology: Topology) -> list:
    deepspeed = import_deepspeed()
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    return ["deepspeed_shm_comm" in ALL_OPS, deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"], build_shm_op()]


def test_the_shared_memory_op_is_known_by_its_name_and_skipped(seen):
    """import_deepspeed: under another name it would be compiled for 70 s at the first start."""
    assert seen("shared_memory") == [[True, False, None]] * 2


@probe
def said(topology: Topology) -> list[str]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for stage, dtype in ((1, BF16), (2, FP32), (3, BF16)):
            build(topology, stage, dtype)
    return out.getvalue().splitlines()


def test_engines_are_built_in_silence(seen):
    """import_deepspeed: the bf16 optimizer prints the memory in use a dozen times."""
    assert seen("said") == [[], []]


@probe
def gradient_type(topology: Topology) -> list:
    sums = []
    for wanted in (FP32, None):
        weight = nn.Parameter(torch.ones((), dtype=BF16))
        if wanted is not None:
            weight.grad_dtype = wanted
        for _ in range(300):
            (weight * 1.0).backward()
        sums += [str(weight.grad.dtype), weight.grad.item()]
    return sums


def test_grad_dtype_makes_torch_accumulate_in_fp32(seen):
    """ZeroEngine.__init__: parameter.grad_dtype."""
    assert seen("gradient_type") == [["torch.float32", 300.0, "torch.bfloat16", 256.0]] * 2


@probe
def accumulation(topology: Topology) -> list[float]:
    gradients = []
    for count in (1, 2):
        engine = initialize(topology, 1, gradient_accumulation_steps=count)
        x = torch.ones(1, 5, requires_grad=True)
        engine(x).backward(torch.ones(1, 3))
        gradients.append(x.grad.clone())
    return [(gradients[0] / gradients[1]).mean().item()]


def test_output_hooks_divide_the_incoming_gradient_by_the_accumulation_steps(seen):
    """deepspeed_config: gradient_accumulation_steps is 1; the loss is scaled by us, once, not at every stage."""
    assert seen("accumulation") == [[2.0]] * 2


@probe
def coalesced(topology: Topology) -> dict:
    """Gradient of second.bias: rank r back-propagates (r + 1) three times, so 3 and 6 locally, 4.5 on average."""
    found = {}
    for stage in (1, 2, 3):
        engine = build(topology, stage)
        with engine.deepspeed.coalesce_grad_reduction():
            for _ in range(3):
                (engine.toy(torch.ones(1, 5)).sum() * (topology.data.rank + 1)).backward()
            local = engine.toy.second.bias.grad.tolist()
            engine.optimizer.backward_epilogue()
        from deepspeed.utils import safe_get_full_grad

        reduced = safe_get_full_grad(engine.toy.second.bias)
        found[stage] = [local, reduced.tolist(), engine.toy.second.bias.grad is None]
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_coalescing_leaves_local_sums_and_averages_once_at_the_end(seen, stage):
    """ZeroEngine.accumulate, and scale_loss, which turns the average back into a sum."""
    for rank, found in enumerate(seen("coalesced")):
        assert found[stage] == [[3.0 * (rank + 1)] * 3, [4.5] * 3, True]


@probe
def refused(topology: Topology) -> str:
    engine = initialize(topology, 1, BF16)
    return raised(lambda: engine.coalesce_grad_reduction().__enter__())


def test_the_bf16_optimizer_cannot_coalesce(seen):
    """ZeroEngine.accumulate: why bf16 ZeRO-1 goes another way."""
    assert seen("refused") == ["NotImplementedError"] * 2


@probe
def flushed_after_an_error(topology: Topology) -> list:
    engine, flushed = build(topology, 1), []
    original = engine.deepspeed._flush_coalesced_reduction_zero12
    engine.deepspeed._flush_coalesced_reduction_zero12 = lambda optimizer: (flushed.append(1), original(optimizer))
    with contextlib.suppress(ZeroDivisionError), engine.accumulate():
        next(toy_losses(engine.toy, 0, FP32)).backward()
        raise ZeroDivisionError
    return flushed


def test_an_error_inside_the_scope_still_runs_the_collective_flush(seen):
    """Why a process group has a timeout: the other ranks may not come."""
    assert seen("flushed_after_an_error") == [[1]] * 2


@probe
def bf16_stage_2(topology: Topology) -> list:
    engine = initialize(topology, 2, BF16)
    return [engine.optimizer.use_grad_accum_attribute, build(topology, 2, BF16).optimizer.use_grad_accum_attribute]


def test_bf16_zero2_does_not_use_the_fp32_attribute_by_itself(seen):
    """ZeroEngine.__init__: use_grad_accum_attribute."""
    assert seen("bf16_stage_2") == [[False, True]] * 2


@probe
def root_forward(topology: Topology) -> list[int]:
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    counts = []
    original = coordinator.assert_ints_same_as_other_ranks
    for whole in (False, True):
        engine, calls = initialize(topology, 3), list[int]()
        coordinator.assert_ints_same_as_other_ranks = lambda ints, calls=calls: calls.append(1)
        with torch.no_grad():
            for _ in range(2):
                if whole:
                    engine(torch.ones(1, 5))
                else:
                    engine.module.second(engine.module.norm(engine.module.first(torch.ones(1, 5))))
        counts.append(len(calls))
    coordinator.assert_ints_same_as_other_ranks = original
    return [counts[0], min(counts[1], 1)]


def test_zero3_talks_to_the_whole_world_in_the_roots_forward_only(seen):
    """ZeroEngine: chunks are called, never the root, or pipeline stages would wait for each other for ever."""
    assert seen("root_forward") == [[0, 1]] * 2


def state_is_linked(engine: ZeroEngine, name: str) -> bool:
    from deepspeed.utils import safe_get_full_optimizer_state

    try:
        return safe_get_full_optimizer_state(engine.parameters[name], "exp_avg") is not None
    except Exception:
        return False


@probe
def linked(topology: Topology) -> list:
    engine = build(topology, 1)
    names = [next(iter(group.parameters)) for group in engine.groups]
    norm_of(engine)
    first = [state_is_linked(engine, name) for name in names]
    engine._link_moments()
    return [first, [state_is_linked(engine, name) for name in names]]


def test_moments_are_linked_after_the_first_groups_step_only(seen):
    """ZeroEngine._link_moments."""
    assert seen("linked") == [[[True, False], [True, True]]] * 2


@probe
def padding(topology: Topology) -> str:
    from deepspeed.utils import safe_set_full_fp32_param

    engine = build(topology, 3)
    return raised(lambda: safe_set_full_fp32_param(engine.parameters["first.bias"], torch.ones(7)))


def test_zero3s_full_setter_cuts_without_the_padding(seen):
    """ZeroEngine._write_partition: 7 elements on 2 ranks are 4 and 4; the last rank has only 3 to take."""
    assert seen("padding") == ["nothing", "RuntimeError"]


@probe
def shapes(topology: Topology) -> list:
    parameter = build(topology, 3).parameters["first.weight"]
    return [tuple(parameter.shape), parameter.dim(), tuple(parameter.ds_shape)]


def test_zero3_empties_shapes(seen):
    """Engine.shapes, optim.groups: every matrix looks like a vector once an engine holds it."""
    assert seen("shapes") == [[(0,), 1, (7, 5)]] * 2


@probe
def per_group_steps(topology: Topology) -> list:
    engine, sizes = build(topology, 1), []
    inner = engine.optimizer.optimizer
    original = inner.step

    def counted() -> None:
        sizes.append([len(inner.param_groups), len(inner.param_groups[0]["params"]), inner.param_groups[0]["params"][0].dim()])
        original()

    inner.step = counted
    norm_of(engine)
    return sizes


def test_the_optimizer_is_stepped_once_per_group_with_one_flat_parameter(seen):
    """optim.adam: nothing may be counted on the optimizer itself."""
    assert seen("per_group_steps") == [[[1, 1, 1], [1, 1, 1]]] * 2


class Chunks(nn.Module):
    """Two chunks behind one root."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False)])

    def forward(self, x: Tensor, chunk: int) -> Tensor:
        return self.parts[chunk](x)


@probe
def stale(topology: Topology) -> list[float]:
    """Two chunks that reduce per microbatch, the way we do not take: the same data and weights twice (lr 0)."""
    engine, norms = initialize(topology, 3, model=Chunks(), managed_gradient_accumulation=False), []
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    with without_record_stream():
        for _ in range(2):
            for chunk in (0, 1):
                out = engine(torch.ones(1, 3), chunk)
                engine.optimizer.clear_backward_seen_flag()
                engine.backward(out.sum())
            engine.step()
            norms.append(float(engine.get_global_grad_norm()))
    return norms


@contextlib.contextmanager
def without_record_stream() -> Iterator[None]:
    """DeepSpeed calls it on CPU tensors too, where torch refuses."""
    original = Tensor.record_stream
    Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Tensor.record_stream = original  # type: ignore[method-assign]


def test_zero3_per_microbatch_adds_into_the_last_steps_shard(seen):
    """ZeroEngine.accumulate: why one flush per step, not DeepSpeed's hooks."""
    for first, second in seen("stale"):
        assert first == pytest.approx(6**0.5)  # six gradients of 1
        assert second == pytest.approx(15**0.5)  # the second chunk's three were added to the first step's: 3 * 1 + 3 * 2^2
