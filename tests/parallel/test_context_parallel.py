"""Attention over ranks that share the tokens of a sample: it gives what one rank gives, to the bit each time, in less memory."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megalm.data.documents import Documents, build_documents
from megalm.models.attention import Attend, CausalAttention
from megalm.parallel import ring
from megalm.parallel.context_parallel import apply_context_parallel, local_tokens
from megalm.parallel.ring import RingAttention
from megalm.parallel.topology import Group, tensor_topology
from megalm.testing import run_distributed

SEQ_LENGTH, HEAD_DIM = 48, 16
STARTS = ((0, 5, 6, 30), (0, 24, 40))  # across chunks and ranks, of one token, at a border of chunks
HEADS = {"8 heads": (8, 8), "grouped": (8, 4), "shared": (8, 2)}  # two of four ranks share a key head
MASKS: dict[str, tuple[int, Any]] = {"causal": (0, ()), "window": (9, ()), "documents": (0, STARTS), "both": (7, STARTS)}
ALL = itertools.product(("ring", "ulysses"), ("fp32", "bf16"), HEADS, MASKS)
CASES = [case for case in ALL if case[1] == "fp32" or case[2] == "grouped"]
TOLERANCE = {"fp32": 1e-6, "bf16": 8e-3}  # one rank's bf16 is 5e-3 from the exact gradients
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Layer(nn.Module):
    """As much of a model as context parallelism looks at."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.attend: Attend = CausalAttention(window, 0.3)


def inputs(heads: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, and the gradient of the result, of two whole samples."""
    generator = torch.Generator().manual_seed(3)
    numbers = (heads[0], heads[1], heads[1], heads[0])
    return [torch.randn(2, SEQ_LENGTH, number, HEAD_DIM, generator=generator).to(dtype) for number in numbers]


def run(attend: Any, tensors: list[Tensor], documents: Documents | None) -> list[Tensor]:
    """Result and gradients of q, k and v."""
    *leaves, dout = (x.clone().requires_grad_(i < 3) for i, x in enumerate(tensors))
    out = attend(*leaves, documents)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def context_group(rank: int, size: int) -> Group:
    return Group(tuple(range(size)), rank, dist.group.WORLD)


def compare(rank: int, size: int, cases: list[tuple[str, str, str, str]]) -> dict[tuple[str, ...], dict[str, float]]:
    """By case: how far this rank's results and gradients are from those of one rank that has everything."""
    group = context_group(rank, size)
    found: dict[tuple[str, ...], dict[str, float]] = {}
    for method, precision, heads, mask in cases:
        window, starts = MASKS[mask]
        tensors, places = inputs(HEADS[heads], DTYPES[precision]), local_tokens(method, size, rank, SEQ_LENGTH)
        documents = build_documents(starts, SEQ_LENGTH, places.numpy()) if starts else None
        layer = Layer(window)
        # In bf16 too what is wanted is the exact result, from which one rank is as far.
        want = run(layer.attend, [x.float() for x in tensors], documents)
        alone = tensor_topology(Group((rank,), 0), torch.device("cpu"))
        apply_context_parallel(layer, dataclasses.replace(alone, context=group), method)
        parts = [x[:, places] for x in tensors]
        got = run(layer.attend, parts, documents)
        again = run(layer.attend, parts, documents)
        errors = {name: relative(a, b[:, places]) for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True)}
        repeats = all(torch.equal(a, b) and a.dtype == DTYPES[precision] for a, b in zip(got, again, strict=True))
        found[method, precision, heads, mask] = {**errors, "repeats": float(repeats)}
    return found


@pytest.fixture(scope="module")
def by_rank() -> dict[int, list[dict]]:
    """All cases on two ranks; on four, where ranks share heads and chunks have neighbours on both sides, those in fp32."""
    four = [case for case in CASES if case[1] == "fp32" and case[2] != "8 heads"]
    return {size: run_distributed(compare, size, cases) for size, cases in ((2, CASES), (4, four))}


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_parts_are_the_whole(by_rank: dict[int, list[dict]], case: tuple[str, ...]) -> None:
    for found in (ranks[case] for results in by_rank.values() for ranks in results if case in ranks):
        assert found["repeats"], "another result the second time"
        assert max(found[name] for name in ("out", "dq", "dk", "dv")) <= TOLERANCE[case[1]], found


LONG = 4096  # tokens, of which the ring's chunks on two ranks have a quarter each


class Watch(TorchDispatchMode):
    """Elements of the largest tensor that an operator gives, in the backward too; and of which types sums are that grow."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.sums = 0, set[torch.dtype]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else (found,):
            self.largest = max(self.largest, x.numel() if isinstance(x, Tensor) else 0)
        if func in (torch.ops.aten.add_.Tensor, torch.ops.aten.lerp_.Tensor):
            self.sums.add(args[0].dtype)
        return found


def watch_ring(rank: int, size: int) -> tuple[list[str], list[str], int, set[torch.dtype]]:
    """What happens in a forward and in a backward, in order; the largest tensor of long sequences under every mask; what type
    the sums of a bf16 ring are."""
    group, happened = context_group(rank, size), list[str]()

    def note(name: str, function: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if happened[-1:] != [name]:  # a wait has two works
                happened.append(name)
            return function(*args, **kwargs)

        return noted

    class Noted:
        def __init__(self, work: Any) -> None:
            self.wait = note("wait", work.wait)

    post = dist.batch_isend_irecv
    dist.batch_isend_irecv = note("post", lambda ops: [Noted(work) for work in post(ops)])
    ring.attention_part = note("compute", ring.attention_part)
    ring.attention_part_backward = note("compute", ring.attention_part_backward)
    q, k, v, dout = (x[:, : SEQ_LENGTH // size] for x in inputs((8, 4), torch.float32))
    out = RingAttention(group)(q.requires_grad_(), k, v)
    forward, happened[:] = list(happened), []
    out.backward(dout)
    backward, largest = list(happened), 0
    for window, starts in ((0, ()), (100, ()), (100, ((0, 10, 1500),)), (0, ((0, 1500),))):
        places = local_tokens("ring", size, rank, LONG)
        documents = build_documents(starts, LONG, places.numpy()) if starts else None
        q = torch.ones(1, LONG // size, 2, 8, requires_grad=True)
        with Watch() as watch:
            RingAttention(group, window)(q, q, q, documents).sum().backward()
        largest = max(largest, watch.largest)
    q, k, v, dout = (x[:, : SEQ_LENGTH // size].requires_grad_(i < 3) for i, x in enumerate(inputs((8, 4), torch.bfloat16)))
    with Watch() as watch:
        RingAttention(group)(q, k, v).backward(dout)
    return forward, backward, largest, watch.sums


@pytest.mark.dist
def test_a_ring_exchanges_while_it_computes_and_has_no_square_matrix() -> None:
    """The next keys are on their way before a block is computed; the gradients' sums, in fp32, while the next block is."""
    for forward, backward, largest, sums in run_distributed(watch_ring, 2):
        assert forward == ["post", "compute", "wait", "compute"]
        assert backward == ["post", "compute", "post", "wait", "compute", "wait", "post", "wait"]
        assert largest < (LONG // 4) ** 2 // 8
        assert sums == {torch.float32}


def test_a_group_of_one_changes_nothing() -> None:
    layer = Layer(5)
    attend = layer.attend
    for method in ("ring", "ulysses"):
        apply_context_parallel(layer, tensor_topology(Group((0,), 0), torch.device("cpu")), method)
        assert layer.attend is attend
