"""The benchmark of attention: its sizes and FLOPs are right, and every peer is called so that it computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from megalm_kernels import flash_attention_reference
from megalm_kernels.attention import hopper
from megalm_kernels.attention.call import ALL, Call, visible
from megalm_kernels.benchmarks import attention
from megalm_kernels.benchmarks.attention import Problem, cases, read_shape
from megalm_kernels.benchmarks.harness import Absent, Function
from megalm_kernels.benchmarks.report import is_ours

CPU = torch.device("cpu")
DENSE = Problem((24, 24), 4, 4, 32, True)
GROUPED = Problem((24, 24), 4, 2, 32, False)
PACKED = Problem((5, 1, 18), 4, 2, 32, True, packed=True)


def near(function: Function, problem: Problem) -> bool:
    """Whether it computes what the reference does, fp64 and bf16 apart by bf16's rounding."""
    torch.manual_seed(0)
    q, k, v, *starts = problem.make(CPU)
    wanted = flash_attention_reference(q.double(), k.double(), v.double(), **problem.options(starts))
    return torch.allclose(function(q, k, v, *starts).double(), wanted, atol=2e-2, rtol=0)


def test_the_full_sizes():
    found = [case for case in cases("full") if case.operation == "attention"]
    shapes = [(case.shape, read_shape(case.shape)) for case in found]
    plain = [numbers for _, numbers in shapes if numbers]
    lengths = [512, 1024, 2048, 4096, 8192, 16384, 32768]
    wanted = [(d, causal, n) for d in (64, 128) for causal in (True, False) for n in lengths]
    assert [(x["head_dim"], x["causal"], x["seq_length"]) for x in plain] == wanted
    assert {shape.split(" x ")[2] for shape, numbers in shapes if numbers is None} == {"32/4", "16/2"}, "8 queries share a key"
    assert read_shape("16384 in 12 x 16 x 128 causal") is None
    assert all(case.bound == "flops" and case.size and case.group for case in found)
    for case in cases("full"):
        batch, length = (1, 16384) if "in" in case.shape else map(int, case.shape.split(" x ")[:2])
        assert batch * length == max(16384, length)


@pytest.mark.parametrize("problem", [DENSE, GROUPED, PACKED])
def test_flops_are_those_of_the_pairs_that_see_each_other(problem: Problem):
    call = Call(ALL, 0 if problem.causal else ALL, 1.0)
    pairs = sum(int(visible(n, n, call, CPU).sum()) for n in problem.lengths)
    diagonal = sum(problem.lengths) if problem.causal else 0  # of which half are counted
    assert problem.flops() == 4 * problem.heads * problem.channels * (pairs - diagonal / 2)
    case = attention._case("attention", problem)
    assert case.backward is not None and case.backward.flops == 2.5 * case.forward.flops


@pytest.mark.parametrize("problem", [DENSE, GROUPED, PACKED])
def test_the_exact_result_in_parts_is_the_whole_one(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attention, "_EXACT_SCORES", 1000)
    case = attention._case("attention", problem)
    found, wanted = [], []
    for function, results in ((case.exact, found), (flash_attention_reference, wanted)):
        q, k, v, *starts = case.inputs(CPU, exact=True)
        y = function(q, k, v, *starts) if function is case.exact else function(q, k, v, **problem.options(starts))
        results += [y, *torch.autograd.grad(y, (q, k, v), torch.ones_like(y))]
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y)


def test_ours_and_its_variants(monkeypatch: pytest.MonkeyPatch):
    """What each provider asks the public function for, and what it leaves behind."""
    asked = []

    def public(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        asked.append((options.get("deterministic", True), hopper._wanted))
        return flash_attention_reference(q, k, v, causal=options["causal"])

    monkeypatch.setattr(attention, "flash_attention", public)
    providers = [provider for provider in attention._providers(DENSE) if is_ours(provider.name)]
    assert [provider.name for provider in providers] == ["triton", "triton unordered", "triton plain"]
    for provider in providers:
        assert provider.choice == {"attention": "triton"} and near(provider.load(), DENSE)
    assert asked == [(True, True), (False, True), (True, False)] and hopper._wanted
    assert "triton plain" not in [provider.name for provider in attention._providers(PACKED)]


@pytest.mark.parametrize("problem", [DENSE, GROUPED])
def test_torch_is_held_to_one_of_its_own(problem: Problem):
    assert near(attention._sdpa(SDPBackend.FLASH_ATTENTION, problem), problem)
    q, k, v = problem.make(CPU)
    with pytest.raises(Absent, match=f"cudnn_attention of .* does not take {problem.group}"):
        attention._sdpa(SDPBackend.CUDNN_ATTENTION, problem)(q, k, v)
    with pytest.raises(Absent, match="has no packed sequences"):
        attention._sdpa(SDPBackend.CUDNN_ATTENTION, PACKED)


@pytest.mark.parametrize("problem", [DENSE, GROUPED, PACKED])
def test_flex_attention(problem: Problem, monkeypatch: pytest.MonkeyPatch):
    """Eagerly: compiling it needs a minute."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert near(attention._flex(problem), problem)


def packed_like(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, most_q: int, most_k: int, **mask: Any
) -> Tensor:
    """How FlashAttention's and torch's functions for packed sequences are called."""
    assert most_q == most_k == 18
    ((name, value),) = mask.items()
    causal = value == (-1, 0) if name == "window_size" else value
    return flash_attention_reference(q, k, v, causal=causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)


@pytest.mark.parametrize("with_lse", [True, False])
def test_flash_attn(with_lse: bool, monkeypatch: pytest.MonkeyPatch):
    def found(module: str, name: str) -> Callable[..., Any]:
        assert module == "flash_attn"
        function = packed_like if name == "flash_attn_varlen_func" else flash_attention_reference
        return lambda *args, **options: (function(*args, **options), "lse") if with_lse else function(*args, **options)

    monkeypatch.setattr(attention, "find", found)
    for problem in (DENSE, GROUPED, PACKED):
        assert near(attention._flash_attn("flash_attn", problem), problem)


def test_torch_has_packed_sequences_under_two_signatures(monkeypatch: pytest.MonkeyPatch):
    def older(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
        return packed_like(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=is_causal)

    def newer(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa
        return packed_like(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, window_size=window_size)

    for function in (older, newer):
        monkeypatch.setattr(attention, "find", lambda module, name, function=function: function)
        assert near(attention._varlen(PACKED), PACKED)

    def missing(module: str, name: str) -> Any:
        raise ImportError

    monkeypatch.setattr(attention, "find", missing)
    with pytest.raises(Absent, match="has no varlen_attn"):
        attention._varlen(PACKED)
